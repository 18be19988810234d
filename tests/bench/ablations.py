"""What DPO contributes at --size tiny, what else could do it, and how its numbers were chosen.

    python -m tests.bench.ablations controls [--seeds 0 1 2] [--rounds 1] [--jobs 2]
    python -m tests.bench.ablations table-3 [...]
    python -m tests.bench.ablations choice --seeds 204 205 --rounds 3

Each variant is run.py with different flags or one replaced function, in runs/ablations. The tables,
one for each round, compare the variants with the unmodified run of the same seed, which must be in
runs/tiny-seed-SEED; the variants share the stages that are the same in both, and are tested on the
first test set only.

`choice` compares candidates for the defaults on other problems: 1,500 validation problems, which
are in no other set. Its unmodified runs are made first. The seeds should not be those that are
reported.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import run
import selftrain
from data.folder import open_folder
from data.problems import read_jsonl, write_jsonl
from data.synthetic import make_datasets, make_problems
from data.terminal import run_command
from dpo import PairExample, PreferencePair
from model import T5
from run import load_data
from sft import Example, Schedule, sft_loss, train
from tests.bench.report import config_of, first_test, interval, measure, spread

SMALL = 25  # DPO steps from the second round on, in the variants with fewer


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


class FewerSteps(selftrain.Experiment):
    """The DPO step has fewer steps from the second round on."""

    def dpo(self, name: str, policy: Path, pairs: list[PreferencePair], round_number: int) -> Path:
        steps = SMALL if round_number > 1 else self.config.dpo_steps
        config = argparse.Namespace(**vars(self.config) | {"dpo_steps": steps})
        brief = selftrain.Experiment(**vars(self) | {"config": config})
        return brief.dpo(name, policy, pairs, round_number)


class FreshPairs(FewerSteps):
    """The same, and D is drawn afresh in every round, as Algorithm 2 says."""

    def pairs(self, name: str, rounds: list[selftrain.Rationales]) -> list[PreferencePair]:
        return super().pairs(name, rounds[-1:])


@dataclass
class Variant:
    """What a variant changes, and which of its stages are those of the unmodified run."""

    flags: str = ""
    shared: Sequence[str] = ("warm-up",)
    train_dpo: Callable = selftrain.train_dpo
    experiment: type = selftrain.Experiment


FIRST = "dpo-st/round-1"
DPO_STEP = ("warm-up", *(f"{FIRST}/{name}" for name in ("samples-for-pairs.jsonl", "dpo")))
SETS = {
    "controls": {
        "winning rationales only": Variant(
            train_dpo=likelihood, shared=["warm-up", f"{FIRST}/samples-for-pairs.jsonl"]
        ),
        "ST with 8 samples": Variant("--method st --st-samples 8"),  # as many as DPO-ST: 5 + 3
    },
    "table-3": {
        "K=5": Variant("--sft-samples 5", DPO_STEP),
        "K=10": Variant("--sft-samples 10", DPO_STEP),
    },
    "choice": {
        "ST": Variant("--method st"),
        "1e-4 in every round": Variant("--later-ratio 1", ["warm-up", FIRST]),
        "25 steps from round 2 on": Variant(
            "--later-ratio 1", ["warm-up", FIRST], experiment=FewerSteps
        ),
        "the same, pairs of this round alone": Variant(
            "--later-ratio 1", ["warm-up", FIRST], experiment=FreshPairs
        ),
        "5e-5 in every round": Variant("--later-ratio 1 --dpo-learning-rate 5e-5"),
    },
}


def find_variant(name: str) -> Variant:
    return next(variants[name] for variants in SETS.values() if name in variants)


def run_variant(name: str) -> None:
    """Run run.py in this process with the variant's changes; it parses the remaining arguments."""
    variant = find_variant(name)
    selftrain.train_dpo = variant.train_dpo
    run.Experiment = variant.experiment

    @contextmanager
    def open_with_shared(
        folder: Path, config: dict, problems: object, base: Path
    ) -> Iterator[None]:
        with open_folder(folder, config, problems, base):
            for stage in variant.shared:
                theirs = usual_folder(config["seed"], config["labeled"]) / stage
                ours = folder / stage
                ours.parent.mkdir(parents=True, exist_ok=True)
                if theirs.is_dir():
                    shutil.copytree(theirs, ours, dirs_exist_ok=True)
                else:
                    shutil.copyfile(theirs, ours)
            keep_first_test(folder / "warm-up" / "evaluation.jsonl")
            yield

    run.open_folder = open_with_shared
    run.load_data = load_first_test
    run.main()


def load_first_test(config: argparse.Namespace) -> tuple[list, list, dict]:
    """The data of a run with only the test set that the tables are about."""
    L, U, tests = load_data(config)
    return L, U, dict(list(tests.items())[:1])


def keep_first_test(path: Path) -> None:
    """Drop the other tests from an evaluation, too."""
    rows = read_jsonl(path)
    write_jsonl([row for row in rows if row["test"] == rows[0]["test"]], path)


def folder_of(name: str, seed: int) -> Path:
    return Path("runs") / "ablations" / f"{name.replace(' ', '-')}-seed-{seed}"


