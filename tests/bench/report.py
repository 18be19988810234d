"""The paper's figures and tables from run folders alone, finished or not.

    python -m tests.bench.report runs/tiny-seed-? [--out DIR]

Prints them, and writes RUN/report.html in the first folder (tests/bench/page.py). Runs that differ
only in the seed are merged: mean ± standard deviation; a single run's accuracies get half of their
95 % interval instead. Runs with other flags than the first are compared with it. pass@k is an
unbiased estimate from the n >= k rationales drawn for each question of U. Figures are written as
PNG and SVG if matplotlib is installed.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import run
from data.folder import MAY_CHANGE, read_run_config
from data.problems import Problem, read_jsonl
from data.results import accuracies, compare, half_width, read_evaluations, rounds_with
from data.terminal import run_command
from selftrain import MAX_SIMILARITY, extract_answer, jaccard, make_pseudo_labels, pass_at_k
from tests.bench import drawing
from tests.bench.drawing import BLUE, GREEN, PINK, RED, add_legend, draw_band, new_figure
from tests.bench.page import write_page
from tokenizer import Tokenizer, format_rationale

NAMES = {"st": "ST", "dpo-st": "DPO-ST"}
COLORS = {"st": BLUE, "dpo-st": RED}
EXPECTED = "by the same calculations"
LABELS = " (the labels are those of three samples of the round alone, without the cap)"
SAME_KIND = MAY_CHANGE - {"rounds", "method", "bf16"}  # runs that differ in these are also merged

# Student's t for 95 %, by the number of runs: two, three, and so on.
T_95 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09),
)

# ------------------------------------------------------------------------------ means and intervals


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; a single value has none."""
    if len(values) > 1:
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    return str(values[0]) if isinstance(values[0], int) else f"{values[0]:.1f}"


def interval(differences: Sequence[float]) -> str:
    """The mean of paired differences, and its 95 % interval (Student's t over the seeds)."""
    mean = statistics.mean(differences)
    n = len(differences)
    if n == 1:
        return f"{mean:+.1f}"
    t = T_95[min(n - 2, len(T_95) - 1)]
    half = t * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


# --------------------------------------------------------------------------------- reading a folder


def config_of(folder: Path) -> argparse.Namespace:
    """The flags of a run. Raises FileNotFoundError if there is no run."""
    return argparse.Namespace(**read_run_config(folder / "config.json"))


def is_generated(config: argparse.Namespace) -> bool:
    """Whether the run's problems were generated from its seed."""
    return config.size == "tiny" and not config.labeled


def kind_of(config: argparse.Namespace) -> dict:
    """The settings that merged runs must share: all but the seed and those for speed and place."""
    ignored = SAME_KIND | {"seed"}
    if is_generated(config):
        ignored |= {"problems"}
    return {name: value for name, value in vars(config).items() if name not in ignored}


def solutions(config: argparse.Namespace) -> dict[str, list[str]]:
    """The calculations that solve each generated held-out problem, by its question."""
    if not is_generated(config):
        return {}
    _, _, tests = run.load_data(config)
    found = {}
    for problem in tests["held-out"]:
        found[problem.question] = calculations(format_rationale(problem.rationale))
    return found


def calculations(rationale: str) -> list[str]:
    """The contents of the brackets, as written and in order: `[ 2 + 3 = 5]` -> 2 + 3 = 5."""
    return re.findall(r"\[ ([^\]]*)\]", rationale)


def has_answer(rationale: str, gold: float | str) -> bool:
    """Whether there is an answer, right or wrong."""
    if isinstance(gold, str):
        return "#### " in rationale
    return extract_answer(rationale) is not None


def chances(rows: list[dict], k: int) -> list[float]:
    """pass@k of each row's question."""
    return [pass_at_k(len(row["correct"]), sum(row["correct"]), k) for row in rows]


