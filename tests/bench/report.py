"""The paper's figures and tables from run folders alone, finished or not.

    python -m tests.bench.report runs/tiny-seed-? [--out DIR]

Runs that differ only in the seed are merged: mean ± standard deviation. The accuracies of a single
run get a 95 % interval instead. pass@k is an unbiased estimate from the n >= k rationales that the
run drew for each question of U. Figures are written as PNG and SVG if matplotlib is installed.
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
from calculator import calculate
from data.folder import MAY_CHANGE, read_run_config
from data.problems import Problem, read_jsonl
from data.results import accuracies, compare, read_evaluations
from data.terminal import run_command
from selftrain import MAX_SIMILARITY, extract_answer, jaccard, make_pseudo_labels, pass_at_k
from tests.bench.drawing import (
    BLUE,
    GREEN,
    PINK,
    RED,
    add_legend,
    add_plain_style,
    draw_band,
    new_figure,
    save_figures,
)
from tests.bench.page import write_page
from tokenizer import Tokenizer, format_rationale

NAMES = {"st": "ST", "dpo-st": "DPO-ST"}
EXPECTED = "by the calculations of the problem's own rationale"
SAME_KIND = MAY_CHANGE - {"rounds", "method", "bf16"}  # runs that differ in these are also merged

# Student's t for 95 %, by the number of runs: two, three, and so on.
T_95 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09),
)

COLORS = {"st": BLUE, "dpo-st": RED}

# ------------------------------------------------------------------------------ means and intervals


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; a single value has none."""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text


