"""Mean and standard deviation over finished tiny runs, and accuracy by number of steps.

    for seed in 0 1 2; do python run.py --seed $seed; done
    python -m tests.bench.tiny runs/tiny-seed-0 runs/tiny-seed-1 runs/tiny-seed-2
"""

import statistics
import sys
from pathlib import Path

import run
from data.problems import read_jsonl
from model import read_json
from selftrain import accuracy


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or sys.exit(__doc__)
    table: dict[tuple[str, str], list[float]] = {}
    for folder in folders:
        config = run.Config(**read_json(folder / "config.json"))
        problems = run.load_data(config)[2]["held-out"]
        for path in sorted(folder.glob("**/evaluation.jsonl")):
            stage = path.parent.relative_to(folder).as_posix()
            for row in read_jsonl(path):
                table.setdefault((stage, row["test"]), []).append(row["accuracy"])
                for steps in (2, 3) if row["test"] == "held-out" else ():
                    chosen = [(r, p) for r, p in zip(row["rationales"], problems) if p.rationale.count("<<") == steps]
                    table.setdefault((stage, f"{steps} steps"), []).append(accuracy(*map(list, zip(*chosen))))
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