def about_samples(rows: list[dict], tokenizer: Tokenizer, k: int) -> dict[str, float]:
    """Statistics of sampled rationales, in % if no unit is given. rows: from a file of samples."""
    k = min(k, len(rows[0]["rationales"]))
    n = 0
    n_without = 0
    similarities = []
    for row in rows:
        n += len(row["rationales"])
        n_without += sum(not has_answer(text, row["answer"]) for text in row["rationales"])
        pieces = [tokenizer.piece_set(rationale) for rationale in row["rationales"]]
        for one, other in itertools.combinations(pieces, 2):
            similarities.append(jaccard(one, other))
    return {
        "pass@1": 100 * statistics.mean(chances(rows, 1)),
        f"pass@{k}": 100 * statistics.mean(chances(rows, k)),
        "similarity of two (Jaccard)": 100 * statistics.mean(similarities or [1]),
        "without an answer": 100 * n_without / n,
    }


def count_labels(rows: list[dict], tokenizer: Tokenizer, n_samples: int) -> int:
    """Count the pseudo-labels from the first n_samples of each question, without gold or cap.

    The paper's figure 6 counts them this way; training caps them (selftrain.PERCENTILE).
    """
    problems = [Problem(row["question"], row["answer"]) for row in rows]
    samples = [row["rationales"][:n_samples] for row in rows]
    return len(make_pseudo_labels(problems, samples, tokenizer, MAX_SIMILARITY, 100))


def about_answers(rows: list[dict], solved_by: dict[str, list[str]]) -> dict[str, dict]:
    """The first three groups of `measure`, from the rows of an evaluation."""
    known = []
    for row in rows:
        if row["test"] == "held-out" and row["calculator"] and row["question"] in solved_by:
            known.append(row)
    known.sort(key=lambda row: len(solved_by[row["question"]]))
    by_steps = []  # the same rows again, as separate tests
    for row in known:
        by_steps.append(row | {"test": f"{len(solved_by[row['question']])} steps"})
    rows = rows + by_steps
    problems = Counter()
    for row in rows:
        suffix = "" if row["calculator"] else " without calculator"
        problems[row["test"] + suffix] += 1
    groups = {"accuracy": accuracies(rows), "problems": problems}
    right = [row for row in known if row["correct"][0]]
    if right:
        n_same = 0
        for row in right:
            n_same += calculations(row["rationales"][0]) == solved_by[row["question"]]
        groups["right answers"] = {EXPECTED: 100 * n_same / len(right)}
    return groups


def measure(folder: Path) -> dict[str, dict[str, dict]]:
    """All numbers of a run: stage -> group -> name -> number. Missing results are left out.

    The groups: "accuracy" of a stage's final model, by test, in %; "problems", the size of each
    test; "right answers", by their calculations, in %; and statistics of samples on U, "before" the
    DPO step (drawn for pairs) and "after" it (drawn for pseudo-labels).
    """
    config = config_of(folder)
    solved_by = solutions(config)
    tokenizer = Tokenizer(folder / "warm-up" / "sft")
    found = {}
    for stage in ["warm-up", *rounds_with(folder, "")]:
        groups = {}
        evaluation = folder / stage / "evaluation.jsonl"
        if evaluation.exists():
            groups |= about_answers(read_jsonl(evaluation), solved_by)
        for group, purpose in (("before", "pairs"), ("after", "labels")):
            samples = folder / stage / f"samples-for-{purpose}.jsonl"
            if samples.exists():
                rows = read_jsonl(samples)
                groups[group] = about_samples(rows, tokenizer, 3)
                groups[group]["pseudo-labels of 3 samples"] = count_labels(rows, tokenizer, 3)
        if groups:
            found[stage] = groups
    return found


# ------------------------------------------------------------------------------------------- tables


def values_of(runs: list[dict], stage: str, group: str, name: str) -> list[float]:
    """One number, from every run that has it."""
    values = []
    for found in runs:
        value = found.get(stage, {}).get(group, {}).get(name)
        if value is not None:
            values.append(value)
    return values


