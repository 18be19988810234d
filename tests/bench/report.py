"""The paper's figures and tables from run folders alone, finished or not; runs that differ in the seed only are merged.

    for seed in 0 1 2 3 4; do OMP_NUM_THREADS=1 python run.py --seed $seed; done
    python -m tests.bench.report runs/tiny-seed-? [--out DIR]      # pictures as PNG and SVG, where matplotlib is installed

pass@k is estimated without bias from the n >= k rationales that the run drew for each question of U.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import run
from calculator import calculate
from data.folder import RunFolder
from data.problems import Problem, read_jsonl
from selftrain import accuracies, extract_answer, is_correct, jaccard, make_pseudo_labels, pass_at_k
from tokenizer import Tokenizer, format_rationale

COLORS = {"st": "#0072B2", "dpo-st": "#D55E00", "other": "#009E73", "third": "#CC79A7"}  # Okabe and Ito: for every eye
LIMITS = set(run.MAY_CHANGE) - {"rounds", "method", "bf16"}  # of memory and time: runs that differ in them are of one kind
NAMES = {"st": "ST", "dpo-st": "DPO-ST"}
EXPECTED = "by the calculations of the problem's own rationale"
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t by n - 1


def spread(values: list[float], digits: int = 1) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def interval(differences: list[float]) -> str:
    """Mean of paired differences and its 95 % interval (Student's t over seeds)."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    half = T_95.get(len(differences) - 1, 1.96) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


# ------------------------------------------------------------------------------------------------ what a folder says


def config_of(stored: dict) -> run.Config:
    """What config.json says; flags that an older version did not have were off, but that a GPU computed in bf16."""
    stored = {"bf16": stored["device"] == "cuda", **stored}
    return run.Config(**{item.name: stored[item.name] for item in fields(run.Config) if item.name in stored})


def expected(config: dict) -> dict[str, list[str]]:
    """The calculations by which the held-out problems of --size tiny are solved: they are made, not read."""
    if config["size"] != "tiny" or config["labeled"]:
        return {}
    problems = run.load_data(config_of(config))[2]["held-out"]
    return {problem.question: calculations(format_rationale(problem.rationale)) for problem in problems}


def calculations(rationale: str) -> list[str]:
    """What stands in the brackets, as written and in this order: `[ 2 + 3 = 5]` -> 2 + 3 = 5."""
    return re.findall(r"\[ ([^\]]*)\]", rationale)


def about_samples(rows: list[dict], tokenizer: Tokenizer, k: int) -> dict[str, float]:
    """What sampled rationales are like, in % where no unit is said."""
    texts, k = [text for row in rows for text in row["rationales"]], min(k, len(rows[0]["rationales"]))
    counts = [(len(row["rationales"]), sum(is_correct(text, row["answer"]) for text in row["rationales"])) for row in rows]
    calls = [text.partition("=")[0] for rationale in texts for text in rationale.split("[")[1:] if "=" in text]
    pairs = [jaccard(*map(tokenizer.piece_set, pair)) for row in rows for pair in itertools.combinations(row["rationales"], 2)]
    share = lambda found, of: 100 * sum(found) / max(1, len(of))
    return {
        "pass@1": 100 * statistics.mean(pass_at_k(n, c, 1) for n, c in counts),
        f"pass@{k}": 100 * statistics.mean(pass_at_k(n, c, k) for n, c in counts),
        "similarity of two (Jaccard)": 100 * statistics.mean(pairs or [1]),
        "calculator calls per rationale": len(calls) / max(1, len(texts)),
        "calls that do not evaluate": share((calculate(call) is None for call in calls), calls),
        "without an answer": share(("#### " not in text if isinstance(row["answer"], str) else extract_answer(text) is None
                                    for row in rows for text in row["rationales"]), texts),
        "cut at the limit": share((not done for row in rows for done in row["finished"]), texts),
    }  # fmt: skip


@cache
def measure(path: Path) -> dict[str, dict[str, float]]:
    """All numbers of a run by stage: accuracies of the model that a round ends with, and how it came about."""
    folder, found = RunFolder(path), {}
    config = json.loads((path / "config.json").read_text())
    steps, vocabulary = expected(config), path / "warm-up" / "sft"
    for stage in ("warm-up", *(f"{method}/round-{n + 1}" for method in NAMES for n in range(config["rounds"]))):
        numbers = {}
        if file := folder.find(f"{stage}/evaluation.jsonl"):
            rows = read_jsonl(file)
            made = [row for row in rows if row["calculator"] and row["test"] == "held-out" and row["question"] in steps]
            made.sort(key=lambda row: len(steps[row["question"]]))
            rows += [{**row, "test": f"{len(steps[row['question']])} steps"} for row in made]
            numbers |= {test: accuracy for test, (accuracy, _, _) in accuracies(rows).items()}
            if right := [row for row in made if is_correct(row["rationales"][0], row["answer"])]:
                same = [calculations(row["rationales"][0]) == steps[row["question"]] for row in right]
                numbers[EXPECTED] = 100 * statistics.mean(same)
        for kind, title in (("samples-for-pairs", "before"), ("samples-for-labels", "after")):
            if file := folder.find(f"{stage}/{kind}.jsonl"):
                rows, tokenizer = read_jsonl(file), Tokenizer(vocabulary)
                numbers |= {f"{title}: {name}": value for name, value in about_samples(rows, tokenizer, 3).items()}
                problems = [Problem(row["question"], row["answer"]) for row in rows]  # their gold rationales do not count
                labels = make_pseudo_labels(problems, [row["rationales"][:3] for row in rows], tokenizer)
                numbers[f"{title}: pseudo-labels of 3 samples"] = len(labels)
        if file := folder.find(f"{stage}/pseudo-labels.jsonl"):
            numbers["pseudo-labels"] = len(read_jsonl(file))
            numbers["correct labels"] = numbers.get("after: pass@1", math.nan)
        if numbers:
            found[stage] = numbers
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def table(title: str, runs: list[dict], stages: list[str], columns: list[str], digits: int = 1) -> None:
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for stage in stages:
        cells = [[r[stage][column] for r in runs if column in r.get(stage, {})] for column in columns]
        if any(cells):
            print(f"| {stage} | " + " | ".join(spread(cell, digits) if cell else "" for cell in cells) + " |")


def print_tables(runs: list[dict]) -> None:
    stages = list(dict.fromkeys(stage for found in runs for stage in found))
    names = list(dict.fromkeys(name for found in runs for name in found["warm-up"] if name != EXPECTED))
    table(f"Greedy accuracy in %, mean ± standard deviation over {len(runs)} runs:", runs, stages, names)
    if any(EXPECTED in numbers for found in runs for numbers in found.values()):
        table("Right held-out answers, in % of these:", runs, stages, [EXPECTED])
    for when in ("before", "after"):
        rows = [{s: {n.removeprefix(f"{when}: "): v for n, v in numbers.items() if n.startswith(when)} for s, numbers in r.items()} for r in runs]
        columns = list(dict.fromkeys(name for found in rows for numbers in found.values() for name in numbers))
        if columns:
            table(f"Samples on U, drawn {'for pairs' if when == 'before' else 'for pseudo-labels'}:", rows, stages, columns)
    test = names[0]
    print()
    for stage in stages[1:]:
        gains = [found[stage][test] - found["warm-up"][test] for found in runs if test in found.get(stage, {})]
        print(f"{stage} minus SFT: {interval(gains)} points")
    for n in range(1, 1 + sum(stage.startswith("st/") for stage in stages)):
        both = [found for found in runs if all(test in found.get(f"{method}/round-{n}", {}) for method in NAMES)]
        if both:
            print(f"DPO-ST minus ST, round {n}: {interval([r[f'dpo-st/round-{n}'][test] - r[f'st/round-{n}'][test] for r in both])} points")


# ------------------------------------------------------------------------------------------------------------ pictures


def band(axes, x: list, rows: list[list[float]], name: str, color: str, **style) -> None:
    """A line through the means of rows, one row per seed, and a band of one standard deviation."""
    columns = list(zip(*rows))
    means = [statistics.mean(column) for column in columns]
    axes.plot(x, means, color=color, label=name, **style)
    if len(rows) > 1:
        deviations = [statistics.stdev(column) for column in columns]
        axes.fill_between(x, [m - d for m, d in zip(means, deviations)], [m + d for m, d in zip(means, deviations)], color=color, alpha=0.2)


def per_round(runs: list[dict], method: str, name: str) -> list[list[float]]:
    stages = ["warm-up", *sorted(stage for stage in runs[0] if stage.startswith(f"{method}/") and name in runs[0][stage])]
    return [[found[stage][name] for stage in stages] for found in runs if all(name in found.get(stage, {}) for stage in stages)]


def draw(folders: list[Path], runs: list[dict], out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return print("\nFor pictures: pip install matplotlib, and the same command again", file=sys.stderr)
    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dpo-st", "lines.linewidth": 2}
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)

    def save(figure, name: str) -> None:
        figure.tight_layout()
        for ending in ("png", "svg"):
            figure.savefig(out / f"{name}.{ending}", **({"dpi": 150} if ending == "png" else {"metadata": {"Date": None}}))
        plt.close(figure)

    test = next(iter(runs[0]["warm-up"]))
    methods = [method for method in NAMES if len(per_round(runs, method, test)[0]) > 1]
    rounds = range(1 + max((len(per_round(runs, method, test)[0]) - 1 for method in methods), default=0))

    figure, axes = plt.subplots(figsize=(6.5, 4.5))  # the paper's figure 5
    for method in methods:
        rows = per_round(runs, method, test)
        band(axes, list(range(len(rows[0]))), rows, NAMES[method], COLORS[method], marker="o")
    axes.set(xlabel="round (0: SFT)", ylabel=f"greedy accuracy, {test} (%)", xticks=rounds)
    if methods:
        axes.legend()
    save(figure, "accuracy-per-round")

    figure, axes = plt.subplots(figsize=(6.5, 4.5))  # figure 7
    for method in methods:
        for name, label, line in ((test, "with", "-"), (f"{test} without calculator", "without", "--")):
            rows = per_round(runs, method, name)
            band(axes, list(range(len(rows[0]))), rows, f"{NAMES[method]}, {label} calculator", COLORS[method], marker="o", linestyle=line)
    axes.set(xlabel="round (0: SFT)", ylabel=f"greedy accuracy, {test} (%)", xticks=rounds)
    if methods:
        axes.legend()
    save(figure, "calculator")

    stage = "dpo-st/round-1"
    if all(f"after: {name}" in r.get(stage, {}) for r in runs for name in ("pass@1", "pass@3")):  # figure 6
        figure, panels = plt.subplots(1, 3, figsize=(10, 4))
        for axes, name in zip(panels, ("pass@1", "pass@3", "pseudo-labels of 3 samples")):
            for x, when in enumerate(("before", "after")):
                values = [r[stage][f"{when}: {name}"] for r in runs]
                error = statistics.stdev(values) if len(values) > 1 else None
                axes.bar(x, statistics.mean(values), yerr=error, capsize=6, color=COLORS["dpo-st"] if x else "#999999")
            axes.set(xticks=(0, 1), xticklabels=("before DPO", "after DPO"), ylabel=f"{name} (%)" if "@" in name else name)
        save(figure, "dpo-step")

    logs = [[record for record in read_jsonl(folder / "log.jsonl") if "step" in record] for folder in folders]
    curves = defaultdict(list)  # (stage, number) -> a run's {step: value}
    for log in logs:
        for stage, number in {(record["stage"], name) for record in log for name in record if name not in ("stage", "step")}:
            steps = {record["step"]: record[number] for record in log if record["stage"] == stage and number in record}
            curves[stage, number].append(steps)

    def curve(axes, stage: str, number: str, label: str, color: str, **style) -> None:
        of_runs = curves.get((stage, number), [])
        steps = sorted(set.intersection(*map(set, of_runs))) if of_runs else []
        if steps:
            band(axes, steps, [[steps_of[step] for step in steps] for steps_of in of_runs], label, color, **style)

    stage = "dpo-st/round-1/dpo"
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2))
    for prefix, label, line in (("", "trained on", "-"), ("held_out_", "held out", "--")):
        curve(panels[0], stage, f"{prefix}loss", label, COLORS["dpo-st"], linestyle=line)
        curve(panels[1], stage, f"{prefix}chosen_rewards", f"chosen, {label}", COLORS["other"], linestyle=line)
        curve(panels[1], stage, f"{prefix}rejected_rewards", f"rejected, {label}", COLORS["third"], linestyle=line)
        curve(panels[1], stage, f"{prefix}reward_margin", f"margin, {label}", "black", linestyle=line)
        curve(panels[2], stage, f"{prefix}reward_accuracy", label, COLORS["dpo-st"], linestyle=line)
    panels[0].axhline(math.log(2), color="grey", linewidth=1)
    panels[0].annotate("log 2", (0, math.log(2)), color="grey", va="bottom")
    for axes, label in zip(panels, ("DPO loss (nats per pair)", "reward (beta times nats)", "pairs in the right order (share)")):
        axes.set(xlabel="optimiser step", ylabel=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
    save(figure, "dpo-curves")

    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    curve(axes, "warm-up/sft", "loss", "warm-up", "black")
    for method in methods:
        curve(axes, f"{method}/round-1/sft", "loss", f"{NAMES[method]}, round 1", COLORS[method])
    axes.set(xlabel="optimiser step", ylabel="SFT loss (nats per token)", yscale="log")
    axes.legend()
    save(figure, "sft-loss")
    print(f"\nPictures: {', '.join(sorted(path.name for path in out.glob('*.svg')))} in {out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: figures/ in the first run's folder")
    args = parser.parse_args(argv)
    folders, kinds = [], defaultdict(list)
    for folder in {path.resolve(): path for path in args.runs}.values():  # one that is named twice is one run
        if not (folder / "config.json").exists():
            print(f"{folder}: there is no run, left out", file=sys.stderr)
            continue
        if not RunFolder(folder).find("warm-up/evaluation.jsonl"):
            print(f"{folder}: no evaluation yet, left out", file=sys.stderr)
            continue
        config = asdict(config_of(json.loads((folder / "config.json").read_text())))
        kinds[json.dumps({**config, **dict.fromkeys(("seed", *LIMITS))}, sort_keys=True)].append(folder)
        folders.append(folder)
    if len(kinds) != 1:
        sys.exit(f"report: {'these runs differ in more than the seed' if kinds else 'nothing to report'}: give runs of one kind")
    runs = [measure(folder) for folder in folders]
    print_tables(runs)
    draw(folders, runs, args.out or folders[0] / "figures")


if __name__ == "__main__":
    main()
