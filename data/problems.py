r"""Problems: read, check and write them. A dataset is a JSONL file in one of two formats:

    {"question": "...", "answer": 24, "rationale": "48/2 = <<48/2=24>>24\n#### 24"}    ours
    {"question": "...", "answer": "48/2 = <<48/2=24>>24\n#### 24"}                     GSM8K's

One bad line rejects the complete file: skipping it would change the training set silently.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.terminal import say

NUMBER = re.compile(r"-?(([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]*)?|\.[0-9]+)")
WORD = re.compile(r"[^\W\d_].{0,39}")  # starts with a letter: `6 apples` is not a word
LABELED_NUMBER = re.compile(r"(\W|[^\W\d_]{2})[-+]?\.?\d")  # `Rs. 18` is not one either
ANNOTATION = re.compile(r"\[([^\[\]=]*)=([^\[\]]*)\]")  # in formatted rationales
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
MAX_NUMBER = 1e15  # a float holds every integer up to here
FIELDS = ("question", "answer", "rationale")


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer (a number or a short text), and optionally a rationale."""

    question: str
    answer: float | str
    rationale: str | None = None


def same_answer(a: float | str, b: float | str) -> bool:
    """Compare numbers up to 1e-4; texts without case, spaces, a final stop and Unicode's form."""
    if isinstance(a, str) and isinstance(b, str):
        return plain_text(a) == plain_text(b)
    if isinstance(a, str) or isinstance(b, str):
        return False
    return abs(a - b) < 1e-4


def plain_text(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)  # as SentencePiece does before a model reads it
    return "".join(text.split()).rstrip(".").casefold()


def question_key(question: str, tokenizer) -> str:
    """Equal for questions that are the same to the model, or differ in case or spaces only."""
    normal = tokenizer.sentencepiece.normalize(question).replace("\u2581", " ")
    return plain_text(normal)


def join_gold(unlabeled: list[Problem], labeled: list[Problem], tokenizer) -> list[Problem]:
    """Drop the rationales of U; a problem that is also in L is replaced by L's, with its rationale.

    In the paper every problem of U is one of L; here U may have others. A problem that is in U
    twice is used once, because both would draw the same samples.
    """
    same_question: dict[str, list[Problem]] = {}
    for problem in labeled:
        same_question.setdefault(question_key(problem.question, tokenizer), []).append(problem)
    joined: dict[tuple, Problem] = {}
    for problem in unlabeled:
        key = question_key(problem.question, tokenizer)
        gold = replace(problem, rationale=None)
        for other in same_question.get(key, []):
            if same_answer(other.answer, problem.answer):
                gold = other
                break
        joined.setdefault((key, gold.answer), gold)
    return list(joined.values())


# ----------------------------------------------------------------------------------------- reading


def load_problems(path: str | Path, quiet: bool = False) -> list[Problem]:
    """Read a dataset; say which of its fields are not used, unless quiet.

    Raises FileNotFoundError for a missing file, ValueError for an empty one or a bad line.
    """
    problems = []
    unused = set()
    for number, row in read_lines(path):
        try:
            problems.append(to_problem(row))
        except (ValueError, OverflowError) as error:  # OverflowError: an integer no float can hold
            raise ValueError(f"{path}, line {number}: {error}") from None
        unused |= row.keys() - {*FIELDS}
    if not problems:
        raise ValueError(
            f"{path} contains no problem: write one JSON object per line, with question and answer"
        )
    if unused and not quiet:
        say(f"{path}: these fields are not used: {', '.join(sorted(unused))}")
    return problems


def no_repeats(fields: list[tuple]) -> dict:
    """For json: an object whose field names all differ."""
    row = dict(fields)
    if len(row) < len(fields):
        raise ValueError("a field occurs twice")
    return row


def read_jsonl(path: str | Path) -> list[dict]:
    """Read a file of one JSON object per line. Raises ValueError or FileNotFoundError."""
    return [row for _, row in read_lines(path)]


def read_lines(path: str | Path) -> list[tuple[int, dict]]:
    """The objects of a JSONL file, each with its line number; empty lines are skipped."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path} is not a file: check the path")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig").strip()  # -sig: a byte-order mark is skipped
            if not text:
                continue
            row = json.loads(text, object_pairs_hook=no_repeats)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # JSON's message without its own line number
            raise ValueError(
                f"{path}, line {number}: each line must be a JSON object ({reason})"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: each line must be a JSON object")
        rows.append((number, row))
    return rows


def to_problem(row: dict) -> Problem:
    """Check one row and make it a Problem. Raises ValueError that says what is wrong with it."""
    question = row.get("question")
    answer = row.get("answer")
    rationale = row.get("rationale")
    if question is None:
        raise ValueError(f"there is no question, but only {', '.join(row) or 'nothing'}")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question must be text, and not empty")
    if isinstance(answer, str) and "####" in answer:  # GSM8K's spelling
        if rationale is not None:
            raise ValueError("there are two rationales, one of them in the answer; keep one")
        rationale = answer
        answer = None
    if rationale is not None:
        final = final_answer(rationale)
        if answer is None:
            answer = final
    if answer is None:
        raise ValueError(f"there is no answer, but only {', '.join(row)}")
    if isinstance(answer, str):
        answer = to_answer(answer)
    elif type(answer) in (int, float) and abs(answer) <= MAX_NUMBER:
        answer = float(answer)
    else:
        raise ValueError(
            f"the answer must be a number up to 1e15 or a short text, not {answer!r:.40}"
        )
    if rationale is not None and not same_answer(final, answer):
        raise ValueError(f"the rationale ends in {final}, but the answer is {answer}")
    for text in (question, rationale or "", str(answer)):
        text.encode()  # raises for a lone surrogate, which JSON can spell but no file can hold
        control = CONTROL.search(text)
        if control:
            raise ValueError(f"there is a {control[0]!r}: JSON spells a backslash with two")
    return Problem(question, answer, rationale)


def final_answer(rationale: object) -> float | str:
    """The answer after the last `####`."""
    if not isinstance(rationale, str) or "####" not in rationale:
        raise ValueError('a rationale must be text that ends in "#### ANSWER"')
    return to_answer(rationale.rpartition("####")[2])


def to_answer(text: str) -> float | str:
    """A number, or a short text that starts with a letter."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        number = float(text.replace(",", ""))
        if abs(number) > MAX_NUMBER:
            raise ValueError("the answer must be a number up to 1e15")
        return number
    if not WORD.fullmatch(text):
        raise ValueError(
            f"an answer must be a number such as 1,200.5 or a short text, not {text!r:.40}"
        )
    if LABELED_NUMBER.search(text):
        raise ValueError(f"the answer {text!r:.40} contains a number: write the number alone")
    return text