def usual_folder(seed: int, validation: object) -> Path:
    """The unmodified run that the variants of this seed are compared with."""
    if validation:
        return folder_of("as it is", seed)
    return Path("runs") / f"tiny-seed-{seed}"


def validation_flags(seed: int) -> list[str]:
    """Write L and U of a seed's usual run, and 1,500 validation problems; run.py's flags for them."""
    defaults = run.parse_args([])
    L, U, tests = make_datasets(defaults.n_labeled, defaults.n_unlabeled, 2000, seed)
    seen = {problem.question for problem in [*L, *U, *tests["held-out"], *tests["dev"]]}
    sets = {"labeled": L, "unlabeled": [replace(problem, rationale=None) for problem in U]}
    sets["validation"] = make_problems(1500, "validation", exclude=seen)
    folder = folder_of("problems", seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in sets.items():
        write_jsonl([asdict(problem) for problem in problems], folder / f"{name}.jsonl")
    flags = ["--labeled", f"{folder}/labeled.jsonl", "--unlabeled", f"{folder}/unlabeled.jsonl"]
    return [*flags, "--test", f"validation={folder}/validation.jsonl"]


def start(command: list[str], name: str, seed: int) -> None:
    """Run a variant or an unmodified run in a new process."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    result = done.stderr[-300:] if done.returncode else "done"
    print(f"{name}, seed {seed}: {result}", file=sys.stderr, flush=True)


def method_of(name: str) -> str:
    return "st" if "--method st" in find_variant(name).flags else "dpo-st"


def look_up(folders: Sequence[Path], stage: str) -> dict[str, list[float]]:
    """The table's numbers for each run: accuracy in %, pseudo-labels, samples in %."""
    numbers: dict[str, list[float]] = {}
    for folder in folders:
        found = measure(folder)
        groups = found[stage]
        before = groups.get("before", {})
        values = {
            "accuracy": groups["accuracy"][first_test([found])],
            "labels": len(read_jsonl(folder / stage / "pseudo-labels.jsonl")),
            "before": before.get("pass@1"),
            "correct": groups["after"]["pass@1"],
            "unanswered before": before.get("without an answer"),
            "unanswered": groups["after"]["without an answer"],
        }
        for name, value in values.items():
            if value is not None:
                numbers.setdefault(name, []).append(value)
    return numbers


def print_row(name: str, numbers: dict[str, list[float]], difference: str) -> None:
    means = {name: f"{statistics.mean(values):.1f}" for name, values in numbers.items()}
    correct = f"{means.get('before', '')} -> {means['correct']}"
    unanswered = f"{means.get('unanswered before', '')} -> {means['unanswered']}"
    cells = [name, spread(numbers["accuracy"]), difference, means["labels"], correct, unanswered]
    by_seed = ", ".join(f"{value:.2f}" for value in numbers["accuracy"])
    print(f"| {' | '.join([*cells, by_seed])} |")


def print_round(number: int, seeds: Sequence[int], names: Sequence[str], validation: bool) -> None:
    """Print the table after a round."""
    print(f"\nRound {number}, {len(seeds)} seeds; before -> after the DPO step in % of samples:\n")
    columns = ["accuracy", "minus the method as it is", "pseudo-labels", "correct"]
    columns += ["without an answer", "accuracy by seed"]
    print(f"| | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    usual_folders = [usual_folder(seed, validation) for seed in seeds]
    usual = look_up(usual_folders, f"dpo-st/round-{number}")
    print_row("as it is", usual, "")
    for name in names:
        folders = [folder_of(name, seed) for seed in seeds]
        numbers = look_up(folders, f"{method_of(name)}/round-{number}")
        pairs = zip(numbers["accuracy"], usual["accuracy"], strict=True)
        print_row(name, numbers, interval([ours - theirs for ours, theirs in pairs]))


def main() -> None:
    if sys.argv[1:2] == ["--variant"]:
        variant = sys.argv[2]
        del sys.argv[1:3]
        run_variant(variant)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", choices=SETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    names = list(SETS[args.variants])
    validation = args.variants == "choice"
    usual_jobs = []
    jobs = []
    for seed in args.seeds:
        usual = usual_folder(seed, validation)
        common = ["--method", "dpo-st", "--rounds", str(args.rounds), "--seed", str(seed)]
        if validation:
            common += validation_flags(seed)
            usual_jobs.append((["run.py", *common, "--out", str(usual)], "as it is", seed))
        elif not (usual / f"dpo-st/round-{args.rounds}" / "evaluation.jsonl").exists():
            parser.error(f"{usual} is not there, to compare the variants with")
        else:
            common += ["--n-test", str(config_of(usual).n_test)]
        for name in names:
            command = ["-m", "tests.bench.ablations", "--variant", name, *common]
            command += [*find_variant(name).flags.split(), "--out", str(folder_of(name, seed))]
            jobs.append((command, name, seed))
    with ThreadPoolExecutor(args.jobs) as pool:
        for part in (usual_jobs, jobs):  # the second part needs the first
            list(pool.map(lambda job: start(*job), part))
    for number in range(1, args.rounds + 1):
        print_round(number, args.seeds, names, validation)


if __name__ == "__main__":
    run_command(main)