def first_test(runs: list[dict]) -> str:
    """The test set used for differences and figures."""
    return next(iter(runs[0]["warm-up"]["accuracy"]))


def stages_of(runs: list[dict]) -> list[str]:
    """All stages that any run has, in order."""
    return list(dict.fromkeys(stage for found in runs for stage in found))


def columns_of(runs: list[dict], group: str) -> list[str]:
    """The names of all numbers of a group that any run has, in order."""
    stages = [groups for found in runs for groups in found.values()]
    return list(dict.fromkeys(name for groups in stages for name in groups.get(group, {})))


def write_cell(runs: list[dict], stage: str, group: str, name: str) -> str:
    """A table cell: one number, over all runs."""
    values = values_of(runs, stage, group, name)
    if not values:
        return ""
    if group == "accuracy" and len(runs) == 1:
        return f"{values[0]:.1f} ± {half_width(values[0], runs[0][stage]['problems'][name]):.1f}"
    return spread(values)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; rows without numbers are left out."""
    lines = [header, ["---"] * len(header), *(row for row in rows if any(row[1:]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stage_table(title: str, runs: list[dict], group: str) -> list[str]:
    """A row for each stage, a column for each number of the group; nothing if it is empty."""
    columns = columns_of(runs, group)
    if not columns:
        return []
    rows = []
    for stage in stages_of(runs):
        rows.append([stage] + [write_cell(runs, stage, group, name) for name in columns])
    return [title, table(["stage", *columns], rows)]


def paired_differences(runs: list[dict], stage: str, other: str) -> list[float]:
    """The first test's accuracy after `stage` minus that after `other`, in runs that have both."""
    test = first_test(runs)
    pairs = []
    for found in runs:
        pairs.append([values_of([found], name, "accuracy", test) for name in (stage, other)])
    return [one[0] - two[0] for one, two in pairs if one and two]


def list_differences(runs: list[dict]) -> str:
    """The gains of self-training, and those of DPO-ST over ST."""
    lines = []
    stages = stages_of(runs)
    for stage in stages[1:]:
        gains = paired_differences(runs, stage, "warm-up")
        if gains:
            lines.append(f"- {stage} minus SFT: {interval(gains)} points")
    for stage in stages:
        method, _, place = stage.partition("/")
        gains = paired_differences(runs, f"dpo-st/{place}", stage)
        if method == "st" and gains:
            lines.append(f"- DPO-ST minus ST, {place.replace('-', ' ')}: {interval(gains)} points")
    return "\n".join(lines)


def describe_runs(runs: list[dict]) -> list[str]:
    """All tables of runs of one kind, as blocks of Markdown."""
    how = f"mean ± standard deviation over {len(runs)} runs"
    if len(runs) == 1:
        how = "± half of the 95 % interval of a single run"
    return [
        *stage_table(f"Greedy accuracy in %, {how}:", runs, "accuracy"),
        list_differences(runs),
        *stage_table(
            "Right held-out answers, % that use the calculations of the known rationale:",
            runs,
            "right answers",
        ),
        *stage_table(f"Samples on U, drawn for pairs{LABELS}:", runs, "before"),
        *stage_table(f"Samples on U, drawn for pseudo-labels{LABELS}:", runs, "after"),
    ]


