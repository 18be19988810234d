"""Decoding speed beside transformers' `generate`: the same weights, questions and threads, in turns.

    python -m tests.bench.decode [--quick] [--cases 1 2 ...] [--repeats N] [--threads N]
    python -m tests.bench.decode --vocabulary DIR --questions gsm8k/test.jsonl --checkpoint DIR
    python -m tests.bench.decode --figure FILE.svg      # speed as batches and rationales grow
    python -m tests.bench.decode --device cuda --sizes base large --batches 32 96 256      # case 9

Without files: the vocabulary of data/tiny and synthetic problems. With them: Flan-T5's spiece.model,
GSM8K's test.jsonl and, for case 7, a checkpoint that writes rationales. Other weights are random, for
speed does not depend on them. All but case 9 is in fp32, and denormals are flushed on both sides.

Figures are medians. A ratio above 1 says that ours is the faster or the smaller one; in brackets stand
the smallest and the largest ratio of two neighbouring turns.
"""

import argparse
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor

import decode
from calculator import calculate
from data.problems import Problem, load_problems
from data.synthetic import make_problems
from decode import TOP_K, KVCache, RowState, Sample, encode_questions, generate, record_step
from model import SIZES, START_ID, T5, load_flan_t5, save_flan_t5
from tokenizer import EOS_ID, MAX_QUESTION, MAX_RATIONALE, Tokenizer, format_rationale, pad_batch

try:
    import ctranslate2
    import google.protobuf  # noqa: F401 (its converter reads the vocabulary with this)
except ModuleNotFoundError:
    ctranslate2 = None

TINY = Path(__file__).parents[2] / "data" / "tiny"
CASES = (
    "1 batch 32, 2 batch 1, 3 gold rationales, 4 five samples, 5 the calculator's cost, 6 base, "
    "7 a checkpoint's texts, 8 memory, 9 ms a step in bf16 (default: 1 to 8; on a GPU 9)"
)


# ----------------------------------------------------------------------------------------- scripts


class Script:
    """For transformers: the next id of each row's script gets the largest score."""

    def __init__(self, scripts: list[list[int]]):
        self.scripts = scripts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n_written = input_ids.shape[1] - 1
        for row, script in enumerate(self.scripts):
            next_id = script[n_written] if n_written < len(script) else EOS_ID
            scores[row, next_id] = torch.inf
        return scores


@contextmanager
def scripted(scripts: dict[str, list[int]]):
    """For ours: the noise of a position spells the id that the question's script has there.

    The model's own choice is made all the same, so that its time counts, and thrown away.
    """
    real_choice = decode.sample_next_token

    def noise(seed: int, question: str, number: int, n: int) -> list[float]:
        script = (scripts[question] + [EOS_ID] * n)[:n]
        return [i / 2**15 for i in script]  # exact in fp32, and below 1

    def choose(logits: Tensor, temperature: float, top_k: int, noise: Tensor) -> Tensor:
        real_choice(logits, temperature, top_k, noise)
        return (noise * 2**15).long()

    with mock.patch.multiple(decode, uniform_noise=noise, sample_next_token=choose):
        yield


def gold_scripts(problems: list[Problem], tokenizer: Tokenizer, n: int) -> dict[str, list[int]]:
    """The ids of n gold rationales, by question, in which the calculator would change nothing."""
    scripts: dict[str, list[int]] = {}
    for problem in problems:
        ids = tokenizer.encode(format_rationale(problem.rationale), MAX_RATIONALE)
        row = RowState(tokenizer, True, Sample(), [])
        for i in ids:
            row.take(i)
        if row.sample.ids == ids[:-1] and len(scripts) < n:
            scripts[problem.question] = ids
    return scripts


# --------------------------------------------------------------------------------------- the peers


class ReReadingCalculator:
    """The authors' way of a calculator: at every step the whole text of every row is read again."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.queues: dict[int, list[int]] = {}  # by row: ids that still have to be written

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(input_ids[:, 1:].tolist()):
            if EOS_ID in ids:
                continue
            if not self.queues.get(row):
                text = "".join(self.tokenizer.piece(i) for i in ids)
                found = re.search(r"\[([^\[\]=]*)=$", text)
                result = calculate(found[1]) if found else None
                if result is not None:
                    self.queues[row] = self.tokenizer.encode(f"{result}]")[:-1]  # without EOS
            if self.queues.get(row):
                scores[row] = -torch.inf
                scores[row, self.queues[row].pop(0)] = 0
        return scores


def load_peer(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """The checkpoint in transformers' hands."""
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    return model.to(device, dtype).eval()


