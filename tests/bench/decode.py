"""Greedy decoding against transformers' `generate` on the same questions, weights, batch size and threads.

    python -m tests.bench.decode [--checkpoint DIR] [--questions FILE] [--batch 32] [--n 64] [--tokens 300] [--repeats 3]

Without a checkpoint: the small shape with random weights, every rationale exactly --tokens long. With one: its own
rationales, of all lengths, the calculator off on both sides; the ids must then be the same, and the share is printed.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from data.problems import load_problems
from data.synthetic import make_problems
from decode import generate
from model import SIZES, T5, load_flan_t5, save_flan_t5
from tokenizer import EOS_ID, MAX_QUESTION, Tokenizer, pad_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--vocabulary", type=Path, default=Path(__file__).parents[2] / "data" / "tiny")
    parser.add_argument("--questions", type=Path, help="JSONL; default: synthetic problems")
    for name, default in (("batch", 32), ("n", 64), ("tokens", 300), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    try:
        import transformers
    except ModuleNotFoundError:
        raise SystemExit("the peer is missing: pip install -r requirements-test.txt") from None
    torch.set_flush_denormal(True)
    folder = args.checkpoint
    if folder is None:
        torch.manual_seed(0)
        folder, model = Path(tempfile.mkdtemp()), T5(SIZES["small"])
        model.lm_head.weight.data[EOS_ID] = 0  # never the largest of 32,128 random logits: no rationale ends early
        save_flan_t5(model, folder)
    ours, tokenizer = load_flan_t5(folder), Tokenizer(args.checkpoint or args.vocabulary)
    peer = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    problems = load_problems(args.questions) if args.questions else make_problems(args.n, seed=0)
    questions = [problem.question for problem in problems[: args.n]]

    def run_ours() -> list[list[int]]:
        samples = generate(ours, tokenizer, questions, max_new_tokens=args.tokens, calculator=False, batch_size=args.batch)
        return [row[0].ids for row in samples]

    def run_peer() -> list[list[int]]:
        rows = []
        for at in range(0, len(questions), args.batch):
            ids, mask = pad_batch([tokenizer.encode(q, MAX_QUESTION) for q in questions[at : at + args.batch]])
            out = peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False, num_beams=1)
            rows += [row[1 : row.index(1) if 1 in row else None] for row in out.tolist()]
        return rows

    seconds, written = {run_ours: [], run_peer: []}, {}
    for _ in range(args.repeats):
        for side in seconds:
            began = time.perf_counter()
            written[side] = side()
            seconds[side].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds[run_ours], seconds[run_peer])]
    tokens = {side: sum(map(len, rows)) for side, rows in written.items()}
    same = sum(a == b for a, b in zip(written[run_ours], written[run_peer]))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads of "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, fp32, batch {args.batch}, {len(questions)} questions")  # fmt: skip
    for name, side in (("this project", run_ours), ("transformers", run_peer)):
        print(f"{name}: {tokens[side] / statistics.median(seconds[side]):8,.0f} tokens/s, median of {args.repeats}")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); same ids {same} of {len(questions)}")


if __name__ == "__main__":
    main()
