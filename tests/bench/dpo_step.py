"""The paper's figure 6: how a DPO step changes the answers of a model, on the dev problems.

    python -m tests.bench.dpo_step runs/tiny-seed-? [--round 1] [--problems N] [--out DIR]

The model before the step is f', the model after it f_d. Pass@1 is greedy; Pass@10 uses ten samples
at the run's temperature. Pseudo-labels are counted in the run's files, from three samples for each
question of U, without gold rationales. Runs that differ in the seed are merged.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from data.problems import Problem, read_jsonl
from data.terminal import run_command
from run import load_data
from selftrain import Experiment
from tests.bench.drawing import RED, add_plain_style, new_figure, save_figures
from tests.bench.report import chances, config_of, count_labels, interval, spread, table
from tokenizer import Tokenizer

NAMES = ("greedy Pass@1 (%)", "Pass@10 (%)", "pseudo-labels")


def measure_model(
    folder: Path, config: argparse.Namespace, checkpoint: str, dev: Sequence[Problem]
) -> tuple[float, float]:
    """Pass@1 and Pass@10 of a model of the run, in %, with the calculator."""
    tokenizer = Tokenizer(folder / checkpoint)
    experiment = Experiment(config, [], [], {"dev": dev}, folder, tokenizer, folder, print)
    model = experiment.load(folder / checkpoint)
    greedy = experiment.generate(model, dev, "dev")
    sampled = experiment.generate(
        model,
        dev,
        str(folder / checkpoint),
        n_samples=10,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=f"figure 6/{config.seed}",
    )
    return 100 * statistics.mean(chances(greedy, 1)), 100 * statistics.mean(chances(sampled, 10))


def measure_step(folder: Path, number: int, n_problems: int | None) -> dict[str, list[float]]:
    """The three numbers before and after the DPO step of a round."""
    config = config_of(folder)
    _, _, tests = load_data(config)
    if "dev" not in tests:
        raise ValueError(f"{folder}: this run has no test set named dev")
    dev = tests["dev"][: config.limit or None][:n_problems]
    here = f"dpo-st/round-{number}"
    before = "warm-up/sft" if number == 1 else f"dpo-st/round-{number - 1}/sft"
    tokenizer = Tokenizer(folder / before)
    found = {}
    for when, model, samples in (("before", before, "pairs"), ("after", f"{here}/dpo", "labels")):
        rows = read_jsonl(folder / here / f"samples-for-{samples}.jsonl")
        n_labels = count_labels(rows, tokenizer, 3)
        found[when] = [*measure_model(folder, config, model, dev), n_labels]
    return found


def draw(found: list[dict[str, list[float]]]):
    """Draw bars before and after the step, for each of the three numbers."""
    figure, panels = new_figure(10, 4, 3)
    for number, axes in enumerate(panels):
        for x, when, color in ((0, "before", "#999999"), (1, "after", RED)):
            values = [run[when][number] for run in found]
            error = statistics.stdev(values) if len(values) > 1 else None
            axes.bar(x, statistics.mean(values), yerr=error, capsize=6, color=color)
        axes.set_xticks((0, 1), ("before DPO", "after DPO"))
        axes.set_ylabel(NAMES[number])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--problems", type=int, help="the first N of dev (all)")
    parser.add_argument("--out", type=Path, help="of the picture (none)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if config_of(args.runs[0]).size == "tiny":
        torch.set_num_threads(1)
    found = [measure_step(folder, args.round, args.problems) for folder in args.runs]
    rows = []
    for number, name in enumerate(NAMES):
        before = [run["before"][number] for run in found]
        after = [run["after"][number] for run in found]
        differences = [two - one for one, two in zip(before, after, strict=True)]
        rows.append([name, spread(before), spread(after), interval(differences)])
    print(table(["", "before DPO", "after DPO", "difference"], rows))
    if args.out and add_plain_style():
        save_figures({"dpo-step": draw(found)}, args.out)


if __name__ == "__main__":
    run_command(main)
