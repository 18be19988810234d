"""A task whose answers are names: who is the tallest of four? Written as the three files that run.py takes as your own data.

    python -m tests.bench.tallest runs/tallest-data
    python run.py --labeled runs/tallest-data/labeled.jsonl --unlabeled runs/tallest-data/unlabeled.jsonl \\
        --test tallest=runs/tallest-data/test.jsonl --out runs/tallest
    python -m tests.bench.tallest --steps runs/tallest ...      # do they end, and have those with the right name the right steps?
"""

import random
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

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


def look_at(path: Path) -> dict[str, float | None]:
    """What the rationales in a file of samples or an evaluation are like, in %; None where there are none of that kind. Right steps
    are `solve`'s to the letter. Raises ValueError if the problems are others."""
    rows = read_jsonl(path)
    if wrong := [row["question"] for row in rows if solve(row["question"])[1] != row["answer"]]:
        raise ValueError(f"{path} is of other problems: {wrong[0][:60]!r}")
    texts = [(row, text, ended) for row in rows for text, ended in zip(row["rationales"], row["finished"], strict=True)]
    named = [(row["question"], text) for row, text, _ in texts if is_correct(text, row["answer"])]
    share = lambda found: 100 * statistics.mean(found) if found else None
    return {
        "cut at the limit": share([not ended for *_, ended in texts]),
        "right name, of those that end": share([is_correct(text, row["answer"]) for row, text, ended in texts if ended]),
        "right steps, of those with the right name": share([text == format_rationale(solve(question)[0]) for question, text in named]),
    }


def compare(paths: list[Path]) -> None:
    """`look_at` each file of samples and each evaluation that any of these runs has finished: the mean, and (run by run)."""
    files = {path: sorted([*path.glob("**/samples-for-*.jsonl"), *path.glob("**/evaluation.jsonl")]) for path in paths}
    for path in (path for path in paths if not files[path]):
        raise ValueError(f"{path} has neither samples nor an evaluation: name the folders of runs")
    names = {str(file.relative_to(path)) for path in paths for file in files[path]}
    for name in sorted(names, key=lambda name: (not name.startswith("warm-up"), name)):
        runs = [look_at(path / name) for path in paths if (path / name).exists()]
        print(name)
        for measure in runs[0]:
            known = [run[measure] for run in runs if run[measure] is not None]
            listed = ", ".join("none" if run[measure] is None else f"{run[measure]:.1f}" for run in runs)
            mean = f"{statistics.mean(known):.1f} %" if known else "none"
            print(f"  {measure}: {mean}" + f" ({listed})" * (len(runs) > 1))


def main() -> None:
    if sys.argv[1:2] == ["--steps"] and sys.argv[2:]:
        return compare([Path(path) for path in sys.argv[2:]])
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, rng = Path(sys.argv[1]), random.Random(0)
    problems = list({problem.question: problem for problem in (make_problem(rng) for _ in range(3000))}.values())
    for name, part in (("labeled", problems[:150]), ("unlabeled", problems[150:900]), ("test", problems[900:1900])):
        rows = map(asdict, part)
        write_jsonl(({**row, "rationale": None} for row in rows) if name != "labeled" else rows, folder / f"{name}.jsonl")
        print(f"{folder / name}.jsonl: {len(part)} problems")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tallest: {error}")
