"""Generated word problems in GSM8K's format, for the run that downloads nothing.

You need not read this file to understand the method. A story has an opening and some events. Each
adds a sentence to the question and one line of arithmetic (two for "three bags of twelve") to the
rationale, which continues from the number reached so far. Families of stories, names, objects and
wordings vary, and one story in four mentions an irrelevant number. The families are in stories.txt,
which you can extend. Two of them, library and orchard, are in neither L nor U but only in tests
(and in what data/tiny has read, as Flan-T5 has read the web). Left out: fractions, percentages,
units.

    python -m data.synthetic        # prints three problems
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from data.problems import Problem

GIRLS = "Ana Clara Emma Grace Ida June Lucy Maria Nora Rosa Sara Tina".split()
BOYS = "Adam Ben Carl David Felix Henry Ivan Jack Leo Omar Paul Tom".split()
OBJECTS = "marbles stickers coins shells stamps cards beads buttons badges pencils".split()
GOODS = "shirts lamps mugs plates chairs puzzles scarves toys kites hats".split()
FOODS = "cakes muffins pies cookies buns tarts rolls waffles".split()
DISTRACTORS = (
    "{M} is {x} years old.",
    "The trip to {M} takes {x} minutes.",
    "It is {x} degrees outside.",
    "{M} has {x} books at home.",
    "There are {x} children in {his} class.",
    "{He} lives at number {x}.",
)
TEST_SEED = 1_000_000  # data/tiny has seen none of these stories
OUT_OF_DOMAIN = ("library", "orchard")


@dataclass
class Row:
    """One opening or event of a family (see stories.txt); one of kind "ask" has only questions."""

    kind: str  # open, then, last or ask
    formulas: list[str]  # such as "n + b"
    begin: str  # how the rationale's line begins and ends
    end: str
    wordings: list[str] = field(default_factory=list)  # of the question's sentence
    questions: list[str] = field(default_factory=list)


def read_stories(path: Path) -> dict[str, list[Row]]:
    """Read stories.txt: family -> rows. Indented lines belong to the row above them."""
    families: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("["):
            rows: list[Row] = []
            families[text.strip("[]")] = rows
        elif line[:1].isalpha():
            kind, _, rest = text.partition(":")
            formulas, _, sentence = rest.partition("->")
            begin, _, end = sentence.partition("...")
            steps = formulas.strip().split("; ")
            if formulas.strip() in ("", "a"):  # a question, or an opening that only states a number
                steps = []
            rows.append(Row(kind, steps, begin.strip(), end.strip()))
        elif text.startswith("?"):
            rows[-1].questions.append(text.lstrip("? "))
        elif text and not text.startswith("#"):
            rows[-1].wordings.append(text)
    return families


FAMILIES = read_stories(Path(__file__).parent / "stories.txt")
IN_DOMAIN = tuple(family for family in FAMILIES if family not in OUT_OF_DOMAIN)


def calculate_step(formula: str, numbers: dict[str, int]) -> tuple[int, str, int, float]:
    """Put numbers into a formula such as "n + b": left operand, sign, right operand and result."""
    left, sign, right = formula.split()
    x = int(numbers.get(left, left))
    y = int(numbers.get(right, right))
    results = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}
    return x, sign, y, results[sign]


class Story:
    """A story under construction: who it is about, its sentences, and the number reached so far."""

    def __init__(self, rng: random.Random, family: list[Row], steps: int):
        self.rng = rng
        self.family = family
        self.steps = steps
        self.name, self.friend, *self.others = rng.sample(GIRLS + BOYS, 6)
        self.before = ""  # the previous main person
        self.things = {
            "objects": rng.choice(OBJECTS),
            "goods": rng.choice(GOODS),
            "foods": rng.choice(FOODS),
            "x": rng.randint(5, 60),
        }
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.number = 0  # n in a formula
        self.previous = 0  # p in a formula
        self.questions = next(row.questions for row in family if row.kind == "ask")

    def words(self) -> dict:
        """The words that a wording may have in braces."""
        he, him, his = "he", "him", "his"
        if self.name in GIRLS:
            he, him, his = "she", "her", "her"
        people = {"N": self.name, "M": self.friend, "L": self.before}
        return self.things | people | {"he": he, "He": he.capitalize(), "him": him, "his": his}

    def fits(self, row: Row) -> bool:
        """Whether a row may come next if the story is to have exactly `steps` steps."""
        missing = self.steps - len(self.lines) - len(row.formulas)
        if missing < 0 or ("p + n" in row.formulas and not self.before):
            return False
        if not self.sentences:
            return row.kind == "open"
        return row.kind == "then" or (row.kind == "last" and missing == 0)

    def go_on(self) -> bool:
        """Add one row; False if a result is too small, too large or not an integer."""
        row = self.rng.choice([row for row in self.family if self.fits(row)])
        numbers = {
            "a": self.rng.randint(11, 99),
            "b": self.rng.randint(3, 60),
            "k": self.rng.randint(2, 9),
            "n": self.number,
            "p": self.previous,
        }
        numbers["c"] = self.number + self.rng.randint(5, 99)
        if row.wordings:
            wording = self.rng.choice(row.wordings)
            self.sentences.append(wording.format(**numbers, **self.words()))
        self.questions = row.questions or self.questions
        self.previous = self.number
        self.number = numbers["a"]  # an opening without a formula only states it
        for formula in row.formulas:
            x, sign, y, result = calculate_step(formula, numbers)
            if result != int(result) or not 2 <= result < 1000:
                return False
            self.number = numbers["m"] = int(result)
            begin = row.begin
            if formula != row.formulas[0]:  # the second step of "three bags of twelve"
                begin = "That makes" if sign == "+" else "That leaves"
            line = f"{begin} {x} {sign} {y} = <<{x}{sign}{y}={self.number}>>{self.number} {row.end}"
            self.lines.append(line.format(**self.words()))
        if row.kind == "then" and row.begin.startswith(
            "{M}"
        ):  # the story continues about somebody else
            self.before = self.name
            self.name = self.friend
            self.friend = self.others.pop()
        return True


def tell_story(rng: random.Random, family: list[Row], steps: int) -> Problem | None:
    """Tell one story of exactly `steps` steps; None if the drawn numbers do not work out."""
    story = Story(rng, family, steps)
    while not story.sentences or len(story.lines) < steps:
        if not story.go_on():
            return None
    if rng.random() < 0.25:
        place = rng.randint(1, len(story.sentences))
        story.sentences.insert(place, rng.choice(DISTRACTORS).format(**story.words()))
    story.sentences.append(rng.choice(story.questions).format(**story.words()))
    rationale = "\n".join([*story.lines, f"#### {story.number}"])
    return Problem(" ".join(story.sentences), float(story.number), rationale)


def make_problems(
    n: int,
    seed: int | str,
    steps: tuple[int, ...] = (2, 3, 4),
    exclude: Collection[str] = (),
    families: tuple[str, ...] = IN_DOMAIN,
) -> list[Problem]:
    """Make n different problems without the questions in `exclude`; a seed gives the same problems.

    All numbers of steps in `steps`, and all families, are equally frequent. Splits are disjoint if
    the questions of one are the `exclude` of the next.
    """
    rng = random.Random(f"problems {seed}")
    problems: list[Problem] = []
    seen = set(exclude)
    while len(problems) < n:
        family = families[len(problems) // len(steps) % len(families)]
        problem = tell_story(rng, FAMILIES[family], steps[len(problems) % len(steps)])
        if problem is not None and problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    rng.shuffle(problems)
    return problems


def make_datasets(
    n_labeled: int, n_unlabeled: int, n_test: int, seed: int
) -> tuple[list[Problem], list[Problem], dict[str, list[Problem]]]:
    """L, U and the test sets of a run; no question is in two of them."""
    train = make_problems(n_labeled + n_unlabeled, seed=f"run {seed}")
    tests = make_tests(n_test, exclude={problem.question for problem in train})
    return train[:n_labeled], train[n_labeled:], tests


def make_tests(n: int, exclude: Collection[str] = ()) -> dict[str, list[Problem]]:
    """n held-out problems, and a quarter as many in each other test set; dev is the last."""
    fewer = max(1, n // 4)
    held_out = make_problems(n, TEST_SEED, exclude=exclude)
    tests = {"held-out": held_out}
    for family in OUT_OF_DOMAIN:
        tests[family] = make_problems(fewer, TEST_SEED, families=(family,))
    exclude = {*exclude, *(problem.question for problem in held_out)}
    tests["dev"] = make_problems(fewer, TEST_SEED + 1, exclude=exclude)
    return tests


def main() -> None:
    for problem in make_problems(3, seed=0, steps=(1, 2, 3)):
        print(f"{problem.question}\n{problem.rationale}\n")


if __name__ == "__main__":
    main()
