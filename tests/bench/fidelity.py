"""What formatting, cutting and the calculator do to real training text: counts for a GSM8K file and Flan-T5's vocabulary.

    python -m tests.bench.fidelity --vocabulary DIR --problems gsm8k/train.jsonl
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from calculator import calculate, rewrite
from data.problems import load_problems
from tokenizer import MAX_QUESTION, MAX_RATIONALE, UNKNOWN_ID, Tokenizer, format_rationale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True)
    args = parser.parse_args()
    tokenizer, counts, examples = Tokenizer(args.vocabulary), Counter(), {}
    for problem in load_problems(args.problems):
        rationale = format_rationale(problem.rationale)
        questions, rationales = tokenizer.encode(problem.question), tokenizer.encode(rationale)
        counts["problems"] += 1
        counts[f"questions over {MAX_QUESTION} ids, cut"] += len(questions) > MAX_QUESTION
        counts[f"rationales over {MAX_RATIONALE} ids, cut (so without their answer)"] += len(rationales) > MAX_RATIONALE
        counts["questions with an unknown id"] += UNKNOWN_ID in questions
        counts["rationales with an unknown id"] += UNKNOWN_ID in rationales
        counts["rationales with an unknown id if format_rationale did nothing"] += UNKNOWN_ID in tokenizer.encode(problem.rationale)
        counts["rationales that --rewrite changes"] += rewrite(rationale) != rationale
        for expression, result in re.findall(r"\[ ([^][=]*)= ?([^][=]*)\]", rationale):
            found = calculate(expression)
            counts["annotations"] += 1
            counts["annotations that the calculator leaves to the model"] += found is None
            if found is not None and found != result.strip():
                same = re.fullmatch(r"[0-9.,-]+", result.strip()) and abs(float(found) - float(result.replace(",", ""))) < 0.01
                counts["annotations with another result than the calculator's"] += 1
                counts["... of these, spelled differently or rounded (60.00 for 60)"] += bool(same)
                examples.setdefault(bool(same), f"{expression.strip()} = {result.strip()}, calculator {found}")
    print("| GSM8K train | count | share |\n|---|---|---|")
    for name, count in counts.items():
        whole = counts["annotations" if "annotation" in name or name.startswith("...") else "problems"]
        print(f"| {name} | {count:,} | {100 * count / whole:.2f} % |")
    print("\nFor example: " + "; ".join(examples.values()))


if __name__ == "__main__":
    main()
