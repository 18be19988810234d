"""A run's files as numbers and words: accuracies, results.json, results.md, the closing words."""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data.folder import write_text
from data.problems import ANNOTATION, Problem, read_jsonl

# The paper's results: size -> method -> accuracy on GSM8K, MultiArith, ASDiv and SVAMP.
TABLE_2 = json.loads((Path(__file__).parent / "table_2.json").read_text())
SETS = {  # what each test set is
    "held-out": "stories of the same kinds as those of L and U",
    "library": "a kind of story that is in neither L nor U",
    "orchard": "another such kind",
    "dev": "drawn like the first set; also answered without the calculator",
    "GSM8K": "test problems of the set that L is from",
    "MultiArith": "out of domain: several steps",
    "ASDiv": "out of domain: mostly one step",
    "SVAMP": "out of domain: one step, with irrelevant numbers",
}


def accuracies(rows: Sequence[dict]) -> dict[str, float]:
    """Percentage of problems solved by their first rationale, for each test set."""
    solved: dict[str, list[bool]] = {}
    for row in rows:
        solved.setdefault(column_of(row), []).append(row["correct"][0])
    return {name: 100 * sum(right) / len(right) for name, right in solved.items()}


def column_of(row: dict) -> str:
    return row["test"] if row["calculator"] else f"{row['test']} without calculator"


def rounds_with(folder: Path, file: str) -> list[str]:
    """The rounds of a run that have a file (any, if it is ""): st/round-1, and so on."""
    rounds = []
    for method in ("st", "dpo-st"):
        number = 1
        while (folder / method / f"round-{number}" / file).exists():
            rounds.append(f"{method}/round-{number}")
            number += 1
    return rounds


def read_evaluations(folder: Path) -> dict[str, list[dict]]:
    """The rows of every evaluation of a run, by stage: warm-up, st/round-1, and so on.

    Raises ValueError if a file is damaged, or not about the same problems as the first.
    """
    evaluations: dict[str, list[dict]] = {}
    asked = None
    for stage in ["warm-up", *rounds_with(folder, "evaluation.jsonl")]:
        path = folder / stage / "evaluation.jsonl"
        rows = read_jsonl(path)
        questions = [(row.get("test"), row.get("question")) for row in rows]
        asked = asked or questions
        known = all(is_whole(row, 1) and isinstance(row.get("test"), str) for row in rows)
        known = known and all(type(row.get("calculator")) is bool for row in rows)
        if not rows or questions != asked or not known:
            raise ValueError(f"{path} is damaged: delete it and run the same command again")
        evaluations[stage] = rows
    return evaluations


def make_table(evaluations: dict[str, list[dict]], config: argparse.Namespace) -> str:
    """Accuracies by stage, in the layout of the paper's table 2."""
    last = list(evaluations.values())[-1]
    results = {stage: accuracies(rows) for stage, rows in evaluations.items()}
    sizes = Counter(column_of(row) for row in last)
    table = [["method", "round", *sizes], ["---"] * (len(sizes) + 2)]
    for stage, shares in results.items():
        method, _, number = stage.partition("/round-")
        name = method.upper() if number else "SFT"
        table.append([name, number or "0", *(f"{share:.1f}" for share in shares.values())])
    halves = [half_width(share, sizes[name]) for name, share in accuracies(last).items()]
    table.append(["± of the last row (95 %)", "", *(f"{half:.1f}" for half in halves)])
    table.append(["problems", "", *map(str, sizes.values())])
    answers: dict[str, Counter] = {name: Counter() for name in sizes}
    for row in last:
        answers[column_of(row)][row["answer"]] += 1
    constant = [100 * max(counts.values()) / counts.total() for counts in answers.values()]
    table.append(["always the most frequent answer", "", *(f"{share:.1f}" for share in constant)])
    if not config.labeled:
        for method, numbers in TABLE_2.get(config.size, {}).items():
            table.append(
                [f"{method}, paper, with its own settings", "", *map(str, numbers), "", ""]
            )
    lines = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"Greedy accuracy in %, Flan-T5 {config.size}, seed {config.seed}:\n\n{lines}"