def load_ctranslate2(folder: Path, vocabulary: Path, n_threads: int):
    """The checkpoint in CTranslate2's hands, None where that is not installed."""
    if ctranslate2 is None:
        return None
    tokenizer = transformers.T5Tokenizer(str(vocabulary / "spiece.model"), legacy=True)
    tokenizer.save_pretrained(folder)
    converted = f"{folder}-converted"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(converted)
    threads = {"inter_threads": 1, "intra_threads": n_threads}
    return ctranslate2.Translator(converted, compute_type="float32", **threads)


def build(size: str, folder: Path) -> Path:
    """Save random weights that end no text: EOS has the logit 0, which is never among the largest."""
    torch.manual_seed(0)
    model = T5(SIZES[size])
    model.lm_head.weight.data[EOS_ID] = 0
    save_flan_t5(model, folder)
    return folder


# ----------------------------------------------------------------------------------- the measuring


def take_turns(systems: dict[str, Callable[[], object]], repeats: int) -> tuple[dict, dict]:
    """Run every system once, then all again, `repeats` times: seconds and last results, by system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    results = {}
    for _ in range(repeats):
        for name, run in systems.items():
            began = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, results


def compare(ours: list[float], theirs: list[float]) -> str:
    """How many times ours theirs is, turn by turn: the median (the smallest to the largest)."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def print_rows(
    label: str, seconds: dict[str, list[float]], n_tokens: int = 0, n_steps: int = 0
) -> None:
    """A row for each peer (the first system is ours): tokens/s, or milliseconds a step."""
    figures = {}
    for name, spent in seconds.items():
        if n_tokens > 0:
            figures[name] = f"{n_tokens / statistics.median(spent):,.0f} tokens/s"
        else:
            figures[name] = f"{1000 * statistics.median(spent) / n_steps:.3f} ms"
    ours, *peers = seconds
    for peer in peers:
        ratio = compare(seconds[ours], seconds[peer])
        print(f"| {label} | {figures[ours]} | {peer} | {figures[peer]} | {ratio} |", flush=True)


