"""Exercises: a copy of this project in which one function is yours to write, and the tests that grade it.

    python -m tests.exercise                 # the list
    python -m tests.exercise 7 ~/dpo         # exercise 7 in a new folder; nothing is changed here
"""

import argparse
import ast
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Exercise:
    """What to read, what is emptied (a file and its functions; `f:if` is the first branch in f), and which tests turn red."""

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
        "Relative position buckets", "Raffel et al. (2020), section 2.1; the docstring", "model.py", ("relative_position_bucket",),
        "tests/test_model.py -k buckets", "Half of the buckets are exact. For the others, at which distance does the logarithm reach the last?",
        "model.Stack.position_bias: one table for all blocks. What would a model with absolute positions lose in decode.KVCache?"),
    Exercise(
        "RMSNorm, and why no mean", "Zhang and Sennrich (2019); RMSNorm's docstring", "model.py", ("RMSNorm.forward",),
        "tests/test_model.py -k norm", "x / sqrt(mean(x^2) + eps) * weight, in fp32 whatever x is.",
        "Subtract the mean, too: which tests of tests/test_model.py turn red, and by how much do the logits move?"),
    Exercise(
        "The key-value cache", "the paper's section 3.2; the docstring of KVCache", "decode.py", ("KVCache.advance", "KVCache.append"),
        "tests/test_model.py -k 'cached or ring'", "Place t % size is written at step t. How old is place p now, and when was this slot's sequence born?",
        "tests/naive.py, the decoder without a cache: how do both compare at 10, 50 and 100 tokens?", "2 hours"),
    Exercise(
        "The calculator's grammar", "calculate's docstring", "calculator.py", ("evaluate", "read_factor"),
        "tests/test_calculator.py", "An operator takes everything to its right that binds more strongly than itself, and nothing else.",
        "Why not eval? Write the five worst expressions that a model could write, and try them.", "2 hours"),
    Exercise(
        "Rewriting tokens in a batch", "section 3.2 and figure 4 of the paper", "decode.py", ("RowState.take", "RowState.watch"),
        "tests/test_decode.py -k 'forced or row_that_asked or bracket or tenant_inherits'",
        "A row's next id comes from its queue unless that is empty. Only pieces that the model chose can open or close a bracket.",
        "python -m tests.bench.decode --quick: what does the calculator cost a step, and what does re-reading every row cost?", "2 hours"),
    Exercise(
        "The SFT loss with padding", "eq. 2 of the paper", "sft.py", ("token_logps",),
        "tests/test_sft.py -k 'loss or logps or eos'", "shift_right has shifted the inputs already: position t predicts labels[t].",
        "test_padding_meets_no_matrix: how much of a batch of GSM8K is padding?"),
    Exercise(
        "The DPO loss and its gradient", "eq. 5 of the paper; Rafailov et al. (2023), section 4", "dpo.py", ("dpo_loss",),
        "tests/test_dpo.py -k 'hand or equation or margins or raises_chosen'", "F.logsigmoid; log(sigmoid(x)) is -inf for x = -200.",
        "Derive the gradient on paper: with which weight does a pair count that is in the right order already?"),
    Exercise(
        "Log-probabilities of policy and reference", "section 2 of the paper", "dpo.py", ("sequence_logps", "add_reference_logps"),
        "tests/test_dpo.py -k 'logps or encoded_once or references or reference or log_two'",
        "A sum, not a mean. And the reference never changes: score it once, without dropout, and keep the numbers.",
        "Use a mean instead: which rationales does the loss then favour?", "2 hours"),
    Exercise(
        "Deduplication by Jaccard similarity", "section 3.1 of the paper", "selftrain.py", ("jaccard", "deduplicate"),
        "tests/test_selftrain.py -k 'jaccard or similar or deduplication or copies'", "Compare with every one kept, with none that was dropped.",
        "python run.py --max-similarity 0.5 --out runs/similar, and 1: how many pseudo-labels does log.jsonl count?"),
    Exercise(
        "Preference pairs", "section 4.2 of the paper", "selftrain.py", ("make_pairs",),
        "tests/test_selftrain.py -k 'pair and not round'", "Gold first among the winning ones. Rank all pairs, keep the least similar.",
        "Keep the MOST similar pairs instead, and compare the curves of DPO.", "2 hours"),
    Exercise(
        "pass@k without bias", "Chen et al. (2021), eq. 1", "selftrain.py", ("pass_at_k",),
        "tests/test_selftrain.py -k pass_at_k", "In how many ways can k samples be drawn so that all are wrong?",
        "The paper's figure 6 from a run of your own: python run.py, then python -m tests.bench.report runs/tiny-seed-42"),
    Exercise(
        "Algorithm 2 from Algorithm 1", "Algorithms 1 and 2 of the paper", "selftrain.py", ("self_train:if",),
        "tests/test_selftrain.py -k 'algorithm or add_up or given_all or names or never_used'", "Four lines. Who writes the pseudo-labels, f' or f_d?",
        "Let DPO go on from the last round's f_d instead of f': does it help?"),
    Exercise(
        "Open: IPO or KTO in place of DPO", "Azar et al. (2023); Ethayarajh et al. (2024)", "dpo.py", (),
        "tests/test_dpo.py -k 'logps or references or encoded_once'",
        "Begin with IPO: (margin of log-ratios - 1/(2 beta))^2 in dpo_loss; what is tested about log 2 and eq. 5 then rightly turns red.",
        "python -m tests.bench.report on five seeds of each: is the difference larger than its interval?", "an afternoon"),
    Exercise(
        "Open: a majority vote as answer where U has none", "Wang et al. (2023), self-consistency", "selftrain.py", (),
        "tests/test_selftrain.py -k 'pair or label or round'",
        "In self_train, once samples are drawn: extract_answer, Counter.most_common, then replace(problem, answer=...) in unlabeled.",
        "How often is the majority right, and how often is it right where fewer than half agree?", "an afternoon"),
    Exercise(
        "Open: another tool than the calculator", "Schick et al. (2023), Toolformer", "decode.py", (),
        "tests/test_decode.py", "RowState.watch decides what a bracket calls. A date? A unit? A table?",
        "What must the training texts hold for the model to call it?", "an afternoon"),
]  # fmt: skip