def half_width(share: float, n: int) -> float:
    """Half of the 95 % interval of an accuracy in %. Source: Agresti and Coull (1998).

    Two right and two wrong answers are added; otherwise it would be 0 if all or none are right.
    """
    share = (share * n + 200) / (n + 4)
    return 1.96 * math.sqrt(share * (100 - share) / (n + 4))


# ------------------------------------------------------------------------------------ closing words


def compare(before: Sequence[dict], after: Sequence[dict]) -> str:
    """How many problems of the first test set one model solves and the other does not.

    Whether the difference can be chance: the exact sign test, two-sided.
    """
    test = after[0]["test"]
    gained = lost = 0
    for old, new in zip(before, after, strict=True):
        if new["test"] == test and new["calculator"]:
            gained += new["correct"][0] > old["correct"][0]
            lost += new["correct"][0] < old["correct"][0]
    n = gained + lost
    if n == 0:
        return "the same problems are solved"
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    p = min(1.0, 2 * tail)
    verdict = "more than chance" if p < 0.05 else "this may be chance"
    return f"{gained} gained, {lost} lost: {verdict} (sign test, p = {p:.2g})"


def mark_results(rationale: str, calculate: Callable[[str], str | None]) -> str:
    """The rationale with what the calculator writes between « and »: results and `]`."""

    def mark(found: re.Match) -> str:
        if calculate(found[1]) == found[2].strip():
            return f"[{found[1]}= «{found[2].strip()}]»"
        return found[0]

    return ANNOTATION.sub(mark, rationale)


def closing_words(
    evaluations: dict[str, list[dict]], calculate: Callable[[str], str | None]
) -> str:
    """What the table says: the sets, what was gained and lost, and one problem in full."""
    warm_up, last = evaluations["warm-up"], list(evaluations.values())[-1]
    test = last[0]["test"]
    lines = [
        f"- {name}: {SETS[name]}" for name in dict.fromkeys(r["test"] for r in last) if name in SETS
    ]
    lines += ["", f"Problems of {test}:"]
    for stage, rows in evaluations.items():
        if stage != "warm-up":
            lines.append(f"- {stage} against SFT: {compare(warm_up, rows)}")
    for stage, rows in evaluations.items():
        other = stage.replace("dpo-st", "st")
        if stage != other and other in evaluations:
            text = compare(evaluations[other], rows)
            lines.append(f"- DPO-ST against ST, {stage.partition('/')[2]}: {text}")
    for old, new in zip(warm_up, last, strict=True):
        if new["calculator"] and new["correct"][0] and not old["correct"][0]:
            lines += ["", "A problem that SFT got wrong and the last model gets right:", ""]
            lines.append(f"{new['question']} (answer: {str(new['answer']).removesuffix('.0')})")
            for name, row in (("SFT", old), ("last model", new)):
                lines.append(f"- {name}: {mark_results(row['rationales'][0], calculate)}")
            break
    return "\n".join(lines) + "\n"


def conclude(
    folder: Path, config: argparse.Namespace, calculate: Callable[[str], str | None]
) -> str:
    """Write results.json and results.md; return what results.md says."""
    evaluations = read_evaluations(folder)
    text = f"{make_table(evaluations, config)}\n{closing_words(evaluations, calculate)}"
    results = {stage: accuracies(rows) for stage, rows in evaluations.items()}
    write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    write_text(text, folder / "results.md")
    return text


def read_samples(path: Path, problems: Sequence[Problem], n_samples: int) -> list[list[str]]:
    """Read a file of samples back: n_samples rationales for each problem, in order.

    Raises ValueError if the file has been changed or damaged.
    """
    rows = read_jsonl(path)
    asked = [row.get("question") for row in rows] == [problem.question for problem in problems]
    if not asked or not all(is_whole(row, n_samples) for row in rows):
        raise ValueError(f"{path} is damaged: delete it and run the same command again")
    return [row["rationales"] for row in rows]


def is_whole(row: dict, n_samples: int) -> bool:
    """Whether a row has its rationales, and a verdict on each."""
    lists = [(row.get("rationales"), str), (row.get("correct"), bool)]
    return all(
        isinstance(items, list) and [type(item) for item in items] == [kind] * n_samples
        for items, kind in lists
    )
