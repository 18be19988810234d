"""Mean and standard deviation over finished tiny runs, and accuracy by number of steps.

    for seed in 0 1 2; do python run.py --seed $seed; done
    python -m tests.bench.tiny runs/tiny-seed-0 runs/tiny-seed-1 runs/tiny-seed-2
"""

import json
import statistics
import sys
from pathlib import Path

import run
from data.problems import read_jsonl
from selftrain import accuracies


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or sys.exit(__doc__)
    table: dict[tuple[str, str], list[float]] = {}
    for folder in folders:
        config = run.Config(**json.loads((folder / "config.json").read_text()))
        steps_of = {problem.question: problem.rationale.count("<<") for problem in run.load_data(config)[2]["held-out"]}
        for path in sorted(folder.glob("**/evaluation.jsonl")):
            stage = path.parent.relative_to(folder).as_posix()
            rows = read_jsonl(path)
            for steps in (2, 3):
                rows += [{**row, "test": f"{steps} steps"} for row in rows if row["calculator"] and steps_of.get(row["question"]) == steps]
            for test, accuracy in accuracies(rows).items():
                table.setdefault((stage, test), []).append(accuracy)
    columns = list(dict.fromkeys(test for _, test in table))
    print("| stage | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for stage in sorted({stage for stage, _ in table}, key=lambda stage: (stage != "warm-up", stage[0] == "d", stage)):
        print(f"| {stage} | " + " | ".join(spread(table[stage, test]) for test in columns) + " |")
    for method in ("st", "dpo-st"):
        last = max(stage for stage, _ in table if stage.startswith(method + "/"))
        gains = [b - a for a, b in zip(table["warm-up", "held-out"], table[last, "held-out"])]
        print(f"{method}: last round minus SFT {spread(gains)} points ({', '.join(f'{gain:+.1f}' for gain in gains)})")


if __name__ == "__main__":
    main()
