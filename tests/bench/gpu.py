"""What has to be known on a GPU, in one command of a few minutes: right, fast, and how much memory.

    python -m tests.bench.gpu [ROW ...] [--sizes base large] [--vocabulary DIR] [--problems FILE]

    tests    python -m pytest -m gpu
    step     milliseconds of a decoding step, as a CUDA graph and eager, beside the floor (bytes over
             measured bandwidth); milliseconds of an admission
    peer     tokens/s against transformers with a calculator that re-reads, batch 96
    figure   the paper's figure 4: speed by batch size, with and without the calculator (--out DIR)
    ids      fp32: graph and eager give the same ids; bf16: how many texts equal those of fp32
    train    SFT and DPO by micro-batch: examples/s, share of the peak, memory
    run      the paper's run, three rounds on GSM8K: minutes per stage, extrapolated

Each row is printed as soon as it is known, and a row that fails does not end the others. Weights
are random. Without files: the vocabulary of data/tiny and generated problems. On a CPU every row
that can run does, at --size tiny and in few steps, so that the first run on a GPU finds no typing
errors.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import decode
from data.problems import Problem, load_problems
from data.synthetic import make_problems
from data.terminal import run_command
from decode import KVCache, Sample, fast_step, generate, sample_next_token
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import SIZES, T5
from run import GPU, parse_args
from sft import Schedule, make_examples, train_sft
from tests.bench.drawing import BLUE, RED, add_plain_style, new_figure, save_figures
from tokenizer import EOS_ID, Tokenizer, format_rationale

TINY = Path(__file__).parents[2] / "data" / "tiny"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
N_GSM8K = 6705  # training problems
N_TESTS = 1319 + 600 + 2096 + 1000 + 2 * 768  # answers of one evaluation

# ------------------------------------------------------------------------------------- measuring


def seconds(do: Callable, repeats: int) -> float:
    """The median time of do(), after one warm-up, with the GPU's work included."""
    spent = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        do()
        if ON_GPU:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def bandwidth() -> float:
    """Bytes per second of a large copy, reading and writing counted."""
    source = torch.ones(2**31 if ON_GPU else 2**24, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 5)


def peak() -> float:
    """bf16 operations per second of a large matrix product."""
    width = 8192 if ON_GPU else 256
    matrix = torch.randn(width, width, dtype=torch.bfloat16, device=DEVICE)
    return 2 * width**3 / seconds(lambda: matrix @ matrix, 5)


def build(size: str, dtype: torch.dtype) -> T5:
    """Random weights that never end a text: EOS has logit 0, never among the largest."""
    torch.manual_seed(0)
    model = T5(SIZES[size])
    model.lm_head.weight.data[EOS_ID] = 0
    return model.to(DEVICE, dtype).eval()


def eager():
    """Within this context `generate` launches every kernel of a step separately."""
    return mock.patch.object(
        decode, "fast_step", lambda model, cache: partial(model.step, cache=cache)
    )


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


# ------------------------------------------------------------------------------------------- rows


