"""What each part of the method is worth at --size tiny: the paper's ablations in small, and a control it does not have.

    python -m tests.bench.ablations [--seeds 0 1 2] [--rounds 1] [--only NAME ...]     # into runs/ablations

Every run is run.py with other numbers, or with one function or class exchanged below, two at a time with one thread each. The table
compares it with the run of the same seed in runs/tiny-seed-SEED (`python run.py --seed SEED`, one thread).
"""

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import run
import selftrain
from selftrain import Stages
from sft import Example, sft_loss, train
from tests.bench.report import interval, measure, spread


class Continued(Stages):
    """SFT goes on from the last round's model; the paper starts from the original weights again (section 3.1)."""

    def sft(self, name, problems):
        original, self.base = self.base, getattr(self, "last", self.base)
        self.last, self.base = super().sft(name, problems), original
        return self.last


def likelihood(policy, pairs, held_out, n_steps, beta, schedule, name, **options):
    """In place of train_dpo: as many steps on the same winning rationales, which are only made more likely: no preferences."""
    winning = [Example(list(pair.input_ids), pair.chosen) for pair in pairs]
    return train(policy, winning, n_steps, sft_loss, lambda example: len(example.labels), schedule, name, dropout=False, **options)


VARIANTS = {  # name: flags, and perhaps what takes whose place
    "winning rationales only": ("", selftrain, "train_dpo", likelihood),
    "5 samples for labels": ("--sft-samples 5",),
    "10 samples for labels": ("--sft-samples 10",),
    "no calculator when sampling": ("--no-calculator",),
    "beta 0.05": ("--beta 0.05",),
    "beta 0.1": ("--beta 0.1",),
    "no deduplication": ("--max-similarity 1",),
    "SFT continued": ("", run, "Stages", Continued),
    "ST with 3 samples": ("--method st --st-samples 3",),
}


def folder_of(variant: str, seed: int) -> Path:
    return Path("runs") / "ablations" / f"{variant.replace(' ', '-')}-seed-{seed}"


def start(rounds: int, job: tuple[str, int]) -> None:
    """Run one variant in a process of its own."""
    variant, seed = job
    flags = f"--method dpo-st --rounds {rounds} --seed {seed} {VARIANTS[variant][0]}".split()
    command = [sys.executable, "-m", "tests.bench.ablations", "--variant", variant, *flags, "--out", str(folder_of(variant, seed))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(f"{variant}, seed {seed}: " + (done.stderr[-300:] if done.returncode else "done"), file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--variant"]:
        if change := VARIANTS[sys.argv[2]][1:]:
            setattr(*change)
        sys.argv[1:3] = []
        return run.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(start, args.rounds), [(variant, seed) for variant in args.only for seed in args.seeds]))
    plain = [measure(Path("runs") / f"tiny-seed-{seed}") for seed in args.seeds]
    print("| variant | accuracy | minus the method as it is | pseudo-labels | correct samples for labels |\n|---|---|---|---|---|")
    for variant in (None, *args.only):
        found = [measure(folder_of(variant, seed)) for seed in args.seeds] if variant else plain
        last = f"{'st' if variant and variant.startswith('ST') else 'dpo-st'}/round-{args.rounds}"
        accuracy = [stages[last]["held-out"] for stages in found]
        usual = [stages[f"dpo-st/round-{args.rounds}"]["held-out"] for stages in plain]
        difference = interval([a - b for a, b in zip(accuracy, usual)]) if variant else ""
        labels = [stages[last]["pseudo-labels"] for stages in found]
        correct = [stages[last]["correct labels"] for stages in found]
        print(f"| {variant or 'as it is'} | {spread(accuracy)} | {difference} | "
              f"{statistics.mean(labels):.0f} | {statistics.mean(correct):.1f} % |")  # fmt: skip


if __name__ == "__main__":
    main()
