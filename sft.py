"""Supervised fine-tuning (paper, eq. 2), and the training loop, which dpo.py uses too.

Left out: generation, preferences, early stopping, fp16 (T5 overflows in it), and restarts inside a
training: a run that was stopped begins its last stage again (selftrain.py). What the project knows
of several processes stands at the end of this file.

    python sft.py        # one example worked by hand
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import T5, load_flan_t5, shift_right
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

IGNORE = -100  # label of a position that has no target


@dataclass(frozen=True)
class Schedule:
    """How to train. The numbers, with their sources, are the flags of run.py."""

    learning_rate: float  # the peak, per optimiser step
    batch_size: int  # examples (SFT) or pairs (DPO) per optimiser step, over all processes
    warmup_ratio: float  # part of the steps spent going up
    final_ratio: float  # the cosine ends at this part of the peak
    weight_decay: float
    max_grad_norm: float
    micro_batch_tokens: int  # per forward pass; bounds the memory
    bf16: bool  # compute in bf16, with weights and moments in fp32
    log_every: int  # optimiser steps between two logged lines
    seed: int  # of the data's order and of dropout


@dataclass(frozen=True)
class Example:
    """One training text as ids: the question and the rationale, both ending in EOS."""

    input_ids: list[int]
    labels: list[int]

    @property
    def weight(self) -> int:  # eq. 2 is a mean over target tokens
        return len(self.labels)

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.labels)


def make_examples(problems: Sequence, tokenizer: Tokenizer) -> list[Example]:
    """Encode problems that have a `question` and a formatted `rationale`."""
    examples = []
    for problem in problems:
        input_ids = tokenizer.encode(problem.question, MAX_QUESTION)
        labels = tokenizer.encode(problem.rationale, MAX_RATIONALE)
        examples.append(Example(input_ids, labels))
    return examples


def token_logps(model: T5, states: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every target token: states (B, S, D), labels (B, T) -> (B, T) fp32.

    Ignored positions give 0. The vocabulary's logits, the largest tensor of all, are only computed
    for the N real tokens.
    """
    real = labels != IGNORE  # (B, T)
    hidden = model.decode(shift_right(labels), states, attention_mask)  # (B, T, D)
    logits = model.lm_head(hidden[real]).float()  # (N, V)
    logps = torch.zeros(labels.shape, device=labels.device)
    logps[real] = -F.cross_entropy(logits, labels[real], reduction="none")
    return logps


def sft_loss(model: T5, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The sum in eq. 2: the negative log-likelihood of the rationales' tokens.

    `train` divides it by the number of tokens in the whole batch.
    DIFFERS: the authors average over the tokens of each device, and then over the devices.
    """
    input_ids, mask = pad_batch([example.input_ids for example in examples], model.device)
    labels, _ = pad_batch([example.labels for example in examples], model.device, IGNORE)
    states = model.encode(input_ids, mask)
    return {"loss": -token_logps(model, states, mask, labels).sum()}


def learning_rate(step: int, n_steps: int, schedule: Schedule) -> float:
    """The rate of step 0 <= step < n_steps: linear warm-up to the peak, then a cosine down.

    DIFFERS: in the authors' framework step 0 has rate 0 and so does nothing.
    """
    n_warmup = math.ceil(schedule.warmup_ratio * n_steps)
    if step < n_warmup:
        return schedule.learning_rate * (step + 1) / n_warmup
    progress = (step - n_warmup) / (n_steps - n_warmup)  # 0 to 1
    cosine = (1 + math.cos(math.pi * progress)) / 2  # 1 to 0
    return schedule.learning_rate * (schedule.final_ratio + (1 - schedule.final_ratio) * cosine)


def batches(items: Sequence, batch_size: int, seed: int) -> Iterator[list]:
    """Yield batches for ever: each epoch in a new order, its last batch possibly smaller."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        for start in range(0, len(order), batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


def micro_batches(batch: Sequence, max_tokens: int) -> list[list]:
    """Cut a batch into parts of similar length: items times the longest is at most max_tokens.

    An item that is longer than that is a part of its own. Questions and rationales are padded each
    by themselves, so a part may take somewhat more.
    """
    parts: list[list] = []
    for item in sorted(batch, key=len, reverse=True):
        fits = parts and (len(parts[-1]) + 1) * len(parts[-1][0]) <= max_tokens
        if not fits:
            parts.append([])
        parts[-1].append(item)
    return parts


def train(
    model: T5,
    items: Sequence,
    n_steps: int,
    loss_of: Callable[[T5, list], dict[str, Tensor]],
    schedule: Schedule,
    name: str,
    log: Callable[[dict], None],
    dropout: bool = True,
) -> T5:
    """Train with AdamW for n_steps optimiser steps; return the model in evaluation mode.

    items have a length in tokens and a `weight`. loss_of(model, items) returns sums over the items,
    the "loss" among them. Each is divided by the weight of the whole batch, so that, but for
    dropout's draw, nothing depends on how the batch is cut, nor on how many processes share it.
    Raises ValueError without items, FloatingPointError when the gradient is not finite.
    DIFFERS: weight decay includes norms and position biases, which the authors' framework spares.
    """
    if not items:
        raise ValueError(
            f"{name}: there is nothing to train on; SFT needs labeled problems, DPO pairs"
        )
    rank, n_processes = rank_and_count()
    torch.manual_seed(schedule.seed + rank)  # each process draws its own dropout
    model.train(dropout)  # False: evaluation mode
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=schedule.weight_decay, fused=True
    )
    batch_stream = batches(items, schedule.batch_size, schedule.seed)
    quiet = True if rank > 0 else None  # None: a bar on a terminal, nothing in a file
    for step in tqdm(range(n_steps), name, unit="step", leave=False, disable=quiet):
        batch = next(batch_stream)
        weight = sum(item.weight for item in batch)
        # 1. The gradient of this process's share of the batch, one micro-batch after the other.
        sums: dict[str, float] = {}
        for part in micro_batches(batch[rank::n_processes], schedule.micro_batch_tokens):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=schedule.bf16):
                terms = loss_of(model, part)
            (terms["loss"] / weight).backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.item() / weight
        # 2. The gradient of the whole batch.
        if n_processes > 1:
            sums = add_over_processes(model, sums)
        norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"{name}: the gradient of step {step + 1} is not finite: "
                "lower the learning rate, with another --out"
            )
        # 3. One optimiser step.
        rate = learning_rate(step, n_steps, schedule)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        # 4. One line per logged step.
        if step % schedule.log_every == 0 or step == n_steps - 1:
            numbers = {"grad_norm": norm, "learning_rate": rate}
            log({"stage": name, "step": step + 1} | sums | numbers)
    return model.eval()


