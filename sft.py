"""Supervised fine-tuning (paper, eq. 2), and the training loop, which dpo.py uses too.

Left out: generation, preferences, early stopping, fp16 (T5 overflows in it), and restarts within a
training: a run that is killed repeats its last stage from the beginning (selftrain.py).

    python sft.py        # one example worked by hand
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.processes import add_over_processes, seed_dropout, share_of
from data.terminal import check_training, progress
from model import T5, load_flan_t5, shift_right
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

IGNORE = -100  # label of a position without a target
Log = Callable[[dict], None]  # receives one record per logged step


@dataclass(frozen=True)
class Schedule:
    """How to train. The defaults are the flags' defaults for every size but tiny (run.py)."""

    peak_rate: float  # the highest learning rate
    batch_size: int  # examples (SFT) or pairs (DPO) per optimiser step, over all processes
    warmup_ratio: float = 0.1  # table 5: fraction of the steps spent warming up
    final_ratio: float = 0.1  # authors' code: the cosine ends at this fraction of the peak
    weight_decay: float = 0.01  # appendix A
    max_grad_norm: float = 1.0  # appendix A
    micro_batch_tokens: int = 2048  # per forward pass; bounds the memory (8192 on a GPU)
    bf16: bool = False  # compute in bf16; weights and AdamW's moments stay fp32
    log_every: int = 10  # optimiser steps between two logged lines
    seed: int = 42  # authors' code: for the data's order and dropout


@dataclass(frozen=True)
class Example:
    """A question and its rationale as ids, both ending in EOS."""

    input_ids: list[int]
    labels: list[int]

    @property
    def n_terms(self) -> int:  # eq. 2 is a mean over target tokens
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
    """log pi(y_t | x, y_<t) of every target token: states (B, S, D), labels (B, T) -> (B, T) fp32.

    Ignored positions give 0. Logits, the largest tensor of all, are computed for the N real tokens
    only. Tokens that the calculator wrote count like any other, in SFT and in DPO (as in the
    authors' code).
    """
    real = labels != IGNORE  # (B, T)
    hidden = model.decode(shift_right(labels), states, attention_mask)  # (B, T, D)
    logits = model.lm_head(hidden[real]).float()  # (N, V)
    logps = torch.zeros(labels.shape, device=labels.device)
    logps[real] = -F.cross_entropy(logits, labels[real], reduction="none")
    return logps


