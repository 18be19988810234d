"""The complete experiment in one command (paper, section 4): flags, data, and the two methods.

    python run.py                            both methods on a laptop, nothing downloaded
    python run.py --size base --rounds 3     the paper; public weights and data are fetched once
    torchrun --nproc-per-node 8 run.py --size large --rounds 3

The same command continues a run that was stopped.
"""

import data  # noqa: F401 (first: Ctrl-C while torch is imported is one word, not a traceback)

# isort: split
import argparse
import shlex
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from os.path import relpath
from pathlib import Path

import torch

from calculator import calculate
from data.checkpoints import check_vocabulary
from data.folder import log_record, open_folder
from data.problems import Problem, check_data, describe, join_gold, load_problems
from data.processes import from_process_0, rank_and_count, start_processes
from data.results import conclude
from data.sources import fetch_datasets, fetch_flan_t5
from data.synthetic import make_datasets
from data.terminal import between, check_files, named_file, plan_stages, run_command, say
from decode import MAX_NEW_TOKENS, TOP_K
from model import SIZES, read_config
from selftrain import MAX_SIMILARITY, N_PAIRS, PERCENTILE, Experiment, is_correct, self_train
from sft import Schedule
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, format_rationale

HERE = Path(__file__).resolve().parent
TESTS = ("GSM8K", "MultiArith", "ASDiv", "SVAMP")  # besides dev, which is GSM8K's


# ------------------------------------------------------------------------------------------- flags


natural = between(0, 10**9, int)
count = between(1, 10**9, int)
positive = between(1e-12, 1e9)
fraction = between(0, 1)

# Every hyper-parameter is a flag (except where texts are cut, tokenizer.py); the source of its
# default is in square brackets.
NUMBERS = {
    "the run": [
        ("--rounds", natural, 3, "rounds of self-training [appendix A]"),
        ("--seed", natural, Schedule.seed, "seed of data, dropout and samples [authors' code]"),
        ("--limit", natural, 0, "use the first N problems of every set; 0: all"),
    ],
    "sampling, pairs and pseudo-labels": [
        ("--dpo-samples", count, 5, "samples per question for pairs [section 4.2]"),
        ("--sft-samples", count, 3, "samples per question for pseudo-labels [section 4.2]"),
        ("--st-samples", count, 3, "the same in plain self-training [section 4.2]"),
        ("--temperature", positive, 0.7, "sampling temperature [section 4.2]"),
        ("--top-k", natural, TOP_K, "sample from the N most probable ids; 0: all [authors' code]"),
        ("--max-new-tokens", count, MAX_NEW_TOKENS, "tokens per rationale, at most [appendix A]"),
        ("--max-similarity", fraction, MAX_SIMILARITY, "of rationales kept [section 4.2]"),
        ("--n-pairs", count, N_PAIRS, "least similar pairs per question [authors' code]"),
        ("--percentile", between(0, 100), PERCENTILE, "caps labels, 0 to 100 [authors' code]"),
    ],
    "SFT": [
        ("--sft-epochs", count, 8, "passes over the examples [table 5]"),
        ("--sft-learning-rate", positive, 3e-4, "peak learning rate [table 5]"),
        ("--sft-batch-size", count, 96, "examples per step [table 5]"),
    ],
    "DPO": [
        ("--dpo-steps", count, 150, "optimiser steps [table 5]"),
        ("--dpo-learning-rate", positive, 7e-7, "peak learning rate in round 1 [table 5]"),
        ("--later-ratio", positive, 1, "that of later rounds / that of round 1 [table 5 has one]"),
        ("--dpo-batch-size", count, 96, "pairs per step [table 5]"),
        ("--beta", positive, 0.1, "ties the policy to the reference [section 4.2]"),
    ],
    "SFT and DPO": [
        ("--warmup-ratio", fraction, Schedule.warmup_ratio, "fraction of the steps [table 5]"),
        ("--final-ratio", fraction, Schedule.final_ratio, "the last rate / peak [authors' code]"),
        ("--weight-decay", fraction, Schedule.weight_decay, "AdamW's [appendix A]"),
        ("--max-grad-norm", positive, Schedule.max_grad_norm, "clips gradients [appendix A]"),
    ],
    "memory and speed [our choice]": [
        ("--micro-batch-tokens", count, Schedule.micro_batch_tokens, "training pass; GPU: 8192"),
        ("--decode-batch-size", count, 96, "rationales decoded at a time; GPU: 512"),
        ("--log-every", count, Schedule.log_every, "steps between two logged lines"),
    ],
    "generated problems of --size tiny [our choice]": [
        ("--n-labeled", count, 250, "labeled problems"),
        ("--n-unlabeled", count, 1000, "unlabeled problems"),
        ("--n-test", count, 500, "held-out problems; other tests have a quarter as many"),
    ],
}
GPU = {"micro_batch_tokens": 8192, "decode_batch_size": 512}  # instead of the CPU's defaults
TINY = {  # DIFFERS: for --size tiny these numbers are our choice; its model has no dropout
    "method": "both",
    "rounds": 2,
    "max_new_tokens": 150,
    "sft_epochs": 5,
    "sft_learning_rate": 1e-3,
    "sft_batch_size": 8,
    "dpo_steps": 100,
    "dpo_learning_rate": 1e-4,
    "later_ratio": 0.3,
    "dpo_batch_size": 16,
    "beta": 0.5,
    "decode_batch_size": 256,
    "log_every": 20,
}