def train_sft(
    model: T5,
    examples: Sequence[Example],
    n_epochs: int,
    schedule: Schedule,
    name: str,
    log: Callable[[dict], None],
) -> T5:
    """Fine-tune for n_epochs passes over the examples."""
    n_steps = n_epochs * math.ceil(len(examples) / schedule.batch_size)
    return train(model, examples, n_steps, sft_loss, schedule, name, log)


# ------------------------------------------------------------- several processes (torchrun)
#
# Every process goes through the whole program. They share the examples of a batch and the problems
# of a sampling; process 0 alone changes files and prints.

TIMEOUT = timedelta(hours=4)  # how long one process waits for another before it gives up


def start_processes(device: str) -> None:
    """Meet the other processes, if torchrun has started any: NCCL between GPUs, else gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # torchrun's word for the number of processes
        return
    if device == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ValueError("there are more processes than GPUs here: lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
    dist.init_process_group(timeout=TIMEOUT)


def end_processes() -> None:
    """Leave the process group and exit, if torchrun has started this process."""
    if rank_and_count()[1] > 1:
        dist.destroy_process_group()
        exit_now(0)


def exit_now(code: int) -> None:
    """Exit at once: torch's threads sometimes abort a process that takes the usual way out."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def rank_and_count() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1 unless under torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_process_0(make: Callable[[], object]) -> object:
    """make(), called by process 0 alone; all wait for it, and get what it returns."""
    rank, n_processes = rank_and_count()
    if n_processes == 1:
        return make()
    made = [None]
    if rank == 0:
        made = [make()]
    dist.broadcast_object_list(made)
    return made[0]


def share_work(items: Sequence, do: Callable[[Sequence], list]) -> list:
    """do(items) -> one result per item. Each process does an equal part, all get all, in order."""
    rank, n_processes = rank_and_count()
    done = do(items[rank::n_processes])
    if n_processes == 1:
        return done
    everyone: list[list] = [[]] * n_processes
    dist.all_gather_object(everyone, done)
    # Item i was the (i // n)-th of process i % n.
    return [everyone[i % n_processes][i // n_processes] for i in range(len(items))]


def add_over_processes(model: T5, sums: dict[str, float]) -> dict[str, float]:
    """Add up all processes' gradients, in place, and the numbers to be logged."""
    for parameter in model.parameters():
        if parameter.grad is None:  # this process had no example
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    everyone: list[dict] = [{}] * rank_and_count()[1]
    dist.all_gather_object(everyone, sums)
    total: dict[str, float] = {}
    for one in everyone:
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + value
    return total


def main() -> None:
    folder = Path(__file__).parent / "data" / "tiny"
    model, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    question = "How many are 2 + 3?"
    input_ids, mask = pad_batch([tokenizer.encode(question)])
    labels, _ = pad_batch([tokenizer.encode("[ 2 + 3 = 5] #### 5")])
    with torch.no_grad():
        logps = token_logps(model, model.encode(input_ids, mask), mask, labels)[0]
    print(f"{question} The rationale's tokens, each after the one before it:")
    for before, target, logp in zip(shift_right(labels)[0].tolist(), labels[0].tolist(), logps):
        piece = tokenizer.piece(target) or "</s>"
        print(f"  after {tokenizer.piece(before)!r:>8} -> {piece!r:<8} log p = {logp:8.4f}")
    print(f"loss (eq. 2) = -({logps.sum():.4f}) / {len(logps)} tokens = {-logps.mean():.4f}")


if __name__ == "__main__":
    main()