def sft_loss(model: T5, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The sum in eq. 2, of which `train` makes a mean over the target tokens of the batch:

        loss = -sum over (x, y) and t of log pi(y_t | x, y_<t)

    DIFFERS: the authors average over the tokens of each device, and then over the devices.
    """
    input_ids, mask = pad_batch([example.input_ids for example in examples], model.device)
    labels, _ = pad_batch([example.labels for example in examples], model.device, IGNORE)
    states = model.encode(input_ids, mask)
    return {"loss": -token_logps(model, states, mask, labels).sum()}


def learning_rate(step: int, n_steps: int, schedule: Schedule) -> float:
    """The rate of step 0 <= step < n_steps: linear warm-up to the peak, then a cosine down.

    DIFFERS: in the authors' framework step 0 has rate 0 and therefore no effect.

    >>> schedule = Schedule(peak_rate=1.0, batch_size=96)
    >>> [round(learning_rate(step, 20, schedule), 2) for step in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.55, 0.11]
    """
    n_warmup = math.ceil(schedule.warmup_ratio * n_steps)
    if step < n_warmup:
        return schedule.peak_rate * (step + 1) / n_warmup
    done = (step - n_warmup) / (n_steps - n_warmup)  # 0 to 1
    cosine = (1 + math.cos(math.pi * done)) / 2  # 1 to 0
    return schedule.peak_rate * (schedule.final_ratio + (1 - schedule.final_ratio) * cosine)


def batches(items: Sequence, batch_size: int, seed: int) -> Iterator[list]:
    """Yield batches without end, reshuffled in every epoch; the last of an epoch may be smaller."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        for start in range(0, len(order), batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


def micro_batches(batch: Sequence, max_tokens: int) -> list[list]:
    """Split a batch into parts of similar length, each of at most max_tokens with its padding.

    An item longer than max_tokens gets a part to itself. Items are sorted by their total length,
    but questions and rationales are padded separately, so a part can slightly exceed max_tokens.

    >>> micro_batches(["aaaa", "b", "cc", "dddd"], max_tokens=8)
    [['aaaa', 'dddd'], ['cc', 'b']]
    """
    parts: list[list] = []
    for item in sorted(batch, key=len, reverse=True):
        # Sorted: the first item of a part is its longest, to which the others are padded.
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
    log: Log,
    dropout: bool = True,
) -> T5:
    """Train with AdamW for n_steps optimiser steps; return the model in evaluation mode.

    items are Examples or PairExamples: they have a length in tokens, and `n_terms`, how many terms
    they add to the mean in the loss. loss_of(model, items) returns sums over the items, among them
    the "loss". Dividing by the terms of the complete batch makes the result independent of the
    micro-batches and of the number of processes, apart from the dropout masks.
    Raises ValueError without items, FloatingPointError when the gradient is not finite.
    DIFFERS: weight decay includes norms and position biases, which the authors' framework spares.
    """
    if not items:
        raise ValueError(f"{name}: nothing to train on; SFT needs labeled problems, DPO pairs")
    seed_dropout(schedule.seed)
    model.train(dropout)  # without dropout, this is evaluation mode
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=schedule.weight_decay, fused=True
    )
    batch_stream = batches(items, schedule.batch_size, schedule.seed)
    guessing = math.log(model.config.vocab_size)  # a uniform guess's loss; far above it is an error
    for step, batch in zip(progress(range(n_steps), name, "step"), batch_stream):
        n_terms = sum(item.n_terms for item in batch)
        # 1. The gradient, one micro-batch after another. Under torchrun each process takes a share
        #    of the batch, and the gradients of all are added up.
        sums: dict[str, float] = {}
        for part in micro_batches(share_of(batch), schedule.micro_batch_tokens):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=schedule.bf16):
                terms = loss_of(model, part)
            (terms["loss"] / n_terms).backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.item() / n_terms
        sums = add_over_processes(model, sums)
        # 2. One optimiser step.
        norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm).item()
        check_training(sums["loss"], norm, guessing, f"{name}, step {step + 1}")
        rate = learning_rate(step, n_steps, schedule)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        # 3. One line per logged step.
        if step % schedule.log_every == 0 or step == n_steps - 1:
            numbers = {"grad_norm": norm, "learning_rate": rate}
            log({"stage": name, "step": step + 1} | sums | numbers)
    return model.eval()


def train_sft(
    model: T5, examples: Sequence[Example], n_epochs: int, schedule: Schedule, name: str, log: Log
) -> T5:
    """Fine-tune for n_epochs passes over the examples."""
    n_steps = n_epochs * math.ceil(len(examples) / schedule.batch_size)
    return train(model, examples, n_steps, sft_loss, schedule, name, log)


def main() -> None:
    folder = Path(__file__).parent / "data" / "tiny"
    model, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    question = "Ben has 2 red and 3 blue coins. How many coins does Ben have?"
    rationale = "Ben has 2 + 3 = [ 2 + 3 = 5] 5 coins. #### 5"
    input_ids, mask = pad_batch([tokenizer.encode(question)])
    labels, _ = pad_batch([tokenizer.encode(rationale)])
    with torch.no_grad():
        logps = token_logps(model, model.encode(input_ids, mask), mask, labels)[0]
    print(f"{question}\nEach token of the rationale, after the one before it:")
    for before, target, logp in zip(shift_right(labels)[0].tolist(), labels[0].tolist(), logps):
        piece = tokenizer.piece(target) or "</s>"
        print(f"  after {tokenizer.piece(before)!r:>8} -> {piece!r:<8} log p = {logp:8.4f}")
    print(f"loss (eq. 2) = -({logps.sum():.4f}) / {len(logps)} tokens = {-logps.mean():.4f}")
    print(
        "Only the result after `[ 2 + 3 =` is improbable. The calculator will write it (decode.py)."
    )


if __name__ == "__main__":
    main()
