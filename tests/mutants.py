"""Small faults in the exercises' functions, and whether the exercises' own tests catch them.

    python -m tests.mutants [NUMBER ...]      # prints each fault that no test of its exercise catches

A mutant is the project with one change in one function that a student writes: another operator, a
constant one higher, a condition turned round, two arguments swapped, a statement left out. What a
grader lets pass of these, it would let pass of a student. It fails if fewer than 95 % are caught;
those in EQUIVALENT are not tried, because they compute the same.
"""

import argparse
import ast
import copy as copies
import difflib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.exercise import EXERCISES, copy, parts_of

OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
OTHER_NAME = {"max": "min", "min": "max", "sum": "mean", "any": "all", "all": "any", "popleft": "pop", "log": "log2", "logsigmoid": "sigmoid", "sorted": "list", "append": "remove", "chosen": "rejected", "correct": "incorrect", "winning": "losing"}  # fmt: skip
SECONDS = 60  # then a mutant that never ends counts as caught
WANTED = 0.95
EQUIVALENT = {  # what these compute is the same, because ...
    "relative_position_bucket: ratio = distance.clamp(min=1) / n_exact => ratio = distance.clamp(min=2) / n_exact": "smaller distances than n_exact have buckets of their own",
    "relative_position_bucket: return offset + torch.where(distance < n_exact, distance, far) => return offset + torch.where(distance <= n_exact, distance, far)": "at n_exact the logarithm is 0",
    "KVCache.advance: bias = self.bias_by_age[:, age.clamp(min=0)].transpose(0, 1) => bias = self.bias_by_age[:, age.clamp(min=0)].transpose(1, 0)": "both swap the first two dimensions",
    "KVCache.advance: bias = bias + torch.where(age >= 0, 0.0, MASKED)[:, None, :] => bias = bias + torch.where(age >= 0, 1.0, MASKED)[:, None, :]": "the softmax does not see a constant",
    "RowState.watch: self.expression = None => pass": "calculate rejects whatever has a bracket or = in it",
    "sequence_logps: logps = token_logps(model, states, mask, labels).sum(-1) => logps = token_logps(model, states, mask, labels).sum(1)": "there are two dimensions",
    "deduplicate: if all((jaccard(pieces, other) <= max_similarity for other in kept_pieces)): => if all((jaccard(other, pieces) <= max_similarity for other in kept_pieces)):": "jaccard is symmetric",
    "make_pairs: pairs.sort(key=lambda pair: jaccard(pieces[pair.chosen], pieces[pair.rejected])) => pairs.sort(key=lambda pair: jaccard(pieces[pair.rejected], pieces[pair.chosen]))": "jaccard is symmetric",
}  # fmt: skip


def other_versions(node: ast.AST) -> Iterator[ast.AST]:
    """What a small fault could make of one node; nothing for most nodes."""
    new = copies.deepcopy(node)
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OTHER_OPERATOR:
        new.op = OTHER_OPERATOR[type(node.op)]()
        yield new
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER_OPERATOR:
        new.ops[0] = OTHER_OPERATOR[type(node.ops[0])]()
        yield new
    elif isinstance(node, ast.UnaryOp):
        yield new.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        new.value = not node.value if type(node.value) is bool else node.value + 1
        yield new
    elif isinstance(node, ast.Name) and node.id in OTHER_NAME and isinstance(node.ctx, ast.Load):
        new.id = OTHER_NAME[node.id]
        yield new
    elif isinstance(node, ast.Attribute) and node.attr in OTHER_NAME:
        new.attr = OTHER_NAME[node.attr]
        yield new
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        new.args[:2] = reversed(node.args[:2])
        yield new
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        new.elts[:2] = reversed(node.elts[:2])
        yield new
    elif isinstance(node, (ast.If, ast.While)):
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield new
    elif isinstance(node, (ast.Assign, ast.AugAssign)) or is_call(node):
        yield ast.Pass()
    elif isinstance(node, ast.Slice) and node.upper is not None and node.lower is None:
        new.lower, new.upper = node.upper, None
        yield new


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def mutants_of(source: str, target: str) -> list[tuple[str, str]]:
    """Every mutant of one function: (what differs, the file's source)."""
    path = target.partition(":")[0]
    _, statements = parts_of(source, target)
    lines = source.splitlines()
    first, last = statements[0].lineno - 1, statements[-1].end_lineno
    indent = " " * statements[0].col_offset
    before = ast.unparse(ast.Module(statements, []))
    found = []
    for place, old in enumerate(walk(statements)):
        for new in other_versions(old):
            changed = copies.deepcopy(statements)
            replace(changed, place, new)
            after = ast.unparse(ast.Module(changed, []))
            if after == before:
                continue
            text = [indent + line for line in after.splitlines()]
            difference = [
                line
                for line in difflib.ndiff(before.splitlines(), after.splitlines())
                if line[:1] in "+-"
            ]
            what = " => ".join(line[2:].strip() for line in difference)
            found.append(
                (f"{path}: {what}", "\n".join([*lines[:first], *text, *lines[last:]]) + "\n")
            )
    return found


def walk(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    for statement in statements:
        yield from ast.walk(statement)


def replace(statements: list[ast.stmt], place: int, new: ast.AST) -> None:
    """Put a new node at the place that it has in `walk`."""
    old = list(walk(statements))[place]
    for parent in [ast.Module(statements, []), *walk(statements)]:
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list):
                value[:] = [new if item is old else item for item in value]


def survives(folder: Path, options: str) -> bool:
    """Whether an exercise's tests pass in a copy; in a process of its own, forked to save imports."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(folder)
        for name in list(sys.modules):
            if name.partition(".")[0] in ("tests", "data"):
                del sys.modules[name]
        sys.path[:] = [str(folder)] + [
            p for p in sys.path if Path(p or ".").resolve() != Path.cwd()
        ]
        import pytest

        code = 1
        try:
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(options)])
        finally:
            os._exit(int(code))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def try_exercise(number: int) -> tuple[int, list[str]]:
    """How many mutants of an exercise differ from it, and those that its tests do not catch."""
    exercise = EXERCISES[number - 1]
    survivors = []
    n = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        folder = Path(place) / "copy"
        copy(folder)
        path = folder / exercise.file
        source = path.read_text(encoding="utf-8")
        if not survives(folder, exercise.tests):
            raise RuntimeError(f"exercise {number}: its tests fail without a fault")
        for target in exercise.empty:
            for what, text in mutants_of(source, target):
                if what in EQUIVALENT:
                    continue
                n += 1
                path.write_text(text, encoding="utf-8")
                if survives(folder, exercise.tests):
                    survivors.append(what)
    return n, survivors


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True  # two mutants may have one size and one second
    import sentencepiece  # noqa: F401 (before the fork)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    graded = [number for number, exercise in enumerate(EXERCISES, 1) if exercise.empty]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", type=int, default=graded, metavar="NUMBER")
    args = parser.parse_args()
    total = 0
    missed = 0
    for number in args.numbers:
        n, survivors = try_exercise(number)
        total += n
        missed += len(survivors)
        print(f"exercise {number}: {n - len(survivors)} of {n} caught", flush=True)
        for what in survivors:
            print(f"    not caught: {what}", flush=True)
    print(f"{total - missed} of {total} caught")
    if total - missed < WANTED * total:
        sys.exit(1)


if __name__ == "__main__":
    main()
