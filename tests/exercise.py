"""Exercises: a copy of this project in which you write one function, and the tests that grade it.

python -m tests.exercise                 # the list
python -m tests.exercise 7 ~/dpo         # exercise 7 in a new folder; this project is not changed
"""

import argparse
import ast
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from data.terminal import run_command

ROOT = Path(__file__).resolve().parents[1]


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


EXERCISES = [
    Exercise(
        title="Relative position buckets",
        read="Raffel et al. (2020), section 2.1; the docstring",
        file="model.py",
        empty=("relative_position_bucket",),
        tests="tests/test_model.py -k buckets",
        hint="Half of the buckets are exact. At which distance does the logarithm reach the last one?",
        after="model.Stack.position_bias: one table for all blocks. What would decode.KVCache lose "
        "with absolute positions?",
    ),
    Exercise(
        title="RMSNorm, and why it subtracts no mean",
        read="Zhang and Sennrich (2019); RMSNorm's docstring",
        file="model.py",
        empty=("RMSNorm.forward",),
        tests="tests/test_model.py -k norm",
        hint="Compute in fp32, whatever x is: x.float().pow(2).mean(-1, keepdim=True).",
        after="Subtract the mean as well: which tests in tests/test_model.py fail?",
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
        time="2 hours",
    ),
    Exercise(
        title="Rewriting tokens in a batch",
        read="section 3.2 and figure 4 of the paper",
        file="decode.py",
        empty=("RowState.take", "RowState.watch"),
        tests="tests/test_decode.py -k 'forced or row_that_asked or bracket or tenant_inherits'",
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
    ),
    Exercise(
        title="Log-probabilities of policy and reference",
        read="section 2 of the paper",
        file="dpo.py",
        empty=("sequence_logps", "pair_loss"),
        tests="tests/test_dpo.py -k 'logps or encoded_once or reference or log_two'",
        hint="Use a sum, not a mean. The reference is a separate model and gets no gradient.",
        after="Use a mean instead: what does one wrong token then cost in a long rationale?",
        time="2 hours",
    ),
    Exercise(
        title="Deduplication by Jaccard similarity",
        read="section 3.1 of the paper",
        file="selftrain.py",
        empty=("jaccard", "deduplicate"),
        tests="tests/test_selftrain.py -k 'jaccard or similar or deduplication or copies'",
        hint="Compare each rationale with all that were kept, not with those that were dropped.",
        after="python run.py --max-similarity 0.5 --out runs/similar, then 1 in another folder: how "
        "many pseudo-labels does each log.jsonl report?",
    ),
    Exercise(
        title="Preference pairs",
        read="section 4.2 of the paper",
        file="selftrain.py",
        empty=("make_pairs",),
        tests="tests/test_selftrain.py -k 'pair and not round'",
        hint="Put gold first among the winning rationales. Rank all pairs and keep the least similar.",
        after="Keep the MOST similar pairs instead, and compare the DPO curves.",
        time="2 hours",
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
    ),
    Exercise(
        title="Algorithm 2 from Algorithm 1",
        read="Algorithms 1 and 2 of the paper",
        file="selftrain.py",
        empty=("self_train:if",),
        tests="tests/test_selftrain.py -k 'algorithm or add_up or given_all or names or never_used'",
        hint="Six lines. Which model writes the pseudo-labels, f' or f_d?",
        after="Start DPO from the last round's f_d instead of f': does it help?",
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
        read="README, How to read the log of DPO",
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
]


def empty(source: str, target: str, number: int) -> str:
    """Replace a function's body, after its docstring, with an error; for `f:if`, the body of the first branch in f."""
    path, _, branch = target.partition(":")
    nodes = ast.parse(source).body
    for name in path.split("."):
        node = next(node for node in nodes if getattr(node, "name", None) == name)
        nodes = node.body
    if branch:
        node = next(inner for inner in ast.walk(node) if isinstance(inner, ast.If))
        nodes = node.body
    elif ast.get_docstring(node) is not None:
        nodes = nodes[1:]
    lines, first, last = source.splitlines(), nodes[0], nodes[-1]
    message = f'raise NotImplementedError("exercise {number}: {path} is yours to write")'
    return (
        "\n".join(
            [
                *lines[: first.lineno - 1],
                " " * first.col_offset + message,
                *lines[last.end_lineno :],
            ]
        )
        + "\n"
    )


FILES = ("*.py", "*.md", "*.txt", "*.ini", "*.toml", "LICENSE", "data", "tests")


def copy(folder: Path) -> None:
    """Copy the project's own files to a folder that does not exist yet; the copies can be written.

    Environments, runs and other files of yours are not copied. Raises FileExistsError.
    """
    folder.mkdir(parents=True)
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            for source in [path] if path.is_file() else sorted(path.rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    target = folder / source.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


def prepare(number: int, folder: Path) -> Exercise:
    """Make the copy for an exercise."""
    exercise = EXERCISES[number - 1]
    copy(folder)
    path = folder / exercise.file
    for target in exercise.empty:
        path.write_text(empty(path.read_text(encoding="utf-8"), target, number), encoding="utf-8")
    return exercise


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.exercise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "number", type=int, nargs="?", choices=range(1, len(EXERCISES) + 1), metavar="NUMBER"
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="a new folder; default: exercise-NUMBER next to this project",
    )
    args = parser.parse_args()
    if args.number is None:
        return print(
            *(f"{n:2}  {e.title} ({e.file}, {e.time})" for n, e in enumerate(EXERCISES, 1)),
            sep="\n",
        )
    folder = (args.folder or ROOT.parent / f"exercise-{args.number}").expanduser()
    if folder.exists() or ROOT in folder.resolve().parents:
        where = "already exists" if folder.exists() else "is inside this project"
        sys.exit(f"exercise: {folder} {where}: name another folder")
    try:
        exercise = prepare(args.number, folder)
    except OSError as error:
        sys.exit(f"exercise: {folder} cannot be created ({error}): name another folder")
    what = (
        f"write    {', '.join(exercise.empty)} in {folder / exercise.file}"
        if exercise.empty
        else f"change   {folder / exercise.file}"
    )
    print(
        f"Exercise {args.number}: {exercise.title} ({exercise.time})\nread     {exercise.read}\n{what}"
    )
    word = (
        "grade   " if exercise.empty else "keep    "
    )  # open exercises: these tests must still pass
    print("once     pip install -r requirements-test.txt")
    print(
        f"{word} cd {shlex.quote(str(folder))} && python -m pytest -q --tb=short {exercise.tests}"
    )
    print(f"hint     {exercise.hint}\nthen     {exercise.after}")


if __name__ == "__main__":
    run_command(main)
