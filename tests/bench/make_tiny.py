"""Make data/tiny, the checkpoint that `python run.py` starts from: a small Flan-T5 that has read, but never reasoned.

It stands for the public Flan-T5 in all but size. First its own vocabulary is learned from the synthetic stories. Then half
of its training is T5's span corruption of multi-step questions and of rationales, each by itself: it never sees such a
question together with ITS rationale. The other half are one-step questions with their worked answer, in place of Flan's
instruction tuning. What it cannot do afterwards is chain steps, the subject of the paper. No test question is ever shown.

    python -m tests.bench.make_tiny        # about 10 minutes on one CPU core
"""

import io
import random
import string
import sys
from pathlib import Path

import sentencepiece
import torch

from data.synthetic import TEST_SEED, make_problems
from model import T5, T5Config, relative_position_bucket, save_flan_t5
from sft import Example, Schedule, train_sft
from tokenizer import Tokenizer, format_rationale

FOLDER = Path(__file__).parents[2] / "data" / "tiny"
SEED, STEPS, BATCH, N_PIECES = 1, 3000, 32, 668  # with the 100 sentinels 768 ids


def make_vocabulary(path: Path) -> None:
    """Learn SentencePiece pieces from 20,000 stories: T5's ids for padding, end and unknown, and every digit alone."""
    problems = make_problems(20_000, seed=SEED, steps=(1, 2, 3))
    texts = [text for p in problems for text in (p.question, format_rationale(p.rationale))]
    path.parent.mkdir(parents=True, exist_ok=True)
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=proto, model_type="bpe", vocab_size=N_PIECES,
        user_defined_symbols=["▁" + digit for digit in string.digits],
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
        split_digits=True, character_coverage=1.0, normalization_rule_name="identity", num_threads=1,
        required_chars=string.ascii_letters + string.digits + string.punctuation, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(proto.getvalue())


def corrupt(ids: list[int], sentinel: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """T5's pre-training: hide spans of one to five pieces behind sentinels. Return what is left, and what was hidden."""
    source, target, i = [], [], 0
    while i < len(ids):
        if rng.random() < 0.08:
            length = rng.randint(1, 5)
            source.append(sentinel)
            target += [sentinel, *ids[i : i + length]]
            sentinel, i = sentinel - 1, i + length
        source += ids[i : i + 1]
        i += 1
    return source, target


def make_example(tokenizer: Tokenizer, one_step: list, many_steps: list, rng: random.Random) -> Example:
    """Draw one example to pre-train on."""
    dice = rng.random()
    if dice < 0.5:
        problem = rng.choice(one_step)
        return Example(tokenizer.encode(problem.question), tokenizer.encode(format_rationale(problem.rationale)))
    problem, first = rng.choice(many_steps), tokenizer.vocab_size - 1
    *ids, eos = tokenizer.encode(problem.question if dice < 0.6 else format_rationale(problem.rationale))
    if dice > 0.85:  # a rationale's whole rest behind one sentinel
        cut = rng.randrange(len(ids))
        return Example([*ids[:cut], first, eos], [first, *ids[cut:], eos])
    source, target = corrupt(ids, first, rng)
    return Example([*source, eos], [*target, eos])


@torch.no_grad()
def look_at_neighbours(model: T5) -> None:
    """Start three heads of each stack at the token before, the same and the next one.

    To copy 56 digit by digit one must know which digit follows which 5. With position biases near zero, as in T5, this
    model still mixed up digits after 10,000 steps; from here it copies after a few hundred.
    """
    for stack, last in ((model.encoder, 127), (model.decoder, 0)):
        for distance in sorted(range(-127, last + 1), key=abs, reverse=True):  # in a shared bucket the nearest decides
            bucket = relative_position_bucket(torch.tensor(distance), last > 0)
            for head, (offset, slope) in enumerate(((-1, 2.0), (0, 0.7), (1, 2.0))):
                stack.relative_bias.weight[bucket, head] = -slope * abs(distance - offset)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of sums, and so the last bits, would depend on the number of cores
    torch.set_flush_denormal(True)  # early in training many numbers are denormal, and those are slow
    make_vocabulary(FOLDER / "spiece.model")
    tokenizer = Tokenizer(FOLDER / "spiece.model")
    model = T5(T5Config(128, d_ff=256, n_heads=4, n_layers=2, d_kv=32, vocab_size=tokenizer.vocab_size, dropout=0.0))
    look_at_neighbours(model)
    test = {problem.question for problem in make_problems(10_000, TEST_SEED)}
    one_step = make_problems(60_000, SEED, steps=(1,))
    many_steps = make_problems(30_000, SEED, steps=(2, 3), exclude=test)
    rng = random.Random(SEED)
    examples = [make_example(tokenizer, one_step, many_steps, rng) for _ in range(STEPS * BATCH)]
    train_sft(model, examples, 1, Schedule(2e-3, BATCH, 0.05, micro_batch_tokens=2048, log_every=100), "pre-training")
    save_flan_t5(model.half(), FOLDER)
