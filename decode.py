"""Batched decoding with a key-value cache, in which a calculator overrides the model's own arithmetic (section 3.2).

Rows that finish hand their place to the next question; whenever a row has written `[ expression =`, the calculator's
digits and `]` are forced into that row. Left out: beam search, answer parsing, the arithmetic itself (calculator.py).

    python decode.py [--checkpoint DIR] ["question"]    # naive against cached against batched, and one rationale
"""

import argparse
import hashlib
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calculator import calculate
from model import START_ID, T5, KVCache, load_flan_t5, shift_right
from tokenizer import EOS_ID, MAX_QUESTION, Tokenizer, pad_batch

MAX_NEW_TOKENS = 300  # section 4.2
TOP_K = 50  # DIFFERS: visible here; the authors inherit it from their framework without saying so


@dataclass
class Sample:
    """One rationale: its ids without EOS, which of them the calculator forced, and whether the model ended it."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finished: bool = False


def uniform_noise(seed: int | str, question: str, sample: int, n: int) -> np.ndarray:
    """The n numbers in [0, 1) that decide one rationale, float32: a function of these arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}\n{sample}\n{question}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest))).random(n, dtype=np.float32)


def sample_next_token(logits: Tensor, temperature: float, top_k: int, noise: Tensor) -> Tensor:
    """Choose one id per row: logits (B, V), noise (B,) in [0, 1) -> ids (B,) int64.
    temperature is dimensionless, 0 is greedy. top_k 0 keeps the whole vocabulary."""
    if temperature == 0:
        return logits.argmax(-1)
    scores, ids = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    cumulative = (scores / temperature).softmax(-1).cumsum(-1)  # (B, k)
    # The first id whose cumulative probability exceeds the noise; scaled, because the sum may round below 1.
    choice = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    return ids.gather(-1, choice.clamp(max=ids.shape[-1] - 1))[:, 0]


class RowState:
    """What one rationale needs beside the tensors: its ids so far, and the calculator's view of them."""

    def __init__(self, tokenizer: Tokenizer, calculator: bool):
        self.tokenizer, self.calculator = tokenizer, calculator
        self.sample = Sample()
        self.queue = deque()  # ids that the calculator still has to write
        self.expression = None  # text since the last open `[`, None outside brackets

    def take(self, chosen: int) -> int:
        """Accept the next id: the calculator's if one is waiting, else the model's choice. Return it."""
        forced = bool(self.queue)
        token = self.queue.popleft() if forced else chosen
        if token == EOS_ID:
            self.sample.finished = True
            return token
        self.sample.ids.append(token)
        self.sample.forced.append(forced)
        if self.calculator and not forced:
            self.watch(self.tokenizer.piece(token))
        return token

    def watch(self, piece: str) -> None:
        """Follow the brackets piece by piece, so that nothing written before is ever read again."""
        if "[" in piece:
            self.expression, piece = "", piece[piece.rindex("[") + 1 :]
        if self.expression is None:
            return
        self.expression += piece
        if "]" in piece:
            self.expression = None
        elif "=" in piece:
            # Pieces with text after `=` exist, but the model has then written past the calculator's turn.
            result = calculate(self.expression[:-1]) if self.expression.endswith("=") else None
            if result is not None:
                self.queue.extend(self.tokenizer.encode(f"{result}]")[:-1])
            self.expression = None


