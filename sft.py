"""Supervised fine-tuning (paper, eq. 2): raise the likelihood of good rationales. And the training loop of the project.

Left out: generation, preferences, early stopping, mixed precision in fp16 (T5 overflows in it).

    python sft.py        # one batch worked by hand
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import T5, load_flan_t5, shift_right
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

IGNORE = -100  # label of a position that has no target


@dataclass(frozen=True)
class Example:
    """One training text as ids: the question and the rationale, both ending in EOS."""
    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.labels)


@dataclass(frozen=True)
class Schedule:
    """How to train. Source: paper, table 5, unless said otherwise."""
    learning_rate: float  # peak, per optimiser step
    batch_size: int = 96  # examples (SFT) or pairs (DPO) per optimiser step
    warmup_ratio: float = 0.1  # part of the steps spent going up
    final_ratio: float = 0.1  # authors' code: the cosine ends at this part of the peak, not at 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 2048  # our choice: padded tokens per forward pass; memory only, never the result
    log_every: int = 10  # optimiser steps between two lines
    seed: int = 42  # authors' code


def make_examples(problems: Sequence, tokenizer: Tokenizer) -> list[Example]:
    """Encode problems that have a `question` and a formatted `rationale`."""
    encode = tokenizer.encode
    return [Example(encode(p.question, MAX_QUESTION), encode(p.rationale, MAX_RATIONALE)) for p in problems]


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pad examples to input_ids (B, S), attention_mask (B, S) and labels (B, T) with IGNORE as padding, int64."""
    input_ids, attention_mask = pad_batch([example.input_ids for example in examples])
    labels, _ = pad_batch([example.labels for example in examples], IGNORE)
    return input_ids.to(device), attention_mask.to(device), labels.to(device)


def token_logps(model: T5, states: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every target token: states (B, S, D), labels (B, T) -> (B, T) fp32, 0 where ignored.

    Held for the backward pass: logits of the N real tokens only, (N, V) in fp32. Padding never meets the vocabulary.
    """
    real = labels != IGNORE  # (B, T)
    hidden = model.decode(shift_right(labels), states, attention_mask, real)  # (N, D)
    logits = model.lm_head(hidden).float()  # (N, V)
    logps = -F.cross_entropy(logits, labels[real], reduction="none")  # (N,)
    return logps.new_zeros(labels.shape).masked_scatter(real, logps)


def sft_loss(model: T5, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Eq. 2: negative log-likelihood of the rationales, summed over their tokens (`train` divides by their number)."""
    input_ids, attention_mask, labels = collate(examples, model.device)
    return {"loss": -token_logps(model, model.encode(input_ids, attention_mask), attention_mask, labels).sum()}


def learning_rate(step: int, n_steps: int, schedule: Schedule) -> float:
    """The rate of optimiser step 0 <= step < n_steps: linear warm-up to the peak, then a cosine down."""
    warmup = math.ceil(schedule.warmup_ratio * n_steps)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return schedule.learning_rate * (schedule.final_ratio + (1 - schedule.final_ratio) * cosine)


def epochs(n: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices below n for ever: each epoch in a new order, its last batch possibly smaller."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
        yield from (order[at : at + batch_size] for at in range(0, n, batch_size))


def micro_batches(batch: Sequence, max_tokens: int) -> list[list]:
    """Cut a batch into pieces of similar length: number of items times the longest stays within max_tokens."""
    pieces = []
    for item in sorted(batch, key=len, reverse=True):  # longest first: it sets the width of its piece
        if not pieces or (len(pieces[-1]) + 1) * len(pieces[-1][0]) > max_tokens:
            pieces.append([])
        pieces[-1].append(item)
    return pieces


def autocast(model: T5) -> torch.autocast:
    """bf16 matrix products on a GPU, over fp32 weights; plain fp32 on a CPU."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


def print_log(record: dict) -> None:
    tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))


def train(
    model: T5, items: Sequence, n_steps: int, loss_of: Callable[[T5, list], dict[str, Tensor]],
    weight_of: Callable[[object], int], schedule: Schedule, name: str, dropout: bool = True,
    watch: Callable[[], dict[str, float]] = dict, log: Callable[[dict], None] = print_log,
) -> T5:  # fmt: skip
    """Train in place with AdamW for n_steps optimiser steps, and return the model in evaluation mode.

    loss_of(model, items) gives sums, "loss" among them; each is divided by the summed weight_of of the whole batch, so
    that the loss of a batch does not depend on how memory forces it to be cut. watch: more numbers for a logged step.
    Raises: ValueError without items; FloatingPointError when the gradient is no longer finite.
    """
    if not items:
        raise ValueError(f"{name}: there is nothing to train on")
    model.train(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=schedule.weight_decay, fused=True)
    batches = epochs(len(items), schedule.batch_size, schedule.seed)
    for step in tqdm(range(n_steps), desc=name, unit="step", disable=None):
        batch = [items[i] for i in next(batches)]
        weight = sum(map(weight_of, batch))
        # 1. Gradients of the whole batch, piece by piece. Dropout repeats from (seed, step) alone.
        torch.manual_seed(schedule.seed * 1_000_003 + step)
        sums: dict[str, Tensor] = {}
        for piece in micro_batches(batch, schedule.micro_batch_tokens):
            with autocast(model):
                terms = loss_of(model, piece)
            (terms["loss"] / weight).backward()
            sums = {key: sums.get(key, 0) + value.detach() for key, value in terms.items()}
        # 2. One optimiser step.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"{name}: the gradient of step {step + 1} is not finite; lower the learning rate")
        rate = learning_rate(step, n_steps, schedule)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        # 3. One line per logged step.
        if step % schedule.log_every == 0 or step == n_steps - 1:
            means = {key: value.item() / weight for key, value in sums.items()}
            log({"stage": name, "step": step + 1, **means, "grad_norm": norm, "learning_rate": rate, **watch()})
    return model.eval()


def train_sft(model: T5, examples: Sequence[Example], n_epochs: int, schedule: Schedule, name="SFT", log=print_log) -> T5:
    """Fine-tune in place for n_epochs passes over the examples; the loss is a mean over rationale tokens."""
    n_steps = n_epochs * math.ceil(len(examples) / schedule.batch_size)
    return train(model, examples, n_steps, sft_loss, lambda example: len(example.labels), schedule, name, log=log)


if __name__ == "__main__":
    folder = Path(__file__).parent / "data" / "tiny"
    model, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    example = Example(tokenizer.encode("How many are 2 + 3?"), tokenizer.encode("[ 2 + 3 = 5] #### 5"))
    input_ids, attention_mask, labels = collate([example])
    with torch.no_grad():
        logps = token_logps(model, model.encode(input_ids, attention_mask), attention_mask, labels)[0]
    for before, target, logp in zip(shift_right(labels)[0].tolist(), example.labels, logps.tolist()):
        print(f"  after {tokenizer.piece(before)!r:>8} -> {tokenizer.piece(target) or '</s>'!r:<8} log p = {logp:8.4f}")
    print(f"loss (eq. 2) = -({logps.sum():.4f}) / {len(logps)} tokens = {-logps.mean():.4f}")
    train_sft(model, [example], 20, Schedule(learning_rate=1e-3, log_every=5))
