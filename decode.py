"""Batched decoding with a key-value cache and a calculator (paper, section 3.2 and figure 4).

A batch has a fixed number of slots, and each slot writes one rationale; when that is finished, the
next rationale takes the slot at once. (A slot is a place in the batch; its row is the rationale
that is now in it.) After `[ expression =` the calculator's digits and `]` are
forced into the rationale. Left out: beam search, and the arithmetic itself (calculator.py).

    python decode.py                                    # one answer; one slot against 32
    python decode.py [--checkpoint DIR] [--samples N] [--temperature T] "question" ...
"""

import data  # noqa: F401 (first: Ctrl-C while torch is imported is one word, not a traceback)

# isort: split
import argparse
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calculator import calculate
from data.checkpoints import check_vocabulary
from data.problems import readable
from data.terminal import between, progress, run_command
from model import MASKED, START_ID, T5, load_flan_t5, padding_bias
from tokenizer import EOS_ID, MAX_QUESTION, Tokenizer, pad_batch

MAX_NEW_TOKENS = 300  # appendix A
TOP_K = 50  # DIFFERS: stated here; the authors inherit it from their framework without saying so
ENCODE_BATCH = 32  # questions encoded at a time
BELOW_1 = 1 - 2**-24  # the largest fp32 number below 1; a larger random() would round up to 1

# ------------------------------------------------------------------- one rationale, one more token


@dataclass
class Sample:
    """One rationale."""

    text: str = ""
    ids: list[int] = field(default_factory=list)  # without EOS
    forced: list[bool] = field(default_factory=list)  # which of the ids the calculator wrote
    finished: bool = False  # True: the model ended it; False: it was cut at the limit


def uniform_noise(seed: int | str, question: str, number: int, n: int) -> list[float]:
    """n numbers in [0, 1), one per token; they depend on seed, question and number alone."""
    source = random.Random(f"{seed}/{number}/{question}")
    return [min(source.random(), BELOW_1) for _ in range(n)]


def sample_next_token(logits: Tensor, temperature: float, top_k: int, noise: Tensor) -> Tensor:
    """Choose an id per row: logits (B, V), noise (B,) in [0, 1) -> ids (B,) int64.

    Temperature 0 is greedy and ignores the noise. top_k 0 keeps the complete vocabulary. Unlike
    torch.multinomial, which draws for a batch, this lets each rationale bring its own noise, so it
    does not depend on what else is in the batch, up to rounding.
    """
    if temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.shape[-1]
    k = min(top_k, vocab_size) if top_k else vocab_size
    scores, ids = logits.float().topk(k)  # (B, k)
    cumulative = (scores / temperature).softmax(-1).cumsum(-1)  # (B, k)
    # The first id whose cumulative probability exceeds the noise; in fp32 all may sum to below 1.
    choice = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, choice)[:, 0]


