"""Make data/tiny, the checkpoint that `python run.py` starts from: a small Flan-T5 that has read, but never reasoned.

It stands for the public Flan-T5 in all but size. First its own vocabulary is learned from the synthetic stories. Then 70 %
of its training is T5's span corruption of multi-step questions and of rationales, each by itself: it never sees a question
together with ITS rationale. The other 30 % are one-step questions with their worked answer, in place of Flan's instruction
tuning. What it cannot do afterwards is chain steps, the subject of the paper. No test question is ever shown.

    python -m data.make_tiny        # about N minutes on 2 CPU cores; on the same machine, the same bytes every time
"""

import io
import random
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import trange

from data.synthetic import TEST_SEED, make_problems
from model import T5, T5Config, save_flan_t5, shift_right
from tokenizer import Tokenizer, format_rationale

FOLDER = Path(__file__).parent / "tiny"
SEED, STEPS, BATCH, LEARNING_RATE = 1, 10_000, 32, 2e-3
N_PIECES = 668  # with the 100 sentinels: 768


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
        required_chars=string.ascii_letters + string.digits + string.punctuation, minloglevel=2)
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


def make_example(tokenizer: Tokenizer, one_step: list, many_steps: list, rng: random.Random) -> tuple[list, list]:
    """Draw one example: source ids and target ids, both ending in EOS."""
    dice = rng.random()
    if dice < 0.6:  # a one-step question, answered
        problem = rng.choice(one_step)
        return tokenizer.encode(problem.question), tokenizer.encode(format_rationale(problem.rationale))
    problem, first = rng.choice(many_steps), tokenizer.sentinel(0)
    *ids, eos = tokenizer.encode(problem.question if dice < 0.7 else format_rationale(problem.rationale))
    if dice > 0.9:  # a rationale's whole rest behind one sentinel
        cut = rng.randrange(len(ids))
        return [*ids[:cut], first, eos], [first, *ids[cut:], eos]
    source, target = corrupt(ids, first, rng)
    return [*source, eos], [*target, eos]


def make_batches(tokenizer: Tokenizer, seed: int) -> Iterator[list]:
    """Yield batches of examples for ever, each of examples of like length, so that little time goes into padding."""
    rng = random.Random(seed)
    test = {problem.question for problem in make_problems(10_000, TEST_SEED)}
    one_step = make_problems(60_000, seed, steps=(1,))
    many_steps = make_problems(30_000, seed, steps=(2, 3), exclude=test)
    while True:
        pool = [make_example(tokenizer, one_step, many_steps, rng) for _ in range(40 * BATCH)]
        pool.sort(key=lambda example: (len(example[1]) // 8, len(example[0])))
        batches = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(batches)
        yield from batches


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def pretrain(model: T5, batches: Iterator[list], steps: int = STEPS) -> None:
    """Train with AdamW, a warm-up of 200 steps and a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 200, (steps - step) / steps))
    bar = trange(steps, desc="pre-training")
    for step in bar:
        sources, targets = zip(*next(batches))
        input_ids, labels = pad(sources, 0), pad(targets, -100)
        logits = model(input_ids, (input_ids != 0).long(), shift_right(labels))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # early in training many numbers are denormal, which a CPU multiplies ten times slower
    make_vocabulary(FOLDER / "spiece.model")
    tokenizer = Tokenizer(FOLDER / "spiece.model")
    model = T5(T5Config(d_model=128, d_ff=256, n_heads=4, n_layers=2, d_kv=32, vocab_size=tokenizer.vocab_size, dropout=0.0))
    pretrain(model, make_batches(tokenizer, SEED))
    save_flan_t5(model.half(), FOLDER)


if __name__ == "__main__":
    main()