@torch.inference_mode()
def ceilings(dtype: torch.dtype, device: str) -> float:
    """Print what is possible here in a large product and a large read; return the latter's bytes/s."""
    width = 1024 if device == "cpu" else 8192
    left = torch.randn(2 * width, width, dtype=dtype, device=device)
    right = torch.randn(width, width, dtype=dtype, device=device)
    memory = torch.randn(2**26 if device == "cpu" else 2**30, dtype=dtype, device=device)

    def multiply() -> None:
        (left @ right)[0, 0].item()  # waits for the GPU

    def read() -> None:
        memory.sum().item()

    seconds, _ = take_turns({"product": multiply, "read": read}, 10)
    product, reading = [statistics.median(spent) for spent in seconds.values()]
    operations = 2 * left.numel() * width / product
    bandwidth = memory.nbytes / reading
    print(f"Ceilings, {dtype}: {operations / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.1f} GB/s")
    return bandwidth


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the most (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", status)[1])


def in_new_process(function: Callable, *arguments: object):
    """function(*arguments), in a process that has done nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# --------------------------------------------------------------------------------------- the cases


class Bench:
    """One checkpoint in our hands and in transformers', and the cases that are measured on it."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, repeats: int, dtype=torch.float32, device="cpu"
    ):
        self.model = load_flan_t5(folder, dtype, device)
        self.peer = load_peer(folder, dtype, device)
        self.tokenizer = tokenizer
        self.repeats = repeats
        self.ours(["Warm up."], 1, max_new_tokens=2)
        self.theirs(["Warm up."], 1, max_new_tokens=2)

    def ours(self, questions: list[str], batch_size: int, **options) -> list[list[int]]:
        """Our ids of every first sample."""
        rows = generate(self.model, self.tokenizer, questions, batch_size=batch_size, **options)
        return [samples[0].ids for samples in rows]

    def theirs(
        self, questions: list[str], batch_size: int, calculator=False, scripts=None, **options
    ) -> list[list[int]]:
        """transformers' `generate`, batch by batch: the ids of every row, without EOS."""
        rows = []
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            ids = [self.tokenizer.encode(question, MAX_QUESTION) for question in part]
            input_ids, mask = pad_batch(ids, self.model.device)
            processors = transformers.LogitsProcessorList()
            if scripts is not None:
                processors.append(Script([scripts[question] for question in part]))
            if calculator:
                processors.append(ReReadingCalculator(self.tokenizer))
            options |= {"num_beams": 1, "logits_processor": processors}
            written = self.peer.generate(input_ids=input_ids, attention_mask=mask, **options)
            for row in written[:, 1:].tolist():
                rows.append(row[: row.index(EOS_ID)] if EOS_ID in row else row)
        return rows

    def greedy(
        self, label: str, questions: list[str], batch_size: int, n_tokens: int, third=None
    ) -> None:
        """Rationales of n_tokens each, no calculator. third: CTranslate2, where it is installed."""
        options = {"max_new_tokens": n_tokens}
        systems = {
            "ours": partial(self.ours, questions, batch_size, calculator=False, **options),
            "transformers": partial(self.theirs, questions, batch_size, **options),
        }
        if third is not None:
            pieces = []
            for question in questions:
                ids = self.tokenizer.encode(question, MAX_QUESTION)
                pieces.append([self.tokenizer.pieces.id_to_piece(i) for i in ids])

            def ctranslate2_rows() -> list[list[str]]:
                length = {"min_decoding_length": n_tokens, "max_decoding_length": n_tokens}
                return [
                    r.hypotheses[0] for r in third.translate_batch(pieces, beam_size=1, **length)
                ]

            systems["CTranslate2"] = ctranslate2_rows
        seconds, results = take_turns(systems, self.repeats)
        for name, rows in results.items():
            assert all(len(row) == n_tokens for row in rows), f"{name} wrote other lengths"
        label = f"{label}, batch {batch_size}, {n_tokens} tokens each"
        print_rows(label, seconds, n_tokens=n_tokens * len(questions))

    def gold(self, scripts: dict[str, list[int]]) -> None:
        """Real lengths with the calculator: both systems are made to spell the gold rationales."""
        options = {"calculator": True, "max_new_tokens": MAX_RATIONALE}
        systems = {
            "ours": partial(self.ours, list(scripts), 32, **options),
            "re-reading": partial(self.theirs, list(scripts), 32, scripts=scripts, **options),
        }
        with scripted(scripts):
            seconds, results = take_turns(systems, self.repeats)
        for name, rows in results.items():
            assert [[*row, EOS_ID] for row in rows] == list(scripts.values()), f"{name} strayed"
        label = f"3 {len(scripts)} gold rationales, calculator, batch 32"
        print_rows(label, seconds, n_tokens=sum(map(len, scripts.values())))

    def five_samples(self, questions: list[str], n_tokens: int) -> None:
        """Ours with the calculator, all samples at once, against both ways of transformers."""
        n = len(questions)
        options = {"temperature": 0.7, "top_k": TOP_K, "max_new_tokens": n_tokens}
        theirs = partial(self.theirs, questions, n, do_sample=True, **options)

        def five_passes() -> None:
            for _ in range(5):
                theirs(calculator=True)

        systems = {
            "ours": partial(self.ours, questions, 5 * n, n_samples=5, **options),
            "num_return_sequences=5, no calculator": partial(theirs, num_return_sequences=5),
            "five passes, re-reading": five_passes,
        }
        seconds, _ = take_turns(systems, self.repeats)
        print_rows(f"4 five samples of {n} questions", seconds, n_tokens=5 * n * n_tokens)

    def calculator_cost(self, scripts: list[list[int]]) -> None:
        """What a calculator takes of a step of 32 rows, without any model: ours with and without."""
        ids, _ = pad_batch(
            [script[:-1] for script in scripts], padding=self.tokenizer.encode(".")[0]
        )
        ids = torch.nn.functional.pad(ids[:, :128], (1, 0), value=START_ID)  # (32, steps + 1)
        scores = torch.zeros(len(ids), self.model.config.vocab_size)

        def ours(calculator: bool) -> None:
            rows = [RowState(self.tokenizer, calculator, Sample(), []) for _ in ids]
            for column in ids.T[1:].tolist():
                for row, i in zip(rows, column):
                    row.take(i)

        def re_reading() -> None:
            reader = ReReadingCalculator(self.tokenizer)
            for length in range(1, ids.shape[1]):
                reader(ids[:, :length], scores)

        systems = {"with": partial(ours, True), "without": partial(ours, False), "re": re_reading}
        seconds, _ = take_turns(systems, 3 * self.repeats)
        cost = [a - b for a, b in zip(seconds["with"], seconds["without"])]
        costs = {"ours": cost, "re-reading": seconds["re"]}
        print_rows("5 calculator, per step of 32 rows", costs, n_steps=ids.shape[1] - 1)

    def texts(self, questions: list[str]) -> None:
        """A real checkpoint, from text to text with the calculator, one turn; counts equal texts."""
        options = {"calculator": True, "max_new_tokens": MAX_RATIONALE}

        def text_of(write: Callable) -> list[str]:
            return [self.tokenizer.decode(row) for row in write(questions, 32, **options)]

        systems = {"ours": partial(text_of, self.ours), "re-reading": partial(text_of, self.theirs)}
        seconds, texts = take_turns(systems, 1)
        n_equal = sum(a == b for a, b in zip(texts["ours"], texts["re-reading"], strict=True))
        n_tokens = sum(len(self.tokenizer.encode(text)) for text in texts["ours"])
        label = f"7 {len(questions)} questions to text, batch 32, {n_equal} texts equal"
        print_rows(label, seconds, n_tokens=n_tokens)

    @torch.inference_mode()
    def steps(self, label: str, questions: list[str], n_steps: int, bandwidth: float) -> None:
        """Milliseconds a step of one full batch: recorded (on a GPU), eager, and only reading."""
        states = encode_questions(self.model, self.tokenizer, questions)
        cache = KVCache(self.model, len(states), n_steps, max(len(state) for state in states))
        cache.admit(list(range(len(states))), self.model, states)

        def run(step: Callable[[Tensor, KVCache], Tensor]) -> None:
            cache.lengths.zero_()
            ids = cache.lengths.clone()
            for _ in range(n_steps):
                ids = step(ids, cache).argmax(-1)
            ids.tolist()  # waits for the GPU

        systems = {"eager": partial(run, self.model.step)}
        if self.model.device.type == "cuda":
            systems = {"recorded": partial(run, record_step(self.model, cache))} | systems
        seconds, _ = take_turns(systems, self.repeats)
        read = [cache.keys, cache.values, cache.source_keys, cache.source_values]
        read += [*self.model.decoder.parameters(), self.model.lm_head.weight]
        least = n_steps * sum(tensor.nbytes for tensor in read) / bandwidth
        seconds["reading weights and cache"] = [least] * self.repeats
        print_rows(label, seconds, n_steps=n_steps)

    def draw(self, questions: list[str], n_tokens: int, path: Path) -> None:
        """Speed over batch size, and over the length of a batch of 32; one turn each."""
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
        axes = {"batch size": [1, 8, 32, 128], "tokens per rationale": [50, 100, 200, 300]}
        for panel, (axis, ticks) in zip(panels, axes.items()):
            speeds = []
            for tick in ticks:
                batch, length = (tick, n_tokens) if axis == "batch size" else (32, tick)
                theirs = partial(self.theirs, questions[:batch], batch, max_new_tokens=length)
                systems = {
                    "ours": partial(self.ours, questions[:batch], batch, max_new_tokens=length),
                    "transformers, no calculator": theirs,
                    "transformers, re-reading": partial(theirs, calculator=True),
                }
                seconds, _ = take_turns(systems, 1)
                label = f"batch {batch}, {length} tokens each"
                print_rows(label, seconds, n_tokens=batch * length)
                speeds.append([batch * length / spent for [spent] in seconds.values()])
            panel.plot(ticks, speeds, "o-", label=list(systems))
            panel.set(xscale="log", yscale="log", xlabel=axis, xticks=ticks, xticklabels=ticks)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("tokens per second")
        panels[0].legend(frameon=False)
        figure.savefig(path, bbox_inches="tight")


