"""Word problems made by the thousand: short stories in GSM8K's own format, for the run that downloads nothing.

A story is an opening and some events. Each adds a sentence to the question and a line of arithmetic (or two, for "three
bags of twelve") to the rationale, going on from the number reached so far. Families, names, objects and wordings vary,
and one story in four mentions a number that has nothing to do with the answer. The families are told in stories.txt,
which you can extend; two of them, library and orchard, are only ever test sets. Left out: fractions, percentages, units.

    python -m data.synthetic        # three of them
"""

import random
from collections import namedtuple
from collections.abc import Collection
from pathlib import Path

from data.problems import Problem

GIRLS = "Ana Clara Emma Grace Ida June Lucy Maria Nora Rosa Sara Tina".split()
BOYS = "Adam Ben Carl David Felix Henry Ivan Jack Leo Omar Paul Tom".split()
OBJECTS = "marbles stickers coins shells stamps cards beads buttons badges pencils".split()
GOODS = "shirts lamps mugs plates chairs puzzles scarves toys kites hats".split()
FOODS = "cakes muffins pies cookies buns tarts rolls waffles".split()
DISTRACTORS = (
    "{M} is {x} years old.", "The trip to {M} takes {x} minutes.", "It is {x} degrees outside.",
    "{M} has {x} books at home.", "There are {x} children in {his} class.", "{He} lives at number {x}.",
)  # fmt: skip

Row = namedtuple("Row", "kind formulas begin end wordings questions")

def read_stories(path: Path) -> dict[str, list[Row]]:
    """Read the families of stories.txt, which explains its own format; a row of kind "ask" holds questions only."""
    families = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("["):
            rows = families[text.strip("[]")] = []
        elif line[:1].isalpha():
            kind, _, rest = text.partition(":")
            formulas, _, sentence = rest.partition("->")
            begin, _, end = sentence.partition("...")
            steps = [] if formulas.strip() in ("a", "") else formulas.strip().split("; ")
            rows.append(Row(kind, steps, begin.strip(), end.strip(), [], []))
        elif text and not text.startswith("#"):
            (rows[-1].questions if text.startswith("?") else rows[-1].wordings).append(text.lstrip("? "))
    return families

FAMILIES = read_stories(Path(__file__).parent / "stories.txt")
TEST_SEED = 1_000_000  # whose stories data/tiny was never shown
OUT_OF_DOMAIN = ("library", "orchard")
IN_DOMAIN = tuple(family for family in FAMILIES if family not in OUT_OF_DOMAIN)

def calculate_step(formula: str, numbers: dict) -> tuple[int, str, int, float]:
    """Put numbers into "n + b": return left operand, sign, right operand and result."""
    left, sign, right = formula.split()
    x, y = (int(numbers.get(word, word)) for word in (left, right))
    return x, sign, y, {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]

def tell_story(rng: random.Random, family: list[Row], steps: int) -> Problem | None:
    """Tell one story of exactly `steps` steps, or None if its numbers came out too small, too large or broken."""
    name, friend, *others = rng.sample(GIRLS + BOYS, 6)
    things = dict(objects=rng.choice(OBJECTS), goods=rng.choice(GOODS), foods=rng.choice(FOODS), x=rng.randint(5, 60))
    told, lines, before, n, p = [], [], "", 0, 0
    questions = next(row.questions for row in family if row.kind == "ask")

    def words() -> dict:
        he, him, his = ("she", "her", "her") if name in GIRLS else ("he", "him", "his")
        return things | dict(N=name, M=friend, L=before, he=he, He=he.capitalize(), him=him, his=his)

    def fits(row: Row) -> bool:
        missing = steps - len(lines) - len(row.formulas)
        if "p + n" in row.formulas and not before:
            return False
        return missing >= 0 and row.kind in (("then", "last" if missing == 0 else "then") if told else ("open",))

    while not told or len(lines) < steps:
        row = rng.choice([row for row in family if fits(row)])
        numbers = dict(a=rng.randint(11, 99), b=rng.randint(3, 60), k=rng.randint(2, 9), n=n, p=p)
        numbers["c"] = n + rng.randint(5, 99)
        if row.wordings:
            told.append(rng.choice(row.wordings).format(**numbers, **words()))
        questions = row.questions or questions
        p, n = n, numbers["a"]  # an opening without a formula just states a number
        for i, formula in enumerate(row.formulas):
            x, sign, y, n = calculate_step(formula, numbers)
            if n != int(n) or not 2 <= n < 1000:
                return None
            n = numbers["m"] = int(n)
            begin = row.begin if i == 0 else "That makes" if sign == "+" else "That leaves"
            lines.append(f"{begin} {x} {sign} {y} = <<{x}{sign}{y}={n}>>{n} {row.end}".format(**words()))
        if row.kind == "then" and row.begin.startswith("{M}"):  # from here on the story is about somebody else
            before, name, friend = name, friend, others.pop()
    if rng.random() < 0.25:
        told.insert(rng.randint(1, len(told)), rng.choice(DISTRACTORS).format(**words()))
    told.append(rng.choice(questions).format(**words()))
    return Problem(" ".join(told), float(n), "\n".join([*lines, f"#### {n}"]))

def make_problems(
    n: int, seed: int | str, steps: tuple[int, ...] = (2, 3), exclude: Collection[str] = (), families: tuple = IN_DOMAIN
) -> list[Problem]:
    """Make n different problems, none of whose questions is in `exclude`; the same arguments give the same problems.

    Every number of steps in `steps`, and every family, is equally frequent. Pass the questions of one split as the
    `exclude` (best as a set) of the next, and the splits are disjoint.
    """
    rng = random.Random(f"problems {seed}")
    problems, seen = [], set(exclude)
    while len(problems) < n:
        family = families[len(problems) // len(steps) % len(families)]
        problem = tell_story(rng, FAMILIES[family], steps[len(problems) % len(steps)])
        if problem and problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    rng.shuffle(problems)
    return problems

if __name__ == "__main__":
    print(*(f"{p.question}\n{p.rationale}" for p in make_problems(3, seed=0, steps=(1, 2, 3))), sep="\n\n")
