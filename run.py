"""The whole experiment in one command (paper, section 4): flags, data, and the closing table.

    python run.py                            the whole method on a laptop, nothing downloaded
    python run.py --size base --rounds 3     the paper; public weights and data are fetched once
    torchrun --nproc-per-node 8 run.py --size large --rounds 3

The same command again continues a run that was stopped.
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from data.folder import MAY_CHANGE, open_folder, write_text
from data.problems import (
    Problem,
    check_answer,
    check_leakage,
    describe,
    load_problems,
    read_jsonl,
)
from data.sources import fetch_datasets, fetch_flan_t5
from data.synthetic import make_datasets
from decode import MAX_NEW_TOKENS, TOP_K, check_vocabulary
from model import SIZES, read_config
from selftrain import (
    MAX_SIMILARITY,
    N_PAIRS,
    PERCENTILE,
    Stages,
    accuracies,
    is_correct,
    self_train,
)
from sft import end_processes, exit_now, from_process_0, rank_and_count, start_processes
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, format_rationale

HERE = Path(__file__).resolve().parent
TESTS = ("GSM8K", "MultiArith", "ASDiv", "SVAMP")  # and dev, GSM8K's
# The paper's results, in the order of TESTS.
TABLE_2 = json.loads((HERE / "data" / "table_2.json").read_text())

TINY = {  # DIFFERS: for --size tiny these numbers are our choice; its model has no dropout
    "method": "both",
    "rounds": 2,
    "max_new_tokens": 150,
    "sft_epochs": 5,
    "sft_learning_rate": 1e-3,
    "sft_batch_size": 8,
    "dpo_steps": 70,
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
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return number

    return read


def named_file(text: str) -> tuple[str, str]:
    """For argparse: NAME=FILE."""
    name, _, file = text.partition("=")
    taken = name == "stage" or name.endswith(" without calculator")  # by the log and the table
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, not {text!a:.60}")
    if taken or "|" in name or not name.isprintable():
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, with another name than {text!a:.60}")
    return name, file


def make_parser() -> argparse.ArgumentParser:
    """Every hyper-parameter is a flag; in square brackets where its default comes from."""
    tiny = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())
    parser = argparse.ArgumentParser(
        usage="python run.py [--size SIZE] [flags]",
        description="The defaults in round brackets are for --size small to xxl. "
        f"--size tiny, which is the default, has others: {tiny}.",
        allow_abbrev=False,
    )
    whole = between(0, 10**9, int)
    count = between(1, 10**9, int)
    positive = between(1e-12, 1e9)
    share = between(0, 1)

    def number(flag: str, kind: Callable, default: float, text: str) -> None:
        """A flag of the group above it."""
        text += " (%(default)s)"
        group.add_argument(flag, type=kind, default=default, metavar="N", help=text)

    group = parser.add_argument_group("the run")
    group.add_argument("--size", choices=SIZES, default="tiny", help="of the model (tiny)")
    methods = ("dpo-st", "st", "both")
    group.add_argument(
        "--method", choices=methods, default="dpo-st", help="Algorithm 2, 1, both (dpo-st)"
    )
    number("--rounds", whole, 3, "of self-training [appendix A]")
    number("--seed", whole, 42, "of data, dropout and samples [authors' code]")
    number("--limit", whole, 0, "use the first N problems of every set; 0: all")
    group.add_argument("--out", default="", help="folder (runs/[own-]SIZE-seed-SEED)")
    group.add_argument(
        "--weights", default="", help="your own checkpoint; --size sets the defaults"
    )
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    group.add_argument("--device", choices=devices, default=devices[0], help="to compute on")

    group = parser.add_argument_group("your own problems (JSONL)")
    group.add_argument("--labeled", default="", metavar="FILE", help="with rationales")
    group.add_argument("--unlabeled", default="", metavar="FILE", help="with answers only")
    tests = "to be tested on; may be repeated"
    group.add_argument(
        "--test", action="append", default=[], type=named_file, metavar="NAME=FILE", help=tests
    )
    group.add_argument("--allow-leakage", action="store_true", help="test on what is trained on")

    group = parser.add_argument_group("sampling, pairs and pseudo-labels")
    number("--dpo-samples", count, 5, "per question, for pairs [section 4.2]")
    number("--sft-samples", count, 3, "per question, for pseudo-labels [section 4.2]")
    number("--st-samples", count, 3, "the same with --method st [section 4.2]")
    number("--temperature", positive, 0.7, "of sampling [section 4.2]")
    number("--top-k", whole, TOP_K, "sample among so many ids, 0: all [authors' code]")
    number("--max-new-tokens", count, MAX_NEW_TOKENS, "per rationale [appendix A]")
    number("--max-similarity", share, MAX_SIMILARITY, "more alike are duplicates [section 4.2]")
    number("--n-pairs", count, N_PAIRS, "per question, the least similar [authors' code]")
    number("--percentile", between(0, 100), PERCENTILE, "caps labels per question [authors' code]")
    group.add_argument(
        "--no-calculator", dest="calculator", action="store_false", help="sample without"
    )

    group = parser.add_argument_group("SFT")
    number("--sft-epochs", count, 8, "passes over the examples [table 5]")
    number("--sft-learning-rate", positive, 3e-4, "the peak [table 5]")
    number("--sft-batch-size", count, 96, "examples per step [table 5]")

    group = parser.add_argument_group("DPO")
    number("--dpo-steps", count, 150, "of the optimiser [table 5]")
    number("--dpo-learning-rate", positive, 7e-7, "the peak [table 5]")
    number("--dpo-batch-size", count, 96, "pairs per step [table 5]")
    number("--beta", positive, 0.1, "how strongly the policy is held back [section 4.2]")

    group = parser.add_argument_group("SFT and DPO")
    number("--warmup-ratio", share, 0.1, "part of the steps with a rising rate [table 5]")
    number("--final-ratio", share, 0.1, "the cosine ends at this part of the peak [authors' code]")
    number("--weight-decay", share, 0.01, "of AdamW [appendix A]")
    number("--max-grad-norm", positive, 1.0, "gradients are clipped to it [appendix A]")

    group = parser.add_argument_group("memory and speed [our choice]")
    number("--micro-batch-tokens", count, 2048, "in training, at a time")
    number("--decode-batch-size", count, 96, "rationales at a time")
    number("--log-every", count, 10, "steps between two logged lines")
    group.add_argument("--bf16", action="store_true", help="compute in it, as always on a GPU")

    group = parser.add_argument_group("generated problems of --size tiny [our choice]")
    number("--n-labeled", count, 250, "with rationales")
    number("--n-unlabeled", count, 700, "others, with answers only")
    number("--n-test", count, 500, "to be tested on, and a quarter as many of each other set")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line -> the numbers of a run."""
    parser = make_parser()
    if parser.parse_known_args(argv)[0].size == "tiny":  # its defaults are others
        parser.set_defaults(**TINY)
    config = parser.parse_args(argv)
    config.bf16 = config.bf16 or config.device == "cuda"
    if bool(config.labeled) != bool(config.test) or (config.unlabeled and not config.labeled):
        parser.error("your own data: give --labeled FILE and --test NAME=FILE, both")
    if len(dict(config.test)) < len(config.test):
        parser.error("--test NAME=FILE: give each name once")
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
        tests = {name: load_problems(path) for name, path in config.test}
    elif config.size == "tiny":
        labeled, unlabeled, tests = make_datasets(
            config.n_labeled, config.n_unlabeled, config.n_test, config.seed
        )
    else:
        folder = from_process_0(fetch_datasets)
        labeled = load_problems(folder / "gsm8k" / "train.jsonl")
        unlabeled = labeled  # section 4.1; self_train takes its rationales away
        tests = {name: load_problems(folder / name.lower() / "test.jsonl") for name in TESTS}
        tests["dev"] = load_problems(folder / "gsm8k" / "dev.jsonl")
    if not config.allow_leakage:
        check_leakage(labeled, unlabeled, tests)
    first = config.limit or None
    for problem in labeled:
        if problem.rationale is None:
            raise ValueError(
                f"{config.labeled}: '{problem.question:.40}...' has no rationale: "
                "move what has none to --unlabeled"
            )
    labeled = [replace(p, rationale=format_rationale(p.rationale)) for p in labeled[:first]]
    for problem in labeled:
        if not is_correct(problem.rationale, problem.answer):
            raise ValueError(
                f"{config.labeled}: the rationale of '{problem.question:.40}...' must end in "
                f"'#### {problem.answer}', with one space"
            )
    tests = {name: problems[:first] for name, problems in tests.items()}
    return labeled, unlabeled[:first], tests


