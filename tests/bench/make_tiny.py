"""Make data/tiny, the base of `python run.py`: a small Flan-T5 that has read but never reasoned.

It plays the part of the public Flan-T5 in everything but size. First its own vocabulary is learned
from the synthetic stories. Then half of its training is T5's span corruption of multi-step
questions and of rationales, separately: it never sees such a question together with its rationale.
The other half replaces Flan's instruction tuning: one-step questions with worked answers. Two in
five of these examples join two or three unrelated stories, which are answered in turn. Afterwards
the model cannot chain steps, which is the subject of the paper. It has read all families of
stories, as Flan-T5 has read the web, but no test question.

    python -m tests.bench.make_tiny        # about 50 minutes on one CPU core
"""

import io
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from data.problems import Problem
from data.synthetic import FAMILIES, make_problems, make_tests
from data.terminal import run_command
from model import SIZES, T5, Attention, relative_position_bucket, save_flan_t5
from sft import Example, Schedule, train_sft
from tokenizer import Tokenizer, format_rationale

FOLDER = Path(__file__).resolve().parents[2] / "data" / "tiny"
SEED = 1
STEPS = 12_000  # optimiser steps
BATCH = 32  # examples
N_PIECES = 668  # 768 ids with the 100 sentinels


def make_vocabulary(path: Path) -> None:
    """Learn SentencePiece pieces from 20,000 stories, with single digits and T5's special ids."""
    texts = []
    for problem in make_problems(20_000, SEED, steps=(1, 2, 3, 4), families=tuple(FAMILIES)):
        texts.append(problem.question)
        texts.append(format_rationale(problem.rationale))
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=proto,
        model_type="bpe",
        vocab_size=N_PIECES,
        user_defined_symbols=["▁" + digit for digit in string.digits],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        num_threads=1,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.getvalue())


def corrupt(ids: list[int], sentinel: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """T5's pre-training: replace spans of one to five pieces, each by its own sentinel.

    Return the remaining ids and the hidden ones. sentinel: the first one; they count down.
    """
    source = []
    target = []
    i = 0
    while i < len(ids):
        if rng.random() < 0.08:
            length = rng.randint(1, 5)
            source.append(sentinel)
            target.append(sentinel)
            target += ids[i : i + length]
            sentinel -= 1
            i += length
        source += ids[i : i + 1]  # none if the span reached the end
        i += 1
    return source, target


def answer_in_turn(tokenizer: Tokenizer, problems: Sequence[Problem]) -> Example:
    """Join the problems' questions, and their steps in order; the last problem has the answer."""
    question = " ".join(problem.question for problem in problems)
    steps = []
    for problem in problems:
        text, _, answer = format_rationale(problem.rationale).partition(" #### ")
        steps.append(text)
    rationale = f"{' '.join(steps)} #### {answer}"
    return Example(tokenizer.encode(question), tokenizer.encode(rationale))


def make_example(
    tokenizer: Tokenizer,
    one_step: Sequence[Problem],
    many_steps: Sequence[Problem],
    rng: random.Random,
) -> Example:
    """Draw one pre-training example."""
    kind = rng.random()
    if kind < 0.5:
        n = rng.choice((1, 1, 1, 2, 3))
        return answer_in_turn(tokenizer, rng.choices(one_step, k=n))
    problem = rng.choice(many_steps)
    text = problem.question if kind < 0.6 else format_rationale(problem.rationale)
    *ids, eos = tokenizer.encode(text)
    sentinel = tokenizer.vocab_size - 1
    if kind > 0.85:  # one sentinel replaces the rest of a rationale
        cut = rng.randrange(len(ids))
        return Example([*ids[:cut], sentinel, eos], [sentinel, *ids[cut:], eos])
    source, target = corrupt(ids, sentinel, rng)
    return Example([*source, eos], [*target, eos])


def make_many_steps() -> list[Problem]:
    """The multi-step problems whose questions and rationales are read separately."""
    tests = set()
    for problems in make_tests(10_000).values():
        tests.update(problem.question for problem in problems)
    return make_problems(60_000, SEED, exclude=tests, families=tuple(FAMILIES))


def make_examples(tokenizer: Tokenizer) -> list[Example]:
    """All pre-training examples, in the order in which they were drawn."""
    one_step = make_problems(150_000, SEED, steps=(1,), families=tuple(FAMILIES))
    many_steps = make_many_steps()
    rng = random.Random(SEED)
    n = STEPS * BATCH
    return [make_example(tokenizer, one_step, many_steps, rng) for _ in range(n)]


def start_at_random(model: T5) -> None:
    """Draw weights by fan-in, as for T5. q is scaled by the 1/sqrt(d_kv) that scores lack."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    nn.init.normal_(model.shared.weight, std=1.0)
    for stack in (model.encoder, model.decoder):
        nn.init.normal_(stack.relative_bias.weight, std=0.1)
    for module in model.modules():
        if isinstance(module, Attention):
            module.q.weight.data.mul_(model.config.d_kv**-0.5)


@torch.no_grad()
def look_at_neighbours(model: T5) -> None:
    """Initialise three heads of each stack to look at the previous, the same and the next token.

    To copy 56 digit by digit, the model must know which digit follows which 5. With position biases
    near zero, as in T5, it still mixed up digits after 10,000 steps; with these it copies after a
    few hundred.
    """
    for stack in (model.encoder, model.decoder):
        last = 127 if stack.bidirectional else 0  # the decoder looks only to the left
        # Several distances share a bucket; the nearest comes last, so it sets the bias.
        for distance in sorted(range(-127, last + 1), key=abs, reverse=True):
            bucket = relative_position_bucket(torch.tensor(distance), stack.bidirectional)
            for head, offset, slope in ((0, -1, 2.0), (1, 0, 0.7), (2, 1, 2.0)):
                stack.relative_bias.weight[bucket, head] = -slope * abs(distance - offset)


def make_model(tokenizer: Tokenizer) -> T5:
    """The untrained model."""
    config = replace(SIZES["tiny"], vocab_size=tokenizer.vocab_size)
    torch.manual_seed(SEED)
    model = T5(config)
    start_at_random(model)
    look_at_neighbours(model)
    return model


def log(record: dict) -> None:
    print(f"step {record['step']}  loss {record['loss']:.4f}", flush=True)


def main() -> None:
    if sys.argv[1:]:
        sys.exit(__doc__)
    torch.set_num_threads(1)  # the order of sums, and so the last bits, depend on this number
    torch.set_flush_denormal(True)  # early in training many numbers are denormal, which is slow
    make_vocabulary(FOLDER / "spiece.model")
    tokenizer = Tokenizer(FOLDER)
    schedule = Schedule(
        peak_rate=2e-3,
        batch_size=BATCH,
        warmup_ratio=0.05,
        log_every=100,
    )
    examples = make_examples(tokenizer)
    model = train_sft(make_model(tokenizer), examples, 1, schedule, "pre-training", log)
    save_flan_t5(model.half(), FOLDER)


if __name__ == "__main__":
    run_command(main)
