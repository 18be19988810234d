"""pass@k on the test sets of runs, with and without the calculator, before and after a DPO step.

    python -m tests.bench.pass_at_k runs/tiny-seed-? [--samples 5] [--problems 500]
        [--tests held-out ...] [--models warm-up/sft dpo-st/round-1/dpo ...]

A run keeps greedy answers only for its test sets; this draws anew, from the checkpoints in its
folder, at its temperature and top-k. There is one table for each test set. Runs that differ in the
seed are merged; of a single run the 95 % interval is a bootstrap over problems.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import run
from data.problems import Problem
from selftrain import Stages
from tests.bench.report import about_samples, chances, config_of, print_rows, spread
from tokenizer import Tokenizer


def bootstrap(values: Sequence[float], n: int = 2000) -> tuple[float, float]:
    """The 95 % interval of a mean, by drawing the values again with replacement (seed 0)."""
    means = np.random.default_rng(0).choice(values, (n, len(values))).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return low, high


def models_of(folder: Path) -> list[str]:
    """The checkpoints in the folder of a run."""
    paths = [*folder.glob("warm-up/*/spiece.model"), *folder.glob("*/round-*/*/spiece.model")]
    return sorted(path.parent.relative_to(folder).as_posix() for path in paths)


def draw(
    folder: Path,
    name: str,
    problems: Sequence[Problem],
    config: argparse.Namespace,
    n_samples: int,
    calculator: bool,
) -> list[dict]:
    """n_samples rationales of a model for each problem, in the rows that a run would keep."""
    checkpoint = folder / name
    stages = Stages(checkpoint, Tokenizer(checkpoint), config, folder, print)
    return stages.write_rationales(
        stages.load_writer(checkpoint),
        str(checkpoint),
        problems,
        n_samples=n_samples,
        temperature=config.temperature,
        top_k=config.top_k,
        calculator=calculator,
        seed=f"pass@k/{config.seed}",
    )


def make_row(
    name: str, calculator: bool, runs: list[list[dict]], n_samples: int, tokenizer: Tokenizer
) -> dict[str, str]:
    """A row of a table. runs: what each run's model has drawn for a test set."""
    if not calculator:
        name += ", no calculator"
    cells = {"": name}
    about = [about_samples(rows, tokenizer, n_samples) for rows in runs]
    for column in about[0]:
        cells[column] = spread([numbers[column] for numbers in about])
    if len(runs) == 1:
        for k in {1, n_samples}:
            low, high = bootstrap(chances(runs[0], k))
            cells[f"pass@{k}"] += f" ({100 * low:.1f} to {100 * high:.1f})"
    return cells


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--problems", type=int, default=500, help="the first N of every test set")
    parser.add_argument("--tests", nargs="+", help="names of test sets; default: all")
    parser.add_argument("--models", nargs="+", help="checkpoints in the folders; default: all")
    args = parser.parse_args()
    if args.samples < 1 or args.problems < 1:
        parser.error("--samples and --problems must be at least 1")
    for folder in args.runs:
        if not (folder / "config.json").exists():
            parser.error(f"{folder} is not the folder of a run")
        models = models_of(folder)
        for name in args.models or []:
            if name not in models:
                parser.error(f"{folder} has no {name}: its models are {', '.join(models)}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_flush_denormal(True)
    tables: dict[str, dict] = {}  # test -> (model, calculator) -> what each run has drawn
    for folder in args.runs:
        config = config_of(folder)
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
        _, _, tests = run.load_data(config)
        for test in args.tests or tests:
            if test not in tests:
                sys.exit(f"pass_at_k: {folder} has no {test}: its tests are {', '.join(tests)}")
            problems = tests[test][: args.problems]
            rows = tables.setdefault(test, {})
            for name in args.models or models_of(folder):
                for calculator in (True, False):
                    drawn = draw(folder, name, problems, config, args.samples, calculator)
                    rows.setdefault((name, calculator), []).append(drawn)
    tokenizer = Tokenizer(args.runs[0] / "warm-up" / "sft")
    for test, rows in tables.items():
        cells = []
        for (name, calculator), runs in rows.items():
            cells.append(make_row(name, calculator, runs, args.samples, tokenizer))
        n = len(runs[0])
        print(f"\n{test}: {args.samples} samples for each of {n} problems, {len(runs)} runs, %\n")
        print_rows(list(cells[0]), [list(row.values()) for row in cells])


if __name__ == "__main__":
    main()