class RowState:
    """A rationale while it is being written, and what the calculator has to know about it."""

    def __init__(self, tokenizer: Tokenizer, calculator: bool, sample: Sample, noise: list[float]):
        self.tokenizer = tokenizer
        self.calculator = calculator
        self.sample = sample  # what has been written so far
        self.noise = noise  # one number per token; their count is the limit
        self.queue: deque[int] = deque()  # ids that the calculator still has to write
        self.expression: str | None = None  # the text since an open `[`; None outside brackets

    @property
    def done(self) -> bool:
        """Ended by the model, or at the limit."""
        return self.sample.finished or len(self.sample.ids) == len(self.noise)

    @property
    def next_input(self) -> int:
        """The id that the decoder reads next: the last one written."""
        return self.sample.ids[-1] if self.sample.ids else START_ID

    @property
    def next_noise(self) -> float:  # a slot that is idle needs a number, too
        return 0.0 if self.done else self.noise[len(self.sample.ids)]

    def take(self, chosen: int) -> None:
        """Accept the next id: the calculator's if one is waiting, otherwise the model's choice."""
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
        """Follow the brackets piece by piece, so that no text has to be read twice.

        At `[ expression =` the result and `]` are queued, and `take` writes them instead of the
        model's choices. Nothing is queued if the expression does not evaluate, or if a piece has
        text after `=`: then the model has started the result itself.

        >>> tokenizer = Tokenizer("data/tiny")
        >>> row = RowState(tokenizer, calculator=True, sample=Sample(), noise=[0.0] * 9)
        >>> for piece in (" [", " 2", " +", " 3", " ="):
        ...     row.watch(piece)
        >>> [tokenizer.piece(token) for token in row.queue]
        [' 5', ']']
        """
        if "[" in piece:
            self.expression = ""
            piece = piece[piece.rindex("[") + 1 :]
        if self.expression is None:
            return
        self.expression += piece
        if "]" in piece:
            self.expression = None
        elif "=" in piece:
            if self.expression.endswith("="):
                result = calculate(self.expression[:-1])
                if result is not None:  # SentencePiece adds the space of `= 24]`
                    self.queue.extend(self.tokenizer.encode(f"{result}]")[:-1])  # without EOS
            self.expression = None


# ---------------------------------------------------------------------------------- a batch of them


