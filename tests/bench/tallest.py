"""A task whose answers are names: who is the tallest of four? As the files that run.py takes.

    python -m tests.bench.tallest runs/tallest-data
    python run.py --labeled runs/tallest-data/labeled.jsonl \\
        --unlabeled runs/tallest-data/unlabeled.jsonl \\
        --test tallest=runs/tallest-data/test.jsonl --out runs/tallest
    python -m tests.bench.tallest --steps runs/tallest ...

The last command tells, of all rationales that these runs kept, how many end, and how many of those
with the right name have the right steps.
"""

import random
import re
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from data.problems import Problem, read_jsonl, write_jsonl
from data.synthetic import BOYS, GIRLS
from tokenizer import format_rationale

N_LABELED = 150
N_UNLABELED = 750
N_TEST = 1000

# ----------------------------------------------------------------------------------- the problems


def solve(question: str) -> tuple[str, str]:
    """The rationale and the answer: whoever wins a comparison is the tallest so far."""
    lines = []
    tallest = ""
    for one, how, other in re.findall(r"(\w+) is (taller|shorter) than (\w+)\.", question):
        if how == "taller":
            tallest, short = one, other
        else:
            tallest, short = other, one
        lines.append(f"{tallest} is taller than {short}, so {tallest} is the tallest.")
    lines.append(f"#### {tallest}")
    return "\n".join(lines), tallest


def make_problem(rng: random.Random) -> Problem:
    """Three comparisons, each with the tallest so far: one has to look up who won the last one."""
    tallest, *others = rng.sample(GIRLS + BOYS, 4)
    sentences = []
    for other in others:
        tall, short = tallest, other
        if rng.random() < 0.5:  # the newcomer is the taller one
            tall, short = other, tallest
        wordings = [f"{tall} is taller than {short}.", f"{short} is shorter than {tall}."]
        sentences.append(rng.choice(wordings))
        tallest = tall
    question = " ".join([*sentences, "Who is the tallest?"])
    rationale, answer = solve(question)
    return Problem(question, answer, rationale)


def write_problems(folder: Path) -> None:
    """Write the labeled, the unlabeled and the test problems; only the first keep rationales."""
    rng = random.Random(0)
    by_question = {}  # so that none is there twice
    for _ in range(3000):
        problem = make_problem(rng)
        by_question[problem.question] = problem
    problems = list(by_question.values())
    labeled = problems[:N_LABELED]
    others = [replace(problem, rationale=None) for problem in problems[N_LABELED:]]
    unlabeled = others[:N_UNLABELED]
    test = others[N_UNLABELED : N_UNLABELED + N_TEST]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("labeled", labeled), ("unlabeled", unlabeled), ("test", test)):
        path = folder / f"{name}.jsonl"
        write_jsonl(map(asdict, part), path)
        print(f"{path}: {len(part)} problems")


# ---------------------------------------------------------------------------- what runs have made


def percentage(found: list[bool]) -> float | None:
    """None where there is nothing to be counted."""
    if not found:
        return None
    return 100 * statistics.mean(found)


def look_at(path: Path) -> dict[str, float | None]:
    """What the rationales in a file of samples or an evaluation are like, in %.

    Right steps are those of `solve`, to the letter. Raises ValueError for other problems.
    """
    cut = []
    right_names = []
    right_steps = []
    for row in read_jsonl(path):
        rationale, answer = solve(row["question"])
        if answer != row["answer"]:
            raise ValueError(f"{path} is of other problems: {row['question'][:60]!r}")
        samples = zip(row["rationales"], row["correct"], row["finished"], strict=True)
        for text, correct, ended in samples:
            cut.append(not ended)
            if ended:
                right_names.append(correct)
            if correct:
                right_steps.append(text == format_rationale(rationale))
    return {
        "cut at the limit": percentage(cut),
        "right name, of those that end": percentage(right_names),
        "right steps, of those with the right name": percentage(right_steps),
    }


def files_of(folder: Path) -> list[str]:
    """The finished samples and evaluations of a run."""
    names = []
    for pattern in ("evaluation.jsonl", "samples-for-*.jsonl"):
        for place in ("warm-up", "*/round-*"):
            for path in folder.glob(f"{place}/{pattern}"):
                names.append(path.relative_to(folder).as_posix())
    if not names:
        raise ValueError(f"{folder} has neither samples nor an evaluation: name folders of runs")
    return names


def write_share(share: float | None) -> str:
    return "none" if share is None else f"{share:.1f}"


def compare(folders: list[Path]) -> None:
    """`look_at` every file that any of these runs has: the mean, and in brackets run by run."""
    names = set()
    for folder in folders:
        names.update(files_of(folder))
    for name in sorted(names, key=lambda name: (not name.startswith("warm-up"), name)):
        print(name)
        runs = [look_at(folder / name) for folder in folders if (folder / name).exists()]
        for measure in runs[0]:
            shares = [run[measure] for run in runs]
            known = [share for share in shares if share is not None]
            text = "none"
            if known:
                text = f"{statistics.mean(known):.1f} %"
            if len(runs) > 1:
                text += f" ({', '.join(map(write_share, shares))})"
            print(f"  {measure}: {text}")


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) > 1 and arguments[0] == "--steps":
        compare([Path(folder) for folder in arguments[1:]])
    elif len(arguments) == 1 and not arguments[0].startswith("-"):
        write_problems(Path(arguments[0]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tallest: {error}")
