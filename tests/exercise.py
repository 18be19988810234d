"""Exercises: a copy of this project in which you write one function, and the tests that grade it.

    python -m tests.exercise                  # the list
    python -m tests.exercise 7 ../my-dpo      # exercise 7 in a new folder; EXERCISE.md is the task
    python -m tests.exercise 7 10 ../hw       # two exercises in one copy
    python -m tests.exercise 7 --hint         # print the hint
    python -m tests.exercise 7 10 --grade FOLDER    # FOLDER/NAME/: what each student hands in

Without numbers, --grade grades the exercises that each student's EXERCISE.md names. It prints a
table and writes FOLDER/grades.csv. This project itself is never changed.
"""

import argparse
import ast
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.terminal import run_command

ROOT = Path(__file__).resolve().parents[1]
FILES = ("*.py", "*.md", "*.txt", "*.ini", "*.toml", "LICENSE", "data", "tests")
KEPT_BACK = (  # they hold answers
    *("tests/test_exercise.py", "tests/teaching.md", "tests/mutants.py"),
    "tests/bench/train.py",  # eq. 5 in TRL's way
)
TASK = "EXERCISE.md"


@dataclass(frozen=True)
class Exercise:
    """What to read, what to write (a file and its functions; `f:if` is the first branch in f), and which tests grade it."""

    title: str
    read: str
    file: str
    empty: tuple[str, ...]
    tests: str
    hint: str
    after: str
    time: str = "1 hour"
    hide: str = ""  # a formula of the solution elsewhere in the file, left out of the copy

    @property
    def options(self) -> str:
        """Of pytest, to grade it."""
        return f"-x -q --tb=short {self.tests}"


