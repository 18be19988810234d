"""Batched decoding with a key-value cache, in which a calculator overrides the model's own arithmetic (section 3.2).

Rows that finish hand their place to the next question; whenever a row has written `[ expression =`, the calculator's
digits and `]` are forced into that row. Left out: beam search, answer parsing, the arithmetic itself (calculator.py).

    python decode.py [--checkpoint DIR] [--samples N] ["question" ...]    # without a question: one row against 32"""

import argparse
import hashlib
import itertools
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from calculator import calculate
from model import START_ID, T5, Layout, decoding, load_flan_t5, mask_to_bias
from tokenizer import EOS_ID, MAX_QUESTION, Tokenizer, pad_batch

MAX_NEW_TOKENS = 300  # section 4.2
GROUP = 64 if torch.cuda.is_available() else 8  # questions encoded at a time
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
    """Choose one id per row: logits (B, V), noise (B,) in [0, 1), on the same device -> ids (B,) int64.
    temperature is dimensionless, 0 is greedy and needs no noise. top_k 0 keeps the whole vocabulary."""
    if temperature == 0:  # on a CPU numpy finds the largest of 32,128 seven times as fast as torch
        return torch.from_numpy(logits.float().numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)
    scores, ids = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    cumulative = (scores / temperature).softmax(-1).cumsum(-1)  # (B, k)
    # The first id whose cumulative probability exceeds the noise; scaled, because the sum may round below 1.
    choice = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    return ids.gather(-1, choice.clamp(max=ids.shape[-1] - 1))[:, 0]

class RowState:
    """What one rationale needs beside the tensors: its ids so far, and the calculator's view of them."""
    def __init__(self, tokenizer: Tokenizer, calculator: bool, question: int = 0, number: int = 0, noise: Sequence = ()):
        self.tokenizer, self.calculator, self.noise = tokenizer, calculator, noise
        self.question, self.number = question, number  # the sample `number` of the question at this index
        self.sample, self.queue = Sample(), deque()  # the ids that the calculator still has to write
        self.expression = None  # text since the last open `[`, None outside brackets

    def take(self, chosen: int) -> None:
        """Accept the next id: the calculator's if one is waiting, else the model's choice."""
        forced = bool(self.queue)
        token = self.queue.popleft() if forced else chosen
        if token == EOS_ID:
            self.sample.finished = True
            return
        self.sample.ids.append(token)
        self.sample.forced.append(forced)
        if self.calculator and not forced:
            self.watch(self.tokenizer.piece(token))

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