def compare_kinds(folders: list[Path], kinds: list[dict]) -> list[str]:
    """The flags in which runs differ, their accuracies, and the problems that each gains and loses.

    A run is compared with the run of the first kind that has its seed, or else with the first run.
    Raises ValueError if they were tested on different problems.
    """
    names = [name for name in kinds[0] if len({str(kind.get(name)) for kind in kinds}) > 1]
    rows = [[name, *(str(kind.get(name)) for kind in kinds)] for name in names]
    blocks = ["Runs that differ in flags:", table(["flag", *map(str, folders)], rows)]
    evaluations = [read_evaluations(folder) for folder in folders]
    shares = [{stage: accuracies(rows) for stage, rows in run.items()} for run in evaluations]
    test = evaluations[0]["warm-up"][0]["test"]
    rows = []
    for stage in stages_of(shares):
        rows.append([stage, *(f"{run[stage][test]:.1f}" if stage in run else "" for run in shares)])
    blocks += [f"Accuracy on {test}, in %:", table(["stage", *map(str, folders)], rows)]
    usual = {}
    for folder, kind, ours in zip(folders, kinds, evaluations):
        seed = config_of(folder).seed
        if kind == kinds[0]:
            usual[seed] = folder, ours
            continue
        other, theirs = usual.get(seed, (folders[0], evaluations[0]))
        lines = []
        for stage in [stage for stage in ours if stage in theirs]:
            asked = [[row["question"] for row in run[stage]] for run in (ours, theirs)]
            if asked[0] != asked[1]:
                raise ValueError(f"{folder} was tested on other problems than {other}")
            lines.append(f"- {stage}: {compare(theirs[stage], ours[stage])}")
        blocks += [f"{folder} against {other}:", "\n".join(lines)]
    return [*blocks, f"Everything below is about {folders[0]}."]


# ------------------------------------------------------------------------------------------ figures


def per_round(runs: list[dict], method: str, test: str) -> list[list[float]]:
    """Accuracy after SFT and after each round, for the runs that have finished the most rounds."""
    curves = []
    for found in runs:
        curve = values_of([found], "warm-up", "accuracy", test)
        for number in range(1, len(found) + 1):
            curve += values_of([found], f"{method}/round-{number}", "accuracy", test)
        curves.append(curve)
    longest = max(len(curve) for curve in curves)
    return [curve for curve in curves if len(curve) == longest]


def draw_rounds(runs: list[dict], lines: Sequence[tuple[str, str, str]]):
    """Plot accuracy over rounds, both methods. lines: a test, its line's label and its style."""
    figure, axes = new_figure(6.5, 4.5)
    last = 0
    for method in NAMES:
        for test, name, style in lines:
            rows = per_round(runs, method, test)
            rounds = range(len(rows[0]))
            if len(rounds) > 1:
                label = NAMES[method] + name
                draw_band(axes, rounds, rows, label, COLORS[method], style, marker="o")
                if len(runs) == 1:
                    add_intervals(axes, runs[0], method, test, rows[0])
                last = max(last, rounds[-1])
    axes.set_xlabel("round (0: SFT)")
    # Users name the test sets: a dollar sign in a name must not start a formula.
    axes.set_ylabel(f"greedy accuracy, {lines[0][0]} (%)", parse_math=False)
    axes.set_xticks(range(last + 1))
    add_legend(axes, fontsize=9)
    return figure


def add_intervals(axes, found: dict, method: str, test: str, shares: Sequence[float]) -> None:
    """The 95 % intervals of a single run's accuracies, as bars."""
    halves = [half_width(share, found["warm-up"]["problems"][test]) for share in shares]
    shift = 0.03 * list(NAMES).index(method)  # side by side
    places = [number + shift for number in range(len(shares))]
    axes.errorbar(places, shares, halves, fmt="none", color=COLORS[method], alpha=0.5)


def draw_logged(
    axes, logs: list[list[dict]], stage: str, number: str, label: str, color: str
) -> None:
    """Plot a number over the optimiser steps of a stage; nothing if no run has logged it."""
    curves = []
    for log in logs:
        curve = {}
        for record in log:
            if record["stage"] == stage and number in record:
                curve[record["step"]] = record[number]
        if curve:
            curves.append(curve)
    if not curves:
        return
    steps = sorted(set(curves[0]).intersection(*curves))  # logged by all runs
    rows = [[curve[step] for step in steps] for curve in curves]
    draw_band(axes, steps, rows, label, color)