EXERCISES = [
    Exercise(
        title="Relative position buckets",
        read="Raffel et al. (2020), section 2.1; the docstring",
        file="model.py",
        empty=("relative_position_bucket",),
        tests="tests/test_model.py -k buckets",
        hint="Half of the buckets are exact. At which distance does the logarithm reach the last one?",
        after="model.Stack.position_bias: why can one table serve all blocks? What would change in "
        "decode.KVCache with absolute positions?",
    ),
    Exercise(
        title="RMSNorm, and why it subtracts no mean",
        read="Zhang and Sennrich (2019), eq. 4; RMSNorm's docstring",
        file="model.py",
        empty=("RMSNorm.forward",),
        tests="tests/test_model.py -k norm",
        hint="Compute in fp32, whatever x is: x.float().pow(2).mean(-1, keepdim=True).",
        after="Subtract the mean as well: which tests in tests/test_model.py fail?",
        time="20 minutes",
        hide=": weight * x / sqrt(mean(x^2) + epsilon)",
    ),
    Exercise(
        title="The key-value cache",
        read="the paper's section 3.2; the docstring of KVCache",
        file="decode.py",
        empty=("KVCache.advance", "KVCache.append"),
        tests="tests/test_model.py -k 'cached or idle or without_work'",
        hint="Slot b writes to column lengths[b]. How old is column t then, and which rationale wrote it?",
        after="tests/naive.py decodes without a cache: how do the two compare at 10, 50, 100 tokens? "
        "T5 uses only distances: why could all slots share one clock and one row of bias?",
        time="2 hours",
    ),
    Exercise(
        title="The calculator's grammar",
        read="calculate's docstring",
        file="calculator.py",
        empty=("read_sum", "read_product", "read_factor"),
        tests="tests/test_calculator.py",
        hint="Write one function for each line of the grammar; each consumes its tokens from the left.",
        after="Why not eval? Try the five worst expressions that a model could write.",
    ),
    Exercise(
        title="Rewriting tokens in a batch",
        read="section 3.2 and figure 4 of the paper",
        file="decode.py",
        empty=("RowState.take", "RowState.watch"),
        tests="tests/test_decode.py -k 'forced or equals or evaluate or row_that_asked or bracket or tenant_inherits'",
        hint="A row's next id comes from its queue unless that is empty. Only pieces that the model "
        "chose can open or close a bracket.",
        after="python -m tests.bench.decode calculator --quick: what does the calculator cost per "
        "step, and what does re-reading every row cost?",
        time="2 hours",
    ),
    Exercise(
        title="The SFT loss with padding",
        read="eq. 2 of the paper",
        file="sft.py",
        empty=("token_logps",),
        tests="tests/test_sft.py -k 'loss or logps or eos or vocabulary'",
        hint="shift_right has already shifted the inputs: position t predicts labels[t].",
        after="test_the_vocabulary_meets_real_tokens_only: how large would the logits for padding be?",
        time="45 minutes",
    ),
    Exercise(
        title="The DPO loss and its gradient",
        read="eq. 5 of the paper; Rafailov et al. (2023), section 4",
        file="dpo.py",
        empty=("dpo_loss",),
        tests="tests/test_dpo.py -k 'hand or equation or margins or raises_chosen'",
        hint="F.logsigmoid; log(sigmoid(x)) is -inf for x = -200.",
        after="Derive the gradient on paper: what is the weight of a pair that is already in the "
        "right order?",
        time="30 minutes",
    ),
    Exercise(
        title="Log-probabilities of policy and reference",
        read="section 2 of the paper",
        file="dpo.py",
        empty=("sequence_logps", "pair_loss"),
        tests="tests/test_dpo.py -k 'logps or encoded_once or margin or reference or log_two'",
        hint="Use a sum, not a mean. The reference is a separate model and gets no gradient.",
        after="Use a mean instead: what does one wrong token then cost in a long rationale?",
        time="90 minutes",
    ),
    Exercise(
        title="Deduplication by Jaccard similarity",
        read="section 3.1 of the paper",
        file="selftrain.py",
        empty=("jaccard", "deduplicate"),
        tests="tests/test_selftrain.py -k 'jaccard or similar or deduplication or copies'",
        hint="Compare each rationale with all that were kept, not with those that were dropped.",
        after="python run.py --method dpo-st --rounds 1 --max-similarity 0.5 --out runs/similar, then 1 "
        "in another folder: how many pairs does each log.jsonl report, and why does S_a hardly change?",
        time="45 minutes",
    ),
    Exercise(
        title="Preference pairs",
        read="section 4.2 of the paper",
        file="selftrain.py",
        empty=("make_pairs",),
        tests="tests/test_selftrain.py -k '(pair or gold) and not round'",
        hint="Put gold first among the winning rationales. Rank all pairs and keep the least similar.",
        after="Keep the MOST similar pairs instead, and compare the DPO curves.",
    ),
    Exercise(
        title="Unbiased pass@k",
        read="Chen et al. (2021), eq. 1",
        file="selftrain.py",
        empty=("pass_at_k",),
        tests="tests/test_selftrain.py -k pass_at_k",
        hint="In how many ways can k samples be drawn so that all are wrong?",
        after="Reproduce the paper's figure 6 with your own run: python run.py, then "
        "python -m tests.bench.dpo_step runs/tiny-seed-42",
        time="30 minutes",
    ),
    Exercise(
        title="Algorithm 2 from Algorithm 1",
        read="Algorithms 1 and 2 of the paper; the names of a round's files in data/README.md",
        file="selftrain.py",
        empty=("self_train:if",),
        tests="tests/test_selftrain.py -k 'algorithm or add_up or given_all or names or never_used'",
        hint="Six lines. Which model writes the pseudo-labels, f' or f_d?",
        after="Start DPO from the last round's f_d instead of f': does it help?",
        time="30 minutes",
    ),
    Exercise(
        title="Open: IPO or KTO instead of DPO",
        read="Azar et al. (2023); Ethayarajh et al. (2024)",
        file="dpo.py",
        empty=(),
        tests="tests/test_dpo.py -k 'logps or reference_gets or encoded_once'",
        hint="Start with IPO: (margin of log-ratios - 1/(2 beta))^2 in dpo_loss. The tests of log 2 "
        "and eq. 5 should then fail.",
        after="python -m tests.bench.report on five seeds of each: is the difference larger than its "
        "interval?",
        time="an afternoon",
    ),
    Exercise(
        title="Open: a majority vote as the answer where U has none",
        read="Wang et al. (2023), self-consistency",
        file="selftrain.py",
        empty=(),
        tests="tests/test_selftrain.py -k 'pair or label or round'",
        hint="In self_train, after sampling: extract_answer, Counter.most_common, then "
        "replace(problem, answer=...) in unlabeled.",
        after="How often is the majority right, and how often when fewer than half agree?",
        time="an afternoon",
    ),
    Exercise(
        title="Open: a tool other than the calculator",
        read="Schick et al. (2023), Toolformer",
        file="decode.py",
        empty=(),
        tests="tests/test_decode.py",
        hint="RowState.watch decides what a bracket calls: a date, a unit, a table?",
        after="What must the training texts contain for the model to call it?",
        time="an afternoon",
    ),
    Exercise(
        title="Open: let samples vote on an answer",
        read="Wang et al. (2023), self-consistency; table 3 of the paper",
        file="decode.py",
        empty=(),
        tests="tests/test_decode.py",
        hint="decode.main with --samples N: generate(..., n_samples, 0.7), extract_answer, Counter.",
        after="How many samples does voting need to beat the greedy rationale on held-out problems?",
        time="2 hours",
    ),
    Exercise(
        title="Open: hold out some of the DPO pairs",
        read="tests/README.md, How to read the log of DPO",
        file="dpo.py",
        empty=(),
        tests="tests/test_dpo.py",
        hint="Split by question, not by pair. Run pair_loss under no_grad at every logged step.",
        after="When do the held-out rewards diverge from the training rewards?",
        time="2 hours",
    ),
    Exercise(
        title="Open: train a model that does not fit on one GPU",
        read="torch's documentation of fully_shard",
        file="sft.py",
        empty=(),
        tests="tests/test_sft.py",
        hint="Shard every block, then the model. Remove the all-reduce; saving must gather the shards.",
        after="How many of the 16 bytes per parameter remain on each of two processes?",
        time="an afternoon",
    ),
    Exercise(
        title="Open: a right answer is not a right reason",
        read="data/README.md, Few possible answers, and Another check, another tool",
        file="selftrain.py",
        empty=(),
        tests="tests/test_selftrain.py -k 'pair or label or round'",
        hint="Outcome: is_correct. Process: it could also ask that every annotation evaluates to what "
        "stands behind it, or that the last result is the answer.",
        after="Generate yes-or-no questions (`Is 3 * 14 more than 40?`). How many questions have a correct "
        "sample, how many of these samples reason correctly, and what does your check change?",
        time="an afternoon",
    ),
    Exercise(
        title="Open: a tool that knows units",
        read="data/README.md, Another check, another tool; Schick et al. (2023)",
        file="calculator.py",
        empty=(),
        tests="tests/test_calculator.py -k 'arithmetic or python_agrees'",
        hint="About 17 lines: before TOKEN sees the expression, replace `16 days` by `(16 * 24)`.",
        after="`[ 16 days =` now gives 384. Write 20 labeled problems that need it: how many does the "
        "model need until it uses the tool, and how often does it use it wrongly?",
        time="2 hours",
    ),
]


