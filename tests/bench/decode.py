"""Decoding speed beside transformers' `generate`: same weights, questions and threads, in turns.

    python -m tests.bench.decode [--quick] [--cases 1 2 ...] [--repeats N] [--threads N]
    python -m tests.bench.decode --vocabulary DIR --questions gsm8k/test.jsonl --checkpoint DIR
    python -m tests.bench.decode --figure FILE.svg      # cost as the work grows
    python -m tests.bench.decode --device cuda --sizes base large --batches 32 96      # case 9

    1, 2   `small` shape, batches of 32 and of 1, equal lengths, no calculator
    3      gold rationales at their real lengths, which both are made to spell, with the calculator
    4      five samples a question, ours with the calculator, transformers in two ways
    5      what the calculator takes of a step
    6      `base` shape, a batch of 16, equal lengths, no calculator
    7      a checkpoint's texts, with the calculator, one turn
    8      memory beside the formula of decode.KVCache
    9      in bf16, with the calculator; on a GPU with and without decode.record_step

Without files: the vocabulary of data/tiny and synthetic problems. With them: Flan-T5's spiece.model
and GSM8K's test.jsonl; case 7 needs a checkpoint that writes rationales. Other weights are random,
for speed does not depend on them. All but case 9 is in fp32; denormals are flushed on both sides.

Figures are medians; in brackets stand the smallest and the largest ratio of two neighbouring turns.
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
from contextlib import contextmanager
from functools import partial
from itertools import chain
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
from decode import TOP_K, KVCache, RowState, Sample, generate
from model import SIZES, START_ID, T5, load_flan_t5, save_flan_t5
from tokenizer import EOS_ID, MAX_QUESTION, MAX_RATIONALE, Tokenizer, format_rationale, pad_batch

try:
    import ctranslate2
    import google.protobuf  # noqa: F401 (its converter reads the vocabulary with this)
except ModuleNotFoundError:
    ctranslate2 = None

TINY = Path(__file__).parents[2] / "data" / "tiny"
GREEDY = {1: ("small", 32), 2: ("small", 1), 6: ("base", 16)}  # case -> size, batch


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


class Script:
    """For transformers: the next id of each row's script gets the largest score."""

    def __init__(self, scripts: list[list[int]]):
        self.scripts = scripts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n_written = input_ids.shape[1] - 1
        for row, script in enumerate(self.scripts):
            scores[row, script[n_written] if n_written < len(script) else EOS_ID] = torch.inf
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


