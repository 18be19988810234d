"""Decoding speed against transformers' `generate`: same weights, questions and threads, in turns.

    python -m tests.bench.decode [ROW ...] [--quick] [--repeats N] [--threads N]
    python -m tests.bench.decode --vocabulary DIR --questions gsm8k/test.jsonl
    python -m tests.bench.decode gpu --sizes base large --batches 32 96 256

    equal       batches of 32 and of 1, equal lengths, no calculator; CTranslate2 runs the first too
    gold        gold rationales at their real lengths, which both are made to write, with calculator
    samples     five samples per question, ours with the calculator, transformers in two ways
    calculator  the time that the calculator takes in a step
    memory      measured, against the formula of decode.KVCache
    growth      cost as the work grows, plotted in --out DIR; evaluation with --checkpoint DIR of
                a tiny run
    gpu         bf16, with the calculator, with and without decode.fast_step

All rows except the last use the `small` shape in fp32. Without files: the vocabulary of data/tiny
and synthetic problems. With them: Flan-T5's spiece.model and GSM8K's test.jsonl. Weights are
random because speed does not depend on them; denormals are flushed on both sides.

Figures are medians, with the smallest and the largest ratio of two adjacent turns in brackets.
"""

import argparse
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor

import decode
from data.problems import Problem, load_problems
from data.synthetic import make_problems
from data.terminal import run_command
from decode import TOP_K, KVCache, RowState, Sample, generate
from model import SIZES, START_ID, T5, load_flan_t5, save_flan_t5
from tests.bench.drawing import BLUE, RED, add_plain_style, new_figure, save_figures
from tests.bench.peers import (
    ReReadingCalculator,
    Script,
    ctranslate2,
    gold_scripts,
    load_ctranslate2,
    load_peer,
    scripted,
)
from tokenizer import EOS_ID, MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

TINY = Path(__file__).parents[2] / "data" / "tiny"


def build(size: str, vocabulary: Path, folder: Path) -> Path:
    """Save random weights that never end a text: EOS has logit 0, never among the largest."""
    torch.manual_seed(0)
    model = T5(SIZES[size])
    model.lm_head.weight.data[EOS_ID] = 0
    save_flan_t5(model, folder)
    shutil.copy(vocabulary / "spiece.model", folder)
    return folder


# --------------------------------------------------------------------------------------- measuring


