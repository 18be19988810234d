"""The whole experiment in one command (paper, section 4): flags, data, and the closing table.

    python run.py                            the whole method on a laptop, nothing downloaded
    python run.py --size base --rounds 3     the paper; public weights and data are fetched once
    torchrun --nproc-per-node 8 run.py --size large --rounds 3

The same command again continues a run that was stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data.folder import MAY_CHANGE, open_folder, write_text
from data.problems import Problem, check_leakage, load_problems, read_jsonl
from data.sources import fetch_datasets, fetch_flan_t5
from data.synthetic import OUT_OF_DOMAIN, TEST_SEED, make_problems
from decode import MAX_NEW_TOKENS, TOP_K
from model import SIZES, read_config
from selftrain import MAX_SIMILARITY, N_PAIRS, PERCENTILE, Stages, accuracies, self_train
from sft import from_process_0, rank_and_count, start_processes
from tokenizer import MAX_QUESTION, MAX_RATIONALE, UNKNOWN_ID, Tokenizer, format_rationale

HERE = Path(__file__).resolve().parent
TESTS = ("GSM8K", "MultiArith", "ASDiv", "SVAMP")
TABLE_2 = json.loads(
    (HERE / "data" / "table_2.json").read_text()
)  # the paper's, in the order of TESTS

TINY = {  # DIFFERS: for --size tiny these numbers are our choice; its model has no dropout
    "method": "both",
    "rounds": 2,
    "max_new_tokens": 100,
    "sft_learning_rate": 1e-3,
    "sft_batch_size": 8,
    "dpo_steps": 100,
    "dpo_learning_rate": 1e-4,
    "dpo_batch_size": 16,
    "beta": 0.5,
    "decode_batch_size": 256,
    "log_every": 20,
}


# ------------------------------------------------------------------------------------------- flags


def between(least: float, most: float, kind: type = float) -> Callable[[str], float]:
    """For argparse: a number from `least` to `most`."""

    def read(text: str) -> float:
        number = kind(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return number

    return read


def make_parser() -> argparse.ArgumentParser:
    """Every number of a run is a flag; in brackets where its default comes from."""
    tiny = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"--size tiny has defaults of its own: {tiny}.",
        allow_abbrev=False,
    )
    whole = between(0, 10**9, int)
    count = between(1, 10**9, int)
    positive = between(1e-12, 1e9)
    share = between(0, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    run = parser.add_argument_group("the run").add_argument
    run("--size", choices=SIZES, default="tiny", help="of the model (tiny)")
    run("--method", choices=("dpo-st", "st", "both"), default="dpo-st", help="(dpo-st)")
    run("--rounds", type=whole, default=3, help="of self-training (3) [appendix A]")
    run("--seed", type=whole, default=42, help="of data, dropout, samples (42) [authors' code]")
    run("--limit", type=whole, default=0, help="use the first N problems of every set; 0: all")
    run("--out", default="", help="the run's folder (runs/SIZE-seed-SEED)")
    run("--weights", default="", help="your own checkpoint folder; --size still sets the defaults")
    run("--device", choices=("cpu", "cuda"), default=device, help=f"(here: {device})")

    data = parser.add_argument_group("your own problems (JSONL)").add_argument
    data("--labeled", default="", help="file of problems with rationales")
    data("--unlabeled", default="", help="file of problems with answers (those of --labeled)")
    data("--test", action="append", default=[], metavar="NAME=FILE", help="may be repeated")
    data("--allow-leakage", action="store_true", help="test on what is trained on, too")

    method = parser.add_argument_group("sampling, pairs, pseudo-labels").add_argument
    method("--dpo-samples", type=count, default=5, help="per question, for pairs (5) [section 4.2]")
    method(
        "--sft-samples", type=count, default=3, help="per question, for labels (3) [section 4.2]"
    )
    method("--st-samples", type=count, default=3, help="the same in --method st (3) [section 4.2]")
    method("--temperature", type=positive, default=0.7, help="(0.7) [section 4.2]")
    method("--top-k", type=whole, default=TOP_K, help="likeliest ids, 0: all (50) [authors' code]")
    method(
        "--max-new-tokens",
        type=count,
        default=MAX_NEW_TOKENS,
        help="per rationale (300) [appendix A]",
    )
    method(
        "--calculator",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="when sampling (on) [section 3.2]",
    )
    method(
        "--max-similarity",
        type=share,
        default=MAX_SIMILARITY,
        help="more alike are duplicates (0.7) [section 4.2]",
    )
    method("--n-pairs", type=count, default=N_PAIRS, help="per question (3) [authors' code]")
    method(
        "--percentile",
        type=between(0, 100),
        default=PERCENTILE,
        help="caps the pseudo-labels per question (90) [authors' code]",
    )

    sft = parser.add_argument_group("SFT").add_argument
    sft("--sft-epochs", type=count, default=8, help="(8) [table 5]")
    sft("--sft-learning-rate", type=positive, default=3e-4, help="the peak (3e-4) [table 5]")
    sft("--sft-batch-size", type=count, default=96, help="examples (96) [table 5]")

    dpo = parser.add_argument_group("DPO").add_argument
    dpo("--dpo-steps", type=count, default=150, help="optimiser steps (150) [table 5]")
    dpo("--dpo-learning-rate", type=positive, default=7e-7, help="the peak (7e-7) [table 5]")
    dpo("--dpo-batch-size", type=count, default=96, help="pairs (96) [table 5]")
    dpo("--beta", type=positive, default=0.1, help="holds the policy back (0.1) [section 4.2]")

    both = parser.add_argument_group("SFT and DPO").add_argument
    both("--warmup-ratio", type=share, default=0.1, help="part of the steps (0.1) [table 5]")
    both("--final-ratio", type=share, default=0.1, help="of the peak (0.1) [authors' code]")
    both("--weight-decay", type=share, default=0.01, help="(0.01) [appendix A]")
    both("--max-grad-norm", type=positive, default=1.0, help="clipping (1.0) [appendix A]")

    limits = parser.add_argument_group("memory and speed [our choice]").add_argument
    limits("--micro-batch-tokens", type=count, default=2048, help="in training, at a time (2048)")
    limits("--decode-batch-size", type=count, default=96, help="rationales at a time (96)")
    limits(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute in bf16 (on a GPU) [authors' code]",
    )
    limits("--log-every", type=count, default=10, help="steps between logged lines (10)")

    tiny = parser.add_argument_group("generated problems of --size tiny [our choice]").add_argument
    tiny("--n-labeled", type=count, default=250, help="(250)")
    tiny("--n-unlabeled", type=count, default=1000, help="other ones, with answers only (1000)")
    tiny("--n-test", type=count, default=2000, help="(2000)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line -> the numbers of a run."""
    parser = make_parser()
    if parser.parse_known_args(argv)[0].size == "tiny":
        parser.set_defaults(**TINY)
    config = parser.parse_args(argv)
    if config.bf16 is None:
        config.bf16 = config.device == "cuda"
    names = [test.partition("=")[0] for test in config.test]
    complete = all(name and path for name, _, path in (test.partition("=") for test in config.test))
    if bool(config.labeled) != bool(names) or len(set(names)) < len(names) or not complete:
        parser.error("your own data: give --labeled FILE and --test NAME=FILE, each name once")
    if config.unlabeled and not config.labeled:
        parser.error("--unlabeled FILE needs --labeled FILE, too")
    if not config.out:
        own = "own-" if config.labeled else ""
        config.out = f"runs/{own}{config.size}-seed-{config.seed}"
    return config