def empty(source: str, target: str, number: int) -> str:
    """Put an error in place of a function's body, behind its signature and docstring; `f:if`: of the first branch in f."""
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
    return "\n".join([*lines[: first.lineno - 1], " " * first.col_offset + message, *lines[last.end_lineno :]]) + "\n"


def copy(folder: Path) -> None:
    """Copy the project, without runs and caches, to a folder that does not exist yet. Raises FileExistsError."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.partial"))


def prepare(number: int, folder: Path) -> Exercise:
    """Make the copy for an exercise."""
    exercise = EXERCISES[number - 1]
    copy(folder)
    path = folder / exercise.file
    for target in exercise.empty:
        path.write_text(empty(path.read_text(encoding="utf-8"), target, number), encoding="utf-8")
    return exercise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", choices=range(1, len(EXERCISES) + 1), metavar="NUMBER")
    parser.add_argument("folder", type=Path, nargs="?", help="a new one; default: exercise-NUMBER beside this project")
    args = parser.parse_args()
    if args.number is None:
        return print(*(f"{n:2}  {e.title} ({e.file}, {e.time})" for n, e in enumerate(EXERCISES, 1)), sep="\n")
    folder = (args.folder or ROOT.parent / f"exercise-{args.number}").expanduser()
    if folder.exists() or ROOT in folder.resolve().parents:
        where = "exists already" if folder.exists() else "lies inside this project"
        sys.exit(f"exercise: {folder} {where}: name another folder")
    try:
        exercise = prepare(args.number, folder)
    except OSError as error:
        sys.exit(f"exercise: {folder} cannot be made ({error}): name another folder")
    what = f"write    {', '.join(exercise.empty)} in {folder / exercise.file}" if exercise.empty else f"change   {folder / exercise.file}"
    print(f"Exercise {args.number}: {exercise.title} ({exercise.time})\nread     {exercise.read}\n{what}")
    print(f"grade    cd {folder} && python -m pytest -q {exercise.tests}      # pip install -r requirements-test.txt, once")
    print(f"hint     {exercise.hint}\nthen     {exercise.after}")


if __name__ == "__main__":
    main()
