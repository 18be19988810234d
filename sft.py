"""Supervised fine-tuning (paper, eq. 2), and the training loop: on one processor or many (torchrun), to be continued after a stop.

Left out: generation, preferences, early stopping, mixed precision in fp16 (T5 overflows in it).

    python sft.py        # one batch worked by hand"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import T5, load_flan_t5, shift_right, save_tensors
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

IGNORE = -100  # label of a position that has no target
HEAD_TOKENS = 1024  # target tokens whose logits are computed at a time

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
    micro_batch_tokens: int = 2048  # our choice: padded tokens per forward pass; only dropout's draw and rounding depend on it
    gradient_checkpointing: bool = False  # our choice: compute activations twice rather than keep them
    bf16: bool = False  # our choice: compute in bf16, but keep the weights in fp32
    shard: bool = False  # our choice: each of several processes keeps only its share of the weights and moments
    log_every: int = 10  # optimiser steps between two lines
    seed: int = 42  # authors' code

def make_examples(problems: Sequence, tokenizer: Tokenizer) -> list[Example]:
    """Encode problems that have a `question` and a formatted `rationale`."""
    return [Example(tokenizer.encode(p.question, MAX_QUESTION), tokenizer.encode(p.rationale, MAX_RATIONALE)) for p in problems]

def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pad examples to input_ids (B, S), attention_mask (B, S) and labels (B, T) with IGNORE as padding, int64."""
    input_ids, attention_mask = pad_batch([example.input_ids for example in examples])
    labels, _ = pad_batch([example.labels for example in examples], IGNORE)
    return input_ids.to(device), attention_mask.to(device), labels.to(device)