class KVCache:
    """The keys and values of every decoder layer, for a batch of B slots.

    The decoder has read lengths[b] tokens in slot b, START_ID included. Their keys are in columns 0
    to lengths[b] - 1, and the next ones go to column lengths[b]. A slot is given to a new rationale
    by setting its length to 0: the old columns are masked, and overwritten one by one. So slots
    need neither start nor end together; an idle one keeps counting, and rewrites its last column.
    The age of a column is how many steps ago it was written. Lengths change in place (fast_step).

        columns             0 1 2 3 4 5 6
        slot 0, length 5    k k k k k . .    the next keys go to column 5
        slot 1, length 2    k k x x x x .    a new rationale; x: the old one's columns, masked

    Memory: 2 * n_layers * B * H * K * (max_new_tokens + source_length) numbers.
    """

    def __init__(self, model: T5, n_slots: int, max_new_tokens: int, source_length: int):
        config, weight = model.config, model.shared.weight

        def zeros(length: int) -> Tensor:
            shape = (config.n_layers, 2, n_slots, config.n_heads, length, config.d_kv)
            return weight.new_zeros(shape)  # the 2: keys and values

        self.own = zeros(max_new_tokens)  # of the tokens written in the slots
        self.cross = zeros(source_length)  # of the questions
        self.slots = torch.arange(n_slots, device=model.device)
        self.lengths = torch.zeros_like(self.slots)
        self.source_lengths = torch.zeros_like(self.slots)
        self.now = torch.zeros_like(self.slots)  # the column that the current step writes
        self.columns = torch.arange(max(max_new_tokens, source_length), device=model.device)
        self.n_columns = max_new_tokens  # how many are read; see narrow
        self.bias_by_age = model.decoder.position_bias(-self.columns[None])[:, 0]  # (H, ages)

    def admit(self, slots: list[int], model: T5, states: list[Tensor]) -> None:
        """Start new rationales in these slots; states: their encoded questions, each (S, D)."""
        index = torch.tensor(slots, device=model.device)
        lengths = torch.tensor([len(state) for state in states], device=model.device)
        self.lengths[index] = 0
        self.source_lengths[index] = lengths
        padded = pad_sequence(states, batch_first=True)  # (slots, S, D)
        for layer, block in enumerate(model.decoder.blocks):
            keys, values = block.cross_attention.keys_values(padded)
            self.cross[layer, 0, index, :, : padded.shape[1]] = keys
            self.cross[layer, 1, index, :, : padded.shape[1]] = values

    def advance(self) -> tuple[Tensor, Tensor]:
        """Start a step; return the bias for own tokens (B, H, 1, T) and question (B, 1, 1, S)."""
        self.now = self.lengths.clamp(max=self.own.shape[4] - 1)  # idle slots keep counting: clamp
        self.lengths += 1
        # Negative ages: columns that this rationale has not written.
        age = self.now[:, None] - self.columns[: self.n_columns]  # (B, T)
        bias = self.bias_by_age[:, age.clamp(min=0)].transpose(0, 1)  # (B, H, T)
        bias = bias + torch.where(age >= 0, 0.0, MASKED)[:, None, :]
        source_columns = self.columns[: self.cross.shape[4]]
        mask = source_columns < self.source_lengths[:, None]  # (B, S)
        return bias[:, :, None, :], padding_bias(mask)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values (B, H, 1, K); return the layer's (B, H, T, K)."""
        # Indices on both sides of a slice put their own dimension first: (B, H, K).
        self.own[layer, 0, self.slots, :, self.now] = keys[:, :, 0]
        self.own[layer, 1, self.slots, :, self.now] = values[:, :, 0]
        return self.own[layer, :, :, :, : self.n_columns].unbind(0)

    def source(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the questions, twice (B, H, S, K)."""
        return self.cross[layer].unbind(0)

    def narrow(self, slots: list[int], n_columns: int) -> None:
        """Keep only these slots, and read only the first n_columns from now on."""
        self.n_columns = n_columns
        if len(slots) < len(self.slots):
            self.own = self.own[:, :, slots]
            self.cross = self.cross[:, :, slots]
            self.lengths = self.lengths[slots]
            self.source_lengths = self.source_lengths[slots]
            self.slots = self.slots[: len(slots)]  # again 0, 1, 2, ...


def encode_questions(model: T5, tokenizer: Tokenizer, questions: list[str]) -> list[Tensor]:
    """The encoder states (S, D) of every question; questions of similar length share a batch."""
    ids = [tokenizer.encode(question, MAX_QUESTION) for question in questions]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    states: list = [None] * len(ids)
    for start in range(0, len(order), ENCODE_BATCH):
        group = order[start : start + ENCODE_BATCH]
        input_ids, mask = pad_batch([ids[i] for i in group], model.device)
        encoded = model.encode(input_ids, mask)
        # Without padding, and as a copy: a view would keep the complete batch in memory.
        for i, row in zip(group, encoded, strict=True):
            states[i] = row[: len(ids[i])].clone()
    return states


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

    For fixed settings a sampled rationale depends only on weights, question, seed and number; a
    different batch may round differently and flip a near-tie. The model is left in evaluation mode.
    Memory: the KVCache of batch_size slots, and the encoder states of all questions. title: the
    progress bar's label.
    """
    model.eval()
    results = [[Sample() for _ in range(n_samples)] for _ in questions]  # filled by the rows
    states = encode_questions(model, tokenizer, questions)
    # Long questions first: their rationales tend to be long, and should not be left for the end.
    order = sorted(range(len(questions)), key=lambda i: -len(states[i]))
    waiting = deque((i, number) for i in order for number in range(n_samples))
    if not waiting:
        return results
    bar = progress(range(len(waiting)), title, "rationale")
    rows: list = [None] * min(batch_size, len(waiting))  # the rationale in each slot
    cache = KVCache(model, len(rows), max_new_tokens, len(states[order[0]]))
    step = fast_step(model, cache)
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
        if all(row.done for row in rows):
            break
        # 2. On a CPU, skip finished slots and empty columns.
        rows = skip_idle(rows, cache)
        # 3. One token for every slot.
        ids = torch.tensor([row.next_input for row in rows], device=model.device)
        noise = torch.tensor([row.next_noise for row in rows], device=model.device)
        chosen = sample_next_token(step(ids), temperature, top_k, noise).tolist()
        # 4. The calculator may replace the model's token; finished rationales become text.
        for row, token in zip(rows, chosen, strict=True):
            if row.done:
                continue
            row.take(token)
            if row.done:
                row.sample.text = tokenizer.decode(row.sample.ids)
                bar.update()
    bar.close()
    return results


# ----------------------------------------------------------- the same steps, faster on each device


def skip_idle(rows: list[RowState], cache: KVCache) -> list[RowState]:
    """On a CPU, drop finished slots once a quarter are idle, and read no empty columns.

    A CUDA graph needs fixed shapes: there all rows stay.
    """
    if cache.own.is_cuda:
        return rows
    slots = list(range(len(rows)))
    busy = [slot for slot in slots if not rows[slot].done]
    if len(busy) <= 0.75 * len(rows):
        slots = busy
    cache.narrow(slots, 1 + max(len(rows[slot].sample.ids) for slot in busy))
    return [rows[slot] for slot in slots]


def fast_step(model: T5, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """`model.step` with this cache; on a GPU a CUDA graph, which launches all its kernels as one.

    A graph repeats the recorded work on the same addresses: ids are copied in, logits are
    overwritten, and no tensor of the cache may change its size.
    """
    if not cache.own.is_cuda:
        return partial(model.step, cache=cache)
    ids = torch.zeros_like(cache.lengths)
    model.step(ids, cache)  # warm-up: keep lazy initialisation out of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step(ids, cache)

    def step(new_ids: Tensor) -> Tensor:
        ids.copy_(new_ids)
        graph.replay()
        return logits

    return step


def mark_forced(tokenizer: Tokenizer, sample: Sample) -> str:
    """The rationale's text, with the calculator's tokens between « and »."""
    text = ""
    for token, forced in zip(sample.ids, sample.forced, strict=True):
        piece = tokenizer.piece(token)
        text += f"«{piece}»" if forced else piece
    return text.replace("»«", "").replace("« ", " «").strip()


def main() -> None:
    tiny = Path(__file__).resolve().parent / "data" / "tiny"
    parser = argparse.ArgumentParser(description="Ask a model questions.")
    add = parser.add_argument
    add("question", nargs="*", help="in quotes; none: a demonstration")
    add("--checkpoint", default=tiny, type=expanduser, help="a folder (data/tiny, not fine-tuned)")
    add("--samples", type=between(1, 1000, int), default=1, metavar="N", help="per question (1)")
    temperature = "of sampling (0.7; a single sample is greedy)"
    add("--temperature", type=between(0, 100), metavar="T", help=temperature)
    add("--no-calculator", dest="calculator", action="store_false", help="the model computes")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.7 if args.samples > 1 else 0.0
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(args.checkpoint), Tokenizer(args.checkpoint)
    if model.config.d_model < 256:
        torch.set_num_threads(1)  # two threads are slower at this size
    check_vocabulary(args.checkpoint, model.config.vocab_size, tokenizer.vocab_size)
    example = "Tom has 6 boxes with 24 shells in each. How many shells does he have?"
    for question in args.question or [example]:
        question = readable(question, tokenizer, MAX_QUESTION)
        [samples] = generate(
            model, tokenizer, [question], args.samples, args.temperature, calculator=args.calculator
        )
        print(question)
        for sample in samples:
            cut = "" if sample.finished else f" (cut at {MAX_NEW_TOKENS} tokens)"
            print(f"  {mark_forced(tokenizer, sample) or '(the model wrote nothing)'}{cut}")
        if len(samples) > 1:
            ends = [sample.text.rpartition("####") for sample in samples]
            answers = Counter(answer.strip() if mark else "" for _, mark, answer in ends)
            [(answer, n)] = answers.most_common(1)
            print(f"  {n} of {len(samples)} samples end in #### {answer}")
    if args.question:
        return
    for n in (1, 32):
        began = time.perf_counter()
        samples = generate(model, tokenizer, [example] * n)
        n_tokens = sum(len(sample.ids) for [sample] in samples)
        print(f"{n:2} at a time: {n_tokens / (time.perf_counter() - began):,.0f} tokens/s")


if __name__ == "__main__":
    run_command(main)