class KVCache:
    """Keys and values of B slots that share one clock and one ring, and of the questions that these answer.
    T5 knows distances only, never absolute positions. So sequences of one batch may start at different times and still write to the
    same place of a ring at each step and share one row of position bias; a mask hides from each slot what is older than its
    sequence. A finished slot goes to the next question at once, without moving the others. Each slot reads its question on a seat;
    samples of one question share that. fixed: no size ever changes, as `record` needs it.
    Memory in numbers: at most 2 * n_layers * n_slots * H * K * (max_new_tokens in whole blocks + source_length, if fixed in whole
    eights), and two layers' share while sizes change. Raises torch.OutOfMemoryError, before any work, if it cannot fit."""
    BLOCK = 32  # the ring grows and shrinks by so many positions

    def __init__(self, model: T5, n_slots: int, max_new_tokens: int, source_length: int, fixed: bool = False):
        c, like = model.config, model.shared.weight.detach()
        longest, free = -(-max_new_tokens // self.BLOCK) * self.BLOCK, free_memory(like.device)
        self.fixed, self.size = fixed, longest if fixed else self.BLOCK
        self.width = -(-source_length // 8) * 8 if fixed else source_length  # GPUs copy masks of other widths, in each layer
        wanted = 2 * c.n_layers * n_slots * c.n_heads * c.d_kv * (longest + self.width) * like.itemsize
        if wanted > free:
            advice = f"use a batch size of at most {most}" if (most := int(0.8 * free / wanted * n_slots)) else "none fits"
            needed = f"need {wanted / 2**20:,.0f} MiB for keys and values, {free / 2**20:,.0f} are free"
            raise torch.OutOfMemoryError(f"{n_slots} rationales at a time {needed}: {advice}")
        layer = lambda length, *n: like.new_zeros(*n, 2, n_slots, c.n_heads, length, c.d_kv)
        layers = lambda length: layer(length, c.n_layers) if fixed else [layer(length) for _ in range(c.n_layers)]
        self.ring, self.cross = layers(self.size), layers(self.width)  # (2, B, H, length, K) each; cross: by seat
        self.seats = list(range(n_slots))  # of the slots: where the question stands that this one answers
        self.births, self.source_lengths = like.new_zeros(2, n_slots, dtype=torch.long)  # of slots, in steps; of seats, in tokens
        self.clock = like.new_zeros(1, dtype=torch.long)  # step t is written to place t % size
        self.positions = torch.arange(max(longest, self.width), device=like.device)
        self.bias = model.decoder.position_bias(-self.positions[None])  # (1, H, 1, ages)

    def admit(self, slot: int, questions: Tensor, row: int, source_length: int, mate: int | None = None) -> None:
        """Give a slot to a new sequence. Its question is a row of `cross_keys_values`, source_length tokens long, and takes a
        seat of its own; or it is that of the slot `mate`, and both read the same keys and values."""
        self.births[slot], self.seats[slot] = self.clock, -1  # its own seat may be free again; the lowest free one is taken
        self.seats[slot] = seat = min({*range(len(self.seats))} - {*self.seats}) if mate is None else self.seats[mate]
        self.source_lengths[seat] = source_length
        layers = self.ring, self.cross, questions
        for ring, cross, question in [layers] if self.fixed else zip(*layers):  # fixed: all layers in one operator
            ring[..., slot, :, :, :] = 0  # the old tenant's numbers go, though they are masked: 0 * NaN is NaN
            if mate is None:
                cross[..., seat, :, :, :] = F.pad(question[..., row, :, :source_length, :], (0, 0, 0, self.width - source_length))

    def fit(self, oldest: int, width: int) -> None:
        """Make room for the next step: `oldest` is the age of the oldest sequence, `width` the length of the longest
        question from now on. Little more is kept: attention reads one dense block twice as fast as a window in it."""
        needed = (oldest // self.BLOCK + 1) * self.BLOCK
        if needed > self.size or needed < self.size - self.BLOCK:
            places = (self.clock - oldest + self.positions[:oldest]) % self.size
            # Layers leave their list one by one, so that no more than one is in memory twice.
            self.ring = [F.pad(self.ring.pop(0).index_select(3, places), (0, 0, 0, needed - oldest)) for _ in range(len(self.ring))]
            self.births, self.clock, self.size = self.births - self.clock + oldest, torch.full_like(self.clock, oldest), needed
        if width < 0.8 * self.width:
            self.width, self.cross = width, [self.cross.pop(0)[..., :width, :].contiguous() for _ in range(len(self.cross))]

    def keep(self, slots: list[int]) -> None:
        """Drop all other slots, so that the last few sequences do not drag an empty batch along."""
        seats = sorted({self.seats[slot] for slot in slots})
        self.seats = [seats.index(self.seats[slot]) for slot in slots]
        self.births, self.source_lengths = self.births[slots], self.source_lengths[seats]
        for layer, (ring, cross) in enumerate(zip(self.ring, self.cross)):
            self.ring[layer], self.cross[layer] = ring[:, slots], cross[:, seats]

    def advance(self) -> tuple[Tensor, Tensor]:
        """Begin a step. Return the bias for the ring (B, H, 1, size) and for the questions (seats, 1, 1, width)."""
        place = self.clock % self.size  # (1,), where this step is written; a slice, if Python may know it, is four times as fast
        self.place = place if self.fixed else slice(at := int(place), at + 1)
        ages = (self.clock - self.positions[: self.size]) % self.size  # of each place in this step; 0: written now
        self.clock += 1
        seen = ages < (self.clock - self.births)[:, None]  # (B, size)
        numbers = defaultdict(itertools.count)  # queries on one seat stand in one row of the layout, one behind the other
        behind = [next(numbers[seat]) for seat in self.seats]  # seats 0, 0, 1: behind 0, 1, 0, places 0, 1, 2
        self.n_seats, most = max(self.seats) + 1, max(behind) + 1
        places = [seat * most + n for seat, n in zip(self.seats, behind)] if self.seats != list(range(len(behind))) else None
        self.layout = Layout((self.n_seats, most), places=places and torch.tensor(places, device=seen.device))
        real = self.positions[: self.width] < self.source_lengths[: self.n_seats, None]  # (seats, width)
        return self.bias[..., ages] + mask_to_bias(seen, self.bias)[:, None, None], mask_to_bias(real, self.bias)[:, None, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Write this step's keys and values (B, H, 1, K); return those of the whole ring (2, B, H, size, K)."""
        self.ring[layer][:, :, :, self.place] = torch.stack((keys, values))
        return self.ring[layer]

def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken, what torch holds in reserve included; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = re.search(r"MemAvailable: *(\d+)", meminfo.read_text()) if (meminfo := Path("/proc/meminfo")).exists() else None
    return 1024 * int(found[1]) if found else float("inf")

def record(model: T5, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """`model.step` on a GPU as a CUDA graph: its several hundred kernels are recorded once, and from then on launched as one.
    A recording repeats its work on the same addresses, so the cache must be `fixed`: ids are copied in, logits overwritten."""
    ids, graph = torch.zeros_like(cache.births), torch.cuda.CUDAGraph()
    model.step(ids, cache)  # what libraries do at their first call must not be recorded
    with torch.cuda.graph(graph):
        logits = model.step(ids, cache)
    return lambda last: (ids.copy_(last), graph.replay(), logits)[-1]

@torch.inference_mode()
def generate(
    model: T5, tokenizer: Tokenizer, questions: list[str], n_samples: int = 1, temperature: float = 0.0, top_k: int = TOP_K,
    max_new_tokens: int = MAX_NEW_TOKENS, calculator: bool = True, seed: int | str = 0, batch_size: int = 32,
    graph: bool | None = None, progress: str | None = None, process: Callable | None = None, on_finish: Callable = lambda *_: None,
) -> list[list[Sample]]:  # fmt: skip
    """Write n_samples rationales for each question; result[i][k] is sample k of questions[i].
    A sampled rationale depends on weights, question, seed and sample number alone. batch_size: rationales written at a time.
    graph: `record` the step, so never shrink the batch; by default on a GPU. progress: title of a bar on stderr. process(logits,
    rows) -> logits (B, V) may change the scores before an id is chosen; rows: B times a RowState or None. on_finish(i, k, sample)
    is called as each rationale ends: what it keeps, Ctrl-C does not lose. Source: section 3.2, figure 4; the scheduling is ours.
    Memory: the KVCache, keys and values of GROUP questions, 4 * V bytes of logits per slot, on a CPU the packed matrices."""
    source_ids = [tokenizer.encode(question, MAX_QUESTION) for question in questions]
    results = [[Sample() for _ in range(n_samples)] for _ in questions]
    # Long questions first: they tend to have long rationales, and no long row should be left over at the end.
    order = sorted(range(len(questions)), key=lambda i: -len(source_ids[i]))
    waiting = deque((i, k) for i in order for k in range(n_samples))
    if not waiting or max_new_tokens < 1:
        return results
    n_slots, longest = min(batch_size, len(waiting)), len(source_ids[order[0]])
    graph = model.device.type == "cuda" if graph is None else graph
    cache = KVCache(model, n_slots, max_new_tokens, longest, fixed=graph)
    groups = iter(order[at : at + GROUP] for at in range(0, len(order), GROUP))  # of like length: little padding
    group, encoded = [], []  # the questions whose turn it is, and their keys and values for cross-attention
    rows: list[RowState | None] = [None] * n_slots
    written, began = 0, time.perf_counter()

    with tqdm(total=len(waiting), desc=progress, unit="rationale", disable=None if progress else True) as bar, decoding(model):
        step = record(model, cache) if graph else lambda ids: model.step(ids, cache)
        while True:
            # 1. Hand every free slot to the next waiting sample.
            for slot, row in enumerate(rows):
                if row is None and waiting:
                    i, k = waiting.popleft()
                    if i not in group:  # then it is the first of the next one
                        group, encoded = next(groups), []  # the old ones go before the new ones need their memory
                        input_ids, mask = (t.to(model.device) for t in pad_batch([source_ids[j] for j in group]))
                        encoded = model.cross_keys_values(model.encode(input_ids, mask))
                    mate = next((other for other, row in enumerate(rows) if row and row.question == i and not graph), None)
                    cache.admit(slot, encoded, group.index(i), len(source_ids[i]), mate)
                    noise = uniform_noise(seed, questions[i], k, max_new_tokens if temperature else 0)
                    rows[slot] = RowState(tokenizer, calculator, i, k, noise.tolist())
            live = [slot for slot, row in enumerate(rows) if row is not None]
            if not live:
                break
            # 2. Nothing waits any more and a quarter of the slots is idle: go on with a smaller batch.
            if len(live) <= 0.75 * len(rows) and not graph:
                cache.keep(live)
                rows, live = [rows[slot] for slot in live], list(range(len(live)))
            # 3. One token for every slot. Ids and noise go to a GPU before the step: a copy behind it would wait for its end.
            ages = [len(row.sample.ids) if row else 0 for row in rows]
            last = [row.sample.ids[-1] if age else START_ID for row, age in zip(rows, ages)]
            if not graph:
                cache.fit(max(ages), max(len(source_ids[rows[slot].question]) for slot in live))
            noise = torch.tensor([r.noise[a] if r else 0.0 for r, a in zip(rows, ages)] if temperature else [], device=model.device)
            logits = step(torch.tensor(last, device=model.device))
            logits = process(logits, rows) if process else logits
            chosen = sample_next_token(logits, temperature, top_k, noise).tolist()
            # 4. The calculator has the last word; finished rows leave.
            for slot in live:
                (row := rows[slot]).take(chosen[slot])
                if row.sample.finished or len(row.sample.ids) == max_new_tokens:
                    row.sample.text = tokenizer.decode(row.sample.ids)
                    results[row.question][row.number], rows[slot] = row.sample, None
                    on_finish(row.question, row.number, row.sample)
                    bar.update()
            written += len(live)
            bar.set_postfix_str(f"{written / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
    return results

def mark_forced(tokenizer: Tokenizer, sample: Sample, marks: tuple[str, str] = ("«", "»")) -> str:
    """The rationale's text with the calculator's digits between two marks."""
    text = ""
    for forced, run in itertools.groupby(zip(sample.forced, sample.ids), key=lambda pair: pair[0]):
        part = "".join(tokenizer.piece(i) for _, i in run)
        text += f" {marks[0]}{part.lstrip()}{marks[1]}" if forced else part
    return text.strip()

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("question", nargs="*", help="answer these, or - for one a line from standard input; none: measure batching")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "data" / "tiny", help="checkpoint folder (else data/tiny)")
    parser.add_argument("--samples", type=int, default=1, help="draw so many at temperature 0.7, and let them vote on the answer")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16: pays on a CPU with AVX-512 BF16 or AMX")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(args.checkpoint, torch.bfloat16 if args.bf16 else torch.float32), Tokenizer(args.checkpoint)
    lines = sys.stdin if args.question == ["-"] else args.question or ["Tom has 6 boxes with 24 pens in each. How many is that?"]
    questions = [line.encode("utf-8", "replace").decode().strip() for line in lines if line.strip()]  # undecodable bytes: ?
    marks = ("\033[7m", "\033[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("«", "»")
    for batch in [questions] if args.question else [questions, questions * 32]:
        began = time.perf_counter()
        samples = generate(model, tokenizer, batch, n := max(1, args.samples), 0.7 if n > 1 else 0)
        speed = sum(len(sample.ids) for row in samples for sample in row) / (time.perf_counter() - began)
        for question, row in zip(questions, samples):
            print(question, *(f"  {mark_forced(tokenizer, sample, marks)}" for sample in row), sep="\n")
            found = Counter(answer for _, mark, answer in (s.text.rpartition("#### ") for s in row) if mark and answer)
            (answer, votes), = found.most_common(1) or [("no answer", 0)]
            print(f"  -> {answer}" + f" ({votes} of {len(row)} votes)" * (len(row) > 1))
        print(f"batch of {len(batch) * n}: {speed:,.0f} tokens/s")

if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit(f"decode.py: {str(error) or 'stopped'}")
