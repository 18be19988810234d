"""Problems: read, check and write them. A dataset is a JSONL file, one problem per line, in one of three spellings:

    {"question": "...", "answer": 24, "rationale": "48/2 = <<48/2=24>>24 clips\\n#### 24"}   this project's own
    {"question": "...", "answer": "48/2 = <<48/2=24>>24 clips\\n#### 24"}                    GSM8K; the paper's split adds `ans`
    {"question": "...", "ans": 24.0}                                                        MultiArith, ASDiv, SVAMP

One bad line refuses the whole file: skipping it would change the training set without a word.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

NUMBER = re.compile(r"-?([0-9][0-9,]*\.?[0-9]*|\.[0-9]+)")
WORD = re.compile(r"[^\W\d_].{0,39}")  # begins with a letter: `6 apples` is meant to be a number

@dataclass(frozen=True)
class Problem:
    """A question, its gold answer (a number or a short text), and maybe a rationale: in files GSM8K's raw text, `#### 24` last."""
    question: str
    answer: float | str
    rationale: str | None = None

def load_problems(path: str | Path) -> list[Problem]:
    """Read a dataset. Raises ValueError for an empty file or a bad line, FileNotFoundError for a missing file."""
    problems = _parse_lines(path, _to_problem)
    if not problems:
        raise ValueError(f"{path} holds no problem; write one JSON object per line, with question and answer.")
    return problems

def read_jsonl(path: str | Path) -> list[dict]:
    """Read a file of one JSON object per line. Raises ValueError or FileNotFoundError as `load_problems` does."""
    return _parse_lines(path, dict)

def write_jsonl(rows: Iterable[dict], path: str | Path) -> None:
    """Write one JSON object per line; the same rows always give the same bytes."""
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)

def write_text(text: str, path: str | Path) -> None:
    """Write `text` (UTF-8) beside `path` and rename it into place, so that no reader ever meets half a file."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the new name and lose the text
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after a failure, Ctrl-C included; after success it is gone already

def _parse_lines(path: str | Path, parse: Callable) -> list:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path, or run `python -m data.sources` for public data.")
    parsed = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            if text := line.decode("utf-8-sig").strip():  # -sig: some editors begin a file with a byte order mark
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError("each line must be a JSON object")
                parsed.append(parse(row))
        except (ValueError, OverflowError, RecursionError) as error:  # bad bytes, huge integers, endless brackets
            reason = f"each line must be a JSON object ({error.msg})" if hasattr(error, "msg") else error
            raise ValueError(f"{path}, line {number}: {reason}") from None
    return parsed

def _to_problem(row: dict) -> Problem:
    question, answer, rationale = row.get("question"), row.get("answer"), row.get("rationale")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question must be text, and not empty")
    if isinstance(answer, str) and "####" in answer:  # GSM8K keeps the rationale here
        if rationale is not None:
            raise ValueError("both a rationale and an answer in words; keep one of them")
        rationale, answer = answer, _final_answer(answer)
    elif answer is not None and "ans" in row:
        raise ValueError("both an answer and an ans; keep one of them")
    answer = row.get("ans", _final_answer(rationale) if answer is None and isinstance(rationale, str) else answer)
    answer = _to_answer(answer) if isinstance(answer, str) else answer
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer)
    if not is_number and not isinstance(answer, str):
        raise ValueError(f"the answer must be a finite number or a short text, not {answer!r:.40}")
    if rationale is not None and not same_answer(_final_answer(rationale), answer):
        raise ValueError(f"the rationale ends in another answer than {answer}")
    f"{question}{answer}{rationale}".encode()  # refuses half a surrogate pair, which JSON can spell and no file can hold
    return Problem(question, float(answer) if is_number else answer, rationale)

def same_answer(a: float | str, b: float | str) -> bool:
    """Numbers are the same up to 1e-4, texts up to case, spaces and a final stop."""
    if isinstance(a, str) and isinstance(b, str):
        a, b = ("".join(text.split()).rstrip(".").casefold() for text in (a, b))
        return a == b
    return not isinstance(a, str) and not isinstance(b, str) and abs(a - b) < 1e-4

def _final_answer(rationale: object) -> float | str:
    _, marker, end = rationale.rpartition("####") if isinstance(rationale, str) else ("", "", "")
    if not marker:
        raise ValueError('a rationale must be text that ends in "#### ANSWER"')
    return _to_answer(end)

def _to_answer(text: str) -> float | str:
    if NUMBER.fullmatch(text := text.strip()):
        return float(text.replace(",", ""))
    if not WORD.fullmatch(text):
        raise ValueError(f"an answer must be a number or a short text, such as yes or a name, not {text!r:.40}")
    return text
