"""A run's files as numbers and tables: accuracies, results.json, results.md."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.folder import write_text
from data.problems import Problem, read_jsonl

# The paper's results: size -> method -> accuracy on GSM8K, MultiArith, ASDiv and SVAMP.
TABLE_2 = json.loads((Path(__file__).parent / "table_2.json").read_text())


def accuracies(rows: Sequence[dict]) -> dict[str, float]:
    """Percentage of problems solved by their first rationale, for each test set."""
    solved: dict[str, list[bool]] = {}
    for row in rows:
        name = row["test"]
        if not row["calculator"]:
            name += " without calculator"
        solved.setdefault(name, []).append(row["correct"][0])
    return {name: 100 * sum(right) / len(right) for name, right in solved.items()}


def make_table(folder: Path, config: argparse.Namespace) -> str:
    """Collect all evaluations in results.json and results.md; return the table."""
    stages = [("SFT", 0, "warm-up")]
    for method in ("st", "dpo-st"):
        number = 1
        while (folder / method / f"round-{number}" / "evaluation.jsonl").exists():
            stages.append((method.upper(), number, f"{method}/round-{number}"))
            number += 1
    results = {}
    rows = []
    constant: list[float] = []  # what the most frequent answer alone would solve, by test
    asked = None  # every evaluation must be on the same problems
    for method, number, stage in stages:
        path = folder / stage / "evaluation.jsonl"
        answers = read_jsonl(path)
        questions = [(row.get("test"), row.get("question")) for row in answers]
        asked = asked or questions
        if not answers or questions != asked:
            raise ValueError(f"{path} is damaged: delete it and run the same command again")
        results[stage] = accuracies(answers)
        rows.append([method, number, *(f"{share:.1f}" for share in results[stage].values())])
        constant = constant or most_frequent(answers)
    rows.append(["always the most frequent answer", "", *(f"{share:.1f}" for share in constant)])
    if not config.labeled:
        for method, numbers in TABLE_2.get(config.size, {}).items():
            rows.append([f"{method}, paper, with its own settings", "", *numbers, "", ""])
    header = ["method", "round", *results["warm-up"]]
    table = f"Greedy accuracy in %, Flan-T5 {config.size}, seed {config.seed}:\n\n"
    for row in [header, ["---"] * len(header), *rows]:
        table += "| " + " | ".join(map(str, row)) + " |\n"
    write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    write_text(table, folder / "results.md")
    return table


def most_frequent(rows: Sequence[dict]) -> list[float]:
    """Percentage of problems whose answer is the most frequent one, for each test set."""
    answers: dict[tuple, Counter] = {}
    for row in rows:
        answers.setdefault((row["test"], row["calculator"]), Counter())[row["answer"]] += 1
    return [100 * max(counts.values()) / counts.total() for counts in answers.values()]


def read_samples(path: Path, problems: Sequence[Problem], n_samples: int) -> list[list[str]]:
    """Read a file of samples back: n_samples rationales for each problem, in order.

    Raises ValueError if the file has been changed or damaged.
    """
    rows = read_jsonl(path)
    found = [(row.get("question"), len(row.get("rationales", ()))) for row in rows]
    if found != [(problem.question, n_samples) for problem in problems]:
        raise ValueError(f"{path} is damaged: delete it and run the same command again")
    return [row["rationales"] for row in rows]