# ---------------------------------------------------------------------------------- closing table


def make_table(folder: Path, config: argparse.Namespace) -> str:
    """Gather the evaluations in results.json and results.md; return the table, as table 2."""
    stages = [("SFT", 0, "warm-up")]
    for method in ("st", "dpo-st"):
        number = 1
        while (folder / method / f"round-{number}" / "evaluation.jsonl").exists():
            stages.append((method.upper(), number, f"{method}/round-{number}"))
            number += 1
    results = {}
    rows = []
    asked = None  # every evaluation must be of the same problems
    for method, number, stage in stages:
        path = folder / stage / "evaluation.jsonl"
        answers = read_jsonl(path)
        questions = [(row.get("test"), row.get("question")) for row in answers]
        asked = asked or questions
        if not answers or questions != asked:
            raise ValueError(f"{path} is damaged: delete it, and the same command makes it again")
        results[stage] = accuracies(answers)
        rows.append([method, number, *(f"{share:.1f}" for share in results[stage].values())])
    if is_the_papers(config):
        for method, numbers in TABLE_2.get(config.size, {}).items():
            rows.append([f"{method}, paper", "", *numbers, "", ""])
    header = ["method", "round", *results["warm-up"]]
    table = f"Greedy accuracy in %, Flan-T5 {config.size}, seed {config.seed}:\n\n"
    for row in [header, ["---"] * len(header), *rows]:
        table += "| " + " | ".join(map(str, row)) + " |\n"
    write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    write_text(table, folder / "results.md")
    return table