def make_parser() -> argparse.ArgumentParser:
    """The flags: NUMBERS, and those whose value is not a number."""
    tiny = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())
    parser = argparse.ArgumentParser(
        usage="python run.py [--size SIZE] [flags]",
        description="The defaults in parentheses are for --size small to xxl. "
        f"--size tiny, the default, has different ones: {tiny}.",
        allow_abbrev=False,
    )
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    group = parser.add_argument_group("models, methods and files")
    add = group.add_argument
    add("--size", choices=SIZES, default="tiny", help="of the model (tiny)")
    methods = ("dpo-st", "st", "both")
    add("--method", choices=methods, default="dpo-st", help="Algorithm 2, 1, or both (dpo-st)")
    add("--out", default="", help="output folder (runs/[own-]SIZE-seed-SEED)")
    add("--weights", default="", help="your own checkpoint; --size still sets the defaults")
    add("--warm-up", default="", metavar="RUN", help="take the warm-up from a run of the same kind")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--bf16", action="store_true", help="compute in bf16 (always on a GPU)")
    add("--no-calculator", dest="calculator", action="store_false", help="sample without it")
    group = parser.add_argument_group("your own problems (JSONL)")
    add = group.add_argument
    add("--labeled", default="", metavar="FILE", help="problems with rationales")
    add("--unlabeled", default="", metavar="FILE", help="problems with answers only")
    test = {"action": "append", "default": [], "type": named_file, "metavar": "NAME=FILE"}
    add("--test", **test, help="a test set; may be repeated")
    add("--allow-leakage", action="store_true", help="allow test questions in the training data")
    for title, flags in NUMBERS.items():
        group = parser.add_argument_group(title)
        for flag, kind, default, text in flags:
            text += " (%(default)s)"
            group.add_argument(flag, type=kind, default=default, metavar="N", help=text)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line -> the settings of a run."""
    parser = make_parser()
    known = parser.parse_known_args(argv)[0]  # device and size decide the defaults
    if known.device == "cuda":
        parser.set_defaults(**GPU)
    if known.size == "tiny":
        parser.set_defaults(**TINY)
    config = parser.parse_args(argv)
    config.bf16 = config.bf16 or config.device == "cuda"
    check_files(parser, config)
    if not config.out:
        own = "own-" if config.labeled else ""
        config.out = f"runs/{own}{config.size}-seed-{config.seed}"
    return config


# -------------------------------------------------------------------------------------------- data


def load_data(
    config: argparse.Namespace,
) -> tuple[list[Problem], list[Problem], dict[str, list[Problem]]]:
    """The labeled set L (rationales formatted), the unlabeled set U, and the test sets by name.

    U's own rationales are ignored; join_gold adds those of L.
    """
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
        labeled = load_problems(folder / "gsm8k" / "train.jsonl", quiet=True)
        unlabeled = labeled  # section 4.1
        paths = {name: folder / name.lower() / "test.jsonl" for name in TESTS}
        paths["dev"] = folder / "gsm8k" / "dev.jsonl"
        tests = {name: load_problems(path, quiet=True) for name, path in paths.items()}
    labeled = [format_problem(problem, config.labeled) for problem in labeled]
    return labeled, unlabeled, tests


def format_problem(problem: Problem, file: str) -> Problem:
    """A labeled problem with a formatted rationale. Raises ValueError, naming the file."""
    if problem.rationale is None:
        raise ValueError(
            f"{file}: '{problem.question:.40}...' has no rationale: "
            "move problems without one to --unlabeled"
        )
    rationale = format_rationale(problem.rationale)
    if not is_correct(rationale, problem.answer):
        raise ValueError(
            f"{file}: the rationale of '{problem.question:.40}...' must end in "
            f"'#### {problem.answer}', with one space"
        )
    return replace(problem, rationale=rationale)


# -------------------------------------------------------------------------------------- experiment


def main() -> None:
    began = time.perf_counter()
    config = parse_args()
    torch.set_flush_denormal(True)  # barely trained models have denormal numbers, which are slow
    if config.size == "tiny":
        torch.set_num_threads(1)  # two threads are slower at this size, and round differently
    start_processes(config.device)
    labeled, unlabeled, tests = load_data(config)
    if config.weights:
        base = Path(config.weights)
    elif config.size == "tiny":
        base = HERE / "data" / "tiny"
    else:
        base = from_process_0(lambda: fetch_flan_t5(config.size))
    tokenizer = Tokenizer(base)
    check_vocabulary(base, read_config(base).vocab_size, tokenizer.vocab_size)
    check_data(labeled, unlabeled, tests, tokenizer, config.allow_leakage)
    limit = config.limit or None  # 0: all
    labeled, unlabeled = labeled[:limit], unlabeled[:limit]
    tests = {name: problems[:limit] for name, problems in tests.items()}

    folder = Path(config.out)
    with open_folder(folder, vars(config), (labeled, unlabeled, tests), base):
        unlabeled = join_gold(unlabeled, labeled, tokenizer)
        say(f"Flan-T5 {config.size} on {rank_and_count()[1]} x {config.device} -> {folder}")
        longest = min(MAX_RATIONALE, config.max_new_tokens)
        problems = [*labeled, *unlabeled, *chain.from_iterable(tests.values())]
        say(describe(labeled, problems, tokenizer, MAX_QUESTION, longest, calculate))
        log = partial(log_record, folder / "log.jsonl")
        experiment = Experiment(config, labeled, unlabeled, tests, base, tokenizer, folder, log)
        methods = ("st", "dpo-st") if config.method == "both" else (config.method,)
        plan_stages(self_train, config, methods)
        for method in methods:
            model = self_train(experiment, method)
        say("\n" + from_process_0(lambda: conclude(folder, config, calculate)))
    decode = relpath(HERE / "decode.py")
    say(f"{time.perf_counter() - began:,.0f} s. Tables and figures, then a question to the model:")
    say(f"python -m tests.bench.report {shlex.quote(str(folder))}")
    say(f'python {shlex.quote(decode)} --checkpoint {shlex.quote(str(model))} "QUESTION"')


if __name__ == "__main__":
    run_command(main, then="; the same command continues")