def measure_tests(args: argparse.Namespace) -> None:
    if not ON_GPU:
        return print_row("tests", "need a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    print_row("tests", done.stdout.strip().splitlines()[-1])


@torch.inference_mode()
def measure_step(args: argparse.Namespace) -> None:
    """Every slot busy, the longest question 191 tokens, a cache of 300 columns."""
    n_columns, source = (300, 191) if ON_GPU else (20, 60)
    speed = bandwidth()
    print_row("copy", f"{speed / 1e12:.3g} TB/s", "bf16 product", f"{peak() / 1e12:.3g} TFLOP/s")
    for size in args.sizes:
        model = build(size, torch.bfloat16)
        n_read = model.lm_head.weight.numel()
        for name, parameter in model.decoder.named_parameters():
            if "cross_attention.k" not in name and "cross_attention.v" not in name:
                n_read += parameter.numel()
        for batch in args.batches:
            cache = KVCache(model, batch, n_columns, source)
            states = torch.randn(batch, 60, model.config.d_model, device=DEVICE).bfloat16()
            cache.admit(list(range(batch)), model, list(states))
            ids = torch.zeros(batch, dtype=torch.long, device=DEVICE)
            noise = torch.rand(batch, device=DEVICE)
            recorded = fast_step(model, cache)

            def sample(step: Callable) -> list[int]:
                return sample_next_token(step(ids), 0.7, 50, noise).tolist()

            n = 50 if ON_GPU else 2
            graph = seconds(partial(sample, recorded), n)
            plain = seconds(partial(sample, partial(model.step, cache=cache)), n)
            admit = seconds(partial(cache.admit, [0], model, [states[0]]), n)
            floor = (2 * n_read + cache.own.nbytes + cache.cross.nbytes) / speed
            print_row(
                f"step, {size}, batch {batch}",
                f"graph {1000 * graph:.2f} ms, {batch / graph:,.0f} tokens/s",
                f"eager {1000 * plain:.2f} ms",
                f"floor {1000 * floor:.2f} ms",
                f"admission {1000 * admit:.2f} ms",
            )


def measure_peer(args: argparse.Namespace) -> None:
    """The same checkpoint in both; transformers with the re-reading calculator."""
    from tests.bench.decode import Bench
    from tests.bench.decode import build as build_checkpoint

    size, batch = args.sizes[0], args.batches[0]
    questions = [problem.question for problem in args.problems[:batch]]
    n = 128 if ON_GPU else 4
    with tempfile.TemporaryDirectory() as scratch:
        folder = build_checkpoint(size, args.vocabulary, Path(scratch))
        systems = Bench(folder, torch.bfloat16, DEVICE).both(questions, batch, max_new_tokens=n)
        ours, theirs = (seconds(system, 2 if ON_GPU else 1) for system in systems.values())
    speeds = [f"{len(questions) * n / spent:,.0f} tokens/s" for spent in (ours, theirs)]
    print_row(f"peer, {size}, batch {batch}", *speeds, f"{theirs / ours:.1f} times as fast")


def measure_figure(args: argparse.Namespace) -> None:
    """Speeds relative to batch 1 without the calculator; the paper's calculator costs up to 30 %."""
    model = build(args.sizes[0], torch.bfloat16)
    n = 128 if ON_GPU else 4
    speeds: dict[bool, list[float]] = {True: [], False: []}
    batches = (1, 8, 16, 32)
    for batch in batches:
        questions = [problem.question for problem in args.problems[:batch]]
        for calculator in (False, True):
            options = {"max_new_tokens": n, "batch_size": batch, "calculator": calculator}
            write = partial(generate, model, args.tokenizer, questions, **options)
            speeds[calculator].append(batch * n / seconds(write, 3 if ON_GPU else 1))
    for calculator, name in ((False, "without calculator"), (True, "with calculator")):
        relative = [
            f"batch {b}: {v / speeds[False][0]:.1f}" for b, v in zip(batches, speeds[calculator])
        ]
        print_row(f"figure 4, {name}", *relative)
    if args.out and add_plain_style():
        figure, axes = new_figure(6, 4)
        for calculator, name, color in ((False, "without calculator", BLUE), (True, "with", RED)):
            places = [x + 0.2 * (1 if calculator else -1) for x in range(len(batches))]
            heights = [speed / speeds[False][0] for speed in speeds[calculator]]
            axes.bar(places, heights, 0.38, label=name, color=color)
        axes.set_xticks(range(len(batches)), batches)
        axes.set(xlabel="batch size", ylabel="speed, batch 1 = 1")
        axes.legend(frameon=False)
        save_figures({"figure-4": figure}, args.out)


def measure_ids(args: argparse.Namespace) -> None:
    questions = [problem.question for problem in args.problems[: 64 if ON_GPU else 4]]
    options = {"max_new_tokens": 60 if ON_GPU else 6, "batch_size": 32}

    def ids(model: T5) -> list[list[int]]:
        samples: list[list[Sample]] = generate(model, args.tokenizer, questions, **options)
        return [sample.ids for [sample] in samples]

    model = build(args.sizes[0], torch.float32)
    recorded = ids(model)
    with eager():
        plain = ids(model)
    half = ids(model.bfloat16())
    for name, found in (("fp32, graph and eager", plain), ("bf16 and fp32", half)):
        equal = sum(one == other for one, other in zip(recorded, found))
        print_row(f"ids, {name}", f"{equal} of {len(found)} texts equal")


def measure_train(args: argparse.Namespace) -> None:
    """The paper's batches of 96; bf16 over fp32 weights on a GPU."""
    top = peak()
    batch = 96 if ON_GPU else 4
    problems = args.problems[: 6 * batch]
    examples = make_examples(problems, args.tokenizer)
    pairs = []
    for problem, other in zip(problems, problems[1:] + problems[:1]):
        pairs.append(PreferencePair(problem.question, problem.rationale, other.rationale))
    for size in args.sizes:
        for task in ("SFT", "DPO"):
            for tokens in args.micro_batches:
                schedule = Schedule(
                    1e-6, batch, micro_batch_tokens=tokens, bf16=ON_GPU, log_every=1
                )
                print_row(f"{task}, {size}, {tokens} tokens", *train(size, task, examples, pairs, schedule, top, args))  # fmt: skip


def train(size, task, examples, pairs, schedule, top, args) -> list[str]:
    """Four optimiser steps, of which the first is a warm-up: examples/s, share of peak, memory."""
    model = build(size, torch.float32)
    stamps = []

    def log(record: dict) -> None:  # the numbers in the record have waited for the GPU
        stamps.append(time.perf_counter())

    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    n_steps = 4 if ON_GPU else 2
    items = examples[: n_steps * schedule.batch_size]
    if task == "SFT":
        train_sft(model, items, 1, schedule, task, log)
    else:
        items = make_pair_examples(pairs[: n_steps * schedule.batch_size], args.tokenizer)
        train_dpo(model, items, n_steps, 0.1, schedule, task, log)
    per_step = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    rate = schedule.batch_size / per_step
    # 6 operations per parameter and token; a question meets the encoder, a rationale the decoder.
    encoder = sum(p.numel() for p in model.encoder.parameters())
    rest = sum(p.numel() for p in model.parameters()) - encoder - model.shared.weight.numel()
    n_read = sum(len(example.input_ids) for example in examples) / len(examples)
    n_written = sum(len(example.labels) for example in examples) / len(examples)
    flop = 6 * (n_read * encoder + n_written * rest)
    if task == "DPO":  # two rationales; the reference adds a forward pass, a third
        flop = 6 * (n_read * encoder + 2 * n_written * rest) * 4 / 3
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if ON_GPU else "-"
    return [f"{rate:.0f} per second", f"{rate * flop / top:.1%} of the peak", memory]


def measure_run(args: argparse.Namespace) -> None:
    """Three rounds with the paper's numbers; texts as long as random weights write them: 150 tokens."""
    config = parse_args(["--size", "base", "--device", DEVICE])
    size, tokens = args.sizes[0], GPU["micro_batch_tokens"] if ON_GPU else 256
    batch = GPU["decode_batch_size"] if ON_GPU else 4
    problems = args.problems[: 4 * 96 if ON_GPU else 8]
    examples = make_examples(problems, args.tokenizer)
    schedule = Schedule(
        1e-6, 96 if ON_GPU else 4, micro_batch_tokens=tokens, bf16=ON_GPU, log_every=1
    )
    pairs = [PreferencePair(p.question, p.rationale, p.rationale) for p in problems]
    stages = {}
    for task, n in (("SFT", 8 * N_GSM8K), ("DPO", 96 * config.dpo_steps)):
        rate = float(train(size, task, examples, pairs, schedule, 1.0, args)[0].split()[0])
        stages[task] = n / max(rate, 1e-9) / 60
    model = build(size, torch.bfloat16)
    questions = [problem.question for problem in problems][: 2 * batch]
    n_new = 150 if ON_GPU else 4
    options = {"n_samples": 2, "temperature": 0.7, "max_new_tokens": n_new, "batch_size": batch}
    spent = seconds(lambda: generate(model, args.tokenizer, questions, **options), 1)
    per_minute = 60 * 2 * len(questions) / spent
    stages["sampling, 8 per question"] = 8 * N_GSM8K / per_minute
    stages["evaluation"] = N_TESTS / per_minute
    print_row(
        f"run, {size}, minutes of a stage", *(f"{name} {m:.1f}" for name, m in stages.items())
    )
    whole = 4 * (stages["SFT"] + stages["evaluation"])  # the warm-up and three rounds
    whole += 3 * (stages["DPO"] + stages["sampling, 8 per question"])
    print_row(f"run, {size}, three rounds", f"{whole:.0f} minutes")


ROWS = {
    "tests": measure_tests,
    "step": measure_step,
    "ids": measure_ids,
    "train": measure_train,
    "run": measure_run,
    "figure": measure_figure,
    "peer": measure_peer,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all")
    sizes = ["base", "large"] if ON_GPU else ["tiny"]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes)
    batches = [96, 256, 512] if ON_GPU else [4]
    parser.add_argument("--batches", nargs="+", type=int, default=batches)
    micro = [2048, 8192, 16384] if ON_GPU else [256]
    parser.add_argument("--micro-batches", nargs="+", type=int, default=micro, help="tokens")
    parser.add_argument("--vocabulary", type=Path, default=TINY, help="folder with spiece.model")
    parser.add_argument("--problems", type=Path, help="JSONL of problems with rationales")
    parser.add_argument("--out", type=Path, help="folder for the figure")
    args = parser.parse_args(argv)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name}: choose from {', '.join(ROWS)}")
    torch.set_flush_denormal(True)
    args.tokenizer = Tokenizer(args.vocabulary)
    problems = load_problems(args.problems) if args.problems else make_problems(600, seed=0)
    args.problems = [formatted(problem) for problem in problems[:600]]
    card = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    print(f"{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}\n")
    began = time.perf_counter()
    for name in args.rows or ROWS:
        try:
            ROWS[name](args)
        except Exception:  # the other rows are worth having
            print_row(name, "FAILED", traceback.format_exc(limit=-1).splitlines()[-1])
        if ON_GPU:
            torch.cuda.empty_cache()
    print(f"\n{time.perf_counter() - began:.0f} s")


def formatted(problem: Problem) -> Problem:
    return replace(problem, rationale=format_rationale(problem.rationale))


if __name__ == "__main__":
    run_command(main)
