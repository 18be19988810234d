"""A task whose answers are names: who is the tallest of four? Written as the three files that run.py takes as your own data.

    python -m tests.bench.tallest runs/tallest-data
    python run.py --labeled runs/tallest-data/labeled.jsonl --unlabeled runs/tallest-data/unlabeled.jsonl \\
        --test tallest=runs/tallest-data/test.jsonl --out runs/tallest
"""

import random
import sys
from dataclasses import asdict
from pathlib import Path

from data.problems import Problem, write_jsonl
from data.synthetic import BOYS, GIRLS


def make_problem(rng: random.Random) -> Problem:
    """Three comparisons, each with the tallest so far: three steps of looking up who won the last one."""
    tallest, *others = rng.sample(GIRLS + BOYS, 4)
    sentences, lines = [], []
    for other in others:
        new = rng.random() < 0.5  # the newcomer is the taller one
        tall, short = (other, tallest) if new else (tallest, other)
        sentences.append(rng.choice([f"{tall} is taller than {short}.", f"{short} is shorter than {tall}."]))
        lines.append(f"{tall} is taller than {short}, so {tall} is the tallest.")
        tallest = tall
    return Problem(" ".join([*sentences, "Who is the tallest?"]), tallest, "\n".join([*lines, f"#### {tallest}"]))


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, rng = Path(sys.argv[1]), random.Random(0)
    problems = list({problem.question: problem for problem in (make_problem(rng) for _ in range(3000))}.values())
    for name, part in (("labeled", problems[:150]), ("unlabeled", problems[150:900]), ("test", problems[900:1900])):
        rows = map(asdict, part)
        write_jsonl(({**row, "rationale": None} for row in rows) if name != "labeled" else rows, folder / f"{name}.jsonl")


if __name__ == "__main__":
    main()