def load_peer(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """The checkpoint in transformers' hands."""
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    return model.to(device, dtype).eval()


def load_ctranslate2(folder: Path, tokenizer: Tokenizer, n_threads: int) -> Callable:
    """The checkpoint in CTranslate2's hands: a function that writes n_tokens for each question."""
    converted = f"{folder}-converted"
    pieces = transformers.T5Tokenizer(str(folder / "spiece.model"), legacy=True)
    pieces.save_pretrained(folder)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(converted)
    translator = ctranslate2.Translator(
        converted, inter_threads=1, intra_threads=n_threads, compute_type="float32"
    )

    def write(questions: list[str], n_tokens: int) -> list[Sample]:
        ids = [tokenizer.encode(question, MAX_QUESTION) for question in questions]
        source = [pieces.convert_ids_to_tokens(row) for row in ids]
        lengths = {"min_decoding_length": n_tokens, "max_decoding_length": n_tokens}
        samples = []
        for result in translator.translate_batch(source, beam_size=1, **lengths):
            row = pieces.convert_tokens_to_ids(result.hypotheses[0])
            samples.append(Sample(tokenizer.decode(row), row))
        return samples

    return write


def build(size: str, vocabulary: Path, folder: Path) -> Path:
    """Save random weights that end no text: EOS has the logit 0, never among the largest."""
    torch.manual_seed(0)
    model = T5(SIZES[size])
    model.lm_head.weight.data[EOS_ID] = 0
    save_flan_t5(model, folder)
    shutil.copy(vocabulary / "spiece.model", folder)
    return folder


# ----------------------------------------------------------------------------------- the measuring


def take_turns(systems: dict[str, Callable], repeats: int) -> tuple[dict, dict]:
    """Run all systems, one after the other, `repeats` times: their seconds, and last results."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    results = {}
    for _ in range(repeats):
        for name, run in systems.items():
            began = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, results


def spread(ours: list[float], theirs: list[float]) -> str:
    """Theirs over ours, turn by turn: the median (the smallest to the largest)."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare(label: str, systems: dict[str, Callable], repeats: int, batch: int) -> list[float]:
    """Print a row for every system but the first, which is ours; return all tokens/s.

    A system is a function that writes and returns samples, `batch` at a time. A full step is what
    one token in every slot takes at this speed.
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
        n_equal = sum(our.text == their.text for our, their in pairs)
        cells = [label, f"{speeds[0]:,.0f}", f"{1000 * batch / speeds[0]:.1f} ms", peer]
        cells += [f"{speed:,.0f}", spread(per_token[ours], per_token[peer])]
        cells += [f"{n_equal} of {len(results[ours])}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return speeds


def ceilings(dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """What is possible here: operations/s in a large product, and bytes/s in a large read."""
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
    """Bytes of this process in memory, now (VmRSS) or at the most (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", status)[1])


def in_new_process(function: Callable, *arguments: object):
    """function(*arguments), in a process that has done nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# --------------------------------------------------------------------------------------- the cases


class Bench:
    """One checkpoint in our hands and in transformers', and the cases measured on it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
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
        """Ours and transformers, with the calculator (theirs re-reads) unless options say no."""
        options = {"calculator": True} | options
        peer = "re-reading" if options["calculator"] else "transformers"
        return {
            "ours": partial(self.ours, questions, batch, **options),
            peer: partial(self.theirs, questions, batch, **options),
        }

    def eager(self, questions: list[str], batch: int, **options) -> list[Sample]:
        """Ours on a GPU, where every kernel of a step is launched by itself."""
        with mock.patch.object(decode, "record_step", return_value=self.model.step):
            return self.ours(questions, batch, **options)

    def five_passes(self, questions: list[str], batch: int, **options) -> list[Sample]:
        """Five samples of each question as the authors draw them."""
        samples = []
        for _ in range(5):
            samples += self.theirs(questions, batch, calculator=True, **options)
        return samples


def calculator_cost(tokenizer: Tokenizer, scripts: list[list[int]], repeats: int) -> None:
    """Milliseconds that a calculator takes of one step of all rows, without any model."""
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
    seconds, _ = take_turns(systems, 3 * repeats)
    cost = [a - b for a, b in zip(seconds["with"], seconds["without"])]
    both = [f"{1000 * statistics.median(s) / n_steps:.3f} ms" for s in (cost, seconds["re"])]
    label = f"5 the calculator in a step of {len(ids)} rows"
    print(f"| {label} | | {both[0]} | re-reading, {both[1]} | | {spread(cost, seconds['re'])} | |")


def measure_memory(folder: Path, questions: list[str], n_tokens: int) -> str:
    """In a new process: what KVCache holds, its docstring's formula, and what `generate` takes."""
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    n = len(questions)
    generate(model, tokenizer, ["Warm up."], max_new_tokens=2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
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


def evaluate_tiny(repeats: int) -> None:
    """Seconds of CPU for greedy answers of data/tiny to more and more problems, 256 at a time."""
    model, tokenizer = load_flan_t5(TINY), Tokenizer(TINY)
    questions = [problem.question for problem in make_problems(3000, seed=0)]
    for n in (300, 1000, 3000):
        spent = []
        for _ in range(repeats):
            began = time.process_time()
            generate(model, tokenizer, questions[:n], max_new_tokens=150, batch_size=256)
            spent.append(time.process_time() - began)
        seconds = statistics.median(spent)
        print(f"| tiny, {n} problems: {seconds:.1f} s, {n / seconds:.0f} a second | | | | | | |")


def draw(bench: Bench, questions: list[str], n_tokens: int, path: Path) -> None:
    """Speed over batch size, and over the length of a batch of 32; one turn each."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    axes = {"batch size": [1, 8, 32, 128], "tokens per rationale": [50, 100, 200, 300]}
    for panel, (axis, ticks) in zip(panels, axes.items()):
        speeds = []
        for tick in ticks:
            batch, length = (tick, n_tokens) if axis == "batch size" else (32, tick)
            both = partial(bench.both, questions[:batch], batch, max_new_tokens=length)
            systems = both(calculator=False) | both()  # ours: the latter, with the calculator
            speeds.append(compare(f"batch {batch}, {length} tokens each", systems, 1, batch))
        panel.plot(ticks, speeds, "o-", label=list(systems))
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=ticks, xticklabels=ticks)
        panel.xaxis.set_minor_formatter("")
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_minor_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and questions")
    parser.add_argument(
        "--cases", type=int, nargs="+", choices=range(1, 10), help="default: 1 to 8"
    )
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
    problems = load_problems(args.questions) if args.questions else make_problems(1400, seed=0)
    third = ctranslate2.__version__ if ctranslate2 else "is not installed: left out"
    print(f"{describe_machine(args)}, CTranslate2 {third}\nCeilings in fp32: {ceilings()}\n")
    print("| case | tokens/s | a full step | beside | its tokens/s | ratio | equal texts |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, problems, Path(scratch))


def measure(args: argparse.Namespace, problems: list[Problem], scratch: Path) -> None:
    """The cases of the command line, in their order."""
    folder = build("small", args.vocabulary, scratch / "small")
    small = Bench(folder)
    questions = [problem.question for problem in problems]
    scripts = gold_scripts(problems, small.tokenizer, 64)
    n_tokens = 32 if args.quick else 128
    sampling = {"max_new_tokens": n_tokens, "temperature": 0.7, "top_k": TOP_K}
    if args.figure:
        evaluate_tiny(args.repeats)
        draw(small, questions, n_tokens, args.figure)
        return
    for case in args.cases or ([9] if args.device == "cuda" else range(1, 9)):
        if case in GREEDY:
            size, batch = GREEDY[case]
            bench = small
            if size != "small":
                bench = Bench(build(size, args.vocabulary, scratch / size))
            asked = questions[: max(2, batch)]
            systems = bench.both(asked, batch, max_new_tokens=n_tokens, calculator=False)
            if case == 1 and ctranslate2:
                write = load_ctranslate2(folder, small.tokenizer, args.threads)
                systems["CTranslate2"] = partial(write, asked, n_tokens)
            label = f"{case} {size}, batch {batch}, {n_tokens} tokens each"
            compare(label, systems, args.repeats, batch)
        elif case == 3:
            n = 16 if args.quick else 64
            systems = small.both(list(scripts)[:n], 32, max_new_tokens=MAX_RATIONALE)
            systems["re-reading"] = partial(systems["re-reading"], scripts=scripts)
            with scripted(scripts):
                compare(f"3 {n} gold rationales, calculator", systems, args.repeats, 32)
        elif case == 4:
            asked = questions[: 8 if args.quick else 32]
            n = len(asked)
            ours = partial(small.ours, n_samples=5, **sampling)
            at_once = partial(small.theirs, do_sample=True, num_return_sequences=5, **sampling)
            passes = partial(small.five_passes, do_sample=True, **sampling)
            systems = {
                "ours": partial(ours, asked, 5 * n),
                "num_return_sequences=5, no calculator": partial(at_once, asked, n),
                "five passes, re-reading": partial(passes, asked, n),
            }
            compare(f"4 five samples of {n} questions, calculator", systems, args.repeats, 5 * n)
        elif case == 5:
            calculator_cost(small.tokenizer, list(scripts.values())[:32], args.repeats)
        elif case == 7 and args.checkpoint:
            real = Bench(args.checkpoint)
            asked = questions[: 64 if args.quick else None]
            systems = real.both(asked, 32, max_new_tokens=MAX_RATIONALE)
            compare(f"7 checkpoint, {len(asked)} questions, calculator", systems, 1, 32)
        elif case == 8:
            memory = in_new_process(measure_memory, folder, questions[:32], n_tokens)
            print(f"| 8 memory, 32 slots, {n_tokens} tokens: {memory} | | | | | | |")
        elif case == 9:
            for size in args.sizes:
                path = build(size, args.vocabulary, scratch / size)
                large = Bench(path, torch.bfloat16, args.device)
                possible = ceilings(torch.bfloat16, args.device)
                print(f"| 9 {size}; ceilings in bf16: {possible} | | | | | | |")
                for batch in args.batches:
                    asked = (questions * 2)[: 4 * batch]
                    systems = large.both(asked, batch, max_new_tokens=n_tokens)
                    if args.device == "cuda":
                        eager = partial(large.eager, max_new_tokens=n_tokens)
                        systems["ours, not recorded"] = partial(eager, asked, batch)
                    compare(f"9 {size}, batch {batch}, bf16", systems, args.repeats, batch)


if __name__ == "__main__":
    main()