def find(source: str, path: str) -> ast.FunctionDef:
    """The definition of a function or method, `Class.method`, in a file's source."""
    nodes = ast.parse(source).body
    for name in path.split("."):
        node = next(node for node in nodes if getattr(node, "name", None) == name)
        nodes = node.body
    return node


def parts_of(source: str, target: str) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """A function's docstring, if it has one, and the statements that are an exercise (Exercise)."""
    path, _, branch = target.partition(":")
    node = find(source, path)
    if branch:
        return [], next(inner for inner in ast.walk(node) if isinstance(inner, ast.If)).body
    n = 0 if ast.get_docstring(node) is None else 1
    return node.body[:n], node.body[n:]


def empty(source: str, target: str, number: int) -> str:
    """Replace a function's body, after its docstring, with an error; for `f:if`, the first branch.

    Formulas, which are indented in the docstring, and comments of its examples go, too.
    """
    path = target.partition(":")[0]
    docstring, body = parts_of(source, target)
    lines = source.splitlines()
    message = f'raise NotImplementedError("exercise {number}: {path} is yours to write")'
    lines[body[0].lineno - 1 : body[-1].end_lineno] = [" " * body[0].col_offset + message]
    for text in docstring:
        inside = slice(text.lineno, text.end_lineno - 1)
        lines[inside] = without_formulas(lines[inside], text.col_offset)
    return "\n".join(lines) + "\n"


def without_formulas(lines: list[str], indent: int) -> list[str]:
    """A docstring's lines without those indented further, and examples without comments."""
    kept: list[str] = []
    for line in lines:
        if ">>> " in line:
            line = line.partition("  # ")[0]
        is_formula = line.startswith(" " * (indent + 4))
        is_second_blank = not line and kept[-1:] == [""]
        if not is_formula and not is_second_blank:
            kept.append(line)
    return kept


def restore(path: Path, original: Path, targets: Sequence[str], number: int) -> None:
    """Put the project's own functions back where a student's file still has an exercise's stubs.

    So one exercise can be graded while another one of the same copy is still to be written.
    """
    source = path.read_bytes().decode("utf-8", "replace")
    solution = original.read_text(encoding="utf-8")
    for target in targets:
        name = target.partition(":")[0]
        if f'"exercise {number}: {name} is yours to write"' not in source:
            continue
        try:
            stub = find(source, name)
        except (SyntaxError, ValueError, StopIteration):
            return  # the tests will say what is wrong
        written = find(solution, name)
        lines = source.splitlines()
        ours = solution.splitlines()[written.lineno - 1 : written.end_lineno]
        lines[stub.lineno - 1 : stub.end_lineno] = ours
        source = "\n".join(lines) + "\n"
        path.write_text(source, encoding="utf-8")


