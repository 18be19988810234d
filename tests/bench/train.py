"""Training speed and memory: SFT beside transformers, DPO beside the way of TRL 0.8.6; in turns.

    python -m tests.bench.train [--quick] [--repeats N] [--threads N] [--size small]
    python -m tests.bench.train --vocabulary DIR --problems gsm8k/train.jsonl
    python -m tests.bench.train --bf16                       # autocast on both sides
    python -m tests.bench.train --device cuda --size base    # bf16 autocast, batches of 96
    python -m tests.bench.train --memory small base large    # peak memory of SFT by size
    python -m tests.bench.train --scale                      # two processes against one

Without files: the vocabulary of data/tiny and synthetic problems. With them: Flan-T5's spiece.model
and GSM8K's train.jsonl. Weights are random, for speed does not depend on them; dropout is off, so
that losses can be compared step by step.

Every system sits in a process of its own, whose peak of memory is its own, too. Figures are
medians; in brackets stand the smallest and the largest ratio of two neighbouring turns.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from data.problems import Problem, load_problems
from data.synthetic import make_problems
from decode import generate
from dpo import PairExample, PreferencePair, make_pair_examples, train_dpo
from model import SIZES, T5, load_flan_t5, save_flan_t5
from run import parse_args
from sft import (
    IGNORE,
    Example,
    Schedule,
    batches,
    learning_rate,
    make_examples,
    rank_and_count,
    share_work,
    start_processes,
    train_sft,
)
from tests.bench.decode import TINY, in_new_process, load_peer, resident, spread, take_turns
from tokenizer import Tokenizer, format_rationale, pad_batch

BETA = 0.1


def make_schedule(task: str, bf16: bool, device: str) -> Schedule:
    """The numbers of a run, but for smaller batches on a CPU and a line for every step."""
    config = parse_args(["--size", "small", "--device", device])
    on_gpu = device == "cuda"
    return Schedule(
        learning_rate=config.sft_learning_rate if task == "SFT" else config.dpo_learning_rate,
        batch_size=96 if on_gpu else 12,
        warmup_ratio=config.warmup_ratio,
        final_ratio=config.final_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        micro_batch_tokens=2**14 if on_gpu else config.micro_batch_tokens,
        bf16=bf16,
        log_every=1,
        seed=config.seed,
    )


# ---------------------------------------------------------------------------------------- the peers


def peer_sft_loss(model, examples: list[Example]) -> Tensor:
    """transformers' own loss: the mean over the target tokens."""
    input_ids, mask = pad_batch([example.input_ids for example in examples], model.device)
    labels, _ = pad_batch([example.labels for example in examples], model.device, IGNORE)
    return model(input_ids, attention_mask=mask, labels=labels, use_cache=False).loss


def concatenated_logps(model, pairs: list[PairExample]) -> tuple[Tensor, Tensor]:
    """TRL's way: chosen and rejected in one batch of twice the rows, the question of each encoded."""
    input_ids, mask = pad_batch([pair.input_ids for pair in pairs] * 2, model.device)
    rationales = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    labels, _ = pad_batch(rationales, model.device, IGNORE)
    logits = model(input_ids, attention_mask=mask, labels=labels, use_cache=False).logits
    targets = labels.clamp(min=0)[..., None]  # (2B, T, 1)
    logps = logits.log_softmax(-1).gather(2, targets)[..., 0]
    return (logps * (labels != IGNORE)).sum(-1).chunk(2)


def peer_dpo_loss(policy, reference, pairs: list[PairExample]) -> Tensor:
    """The sigmoid loss, with the reference's probabilities computed at every step."""
    chosen, rejected = concatenated_logps(policy, pairs)
    with torch.no_grad():
        reference_chosen, reference_rejected = concatenated_logps(reference, pairs)
    margins = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -F.logsigmoid(BETA * margins).mean()


def peer_train(model, items: list, schedule: Schedule, loss_of: Callable) -> list[float]:
    """The usual loop, an epoch: shuffled batches, padded to the longest, AdamW; losses by step.

    AdamW is fused, as transformers' Trainer has it by default since torch 2.8.
    """
    n_steps = math.ceil(len(items) / schedule.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=schedule.weight_decay, fused=True
    )
    source = batches(items, schedule.batch_size, schedule.seed)
    losses = []
    for step in range(n_steps):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=schedule.bf16):
            loss = loss_of(next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps, schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