def token_logps(model: T5, states: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every target token: states (B, S, D), labels (B, T) -> (B, T) fp32, 0 where ignored.
    Held for the backward pass: (N, V) fp32 for the N real tokens of these labels, a micro-batch; the work on them takes
    (HEAD_TOKENS, V) at a time, and with gradient checkpointing nothing more is held. Padding never meets the vocabulary."""
    real = labels != IGNORE  # (B, T)
    hidden = model.decode(shift_right(labels), states, attention_mask, real)  # (N, D)

    def head(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")

    parts = zip(hidden.split(HEAD_TOKENS), labels[real].split(HEAD_TOKENS))
    logps = torch.cat([model.run(head, *part) for part in parts])  # (N,)
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
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup))) / 2
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

def print_log(record: dict) -> None:
    tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))

def train(
    model: T5, items: Sequence, n_steps: int, loss_of: Callable[[T5, list], dict[str, Tensor]],
    weight_of: Callable[[object], int], schedule: Schedule, name: str, dropout: bool = True,
    watch: Callable[[nn.Module], dict] = lambda loss: {}, log: Callable[[dict], None] = print_log, progress=None,
) -> T5:  # fmt: skip
    """Train with AdamW for n_steps optimiser steps, and return the model in evaluation mode.
    loss_of(model, items) gives sums, "loss" among them; each is divided by the summed weight_of of the whole batch, so
    that the loss of a batch does not depend on how memory forces it to be cut, nor on how many processes share the pieces.
    watch(loss): more numbers for a logged step. progress: a Progress, or None for a training that cannot be continued.
    Raises: ValueError without items; FloatingPointError when the gradient is no longer finite."""
    if not items:
        raise ValueError(f"{name}: there is nothing to train on; SFT needs rationales, DPO preference pairs")
    model.train(dropout)
    model.gradient_checkpointing = schedule.gradient_checkpointing
    (rank, n), (loss, apart) = place(), spread(Loss(model, loss_of, schedule.bf16), schedule.shard)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=schedule.weight_decay, fused=True)
    first = progress.restore(model, optimizer) if progress else 0
    batches = itertools.islice(epochs(len(items), schedule.batch_size, schedule.seed), first, n_steps)
    bar = tqdm(batches, name, n_steps, unit="step", initial=first, disable=True if rank else None)
    for step, batch in enumerate(bar, first):
        weight = sum(weight_of(items[i]) for i in batch)
        # 1. Gradients of the whole batch, piece by piece, n processes side by side; who finds no piece left in the last
        #    turn repeats one that does not count. Dropout repeats from (seed, step, piece) alone.
        pieces = micro_batches([items[i] for i in batch], schedule.micro_batch_tokens)
        sums: dict[str, Tensor] = {}
        for i in range(rank, turns := math.ceil(len(pieces) / n) * n, n):
            torch.manual_seed((schedule.seed * 1_000_003 + step) * 1_009 + i)
            with apart() if i + n < turns else nullcontext():
                terms = {key: value * (i < len(pieces)) for key, value in loss(pieces[i % len(pieces)]).items()}
                (terms["loss"] * n / weight).backward()  # times n, for the processes' mean is taken
            sums = {key: sums.get(key, 0) + value.detach() for key, value in terms.items()}
        # 2. One optimiser step.
        norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            kept = progress and progress.folder.find(progress.name) or "none yet"
            raise FloatingPointError(f"{name}: the gradient of step {step + 1} (items {sorted(batch)}) is not finite: lower "
                                     f"the learning rate, with another --out; last good checkpoint: {kept}")  # fmt: skip
        optimizer.param_groups[0]["lr"] = rate = learning_rate(step, n_steps, schedule)
        optimizer.step()
        optimizer.zero_grad()
        # 3. One line per logged step.
        if step % schedule.log_every == 0 or step == n_steps - 1:
            totals = torch.stack([*sums.values()])
            if n > 1:
                dist.all_reduce(totals)
            means = {key: total / weight for key, total in zip(sums, totals.tolist())}
            log({"stage": name, "step": step + 1, **means, "grad_norm": norm, "learning_rate": rate, **watch(loss)})
        if progress:
            progress.save(step + 1, model, optimizer)
    if schedule.shard and n > 1:  # the whole model again, on the CPU of process 0
        api, whole = whole_states()
        state = api.get_model_state_dict(model, options=whole)
        with torch.device("meta"):
            model = T5(model.config)
        model.load_state_dict(state, strict=rank == 0, assign=True)
    return model.eval()

def train_sft(model: T5, examples: Sequence[Example], n_epochs: int, schedule: Schedule, name="SFT", **options) -> T5:
    """Fine-tune for n_epochs passes over the examples; the loss is a mean over rationale tokens. options: see `train`."""
    n_steps = n_epochs * math.ceil(len(examples) / schedule.batch_size)
    return train(model, examples, n_steps, sft_loss, lambda example: len(example.labels), schedule, name, **options)

# ---------------------------------------------------------------------------- many processes, and starting where one stopped

def place() -> tuple[int, int]:
    """The rank of this process, and how many there are: 0 and 1 unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

def deal(work: Sequence, do: Callable, title: str | None = None) -> list:
    """Do piece i of the work in process i % n; return all results, in order, in every process. title: of a bar on stderr."""
    rank, n = place()
    done = [do(piece) for piece in tqdm(work[rank::n], desc=title, disable=None if title and rank == 0 else True)]
    everyone = [done] * n
    if n > 1:
        dist.all_gather_object(everyone, done)
    return [everyone[i % n][i // n] for i in range(len(work))]

def alone(do: Callable[[], object]) -> None:
    """Let process 0 change files, when no other is still looking for what is there, and all others wait until it has."""
    deal((), do)
    deal([0], lambda _: do())

class Loss(nn.Module):
    """loss_of(model, items), if bf16 then in that over fp32 weights. A module, for there data parallelism can hook in."""
    def __init__(self, model: T5, loss_of: Callable, bf16: bool):
        super().__init__()
        self.model, self.loss_of, self.bf16 = model, loss_of, bf16

    def forward(self, items: list):
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss_of(self.model, items)

def spread(loss: Loss, shard: bool) -> tuple[nn.Module, Callable]:
    """Let processes average their gradients in the backward pass: the module to call, and a context in which they do not.
    shard: every process keeps its part of each matrix instead of the whole, and averaging is never put off."""
    if place()[1] == 1:
        return loss, nullcontext
    if not shard:
        parallel = nn.parallel.DistributedDataParallel(loss, gradient_as_bucket_view=True)
        return parallel, parallel.no_sync
    from torch.distributed.fsdp import fully_shard  # here, because it takes half a second
    mesh = dist.init_device_mesh(loss.model.device.type, (place()[1],))
    for part in (*loss.model.encoder.blocks, *loss.model.decoder.blocks, loss):
        fully_shard(part, mesh=mesh)
    return loss, nullcontext

def whole_states() -> tuple:
    """torch's own reader and writer of states, and how to get them as whole tensors whoever holds which share of them."""
    from torch.distributed.checkpoint import state_dict  # here, because it takes half a second
    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)

class Progress:
    """Where a training stands, kept in a data.folder.RunFolder: the same training goes on from there, on any number of GPUs."""
    def __init__(self, folder, name: str, minutes: float):
        self.folder, self.name, self.minutes, self.saved = folder, f"{name}.step-", minutes, time.monotonic()

    def restore(self, model: T5, optimizer: torch.optim.Optimizer) -> int:
        """Put both where they were at the last save; return the number of steps done by then."""
        if not (path := self.folder.find(self.name)):
            return 0
        weights, moments, step = torch.load(path, weights_only=True)
        api, whole = whole_states()
        api.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=whole)
        return step

    def save(self, step: int, model: T5, optimizer: torch.optim.Optimizer) -> None:
        if any(deal([0], lambda _: time.monotonic() - self.saved >= 60 * self.minutes)):
            api, whole = whole_states()
            write = partial(save_tensors, (*api.get_state_dict(model, optimizer, options=whole), step))
            alone(lambda: self.folder.write(f"{self.name}{step}.pt", write, replaces=self.name))
            self.saved = time.monotonic()

if __name__ == "__main__":
    folder = Path(__file__).parent / "data" / "tiny"
    model, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    example = Example(tokenizer.encode("How many are 2 + 3?"), tokenizer.encode("[ 2 + 3 = 5] #### 5"))
    input_ids, attention_mask, labels = collate([example])
    with torch.no_grad():
        logps = token_logps(model, model.encode(input_ids, attention_mask), attention_mask, labels)[0]
    for before, target, logp in zip(shift_right(labels)[0].tolist(), example.labels, logps.tolist()):
        print(f"  after {tokenizer.piece(before)!r:>8} -> {tokenizer.piece(target) or '</s>'!r:<8} log p = {logp:8.4f}")
    print(f"After 'How many are 2 + 3?': loss (eq. 2) = -({logps.sum():.4f}) / {len(logps)} tokens = {-logps.mean():.4f}")