def is_the_papers(config: argparse.Namespace) -> bool:
    """Whether all numbers of a run are the paper's, but for the seed and where it is computed."""
    defaults = parse_args(["--size", config.size])
    ignored = (MAY_CHANGE - {"rounds", "labeled", "weights"}) | {"seed"}
    given = {name: value for name, value in vars(config).items() if name not in ignored}
    return given.items() <= vars(defaults).items()


# --------------------------------------------------------------------------------------- the whole


def main() -> None:
    began = time.perf_counter()
    if sys.version_info < (3, 11):
        sys.exit("run.py: this needs Python 3.11 or later")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # a stream that is closed swallows its lines
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # a sign that a terminal lacks ends nothing
    config = parse_args()
    folder = Path(config.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun and schedulers stop us so
    torch.set_flush_denormal(True)  # barely trained models have denormal numbers, which are slow
    if config.size == "tiny":
        torch.set_num_threads(1)  # two are slower at this size, and round differently
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
    check_vocabulary(base, read_config(base), tokenizer)
    for problem in chain(labeled, unlabeled, *tests.values()):
        check_answer(problem, tokenizer)
    problems = (labeled, unlabeled, tests)
    from_process_0(lambda: open_folder(folder, vars(config), problems, base))

    def log(record: dict) -> None:
        """Print a line, and add it to log.jsonl."""
        if rank > 0:
            return
        words = []
        for key, value in record.items():
            words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        tqdm.write("  ".join(words))  # print would write into an open progress bar
        sys.stdout.flush()
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    if rank == 0:
        print(f"Flan-T5 {config.size} on {n_processes} x {config.device} -> {folder}")
        questions = {p.question for p in chain(labeled, unlabeled, *tests.values())}
        longest = min(MAX_RATIONALE, config.max_new_tokens)
        print(describe(labeled, questions, tokenizer, MAX_QUESTION, longest))
    stages = Stages(base, tokenizer, config, folder, log)
    methods = ("st", "dpo-st") if config.method == "both" else (config.method,)
    for method in methods:
        model = self_train(method, labeled, unlabeled, tests, config, stages)
    if rank == 0:
        print(f"\n{make_table(folder, config)}")
        print(f"{time.perf_counter() - began:,.0f} s. Ask the last model:")
        print("python", shlex.quote(str(HERE / "decode.py")), "--checkpoint", end=" ")
        print(shlex.quote(str(model)), '"QUESTION"')
    end_processes()


def explain(error: BaseException) -> str | None:
    """One sentence for what a user can cause or mend, None for a fault of this program."""
    message = " ".join(str(error).split())
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "DefaultCPUAllocator" in message:  # a CPU has no error of its own for this
        return (
            "memory is short: lower --micro-batch-tokens (training) or --decode-batch-size "
            "(sampling), and the run continues"
        )
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command continues"
    if isinstance(error, BrokenPipeError):
        return "stopped, for nobody reads its output any more; the same command continues"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return message
    if isinstance(error, RuntimeError) and rank_and_count()[1] > 1:
        return f"another process has ended or hangs ({message:.100}); the same command continues"
    return None


if __name__ == "__main__":
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's may come while this one exits
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"run.py: {sentence}", file=sys.stderr)
        if rank_and_count()[1] > 1:
            exit_now(2)
        sys.exit(2)
