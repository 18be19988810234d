"""Batched decoding with a key-value cache and a calculator (paper, section 3.2 and figure 4).

A batch has a fixed number of slots. Each slot writes one rationale; when that is finished, the next
one takes the slot at once. Whenever a rationale has come to `[ expression =`, the calculator's
digits and `]` are forced into it. Left out: beam search, and the arithmetic itself (calculator.py).

    python decode.py                                        # watch an answer; one slot against 32
    python decode.py [--checkpoint DIR] "question" ...
"""

import argparse
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from calculator import calculate
from model import MASKED, START_ID, T5, T5Config, load_flan_t5, padding_bias
from tokenizer import EOS_ID, MAX_QUESTION, UNKNOWN_ID, Tokenizer, pad_batch

MAX_NEW_TOKENS = 300  # appendix A
TOP_K = 50  # DIFFERS: visible here; the authors inherit it from their framework without saying so
ENCODE_BATCH = 32  # questions encoded at a time


@dataclass
class Sample:
    """One rationale."""

    text: str = ""
    ids: list[int] = field(default_factory=list)  # without EOS
    forced: list[bool] = field(default_factory=list)  # which of the ids the calculator wrote
    finished: bool = False  # True: the model ended it; False: the limit cut it


def uniform_noise(seed: int | str, question: str, number: int, n: int) -> list[float]:
    """The n numbers in [0, 1) that decide one rationale: a function of these arguments alone."""
    source = random.Random(f"{seed}/{number}/{question}")
    return [source.random() for _ in range(n)]


def sample_next_token(logits: Tensor, temperature: float, top_k: int, noise: Tensor) -> Tensor:
    """Choose an id per row: logits (B, V), noise (B,) in [0, 1) -> ids (B,) int64.

    Temperature 0 is greedy and ignores the noise. top_k 0 keeps the whole vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.shape[-1]
    scores, ids = logits.float().topk(min(top_k or vocab_size, vocab_size))  # (B, k)
    cumulative = (scores / temperature).softmax(-1).cumsum(-1)  # (B, k)
    # The first id whose cumulative probability exceeds the noise. In fp32 the sum may round to
    # below 1, and the noise up to 1: hence the scaling, and the clamp.
    choice = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, choice.clamp(max=ids.shape[-1] - 1))[:, 0]


class RowState:
    """One rationale while it is being written, and the calculator's view of it."""

    def __init__(self, tokenizer: Tokenizer, calculator: bool, sample: Sample, noise: list[float]):
        self.tokenizer = tokenizer
        self.calculator = calculator
        self.sample = sample  # what has been written so far
        self.noise = noise  # as many numbers as the rationale may have tokens
        self.queue: deque[int] = deque()  # ids that the calculator still has to write
        self.expression: str | None = None  # the text since an open `[`; None outside brackets

    @property
    def done(self) -> bool:
        """Ended by the model, or at the limit: as many tokens as there is noise for."""
        return self.sample.finished or len(self.sample.ids) == len(self.noise)

    @property
    def next_input(self) -> int:
        """The id that the decoder reads next: the last one written."""
        return self.sample.ids[-1] if self.sample.ids else START_ID

    @property
    def next_noise(self) -> float:
        return 0.0 if self.done else self.noise[len(self.sample.ids)]

    def take(self, chosen: int) -> None:
        """Accept the next id: the calculator's if one is waiting, else the model's choice."""
        forced = len(self.queue) > 0
        token = self.queue.popleft() if forced else chosen
        if token == EOS_ID:
            self.sample.finished = True
            return
        self.sample.ids.append(token)
        self.sample.forced.append(forced)
        if self.calculator and not forced:
            self.watch(self.tokenizer.piece(token))

    def watch(self, piece: str) -> None:
        """Follow the brackets piece by piece, so that nothing written before is read again."""
        if "[" in piece:
            self.expression = ""
            piece = piece[piece.rindex("[") + 1 :]
        if self.expression is None:
            return
        self.expression += piece
        if "]" in piece:
            self.expression = None
        elif "=" in piece:
            # In a piece with text behind `=` the model has written past the calculator's turn.
            if self.expression.endswith("="):
                result = calculate(self.expression[:-1])
                if result is not None:  # SentencePiece begins every text with a space: `= 24]`
                    self.queue.extend(self.tokenizer.encode(f"{result}]")[:-1])  # without EOS
            self.expression = None


