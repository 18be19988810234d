"""How formatting, cutting and the calculator change GSM8K's training text, with T5's vocabulary.

python -m tests.bench.fidelity --vocabulary DIR --problems gsm8k/train.jsonl
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from calculator import calculate
from data.problems import load_problems
from data.terminal import run_command
from tokenizer import MAX_QUESTION, MAX_RATIONALE, UNKNOWN_ID, Tokenizer, format_rationale


def annotations(rationale: str) -> list[tuple[str, str]]:
    """The expression and the result of every `[ 2 + 3 = 5]`."""
    return re.findall(r"\[ ([^][=]*)= ?([^][=]*)\]", rationale)


def same_number(found: str, written: str) -> bool:
    """Whether a result differs only in spelling or rounding, such as 60.00 for 60."""
    if not re.fullmatch(r"[0-9.,-]+", written):
        return False
    return abs(float(found) - float(written.replace(",", ""))) < 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = Tokenizer(args.vocabulary)
    texts = Counter()
    results = Counter()
    examples = {}
    for problem in load_problems(args.problems):
        rationale = format_rationale(problem.rationale)
        question_ids = tokenizer.encode(problem.question)
        ids = tokenizer.encode(rationale)
        raw_ids = tokenizer.encode(problem.rationale)
        texts["problems"] += 1
        texts[f"questions over {MAX_QUESTION} ids, cut"] += len(question_ids) > MAX_QUESTION
        texts[f"rationales over {MAX_RATIONALE} ids, cut"] += len(ids) > MAX_RATIONALE
        texts["questions with an unknown id"] += UNKNOWN_ID in question_ids
        texts["rationales with an unknown id"] += UNKNOWN_ID in ids
        texts["the same without format_rationale"] += UNKNOWN_ID in raw_ids
        for expression, written in annotations(rationale):
            written = written.strip()
            found = calculate(expression)
            results["annotations"] += 1
            results["annotations left to the model by the calculator"] += found is None
            if found is not None and found != written:
                same = same_number(found, written)
                results["annotations with another result than the calculator's"] += 1
                results["of these, only spelled differently or rounded"] += same
                example = f"{expression.strip()} = {written}, calculator {found}"
                examples.setdefault(same, example)
    print("| | count | share |")
    print("|---|---|---|")
    for counts, whole in ((texts, texts["problems"]), (results, results["annotations"])):
        for name, count in counts.items():
            print(f"| {name} | {count:,} | {100 * count / whole:.2f} % |")
    print(f"\nFor example: {'; '.join(examples.values())}")


if __name__ == "__main__":
    run_command(main)