# -------------------------------------------------------------------------------------------- data


def load_data(
    config: argparse.Namespace,
) -> tuple[list[Problem], list[Problem], dict[str, list[Problem]]]:
    """The labeled set L (rationales formatted), the unlabeled set U, and the test sets by name."""
    if config.labeled:
        labeled = load_problems(config.labeled)
        unlabeled = load_problems(config.unlabeled) if config.unlabeled else labeled
        tests = {}
        for test in config.test:
            name, _, path = test.partition("=")
            tests[name] = load_problems(path)
    elif config.size == "tiny":
        train = make_problems(config.n_labeled + config.n_unlabeled, seed=f"run {config.seed}")
        labeled = train[: config.n_labeled]
        unlabeled = train[config.n_labeled :]
        seen = {problem.question for problem in train}
        tests = {"held-out": make_problems(config.n_test, TEST_SEED, exclude=seen)}
        for family in OUT_OF_DOMAIN:
            tests[family] = make_problems(max(1, config.n_test // 4), TEST_SEED, families=(family,))
    else:
        folder = from_process_0(fetch_datasets)
        labeled = load_problems(folder / "gsm8k" / "train.jsonl")
        unlabeled = labeled  # section 4.1: U is L without its rationales
        tests = {name: load_problems(folder / name.lower() / "test.jsonl") for name in TESTS}
    if not config.allow_leakage:
        check_leakage(labeled, unlabeled, tests)
    first = config.limit or None
    labeled = [problem for problem in labeled if problem.rationale][:first]
    labeled = [replace(p, rationale=format_rationale(p.rationale)) for p in labeled]
    tests = {name: problems[:first] for name, problems in tests.items()}
    return labeled, unlabeled[:first], tests


def describe(config: argparse.Namespace, labeled: list[Problem], tokenizer: Tokenizer) -> str:
    """What of the texts is cut, or respelled, before anything is trained."""
    questions = [tokenizer.encode(problem.question) for problem in labeled]
    rationales = [tokenizer.encode(problem.rationale) for problem in labeled]
    longest = min(MAX_RATIONALE, config.max_new_tokens)
    cut = sum(len(ids) > MAX_QUESTION for ids in questions)
    long = sum(len(ids) > longest for ids in rationales)
    unknown = sum(UNKNOWN_ID in ids for ids in questions + rationales)
    return (
        f"Of {len(labeled)} labeled problems {cut} questions are cut at {MAX_QUESTION} tokens, "
        f"{long} rationales are longer than {longest}, {unknown} texts have signs that the vocabulary lacks"
    )


# ---------------------------------------------------------------------------------- closing table


def make_table(folder: Path, config: argparse.Namespace) -> str:
    """Gather the evaluations in results.json and results.md; return the table, shaped as table 2."""
    stages = {"warm-up": ["SFT", 0]}
    for method in ("st", "dpo-st"):
        for number in range(1, config.rounds + 1):
            stages[f"{method}/round-{number}"] = [method.upper(), number]
    results = {}
    rows = []
    for stage, row in stages.items():
        path = folder / stage / "evaluation.jsonl"
        if path.exists():
            results[stage] = accuracies(read_jsonl(path))
            rows.append(row + [f"{accuracy:.1f}" for accuracy in results[stage].values()])
    header = ["method", "round", *results["warm-up"]]
    if not config.labeled:
        for method, numbers in TABLE_2.get(config.size, {}).items():
            rounds = 0 if method == "SFT" else 3
            rows.append([f"{method}, paper", rounds, *numbers, *[""] * (len(header) - 6)])
    lines = [f"Greedy accuracy in %, Flan-T5 {config.size}, seed {config.seed}:", ""]
    for row in [header, ["---"] * len(header), *rows]:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    other = other_numbers(config)
    if config.size in TABLE_2 and other:
        lines += ["", f"Unlike the paper's, this run has {', '.join(other)}."]
    table = "\n".join(lines) + "\n"
    write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    write_text(table, folder / "results.md")
    return table


def other_numbers(config: argparse.Namespace) -> list[str]:
    """The flags that differ from the defaults of this size, but for those that say where and how long."""
    defaults = vars(parse_args(["--size", config.size, "--device", config.device]))
    ignored = (MAY_CHANGE - {"rounds", "weights", "labeled"}) | {"seed"}
    other = []
    for name, value in vars(config).items():
        if name not in ignored and value != defaults[name]:
            other.append(f"--{name.replace('_', '-')} {value}")
    return other


# ----------------------------------------------------------------------------------------- the whole


def main() -> None:
    began = time.perf_counter()
    config = parse_args()
    folder = Path(config.out)
    torch.set_flush_denormal(True)  # barely trained models have denormal numbers, which are slow
    start_processes(config.device)
    rank, n_processes = rank_and_count()
    labeled, unlabeled, tests = load_data(config)
    if config.weights:
        base = Path(config.weights)
    elif config.size == "tiny":
        base = HERE / "data" / "tiny"
    else:
        base = from_process_0(lambda: fetch_flan_t5(config.size))
    tokenizer = Tokenizer(base)
    vocab_size = read_config(base).vocab_size
    if not 0 <= vocab_size - tokenizer.vocab_size < 128:  # T5 rounds up to a multiple of 128
        raise ValueError(
            f"{base}: spiece.model has {tokenizer.vocab_size} ids, the model {vocab_size}: "
            "they do not belong together"
        )
    problems = (labeled, unlabeled, tests)
    from_process_0(lambda: open_folder(folder, vars(config), problems, base))

    def log(record: dict) -> None:
        """Print a line, and add it to log.jsonl."""
        if rank > 0:
            return
        words = []
        for key, value in record.items():
            words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print("  ".join(words), flush=True)
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    if rank == 0:
        print(f"Flan-T5 {config.size} on {n_processes} x {config.device} -> {folder}")
        print(describe(config, labeled, tokenizer))
    stages = Stages(base, tokenizer, config, folder, log)
    methods = ("st", "dpo-st") if config.method == "both" else (config.method,)
    for method in methods:
        model = self_train(method, labeled, unlabeled, tests, config, stages)
    if rank == 0:
        print(f"\n{make_table(folder, config)}")
        print(
            f"{time.perf_counter() - began:,.0f} s. Next: python decode.py --checkpoint {model} QUESTION"
        )


def explain(error: BaseException) -> str | None:
    """One sentence for what a user can cause or mend, None for a fault of this program."""
    message = " ".join(str(error).split())
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "DefaultCPUAllocator" in message:  # a CPU has no error of its own for this
        return (
            "memory is short: lower --micro-batch-tokens (training) or --decode-batch-size (sampling); "
            "the same command continues"
        )
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command continues"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return message
    if isinstance(error, RuntimeError) and rank_and_count()[1] > 1:
        return f"another process has ended or hangs ({message:.100}); the same command continues"
    return None


if __name__ == "__main__":
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"run.py: {sentence}", file=sys.stderr)
        sys.exit(2)