class KVCache:
    """The keys and values of every decoder layer, for a batch of B slots.

    The decoder has read lengths[b] tokens in slot b, START_ID among them; their keys stand in
    columns 0 to lengths[b] - 1, and the next ones go to column lengths[b]. To give a slot to a new
    rationale its length is set to 0: the old columns are masked, and overwritten one by one. So
    slots need not start together, nor end together.

        columns             0 1 2 3 4 5 6
        slot 0, length 5    k k k k k . .    the next keys go to column 5
        slot 1, length 2    k k x x x x .    a new tenant; x: the old one's, masked

    Held: 2 * n_layers * B * H * K * (max_new_tokens + source_length) numbers. Source: our own.
    """

    def __init__(self, model: T5, n_slots: int, max_new_tokens: int, source_length: int):
        config, weight = model.config, model.shared.weight

        def zeros(length: int) -> Tensor:
            shape = (config.n_layers, 2, n_slots, config.n_heads, length, config.d_kv)
            return weight.new_zeros(shape)  # the 2: keys and values

        self.own = zeros(max_new_tokens)  # of the tokens that the slots have written
        self.cross = zeros(source_length)  # of the questions that they answer
        self.lengths = torch.zeros(n_slots, dtype=torch.long, device=model.device)
        self.source_lengths = torch.zeros(n_slots, dtype=torch.long, device=model.device)
        self.window = max_new_tokens  # columns that are read; fewer while all rationales are short
        self.columns = torch.arange(max(max_new_tokens, source_length), device=model.device)
        self.bias_by_age = model.decoder.position_bias(-self.columns[None])[:, 0]  # (H, ages)

    def admit(self, slots: list[int], model: T5, states: list[Tensor]) -> None:
        """Let slots begin anew, each with the question whose encoder states (S, D) these are."""
        lengths = [len(state) for state in states]
        self.lengths[slots] = 0
        self.source_lengths[slots] = torch.tensor(lengths, device=model.device)
        padded = pad_sequence(states, batch_first=True)  # (slots, S, D)
        for layer, block in enumerate(model.decoder.blocks):
            keys, values = block.cross_attention.keys_values(padded)
            self.cross[layer, 0, slots, :, : max(lengths)] = keys
            self.cross[layer, 1, slots, :, : max(lengths)] = values

    def keep(self, slots: list[int]) -> None:
        """Drop the other slots: the last few rationales need not drag an empty batch along."""
        self.own = self.own[:, :, slots]
        self.cross = self.cross[:, :, slots]
        self.lengths = self.lengths[slots]
        self.source_lengths = self.source_lengths[slots]

    def advance(self) -> tuple[Tensor, Tensor]:
        """Begin a step: the bias for written tokens (B, H, 1, T) and the question (B, 1, 1, S)."""
        self.slots = torch.arange(len(self.lengths), device=self.lengths.device)
        # The column that this step writes in every slot. A finished slot keeps counting: clamp.
        self.now = self.lengths.clamp(max=self.own.shape[4] - 1)
        self.lengths += 1
        # How long ago each column was written; negative: not by this rationale.
        age = self.now[:, None] - self.columns[: self.window]  # (B, T)
        bias = self.bias_by_age[:, age.clamp(min=0)].transpose(0, 1)  # (B, H, T)
        bias = bias + torch.where(age >= 0, 0.0, MASKED)[:, None, :]
        source_columns = self.columns[: self.cross.shape[4]]
        mask = source_columns < self.source_lengths[:, None]  # (B, S)
        return bias[:, :, None, :], padding_bias(mask)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values (B, H, 1, K); return the layer's (B, H, T, K)."""
        # Indices on both sides of a slice put their own dimension first: (B, H, K).
        self.own[layer, 0, self.slots, :, self.now] = keys[:, :, 0]
        self.own[layer, 1, self.slots, :, self.now] = values[:, :, 0]
        return self.own[layer, :, :, :, : self.window].unbind(0)

    def source(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the questions, twice (B, H, S, K)."""
        return self.cross[layer].unbind(0)


def encode_questions(model: T5, tokenizer: Tokenizer, questions: list[str]) -> list[Tensor]:
    """The encoder states (S, D) of every question; questions of similar length share a batch."""
    ids = [tokenizer.encode(question, MAX_QUESTION) for question in questions]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    states: list = [None] * len(ids)
    for start in range(0, len(order), ENCODE_BATCH):
        group = order[start : start + ENCODE_BATCH]
        input_ids, mask = pad_batch([ids[i] for i in group], model.device)
        encoded = model.encode(input_ids, mask)
        # Without its padding, and as a copy: a view would keep the whole batch in memory.
        for i, row in zip(group, encoded, strict=True):
            states[i] = row[: len(ids[i])].clone()
    return states


def record_step(model: T5, cache: KVCache) -> Callable[[Tensor, KVCache], Tensor]:
    """`model.step` as a CUDA graph: its hundreds of kernels are recorded once, and launched as one.

    A recording repeats its work on the same addresses: ids are copied in, logits are overwritten,
    and no tensor of the cache may change its size.
    """
    ids = torch.zeros_like(cache.lengths)
    model.step(ids, cache)  # what libraries do at their first call must not be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step(ids, cache)

    def step(new_ids: Tensor, _: KVCache) -> Tensor:  # always on the recorded cache
        ids.copy_(new_ids)
        graph.replay()
        return logits

    return step


@torch.inference_mode()
def generate(
    model: T5,
    tokenizer: Tokenizer,
    questions: list[str],
    n_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = TOP_K,
    max_new_tokens: int = MAX_NEW_TOKENS,
    calculator: bool = True,
    seed: int | str = 0,
    batch_size: int = 32,
    title: str | None = None,
) -> list[list[Sample]]:
    """Write n_samples rationales for each question; result[i][k] is sample k of questions[i].

    A sampled rationale depends on weights, question, seed and number alone; another batch may round
    differently and flip a near-tie. The model comes back in evaluation mode. Memory: the KVCache of
    batch_size slots, and the encoder states of all questions. title: of a progress bar.
    """
    model.eval()
    on_gpu = model.device.type == "cuda"
    results = [[Sample() for _ in range(n_samples)] for _ in questions]
    states = encode_questions(model, tokenizer, questions)
    # Long questions first: their rationales tend to be long, and none should be left at the end.
    order = sorted(range(len(questions)), key=lambda i: -len(states[i]))
    waiting = deque((i, number) for i in order for number in range(n_samples))
    if not waiting:
        return results
    quiet = None if title else True  # None: a bar on a terminal, nothing in a file
    bar = tqdm(total=len(waiting), desc=title, unit="rationale", leave=False, disable=quiet)
    rows: list = [None] * min(batch_size, len(waiting))  # who writes in each slot
    cache = KVCache(model, len(rows), max_new_tokens, len(states[order[0]]))
    step = record_step(model, cache) if on_gpu else model.step
    while True:
        # 1. Every free slot takes the next rationale.
        free = [slot for slot, row in enumerate(rows) if row is None or row.done]
        free = free[: len(waiting)]
        admitted = []
        for slot in free:
            i, number = waiting.popleft()
            admitted.append(states[i])
            noise = uniform_noise(seed, questions[i], number, max_new_tokens)
            rows[slot] = RowState(tokenizer, calculator, results[i][number], noise)
        if free:
            cache.admit(free, model, admitted)
        busy = [slot for slot, row in enumerate(rows) if not row.done]
        if not busy:
            break
        # 2. On a CPU (a CUDA graph needs fixed shapes) drop idle slots, and read no empty columns.
        if not on_gpu:
            if len(busy) <= 0.75 * len(rows):
                cache.keep(busy)
                rows = [rows[slot] for slot in busy]
                busy = list(range(len(rows)))
            cache.window = 1 + max(len(rows[slot].sample.ids) for slot in busy)
        # 3. One token for every slot.
        ids = torch.tensor([row.next_input for row in rows], device=model.device)
        noise = torch.tensor([row.next_noise for row in rows], device=model.device)
        chosen = sample_next_token(step(ids, cache), temperature, top_k, noise).tolist()
        # 4. The calculator has the last word; finished rationales leave.
        for slot in busy:
            row = rows[slot]
            row.take(chosen[slot])
            if row.done:
                row.sample.text = tokenizer.decode(row.sample.ids)
                bar.update()
    bar.close()
    return results


def check_vocabulary(folder: str | Path, config: T5Config, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a model and a spiece.model do not belong together."""
    if not 0 <= config.vocab_size - tokenizer.vocab_size < 128:  # T5 rounds up to a multiple of 128
        raise ValueError(
            f"{folder}: spiece.model has {tokenizer.vocab_size} ids, the model "
            f"{config.vocab_size}: they do not belong together"
        )


def mark_forced(tokenizer: Tokenizer, sample: Sample) -> str:
    """The rationale's text, with what the calculator wrote between « and »."""
    text = ""
    for token, forced in zip(sample.ids, sample.forced, strict=True):
        piece = tokenizer.piece(token)
        text += f"«{piece}»" if forced else piece
    return text.replace("»«", "").replace("« ", " «").strip()


def main() -> None:
    tiny = Path(__file__).resolve().parent / "data" / "tiny"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="*", help="without any: a demonstration")
    parser.add_argument("--checkpoint", default=tiny, help="a folder (data/tiny, untrained)")
    args = parser.parse_args()
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a sign that a terminal lacks ends nothing
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    torch.set_flush_denormal(True)
    try:
        if (Path(args.checkpoint) / "log.jsonl").exists():
            raise ValueError(f"{args.checkpoint} is a run: give a model in it, as warm-up/sft")
        model, tokenizer = load_flan_t5(args.checkpoint), Tokenizer(args.checkpoint)
        check_vocabulary(args.checkpoint, model.config, tokenizer)
    except (OSError, ValueError) as error:
        sys.exit(f"decode.py: {error}")
    for question in args.question:
        question = question.encode("utf-8", "replace").decode()  # bytes that are no text: ?
        ids = tokenizer.encode(question)
        if len(ids) > MAX_QUESTION or UNKNOWN_ID in ids:
            print("decode.py: too long, or unknown characters, in this question:", file=sys.stderr)
        [[sample]] = generate(model, tokenizer, [question])
        print(f"{question}\n  {mark_forced(tokenizer, sample) or '(the model wrote nothing)'}")
    if args.question:
        return
    question = "Tom has 6 boxes with 24 pens in each. How many pens does he have?"
    [[sample]] = generate(model, tokenizer, [question])
    print(question)
    for word in mark_forced(tokenizer, sample).split(" "):
        print(word, end=" ", flush=True)
        time.sleep(0.15)  # so that one can watch it
    print()
    for n in (1, 32):
        began = time.perf_counter()
        samples = generate(model, tokenizer, [question] * n)
        n_tokens = sum(len(sample.ids) for [sample] in samples)
        print(f"{n:2} at a time: {n_tokens / (time.perf_counter() - began):,.0f} tokens/s")


if __name__ == "__main__":
    main()