def draw_dpo_curves(logs: list[list[dict]]):
    """Plot the loss, the rewards and the order of the pairs in the first DPO step."""
    stage = "dpo-st/round-1/dpo"
    figure, (losses, rewards, order) = new_figure(14, 4.2, 3)
    draw_logged(losses, logs, stage, "loss", "loss", RED)
    losses.axhline(math.log(2), color="grey", linewidth=1)
    losses.text(0, math.log(2) + 0.01, "log 2", color="grey")
    losses.set_ylabel("DPO loss (nats per pair)")
    draw_logged(rewards, logs, stage, "chosen_rewards", "chosen", GREEN)
    draw_logged(rewards, logs, stage, "rejected_rewards", "rejected", PINK)
    draw_logged(rewards, logs, stage, "reward_margin", "margin", "black")
    rewards.set_ylabel("reward (beta times nats)")
    add_legend(rewards, fontsize=9)
    draw_logged(order, logs, stage, "reward_accuracy", "accuracy", RED)
    order.set_ylabel("pairs in the right order (share)")
    for axes in (losses, rewards, order):
        axes.set_xlabel("optimiser step")
    return figure


def draw_sft_loss(logs: list[list[dict]]):
    """Plot the SFT loss, on labeled problems alone and with the first pseudo-labels."""
    figure, axes = new_figure(6.5, 4.5)
    draw_logged(axes, logs, "warm-up/sft", "loss", "warm-up", "black")
    for method, name in NAMES.items():
        stage = f"{method}/round-1/sft"
        draw_logged(axes, logs, stage, "loss", f"{name}, round 1", COLORS[method])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("SFT loss (nats per token)")
    axes.set_yscale("log")
    add_legend(axes)
    return figure


def read_log(path: Path) -> list[dict]:
    """The lines of a log, except one that a killed run left incomplete."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw(folders: list[Path], runs: list[dict], out: Path) -> None:
    """Write all figures that these runs have data for."""
    if not drawing.add_plain_style():
        return
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    figures = {
        "accuracy-per-round": draw_rounds(runs, [(first_test(runs), "", "-")]),  # figure 5
        "dpo-curves": draw_dpo_curves(logs),
        "sft-loss": draw_sft_loss(logs),
    }
    if "dev without calculator" in runs[0]["warm-up"]["accuracy"]:  # figure 7
        with_it = ("dev", ", with calculator", "-")
        without = ("dev without calculator", ", without calculator", "--")
        figures["calculator"] = draw_rounds(runs, [with_it, without])
    drawing.save_figures(figures, out)


# --------------------------------------------------------------------------------------------- main


def usable(paths: list[Path]) -> list[Path]:
    """The folders with something to report, each once; print why the others are left out."""
    folders = []
    for path in {path.resolve(): path for path in paths}.values():
        if not (path / "config.json").exists():
            print(f"{path}: there is no run, left out", file=sys.stderr)
        elif not (path / "warm-up" / "evaluation.jsonl").exists():
            print(f"{path}: no evaluation yet, left out", file=sys.stderr)
        else:
            folders.append(path)
    return folders


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="of the pictures (figures/ in the first folder)")
    args = parser.parse_args(argv)
    folders = usable(args.runs)
    if not folders:
        sys.exit("report: nothing to report: give folders of runs")
    kinds = [kind_of(config_of(folder)) for folder in folders]
    merged = [folder for folder, kind in zip(folders, kinds) if kind == kinds[0]]
    if len({config_of(folder).seed for folder in merged}) < len(merged):
        sys.exit("report: two of these runs have one seed: give one run for each seed")
    try:
        blocks = compare_kinds(folders, kinds) if len(merged) < len(folders) else []
        runs = [measure(folder) for folder in merged]
        if len(runs) > 1:
            blocks.append("Tables and pictures: all runs of this kind. The rest: the first one.")
        blocks += describe_runs(runs)
        print("\n\n".join(block for block in blocks if block))
        out = args.out or folders[0] / "figures"
        draw(merged, runs, out)
        print(f"A page: {write_page(folders[0], config_of(folders[0]), blocks, out)}")
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    run_command(main)
