"""DPO's contribution at --size tiny: two controls, and table 3 (more samples for pseudo-labels).

    python -m tests.bench.ablations [--seeds 0 1 2] [--rounds 1] [--only NAME ...]

Each variant is run.py with different flags, or with DPO replaced by `likelihood` below. Two run at
a time, in runs/ablations. The tables, one for each round, compare the variants with DPO-ST of the
same seed in runs/tiny-seed-SEED. That run must exist; the variants share its warm-up.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import run
import selftrain
from data.folder import open_folder
from data.problems import read_jsonl
from data.terminal import run_command
from dpo import PairExample
from model import T5
from sft import Example, Schedule, sft_loss, train
from tests.bench.report import config_of, interval, measure, spread

FLAGS = {  # run.py's flags, by variant
    "winning rationales only": "",
    "ST with 8 samples": "--method st --st-samples 8",  # as many as DPO-ST draws: 5 + 3
    "5 samples for labels": "--sft-samples 5",  # this and the next: table 3
    "10 samples for labels": "--sft-samples 10",
}


def likelihood(
    policy: T5,
    pairs: Sequence[PairExample],
    n_steps: int,
    beta: float,
    schedule: Schedule,
    name: str,
    log: Callable[[dict], None],
) -> T5:
    """Replace train_dpo: the same number of steps on the winning rationales, without preferences.

    The steps only make these rationales more likely (eq. 2); beta is not used.
    """
    winning = [Example(pair.input_ids, pair.chosen) for pair in pairs]
    return train(policy, winning, n_steps, sft_loss, schedule, name, log, dropout=False)


def run_variant(variant: str) -> None:
    """Run run.py in this process with the variant's changes; it parses the remaining arguments."""
    if variant == "winning rationales only":
        selftrain.train_dpo = likelihood
    run.open_folder = open_with_warm_up
    run.main()


@contextmanager
def open_with_warm_up(folder: Path, config: dict, problems: object, base: Path) -> Iterator[None]:
    """Start a variant's folder with the warm-up of the run that it is compared with."""
    with open_folder(folder, config, problems, base):
        usual = usual_folder(config["seed"]) / "warm-up"
        shutil.copytree(usual, folder / "warm-up", dirs_exist_ok=True)
        yield


def folder_of(variant: str, seed: int) -> Path:
    return Path("runs") / "ablations" / f"{variant.replace(' ', '-')}-seed-{seed}"


def usual_folder(seed: int) -> Path:
    """The unmodified run that the variants of this seed are compared with."""
    return Path("runs") / f"tiny-seed-{seed}"


def start(job: tuple[str, int, int]) -> None:
    """Run a variant, with a seed and a number of rounds, in a new process."""
    variant, seed, rounds = job
    command = [sys.executable, "-m", "tests.bench.ablations", "--variant", variant]
    command += ["--method", "dpo-st", "--rounds", str(rounds), "--seed", str(seed)]
    command += ["--n-test", str(config_of(usual_folder(seed)).n_test)]
    command += FLAGS[variant].split()
    command += ["--out", str(folder_of(variant, seed))]
    done = subprocess.run(command, capture_output=True, text=True)
    result = done.stderr[-300:] if done.returncode else "done"
    print(f"{variant}, seed {seed}: {result}", file=sys.stderr, flush=True)


def method_of(variant: str) -> str:
    return "st" if "--method st" in FLAGS[variant] else "dpo-st"


def look_up(folders: Sequence[Path], stage: str) -> dict[str, list[float]]:
    """The table's numbers for each run: accuracy in %, pseudo-labels, correct samples in %."""
    numbers: dict[str, list[float]] = {"accuracy": [], "labels": [], "correct": []}
    for folder in folders:
        groups = measure(folder)[stage]
        numbers["accuracy"].append(groups["accuracy"]["held-out"])
        numbers["labels"].append(len(read_jsonl(folder / stage / "pseudo-labels.jsonl")))
        numbers["correct"].append(groups["after"]["pass@1"])
    return numbers


def print_row(name: str, numbers: dict[str, list[float]], difference: str) -> None:
    accuracy = spread(numbers["accuracy"])
    labels = statistics.mean(numbers["labels"])
    correct = statistics.mean(numbers["correct"])
    print(f"| {name} | {accuracy} | {difference} | {labels:.0f} | {correct:.1f} % |")


def print_round(number: int, seeds: Sequence[int], variants: Sequence[str]) -> None:
    """Print the table after a round."""
    print(f"\nRound {number}, {len(seeds)} seeds:\n")
    print("| variant | accuracy | minus the method as it is | pseudo-labels | correct samples |")
    print("|---|---|---|---|---|")
    usual = look_up([usual_folder(seed) for seed in seeds], f"dpo-st/round-{number}")
    print_row("as it is", usual, "")
    for variant in variants:
        stage = f"{method_of(variant)}/round-{number}"
        numbers = look_up([folder_of(variant, seed) for seed in seeds], stage)
        differences = []
        for ours, theirs in zip(numbers["accuracy"], usual["accuracy"], strict=True):
            differences.append(ours - theirs)
        print_row(variant, numbers, interval(differences))


def main() -> None:
    if sys.argv[1:2] == ["--variant"]:
        variant = sys.argv[2]
        del sys.argv[1:3]
        run_variant(variant)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(FLAGS), choices=FLAGS)
    args = parser.parse_args()
    for seed in args.seeds:
        last = usual_folder(seed) / f"dpo-st/round-{args.rounds}" / "evaluation.jsonl"
        if not last.exists():
            parser.error(f"{last} is not there, to compare the variants with")
    jobs = []
    for seed in args.seeds:
        for variant in args.only:
            jobs.append((variant, seed, args.rounds))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, jobs))
    for number in range(1, args.rounds + 1):
        print_round(number, args.seeds, args.only)


if __name__ == "__main__":
    run_command(main)