def to_jsonl(rows: Iterable[dict]) -> str:
    """One JSON object per line; the same rows always give the same text."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(rows: Iterable[dict], path: str | Path) -> None:
    """Write one JSON object per line, UTF-8."""
    Path(path).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


# ----------------------------------------------------------------------- before training and asking


def readable(question: str, tokenizer, max_question: int) -> str:
    """A question from the command line, with ? for bytes that are not text; warns if it is cut."""
    question = question.encode("utf-8", "replace").decode()
    ids = tokenizer.encode(question)
    if len(ids) > max_question or tokenizer.sentencepiece.unk_id() in ids:
        print("This question is too long or contains unknown characters:", file=sys.stderr)
    return question


def check_data(
    labeled: list[Problem],
    unlabeled: list[Problem],
    tests: dict[str, list[Problem]],
    tokenizer,
    allow_leakage: bool,
) -> None:
    """Raise ValueError for data that would give wrong or meaningless results."""
    if not allow_leakage:
        check_leakage([*labeled, *unlabeled], tests, tokenizer)
    for name, problems in {"L": labeled, "U": unlabeled, **tests}.items():
        answers: dict[str, Problem] = {}
        for problem in problems:
            check_answer(problem, tokenizer)
            first = answers.setdefault(question_key(problem.question, tokenizer), problem)
            if not same_answer(first.answer, problem.answer):
                raise ValueError(
                    f"{name}: '{problem.question:.40}...' is there twice, with the answers "
                    f"{first.answer} and {problem.answer}: keep one"
                )


def check_leakage(trained: Iterable[Problem], tests: dict[str, list[Problem]], tokenizer) -> None:
    """Raise ValueError if a test question is also in the training data."""
    known = {question_key(problem.question, tokenizer) for problem in trained}
    for name, problems in tests.items():
        leaked = [p.question for p in problems if question_key(p.question, tokenizer) in known]
        if leaked:
            raise ValueError(
                f"{name}: {len(leaked)} questions are also in the training data "
                f"('{leaked[0]:.40}...'): remove them, or add --allow-leakage"
            )


def check_answer(problem: Problem, tokenizer) -> None:
    """Raise ValueError for an answer that no model can write, because the vocabulary lacks it."""
    if isinstance(problem.answer, str):
        written = tokenizer.decode(tokenizer.encode(problem.answer))
        if not same_answer(written, problem.answer):
            raise ValueError(
                f"'{problem.question:.40}...': the vocabulary lacks characters of the answer "
                f"{problem.answer!r}, so no model can write it: use other characters"
            )


def describe(
    labeled: list[Problem],
    problems: Sequence[Problem],
    tokenizer,
    max_question: int,
    max_rationale: int,
    calculate: Callable[[str], str | None],
) -> str:
    """What is cut (lengths in tokens), lost or unusual: two lines to print before training."""
    unknown_id = tokenizer.sentencepiece.unk_id()
    questions = {problem.question for problem in problems}
    n_cut = n_unknown = 0
    for question in questions:
        ids = tokenizer.encode(question)
        n_cut += len(ids) > max_question
        n_unknown += unknown_id in ids
    n_long = n_unknown_rationales = n_annotations = n_other = n_without = 0
    for problem in labeled:
        ids = tokenizer.encode(problem.rationale)
        n_long += len(ids) > max_rationale
        n_unknown_rationales += unknown_id in ids
        annotations = ANNOTATION.findall(problem.rationale)
        n_annotations += len(annotations)
        n_without += not annotations
        for expression, result in annotations:
            n_other += calculate(expression) not in (None, result.strip())
    n_words = sum(isinstance(problem.answer, str) for problem in problems)
    return (
        f"Of {len(questions)} questions in L, U and the tests {n_cut} are cut at {max_question} "
        f"tokens and {n_unknown} have characters that the vocabulary lacks; of {len(labeled)} "
        f"labeled rationales {n_long} are longer than {max_rationale} tokens and "
        f"{n_unknown_rationales} have such characters\n"
        f"The labeled rationales have {n_annotations} annotations, {n_other} of them other than "
        f"the calculator's; {n_without} rationales have none; {n_words} of {len(problems)} answers "
        "are words"
    )