def copy(folder: Path) -> None:
    """Copy the project's own files to a folder that does not exist yet; the copies can be written.

    Environments, runs and other files of yours are not copied. Raises FileExistsError.
    """
    folder.mkdir(parents=True)
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            for source in [path] if path.is_file() else sorted(path.rglob("*")):
                name = source.relative_to(ROOT)
                wanted = "__pycache__" not in name.parts and name.as_posix() not in KEPT_BACK
                if source.is_file() and wanted:
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


def describe(number: int, with_hint: bool) -> str:
    """The task of an exercise, in Markdown."""
    exercise = EXERCISES[number - 1]
    names = ", ".join(f"`{name.partition(':')[0]}`" for name in exercise.empty)
    write = f"{names} in `{exercise.file}`" if names else f"an addition to `{exercise.file}`"
    grade = "These tests grade it" if names else "These tests must still pass"
    lines = [
        f"# Exercise {number}: {exercise.title}",
        f"Time: {exercise.time}, once you have read the paper.",
        f"Read: {exercise.read}.",
        f"Write: {write}.",
        f"{grade} (the first one that fails says what was wanted):",
        f"    python -m pytest {exercise.options}",
        f"Then: {exercise.after}",
    ]
    if with_hint:
        lines.append(f"Hint: {exercise.hint}")
    return "\n\n".join(lines) + "\n"


def prepare(numbers: Sequence[int], folder: Path, with_hint: bool = False) -> None:
    """Make a copy in which these exercises are empty; EXERCISE.md holds their tasks."""
    copy(folder)
    for number in numbers:
        exercise = EXERCISES[number - 1]
        path = folder / exercise.file
        for target in exercise.empty:
            text = empty(path.read_text(encoding="utf-8"), target, number)
            path.write_text(text.replace(exercise.hide, ""), encoding="utf-8")
    files = dict.fromkeys(f"`{EXERCISES[number - 1].file}`" for number in numbers)
    tasks = [describe(number, with_hint) for number in numbers]
    tasks.append(
        "Once, before the first test: `pip install -r requirements-test.txt`. "
        "Write your answers to `Then` below. "
        f"Hand in {', '.join(files)}, and this file."
    )
    (folder / TASK).write_text("\n".join(tasks) + "\n", encoding="utf-8")


def read_words(words: Sequence[str]) -> tuple[list[int], str]:
    """`7 10 ../hw` -> [7, 10] and "../hw". Raises ValueError."""
    numbers = []
    folder = ""
    for word in words:
        if word.isdecimal() and not folder:
            numbers.append(int(word))
            if not 1 <= int(word) <= len(EXERCISES):
                raise ValueError(f"there is no exercise {word}: name 1 to {len(EXERCISES)}")
        elif folder:
            raise ValueError(f"name one folder, after the numbers, not {folder} and {word}")
        else:
            folder = word
    return list(dict.fromkeys(numbers)), folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.exercise",
        usage="%(prog)s [NUMBER ...] [FOLDER] [--hint] [--grade FOLDER]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", help="numbers of exercises, and a new folder")
    parser.add_argument("--hint", action="store_true", help="with the hint")
    parser.add_argument("--grade", type=Path, metavar="FOLDER", help="a folder per student")
    args = parser.parse_args()
    try:
        numbers, name = read_words(args.words)
        if args.grade:
            from tests.grading import grade_folder  # it imports this module

            if name:
                raise ValueError(f"--grade takes numbers of exercises, not {name}")
            grade_folder(args.grade.expanduser(), numbers)
        elif not numbers:
            if name:
                raise ValueError(f"which exercise goes to {name}? name its number first")
            for number, exercise in enumerate(EXERCISES, 1):
                print(f"{number:2}  {exercise.title} ({exercise.file}, {exercise.time})")
        elif args.hint and not name:
            for number in numbers:
                print(f"Exercise {number}: {EXERCISES[number - 1].hint}")
        else:
            start(numbers, name, args.hint)
    except ValueError as error:
        sys.exit(f"exercise: {error}")


def start(numbers: list[int], name: str, with_hint: bool) -> None:
    """Make the copy, and print the task. Raises ValueError."""
    default = ROOT.parent / f"exercise-{'-'.join(map(str, numbers))}"
    folder = Path(name).expanduser() if name else default
    if folder.exists() or ROOT in folder.resolve().parents:
        where = "already exists" if folder.exists() else "is inside this project"
        raise ValueError(f"{folder} {where}: name another folder")
    try:
        prepare(numbers, folder, with_hint)
    except OSError as error:
        raise ValueError(f"{folder} cannot be created ({error}): name another folder") from None
    print((folder / TASK).read_text(encoding="utf-8"))
    print(f"This is {folder / TASK}. Begin with: cd {shlex.quote(str(folder))}")


if __name__ == "__main__":
    run_command(main)
