r"""Problems: read, check and write them. A dataset is a JSONL file in one of three spellings:

    {"question": "...", "answer": 24, "rationale": "48/2 = <<48/2=24>>24\n#### 24"}    ours
    {"question": "...", "answer": "48/2 = <<48/2=24>>24\n#### 24"}                     GSM8K
    {"question": "...", "ans": 24.0}                                     MultiArith, ASDiv, SVAMP

One bad line refuses the whole file: skipping it would change the training set without a word.
"""

import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

NUMBER = re.compile(r"-?(([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]*)?|\.[0-9]+)")
WORD = re.compile(r"[^\W\d_].{0,39}")  # begins with a letter: `6 apples` is meant to be a number


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer (a number or a short text), maybe a rationale that ends in it."""

    question: str
    answer: float | str
    rationale: str | None = None


def same_answer(a: float | str, b: float | str) -> bool:
    """Numbers are the same up to 1e-4, texts up to case, spaces, a last stop and Unicode's form."""
    if isinstance(a, str) and isinstance(b, str):
        return plain_text(a) == plain_text(b)
    if isinstance(a, str) or isinstance(b, str):
        return False
    return abs(a - b) < 1e-4


def plain_text(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)  # as SentencePiece does with all that a model reads
    return "".join(text.split()).rstrip(".").casefold()


# ----------------------------------------------------------------------------------------- reading


def load_problems(path: str | Path) -> list[Problem]:
    """Read a dataset.

    Raises FileNotFoundError for a missing file, ValueError for an empty one or a bad line.
    """
    problems = []
    for number, row in read_lines(path):
        try:
            problems.append(to_problem(row))
        except (ValueError, OverflowError) as error:  # OverflowError: an integer no float can hold
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not problems:
        raise ValueError(
            f"{path} holds no problem: write one JSON object a line, with question and answer"
        )
    return problems


def read_jsonl(path: str | Path) -> list[dict]:
    """Read a file of one JSON object a line. Raises ValueError or FileNotFoundError."""
    return [row for _, row in read_lines(path)]


def read_lines(path: str | Path) -> list[tuple[int, dict]]:
    """The objects of a JSONL file, each with the number of its line; empty lines do not count."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path} is no file: check the path")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig").strip()  # -sig: some editors begin a file with a mark
            if not text:
                continue
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # of JSON's error without its own line numbers
            raise ValueError(
                f"{path}, line {number}: each line must be a JSON object ({reason})"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: each line must be a JSON object")
        rows.append((number, row))
    return rows


def to_problem(row: dict) -> Problem:
    """Check one line and bring it to one form. Raises ValueError with what is wrong in it."""
    question = row.get("question")
    answer = row.get("answer")
    rationale = row.get("rationale")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question must be text, and not empty")
    if isinstance(answer, str) and "####" in answer:  # GSM8K keeps the rationale here
        if rationale is not None:
            raise ValueError("there are two rationales, one of them in the answer; keep one")
        rationale = answer
        answer = None
    if "ans" in row:
        if answer is not None:
            raise ValueError("there is an answer and an ans; keep one of them")
        answer = row["ans"]
    if rationale is not None:
        final = final_answer(rationale)
        if answer is None and "ans" not in row:
            answer = final
    if isinstance(answer, str):
        answer = to_answer(answer)
    elif type(answer) in (int, float) and math.isfinite(answer):
        answer = float(answer)
    else:
        raise ValueError(f"the answer must be a finite number or a short text, not {answer!r:.40}")
    if rationale is not None and not same_answer(final, answer):
        raise ValueError(f"the rationale ends in {final}, but the answer is {answer}")
    for text in (question, rationale or "", str(answer)):
        text.encode()  # raises for half a character, which JSON can spell and no file can hold
    return Problem(question, answer, rationale)


def final_answer(rationale: object) -> float | str:
    """What stands behind the last `####`."""
    if not isinstance(rationale, str) or "####" not in rationale:
        raise ValueError('a rationale must be text that ends in "#### ANSWER"')
    return to_answer(rationale.rpartition("####")[2])


def to_answer(text: str) -> float | str:
    """A number, or a short text that begins with a letter."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        number = float(text.replace(",", ""))
        if math.isinf(number):
            raise ValueError("the answer must be a finite number")
        return number
    if not WORD.fullmatch(text):
        raise ValueError(
            f"an answer must be a number such as 1,200.5 or a short text, not {text!r:.40}"
        )
    return text


def write_jsonl(rows: Iterable[dict], path: str | Path) -> None:
    """Write one JSON object a line, UTF-8; the same rows always give the same bytes."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------ before training


def check_leakage(
    labeled: list[Problem], unlabeled: list[Problem], tests: dict[str, list[Problem]]
) -> None:
    """Raise ValueError if a test asks what is trained on, up to case, spaces and Unicode's form."""
    trained = {plain_text(problem.question) for problem in [*labeled, *unlabeled]}
    for name, problems in tests.items():
        leaked = [
            problem.question for problem in problems if plain_text(problem.question) in trained
        ]
        if leaked:
            raise ValueError(
                f"{name}: {len(leaked)} questions are trained on, too ('{leaked[0]:.40}...'): "
                "drop them, or add --allow-leakage"
            )


def check_answer(problem: Problem, tokenizer) -> None:
    """Raise ValueError if the answer has signs that the vocabulary lacks, so none can write it."""
    if isinstance(problem.answer, str):
        written = tokenizer.decode(tokenizer.encode(problem.answer))
        if not same_answer(written, problem.answer):
            raise ValueError(
                f"'{problem.question:.40}...': the vocabulary lacks signs of the answer "
                f"{problem.answer!r}, so it could never be written: spell it in other signs"
            )


def describe(
    labeled: list[Problem],
    questions: Collection[str],
    tokenizer,
    max_question: int,
    max_rationale: int,
) -> str:
    """What of the texts is cut (lengths in tokens) or lost."""
    unknown_id = tokenizer.sentencepiece.unk_id()
    cut = unknown = 0
    for question in questions:
        ids = tokenizer.encode(question)
        cut += len(ids) > max_question
        unknown += unknown_id in ids
    long = unknown_rationales = 0
    for problem in labeled:
        ids = tokenizer.encode(problem.rationale)
        long += len(ids) > max_rationale
        unknown_rationales += unknown_id in ids
    return (
        f"Of {len(questions)} questions {cut} are cut at {max_question} tokens and {unknown} have "
        f"characters that the vocabulary lacks; of {len(labeled)} labeled rationales {long} are "
        f"longer than {max_rationale} tokens and {unknown_rationales} have such characters"
    )