def measure_memory(
    folder: Path, vocabulary: Path, questions: list[str], n_tokens: int
) -> tuple[int, int]:
    """Bytes that `generate` adds to this process's memory at the most, and the formula of KVCache."""
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(folder), Tokenizer(vocabulary)
    n = len(questions)
    generate(model, tokenizer, ["Warm up."], max_new_tokens=2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    generate(model, tokenizer, questions, max_new_tokens=n_tokens, calculator=False, batch_size=n)
    grown = resident("VmHWM") - before
    c = model.config
    source_length = max(len(tokenizer.encode(question, MAX_QUESTION)) for question in questions)
    numbers = 2 * c.n_layers * n * c.n_heads * c.d_kv * (n_tokens + source_length)
    return grown, 4 * numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and questions")
    parser.add_argument("--cases", type=int, nargs="+", choices=range(1, 10), help=CASES)
    parser.add_argument("--vocabulary", type=Path, default=TINY, help="folder with spiece.model")
    parser.add_argument("--questions", type=Path, help="JSONL of problems with rationales")
    parser.add_argument("--checkpoint", type=Path, help="for case 7")
    parser.add_argument("--repeats", type=int, default=3, help="turns (3)")
    parser.add_argument("--threads", type=int, default=1, help="of every system (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: case 9")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base"], help="for case 9")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 96, 256], help="for case 9")
    parser.add_argument("--figure", type=Path, help="only draw this (needs matplotlib)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    tokenizer = Tokenizer(args.vocabulary)
    problems = load_problems(args.questions) if args.questions else make_problems(1400, seed=0)
    questions = [problem.question for problem in problems]
    scripts = gold_scripts(problems, tokenizer, 64)
    n_tokens = 32 if args.quick else 128
    cases = args.cases or ([9] if args.device == "cuda" else range(1, 9))
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{args.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {args.repeats} turns"
    )
    ceilings(torch.float32, "cpu")
    if ctranslate2 is None:
        print("CTranslate2 is not installed: left out")
    print("\n| case | ours | beside | its figure | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = build("small", scratch / "small")
        small = Bench(folder, tokenizer, args.repeats)
        if args.figure:
            small.draw(questions, n_tokens, args.figure)
            return
        for case in cases:
            if case == 1:
                third = load_ctranslate2(folder, args.vocabulary, args.threads)
                small.greedy("1 small", questions[:32], 32, n_tokens, third)
            elif case == 2:
                small.greedy("2 small", questions[:2], 1, n_tokens)
            elif case == 3:
                n = 16 if args.quick else 64
                small.gold({question: scripts[question] for question in list(scripts)[:n]})
            elif case == 4:
                small.five_samples(questions[: 8 if args.quick else 32], n_tokens)
            elif case == 5:
                small.calculator_cost(list(scripts.values())[:32])
            elif case == 6:
                base = Bench(build("base", scratch / "base"), tokenizer, args.repeats)
                base.greedy("6 base", questions[:16], 16, n_tokens)
            elif case == 7 and args.checkpoint:
                real = Bench(args.checkpoint, Tokenizer(args.checkpoint), args.repeats)
                real.texts(questions[: 64 if args.quick else None])
            elif case == 8:
                arguments = (folder, args.vocabulary, questions[:32], n_tokens)
                grown, formula = in_new_process(measure_memory, *arguments)
                print(
                    f"| 8 memory of 32 slots, {n_tokens} tokens | {grown / 2**20:.0f} MiB | formula "
                    f"of KVCache | {formula / 2**20:.0f} MiB | {formula / grown:.2f} |"
                )
            elif case == 9:
                for size in args.sizes:
                    path = build(size, scratch / size)
                    large = Bench(path, tokenizer, args.repeats, torch.bfloat16, args.device)
                    bandwidth = ceilings(torch.bfloat16, args.device)
                    for batch in args.batches:
                        large.steps(
                            f"9 {size}, batch {batch}", questions[:batch], n_tokens, bandwidth
                        )


if __name__ == "__main__":
    main()