@torch.inference_mode()
def generate(
    model: T5, tokenizer: Tokenizer, questions: list[str], n_samples: int = 1, temperature: float = 0.0,
    top_k: int = TOP_K, max_new_tokens: int = MAX_NEW_TOKENS, calculator: bool = True, seed: int | str = 0,
    batch_size: int = 32, progress: str | None = None,
) -> list[list[Sample]]:  # fmt: skip
    """Write n_samples rationales for each question; result[i][k] is sample k of questions[i].

    Each question is encoded once for all of its samples. A sampled rationale depends on weights, question, seed and
    sample number alone. batch_size: rationales written at a time. progress: title of a bar on stderr, None for none.
    Memory: see KVCache. Source: paper, section 3.2 and figure 4; the scheduling is ours.
    """
    source_ids = [tokenizer.encode(question, MAX_QUESTION) for question in questions]
    results = [[Sample() for _ in range(n_samples)] for _ in questions]
    # Long questions first: they tend to have long rationales, and no long row should be left over at the end.
    order = sorted(range(len(questions)), key=lambda i: -len(source_ids[i]))
    waiting = deque((i, k) for i in order for k in range(n_samples))
    if not waiting or max_new_tokens < 1:
        return results
    n_slots, per_group = min(batch_size, len(waiting)), -(-batch_size // n_samples)
    was_training = model.training
    model.eval()
    cache = KVCache(model, n_slots, max_new_tokens, len(source_ids[order[0]]))
    groups = iter(order[at : at + per_group] for at in range(0, len(order), per_group))
    encoded: dict[int, Tensor] = {}  # the cross-attention keys and values of the group whose turn it is
    noise = torch.zeros(n_slots, max_new_tokens, device=model.device)
    rows: list[RowState | None] = [None] * n_slots
    jobs: list[tuple[int, int]] = [(0, 0)] * n_slots
    ids = [START_ID] * n_slots  # the last id of every row, the next input
    bar = tqdm(total=len(waiting), desc=progress, unit="rationale", disable=None if progress else True)
    written, began = 0, time.perf_counter()

    while True:
        # 1. Hand every free slot to the next waiting sample.
        for slot, row in enumerate(rows):
            if row is None and waiting:
                i, k = jobs[slot] = waiting.popleft()
                if i not in encoded:  # then it is the first of the next group
                    encoded = encode_questions(model, source_ids, next(groups))
                cache.admit(slot, encoded[i], len(source_ids[i]))
                rows[slot], ids[slot] = RowState(tokenizer, calculator), START_ID
                if temperature > 0:
                    noise[slot] = torch.from_numpy(uniform_noise(seed, questions[i], k, max_new_tokens))
        live = [slot for slot, row in enumerate(rows) if row is not None]
        if not live:
            break
        # 2. Nothing waits any more and half the slots are idle: go on with a smaller batch.
        if len(live) <= len(rows) // 2:
            cache.keep(live)
            noise = noise[live]
            rows, jobs, ids = ([column[slot] for slot in live] for column in (rows, jobs, ids))
            live = list(range(len(live)))
        # 3. One token for every slot.
        ages = [len(row.sample.ids) if row else 0 for row in rows]
        cache.fit(max(ages), max(len(source_ids[jobs[slot][0]]) for slot in live))
        logits = model.step(torch.tensor(ids, device=model.device), cache)
        at = noise.gather(1, torch.tensor(ages, device=model.device)[:, None])[:, 0]
        ids = sample_next_token(logits, temperature, top_k, at).tolist()
        # 4. The calculator has the last word; finished rows leave.
        for slot in live:
            row = rows[slot]
            ids[slot] = row.take(ids[slot])
            if row.sample.finished or len(row.sample.ids) == max_new_tokens:
                i, k = jobs[slot]
                row.sample.text = tokenizer.decode(row.sample.ids)
                results[i][k], rows[slot] = row.sample, None
                bar.update()
        written += len(live)
        bar.set_postfix_str(f"{written / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
    bar.close()
    model.train(was_training)
    return results


def encode_questions(model: T5, source_ids: list[list[int]], chosen: list[int]) -> dict[int, Tensor]:
    """Run the encoder over some questions; return each one's cross-attention keys and values (layers, 2, H, S, K)."""
    input_ids, mask = (t.to(model.device) for t in pad_batch([source_ids[i] for i in chosen]))
    return dict(zip(chosen, model.cross_keys_values(model.encode(input_ids, mask)).unbind(2)))


@torch.inference_mode()
def generate_naive(
    model: T5, tokenizer: Tokenizer, questions: list[str], n_samples: int = 1, temperature: float = 0.0,
    top_k: int = TOP_K, max_new_tokens: int = MAX_NEW_TOKENS, calculator: bool = True, seed: int | str = 0,
) -> list[list[Sample]]:  # fmt: skip
    """The slow twin of `generate`: one rationale at a time, the whole sequence again for every token, no cache."""
    was_training, results = model.training, []
    model.eval()
    for question in questions:
        input_ids = torch.tensor([tokenizer.encode(question, MAX_QUESTION)], device=model.device)
        results.append([])
        for k in range(n_samples):
            row = RowState(tokenizer, calculator)
            noise = torch.from_numpy(uniform_noise(seed, question, k, max_new_tokens)).to(model.device)
            for age in range(max_new_tokens):
                target = torch.tensor([[*row.sample.ids, START_ID]], device=model.device)  # the last is shifted out
                logits = model(input_ids, torch.ones_like(input_ids), shift_right(target))[:, -1]
                row.take(sample_next_token(logits, temperature, top_k, noise[age : age + 1]).item())
                if row.sample.finished:
                    break
            row.sample.text = tokenizer.decode(row.sample.ids)
            results[-1].append(row.sample)
    model.train(was_training)
    return results


def mark_forced(tokenizer: Tokenizer, sample: Sample, left: str = "«", right: str = "»") -> str:
    """The rationale's text with the calculator's digits between marks."""
    text = ""
    for forced, run in groupby(zip(sample.forced, sample.ids), key=lambda pair: pair[0]):
        part = "".join(tokenizer.piece(i) for _, i in run)
        text += f" {left}{part.lstrip()}{right}" if forced else part
    return text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", help="answer this one; without it, compare three ways to decode")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "data" / "tiny", help="a checkpoint folder")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(args.checkpoint), Tokenizer(args.checkpoint)
    question = args.question or "Tom has 12 boxes with 24 pens in each. How many pens does Tom have?"
    ways = (("naive", generate_naive, 1), ("cached", generate, 1), ("batched", generate, 32))
    for name, write, n in (("", generate, 1),) if args.question else ways:
        began = time.perf_counter()
        samples = write(model, tokenizer, [question] * n)
        tokens = sum(len(sample.ids) for row in samples for sample in row)
        print(f"{name:>8} {tokens / (time.perf_counter() - began):8,.0f} tokens/s")
    marks = ("\033[1;36m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("«", "»")
    print(f"{question}\n{mark_forced(tokenizer, samples[0][0], *marks)}")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"decode.py: {error}")