def take_turns(systems: dict[str, Callable], repeats: int) -> tuple[dict, dict]:
    """Run all systems in turn, `repeats` times; return their seconds and their last results."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    results = {}
    for _ in range(repeats):
        for name, run in systems.items():
            began = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, results


def spread(ours: list[float], theirs: list[float]) -> str:
    """Ratio of theirs to ours, turn by turn: the median (the smallest to the largest)."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare(label: str, systems: dict[str, Callable], repeats: int, batch: int) -> list[float]:
    """Print a row for every system except the first, which is ours; return all tokens/s.

    A system is a function that writes and returns samples, `batch` at a time. A full step is the
    time for one token in every slot at this speed.
    """
    seconds, results = take_turns(systems, repeats)
    per_token = {}
    speeds = []
    for name, samples in results.items():
        n_tokens = sum(len(sample.ids) for sample in samples)
        per_token[name] = [spent / n_tokens for spent in seconds[name]]
        speeds.append(1 / statistics.median(per_token[name]))
    ours, *peers = systems
    for peer, speed in zip(peers, speeds[1:]):
        pairs = zip(results[ours], results[peer], strict=True)
        n_equal = sum(our.text == their.text for our, their in pairs)  # sampled texts: by chance
        cells = [label, f"{speeds[0]:,.0f}", f"{1000 * batch / speeds[0]:.1f} ms", peer]
        cells += [f"{speed:,.0f}", spread(per_token[ours], per_token[peer])]
        cells += [f"{n_equal} of {len(results[ours])}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return speeds


def ceilings(dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """This machine's limits: operations/s in a large product, and bytes/s in a large read."""
    width = 2048 if device == "cpu" else 8192
    matrix = torch.randn(width, width, dtype=dtype, device=device)
    memory = torch.zeros(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    memory = memory.view(dtype)

    def multiply() -> None:
        (matrix @ matrix)[0, 0].item()  # waits for the GPU

    def read() -> None:
        memory.sum().item()

    seconds, _ = take_turns({"product": multiply, "read": read}, 10)
    product, reading = [statistics.median(spent) for spent in seconds.values()]
    return f"{2 * width**3 / product / 1e9:,.0f} GFLOP/s, {memory.nbytes / reading / 1e9:,.1f} GB/s"


def describe_machine(args: argparse.Namespace) -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{args.threads} threads, {args.repeats} turns, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the peak (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", status)[1])


def in_new_process(function: Callable, *arguments: object):
    """Return function(*arguments), computed in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------- the rows


class Bench:
    """One checkpoint, loaded by our code and by transformers, to be measured side by side."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.folder = folder
        self.model = load_flan_t5(folder, dtype, device)
        self.peer = load_peer(folder, dtype, device)
        self.tokenizer = Tokenizer(folder)
        self.ours(["Warm up."], 1, max_new_tokens=2)
        self.theirs(["Warm up."], 1, max_new_tokens=2)

    def ours(self, questions: list[str], batch: int, **options) -> list[Sample]:
        rows = generate(self.model, self.tokenizer, questions, batch_size=batch, **options)
        return list(chain.from_iterable(rows))

    def theirs(
        self, questions: list[str], batch: int, calculator=False, scripts=None, **options
    ) -> list[Sample]:
        """transformers' `generate`, from text to text, batch by batch."""
        samples = []
        for start in range(0, len(questions), batch):
            part = questions[start : start + batch]
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
                if EOS_ID in row:
                    row = row[: row.index(EOS_ID)]
                samples.append(Sample(self.tokenizer.decode(row), row))
        return samples

    def both(self, questions: list[str], batch: int, **options) -> dict[str, Callable]:
        """Ours and transformers, by default with the calculator (theirs re-reads)."""
        options = {"calculator": True} | options
        peer = "re-reading" if options["calculator"] else "transformers"
        return {
            "ours": partial(self.ours, questions, batch, **options),
            peer: partial(self.theirs, questions, batch, **options),
        }

    def eager(self, questions: list[str], batch: int, **options) -> list[Sample]:
        """Ours on a GPU, with every kernel of a step launched separately."""

        def step(model, cache):
            return partial(model.step, cache=cache)

        with mock.patch.object(decode, "fast_step", step):
            return self.ours(questions, batch, **options)

    def five_passes(self, questions: list[str], batch: int, **options) -> list[Sample]:
        """Five samples of each question, drawn as the authors do."""
        samples = []
        for _ in range(5):
            samples += self.theirs(questions, batch, calculator=True, **options)
        return samples


def measure_equal(small: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    """All rationales have the same length; none ends early, and no calculator is used."""
    for batch in (32, 1):
        asked = [problem.question for problem in problems[: max(2, batch)]]  # batch 1: two in turn
        systems = small.both(asked, batch, max_new_tokens=args.tokens, calculator=False)
        if batch == 32 and ctranslate2:
            write = load_ctranslate2(small.folder, small.tokenizer, args.threads)
            systems["CTranslate2"] = partial(write, asked, args.tokens)
        compare(f"batch {batch}, {args.tokens} tokens each", systems, args.repeats, batch)


def measure_gold(small: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    """GSM8K's demands on a decoder: different lengths, and a calculation in every line."""
    scripts = gold_scripts(problems, small.tokenizer, 16 if args.quick else 64)
    systems = small.both(list(scripts), 32, max_new_tokens=MAX_RATIONALE)
    systems["re-reading"] = partial(systems["re-reading"], scripts=scripts)
    with scripted(scripts):
        compare(f"{len(scripts)} gold rationales, calculator", systems, args.repeats, 32)


def measure_samples(small: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    """Five samples of each question, which is encoded once or once per sample."""
    n = 8 if args.quick else 32
    asked = [problem.question for problem in problems[:n]]
    sampling = {"max_new_tokens": args.tokens, "temperature": 0.7, "top_k": TOP_K}
    at_once = partial(small.theirs, do_sample=True, num_return_sequences=5, **sampling)
    systems = {
        "ours": partial(small.ours, asked, 5 * n, n_samples=5, **sampling),
        "num_return_sequences=5, no calculator": partial(at_once, asked, n),
        "five passes, re-reading": partial(small.five_passes, asked, n, do_sample=True, **sampling),
    }
    compare(f"five samples of {n} questions, calculator", systems, args.repeats, 5 * n)


def measure_calculator(small: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    """Milliseconds that each calculator takes in one step of 32 rows, without a model."""
    tokenizer = small.tokenizer
    scripts = gold_scripts(problems, tokenizer, 32).values()
    rationales = [script[:-1] for script in scripts]
    ids, _ = pad_batch(rationales, padding=tokenizer.encode(".")[0])
    ids = torch.nn.functional.pad(ids[:, :128], (1, 0), value=START_ID)  # (B, steps + 1)
    n_steps = ids.shape[1] - 1
    scores = torch.zeros(len(ids), 32128)

    def ours(calculator: bool) -> None:
        rows = [RowState(tokenizer, calculator, Sample(), []) for _ in ids]
        for column in ids.T[1:].tolist():
            for row, i in zip(rows, column):
                row.take(i)

    def re_reading() -> None:
        reader = ReReadingCalculator(tokenizer)
        for length in range(1, n_steps + 1):
            reader(ids[:, :length], scores)

    systems = {"with": partial(ours, True), "without": partial(ours, False), "re": re_reading}
    seconds, _ = take_turns(systems, 10 * args.repeats)
    # A difference of two short times: its median is steady, a single one is noise.
    cost = statistics.median(seconds["with"]) - statistics.median(seconds["without"])
    theirs = statistics.median(seconds["re"])
    both = [f"{1000 * spent / n_steps:.3f} ms" for spent in (cost, theirs)]
    label = f"the calculator in a step of {len(ids)} rows"
    print(f"| {label} | | {both[0]} | re-reading, {both[1]} | | {theirs / cost:.0f} | |")


def measure_memory(small: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    asked = [problem.question for problem in problems[:32]]
    memory = in_new_process(memory_of_generate, small.folder, asked, args.tokens)
    print(f"| memory, 32 slots, {args.tokens} tokens: {memory} | | | | | | |")


def memory_of_generate(folder: Path, questions: list[str], n_tokens: int) -> str:
    """In a new process: KVCache's size, its docstring's formula, and the memory of `generate`."""
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    n = len(questions)
    generate(model, tokenizer, ["Warm up."], max_new_tokens=2)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    generate(model, tokenizer, questions, max_new_tokens=n_tokens, batch_size=n)
    grown = resident("VmHWM") - before
    c = model.config
    source_length = max(len(tokenizer.encode(question, MAX_QUESTION)) for question in questions)
    formula = 4 * 2 * c.n_layers * n * c.n_heads * c.d_kv * (n_tokens + source_length)
    cache = KVCache(model, n, n_tokens, source_length)
    held = sum(part.nbytes for part in vars(cache).values() if isinstance(part, Tensor))
    return (
        f"the cache holds {held / 2**20:.1f} MiB, by its formula {formula / 2**20:.1f}; `generate` "
        f"takes {grown / 2**20:.0f} at the most, with the encoder's work"
    )


def measure_growth(small: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    """Cost per token with more slots, longer rationales and more problems; one turn each."""
    axes = {"batch size": [1, 8, 32, 128], "tokens per rationale": [50, 100, 200, 300]}
    if args.quick:
        axes = {"batch size": [1, 8], "tokens per rationale": [10, 20]}
    speeds: dict[str, list[list[float]]] = {axis: [] for axis in axes}
    for axis, ticks in axes.items():
        for tick in ticks:
            batch, length = (tick, args.tokens) if axis == "batch size" else (32, tick)
            asked = [problem.question for problem in problems[:batch]]
            systems = small.both(asked, batch, max_new_tokens=length)
            label = f"batch {batch}, {length} tokens each, calculator"
            speeds[axis].append(compare(label, systems, 1, batch))
    if args.out:
        draw(axes, speeds, args.out)
    model, tokenizer = load_flan_t5(args.checkpoint), Tokenizer(args.checkpoint)
    questions = [problem.question for problem in make_problems(3000, seed=0)]
    for n in (300, 1000, 3000):
        began = time.process_time()
        generate(model, tokenizer, questions[:n], max_new_tokens=150, batch_size=256)
        spent = time.process_time() - began
        print(f"| {n} problems of --size tiny | {spent:.1f} s of CPU, {n / spent:.0f} a second | |")


def draw(axes: dict[str, list[int]], speeds: dict[str, list[list[float]]], out: Path) -> None:
    """Plot tokens per second over batch size and over length, for both systems."""
    if not add_plain_style():
        return
    figure, panels = new_figure(9, 3.6, 2)
    panels[1].sharey(panels[0])
    names = {"this code": BLUE, "transformers, re-reading": RED}
    for panel, (axis, ticks) in zip(panels, axes.items()):
        for (name, color), speed in zip(names.items(), zip(*speeds[axis])):
            panel.plot(ticks, speed, "o-", label=name, color=color)
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=ticks, xticklabels=ticks)
        panel.set(yticks=(50, 100, 200, 400), yticklabels=(50, 100, 200, 400))
        panel.xaxis.set_minor_formatter("")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(frameon=False)
    save_figures({"decoding": figure}, out)


def measure_gpu(_: Bench, problems: list[Problem], args: argparse.Namespace) -> None:
    """In bf16 on a CUDA GPU, next to the limits set by its memory and its products."""
    questions = [problem.question for problem in problems] * 2
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = build(size, args.vocabulary, Path(scratch))
            large = Bench(folder, torch.bfloat16, "cuda")
            print(f"| {size}; ceilings in bf16: {ceilings(torch.bfloat16, 'cuda')} | | | | | | |")
            for batch in args.batches:
                asked = questions[: 4 * batch]
                systems = large.both(asked, batch, max_new_tokens=args.tokens)
                eager = partial(large.eager, asked, batch, max_new_tokens=args.tokens)
                systems["ours, not recorded"] = eager
                compare(f"{size}, batch {batch}, bf16", systems, args.repeats, batch)


ROWS = {
    "equal": measure_equal,
    "gold": measure_gold,
    "samples": measure_samples,
    "calculator": measure_calculator,
    "memory": measure_memory,
    "growth": measure_growth,
    "gpu": measure_gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all but gpu")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and questions")
    parser.add_argument("--vocabulary", type=Path, default=TINY, help="folder with spiece.model")
    parser.add_argument("--questions", type=Path, help="JSONL of problems with rationales")
    parser.add_argument("--repeats", type=int, default=3, help="turns (3)")
    parser.add_argument("--threads", type=int, default=1, help="of every system (1)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base"], help="for gpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 96, 256], help="for gpu")
    parser.add_argument("--out", type=Path, help="folder for the picture of growth")
    parser.add_argument("--checkpoint", type=Path, default=TINY, help="for growth: data/tiny")
    args = parser.parse_args()
    args.rows = args.rows or [name for name in ROWS if name != "gpu"]
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"{name} is no row; there are {', '.join(ROWS)}")
    args.tokens = 32 if args.quick else 128
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    problems = load_problems(args.questions) if args.questions else make_problems(1400, seed=0)
    third = ctranslate2.__version__ if ctranslate2 else "is not installed: left out"
    print(f"{describe_machine(args)}, CTranslate2 {third}\nCeilings in fp32: {ceilings()}\n")
    print("| row | tokens/s | a full step | beside | its tokens/s | ratio | equal texts |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        small = Bench(build("small", args.vocabulary, Path(scratch) / "small"))
        for name in args.rows:
            ROWS[name](small, problems, args)


if __name__ == "__main__":
    run_command(main)