def interval(differences: Sequence[float]) -> str:
    """The mean of paired differences, and its 95 % interval (Student's t over the seeds)."""
    mean = statistics.mean(differences)
    n = len(differences)
    if n == 1:
        return f"{mean:+.1f}"
    t = T_95[min(n - 2, len(T_95) - 1)]
    half = t * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the share n_right / n. Source: Wilson (1927).

    It contains every share p that is within 1.96 of its own standard errors, sqrt(p * (1 - p) / n),
    of the observed share.
    """
    z = 1.96
    share = n_right / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


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


def calculator_calls(rationale: str) -> list[str]:
    """The calculator's inputs, including spaces: `[ 2 + 3 = 5]` -> 2 + 3."""
    return re.findall(r"\[([^\[=]*)=", rationale)


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
    n_cut = 0
    calls = []
    similarities = []
    for row in rows:
        n += len(row["rationales"])
        n_cut += row["finished"].count(False)
        for rationale in row["rationales"]:
            calls += calculator_calls(rationale)
            n_without += not has_answer(rationale, row["answer"])
        pieces = [tokenizer.piece_set(rationale) for rationale in row["rationales"]]
        for one, other in itertools.combinations(pieces, 2):
            similarities.append(jaccard(one, other))
    n_refused = sum(calculate(call) is None for call in calls)
    return {
        "pass@1": 100 * statistics.mean(chances(rows, 1)),
        f"pass@{k}": 100 * statistics.mean(chances(rows, k)),
        "similarity of two (Jaccard)": 100 * statistics.mean(similarities or [1]),
        "calculator calls per rationale": len(calls) / n,
        "calls that do not evaluate": 100 * n_refused / max(1, len(calls)),
        "without an answer": 100 * n_without / n,
        "cut at the limit": 100 * n_cut / n,
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
    stages = ["warm-up"]
    for method in NAMES:
        n_rounds = len(list((folder / method).glob("round-*")))
        for number in range(1, n_rounds + 1):
            stages.append(f"{method}/round-{number}")
    found = {}
    for stage in stages:
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
    stages = []
    for found in runs:
        for stage in found:
            if stage not in stages:
                stages.append(stage)
    return stages


def columns_of(runs: list[dict], group: str) -> list[str]:
    """The names of all numbers of a group that any run has, in order."""
    columns = []
    for found in runs:
        for groups in found.values():
            for name in groups.get(group, {}):
                if name not in columns:
                    columns.append(name)
    return columns


def write_cell(runs: list[dict], stage: str, group: str, name: str) -> str:
    """A table cell: one number, over all runs."""
    values = values_of(runs, stage, group, name)
    if not values:
        return ""
    text = spread(values)
    if group == "accuracy" and len(runs) == 1:
        n = runs[0][stage]["problems"][name]
        low, high = wilson(round(values[0] * n / 100), n)
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text


def print_rows(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown; rows without numbers are left out."""
    print(f"| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for row in rows:
        if any(row[1:]):
            print(f"| {' | '.join(row)} |")


def print_table(title: str, runs: list[dict], group: str) -> None:
    """Print a row for each stage, a column for each number of the group; nothing if it is empty."""
    columns = columns_of(runs, group)
    if not columns:
        return
    print(f"\n{title}\n")
    rows = []
    for stage in stages_of(runs):
        rows.append([stage] + [write_cell(runs, stage, group, name) for name in columns])
    print_rows(["", *columns], rows)


def paired_differences(runs: list[dict], stage: str, other: str) -> list[float]:
    """The first test's accuracy after `stage` minus that after `other`, in runs that have both."""
    test = first_test(runs)
    differences = []
    for found in runs:
        one = values_of([found], stage, "accuracy", test)
        two = values_of([found], other, "accuracy", test)
        if one and two:
            differences.append(one[0] - two[0])
    return differences


def print_differences(runs: list[dict]) -> None:
    """Print the gains of self-training, and those of DPO-ST over ST."""
    print()
    stages = stages_of(runs)
    for stage in stages[1:]:
        gains = paired_differences(runs, stage, "warm-up")
        if gains:
            print(f"{stage} minus SFT: {interval(gains)} points")
    for stage in stages:
        method, _, place = stage.partition("/")
        gains = paired_differences(runs, f"dpo-st/{place}", stage)
        if method == "st" and gains:
            print(f"DPO-ST minus ST, {place.replace('-', ' ')}: {interval(gains)} points")


def print_tables(runs: list[dict]) -> None:
    how = f"mean ± standard deviation over {len(runs)} runs"
    if len(runs) == 1:
        how = "with the 95 % interval of a single run"
    print_table(f"Greedy accuracy in %, {how}:", runs, "accuracy")
    print_table("Right held-out answers, in % of these:", runs, "right answers")
    print_table("Samples on U, drawn for pairs:", runs, "before")
    print_table("Samples on U, drawn for pseudo-labels:", runs, "after")
    print_differences(runs)


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
    add_legend(axes)
    return figure


def add_intervals(axes, found: dict, method: str, test: str, shares: Sequence[float]) -> None:
    """The 95 % intervals of a single run's accuracies, as bars."""
    n = found["warm-up"]["problems"][test]
    bounds = [wilson(round(share * n / 100), n) for share in shares]
    low = [share - 100 * bound[0] for share, bound in zip(shares, bounds)]
    high = [100 * bound[1] - share for share, bound in zip(shares, bounds)]
    shift = 0.03 * list(NAMES).index(method)  # side by side
    places = [number + shift for number in range(len(shares))]
    axes.errorbar(places, shares, (low, high), fmt="none", color=COLORS[method], alpha=0.5)


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
    rows = []
    for curve in curves:
        rows.append([curve[step] for step in steps])
    draw_band(axes, steps, rows, label, color)


def draw_dpo_curves(logs: list[list[dict]]):
    """Plot the loss, the rewards and the order of the pairs in the first DPO step."""
    stage = "dpo-st/round-1/dpo"
    figure, (losses, rewards, order) = new_figure(14, 4.2, 3)
    draw_logged(losses, logs, stage, "loss", "loss", RED)
    losses.axhline(math.log(2), color="grey", linewidth=1)
    losses.annotate("log 2", (0, math.log(2)), color="grey", va="bottom")
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
    if not add_plain_style():
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
    save_figures(figures, out)


# -------------------------------------------------------------------------- runs that differ in flags


def compare_runs(folders: list[Path], kinds: list[dict]) -> None:
    """The flags in which runs differ, and the problems each gains and loses against the first."""
    names = [n for n in kinds[0] if len({str(kind.get(n)) for kind in kinds}) > 1]
    rows = [[name, *(str(kind.get(name)) for kind in kinds)] for name in names]
    print_rows(["flag", *map(str, folders)], rows)
    evaluations = [read_evaluations(folder) for folder in folders]
    first, *others = evaluations
    for folder, other in zip(folders[1:], others):
        print(f"\n{folder} against {folders[0]}, {next(iter(first.values()))[0]['test']}:\n")
        for stage, rows in other.items():
            if stage in first:
                asked = [row["question"] for row in rows]
                if asked != [row["question"] for row in first[stage]]:
                    raise ValueError(f"{folder} was tested on other problems than {folders[0]}")
                print(f"{stage}: {compare(first[stage], rows)}")


# --------------------------------------------------------------------------------------------- main


def usable(paths: list[Path]) -> list[Path]:
    """The folders with something to report, each once; print why the others are left out."""
    folders = []
    places = set()
    for path in paths:
        if path.resolve() in places:
            continue
        places.add(path.resolve())
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
    try:
        if any(kind != kinds[0] for kind in kinds):
            compare_runs(folders, kinds)
            return
        seeds = {config_of(folder).seed for folder in folders}
        if len(seeds) < len(folders):
            sys.exit("report: two of these runs have one seed: give one run for each seed")
        runs = [measure(folder) for folder in folders]
        print_tables(runs)
        out = args.out or folders[0] / "figures"
        draw(folders, runs, out)
        for folder, found in zip(folders, runs, strict=True):
            print(f"A page: {write_page(folder, config_of(folder), found, out)}")
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    run_command(main)
