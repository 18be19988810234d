"""A task whose answers are names: who is the tallest of four? Written as the three files that run.py takes as your own data.

    python -m tests.bench.tallest runs/tallest-data
    python run.py --labeled runs/tallest-data/labeled.jsonl --unlabeled runs/tallest-data/unlabeled.jsonl \\
        --test tallest=runs/tallest-data/test.jsonl --out runs/tallest
    python -m tests.bench.tallest --steps runs/tallest ...      # how many rationales with the right name have the right steps
"""

import random
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from data.folder import RunFolder
from data.problems import Problem, read_jsonl, write_jsonl
from data.synthetic import BOYS, GIRLS
from selftrain import is_correct
from tokenizer import format_rationale


def solve(question: str) -> tuple[str, str]:
    """The rationale and the answer: whoever is the taller one of a comparison is the tallest so far."""
    lines, tallest = [], ""
    for one, how, other in re.findall(r"(\w+) is (taller|shorter) than (\w+)\.", question):
        tallest, short = (one, other) if how == "taller" else (other, one)
        lines.append(f"{tallest} is taller than {short}, so {tallest} is the tallest.")
    return "\n".join([*lines, f"#### {tallest}"]), tallest


def make_problem(rng: random.Random) -> Problem:
    """Three comparisons, each with the tallest so far: three steps of looking up who won the last one."""
    tallest, *others = rng.sample(GIRLS + BOYS, 4)
    sentences = []
    for other in others:
        new = rng.random() < 0.5  # the newcomer is the taller one
        tall, short = (other, tallest) if new else (tallest, other)
        sentences.append(rng.choice([f"{tall} is taller than {short}.", f"{short} is shorter than {tall}."]))
        tallest = tall
    question = " ".join([*sentences, "Who is the tallest?"])
    rationale, answer = solve(question)
    return Problem(question, answer, rationale)


def right_steps(path: Path) -> float:
    """Of the rationales in a list of samples that end in the right name, the share in % with the right steps, no more and no fewer."""
    right = [(row["question"], text) for row in read_jsonl(path) for text in row["rationales"] if is_correct(text, row["answer"])]
    return 100 * statistics.mean(text == format_rationale(solve(question)[0]) for question, text in right)


def count_steps(runs: list[RunFolder]) -> None:
    """One line for each list of samples and evaluation: `right_steps`, run by run."""
    names = [line.split()[1] for line in (runs[0].path / "sha256sums.txt").read_text().splitlines()]
    for name in names:
        if name.endswith(("samples-for-pairs.jsonl", "samples-for-labels.jsonl", "evaluation.jsonl")):
            shares = [right_steps(path) for run in runs if (path := run.find(name))]
            print(f"{name}: {statistics.mean(shares):.1f} % ({', '.join(f'{share:.1f}' for share in shares)})")


def main() -> None:
    if sys.argv[1:2] == ["--steps"] and sys.argv[2:]:
        return count_steps([RunFolder(Path(path)) for path in sys.argv[2:]])
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, rng = Path(sys.argv[1]), random.Random(0)
    problems = list({problem.question: problem for problem in (make_problem(rng) for _ in range(3000))}.values())
    for name, part in (("labeled", problems[:150]), ("unlabeled", problems[150:900]), ("test", problems[900:1900])):
        rows = map(asdict, part)
        write_jsonl(({**row, "rationale": None} for row in rows) if name != "labeled" else rows, folder / f"{name}.jsonl")


if __name__ == "__main__":
    main()
