"""SFT: the loss against two oracles, micro-batches of any size, and the project's only training loop."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data.problems import load_problems
from model import T5, T5Config, load_flan_t5, save_flan_t5, shift_right
from sft import (
    IGNORE,
    Example,
    batches,
    learning_rate,
    make_examples,
    micro_batches,
    sft_loss,
    token_logps,
    train_sft,
)
from tests.conftest import schedule
from tokenizer import (
    EOS_ID,
    MAX_QUESTION,
    MAX_RATIONALE,
    Tokenizer,
    format_rationale,
    pad_batch,
)

CONFIG = T5Config(d_model=32, d_ff=48, n_heads=2, n_layers=2, d_kv=16, vocab_size=48)
RAGGED = [
    (3, 9),
    (11, 2),
    (5, 5),
    (2, 14),
    (7, 1),
    (1, 6),
    (9, 4),
]  # tokens of question and rationale, without EOS


def random_model(seed: int = 0, **changes) -> T5:
    torch.manual_seed(seed)
    return T5(replace(CONFIG, **changes)).eval()


def random_examples(lengths=RAGGED, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def ids(n):
        return rng.integers(3, CONFIG.vocab_size, n).tolist() + [EOS_ID]

    return [Example(ids(source), ids(target)) for source, target in lengths]


def n_targets(examples: list[Example]) -> int:
    return sum(len(example.labels) for example in examples)


def weights(model: T5) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_bytes(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded questions, their mask, and padded labels."""
    input_ids, mask = pad_batch([example.input_ids for example in examples])
    labels, _ = pad_batch([example.labels for example in examples], padding=IGNORE)
    return input_ids, mask, labels


def quiet(record: dict) -> None:
    """A log that prints nothing."""


@contextmanager
def seen_by_optimizer():
    """Record AdamW's learning rate and gradients at every step; the gradients are in the order of parameters()."""
    steps = []

    def remember(optimizer, args, kwargs):
        groups = optimizer.param_groups
        gradients = [parameter.grad.clone() for group in groups for parameter in group["params"]]
        steps.append(SimpleNamespace(rate=groups[0]["lr"], gradients=gradients))

    handle = register_optimizer_step_pre_hook(remember)
    yield steps
    handle.remove()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A vocabulary of about forty pieces, learned from 100 short texts, with T5's special ids."""
    folder = tmp_path_factory.mktemp("vocabulary")
    sums = [
        f"How many are {a} + {b}? [ {a} + {b} = {a + b}] #### {a + b}"
        for a in range(10)
        for b in range(10)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sums), model_prefix=str(folder / "spiece"), vocab_size=45, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(folder)


# ---------------------------------------------------------------------------------------------- examples and batches


def test_texts_are_cut_at_200_and_300_tokens_and_keep_their_eos(tokenizer):
    """A rationale truncated without EOS would teach the model never to stop; the authors truncate at these lengths."""
    long, short = "3 + 4 = 7 " * 200, "3 + 4"
    cut, whole = make_examples(
        [
            SimpleNamespace(question=long, rationale=long),
            SimpleNamespace(question=short, rationale=short),
        ],
        tokenizer,
    )
    assert (len(cut.input_ids), len(cut.labels)) == (MAX_QUESTION, MAX_RATIONALE) == (200, 300)
    everything = tokenizer.encode(long)
    assert cut.input_ids == everything[:199] + [EOS_ID] and cut.labels == everything[:299] + [
        EOS_ID
    ]
    assert whole.input_ids == whole.labels == tokenizer.encode(short) and whole.labels[-1] == EOS_ID


def test_padding_is_masked_in_questions_and_ignored_in_rationales():
    """Labels padded with 0 would make padding a target, and the model would learn to write it."""
    input_ids, attention_mask, labels = collate(
        [Example([5, 6, 1], [7, 1]), Example([8, 1], [9, 10, 11, 1])]
    )
    assert input_ids.tolist() == [[5, 6, 1], [8, 1, 0]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[7, 1, IGNORE, IGNORE], [9, 10, 11, 1]] and IGNORE == -100


def test_micro_batches_keep_every_item_once_within_the_budget():
    """A lost or duplicated item silently changes the loss; a micro-batch over the budget runs out of GPU memory."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        batch = [[i] * int(rng.integers(1, 60)) for i in range(rng.integers(1, 40))]
        budget = int(rng.integers(1, 300))
        pieces = micro_batches(batch, budget)
        assert sorted(item for piece in pieces for item in piece) == sorted(batch)
        assert all(
            len(piece) == 1 or len(piece) * max(map(len, piece)) <= budget for piece in pieces
        )


def test_micro_batches_are_few_and_of_similar_length():
    """Mixing long and short items wastes tokens on padding: [9 9] [1 1] costs 20 tokens, [9 1] [9 1] costs 36."""

    def lengths(pieces):
        return [[len(item) for item in piece] for piece in pieces]

    batch = ["a", "b" * 9, "c", "d" * 9]
    assert lengths(micro_batches(batch, 18)) == [[9, 9], [1, 1]]
    assert lengths(micro_batches(batch, 36)) == [[9, 9, 1, 1]]
    assert micro_batches([], 18) == []


def test_every_epoch_visits_every_item_once_in_its_own_order():
    """Sampling with replacement would skip a third of L per epoch; a fixed order is not a shuffle."""
    source = batches(range(10), 4, seed=1)
    first, second = ([next(source) for _ in range(3)] for _ in range(2))
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [4, 4, 2]
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert first != second


def test_the_order_of_the_data_follows_from_the_seed_alone():
    """A continued run must see its data in the same order as an uninterrupted one, whatever random numbers were drawn."""

    def take(seed):
        return [batch for batch, _ in zip(batches(range(50), 8, seed), range(20))]

    before = take(3)
    torch.manual_seed(99), np.random.seed(99)
    assert take(3) == before != take(4)


# ---------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_equals_cross_entropy_in_float64():
    """Eq. 2 for one example at a time, without padding: a second shift, a lost EOS or a padded target changes the loss."""
    model, examples = random_model(), random_examples()
    expected = 0.0
    for example in examples:
        source, target = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        logits = model(source, torch.ones_like(source), torch.tensor([[0, *example.labels[:-1]]]))[
            0
        ].double()
        for t, label in enumerate(
            target[0]
        ):  # position t reads labels before t and predicts label t
            expected += (torch.logsumexp(logits[t], 0) - logits[t, label]).item()
    assert sft_loss(model, examples)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_equals_the_public_library(tmp_path):
    """transformers itself shifts the labels and skips -100; equal losses on ragged labels show that we do both correctly."""
    transformers = pytest.importorskip("transformers")
    model, examples = random_model(), random_examples()
    save_flan_t5(model, tmp_path)
    oracle = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    input_ids, attention_mask, labels = collate(examples)
    with torch.no_grad():
        expected = oracle(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels
        ).loss.item()
        ours = sft_loss(model, examples)["loss"].item() / n_targets(examples)
    assert abs(ours - expected) < 1e-5


def test_the_loss_equals_the_public_library_on_real_text(shared):
    """The same on GSM8K with the real vocabulary of 32,128, where a sum over logits can lose precision."""
    transformers = pytest.importorskip("transformers")
    problems = load_problems(shared / "data" / "gsm8k" / "train.jsonl")[:4]
    problems = [replace(p, rationale=format_rationale(p.rationale)) for p in problems]
    folder = shared / "mini-flan-t5"
    examples = make_examples(problems, Tokenizer(folder))
    input_ids, attention_mask, labels = collate(examples)
    with torch.no_grad():
        oracle = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        )
        oracle = oracle.eval()
        expected = oracle(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels
        ).loss.item()
        ours = sft_loss(load_flan_t5(folder), examples)["loss"].item() / n_targets(examples)
    assert abs(ours - expected) < 1e-5


def test_the_vocabulary_meets_real_tokens_only():
    """The logits over 32,128 ids are the largest tensor: they must have no rows for padding."""
    model, examples, rows = random_model(), random_examples(), []
    model.lm_head.register_forward_hook(lambda layer, given, _: rows.append(given[0].shape[:-1]))
    sft_loss(model, examples)
    assert rows == [(n_targets(examples),)]


def test_padding_says_nothing_about_the_answer():
    """Extra padding with any ids must leave every gradient unchanged: a mask forgotten anywhere would change one."""
    model, examples = random_model(), random_examples()
    input_ids, attention_mask, labels = collate(examples)
    wider = [
        F.pad(t, (0, 5), value=v)
        for t, v in ((input_ids, 7), (attention_mask, 0), (labels, IGNORE))
    ]
    gradients = []
    for ids, mask, targets in ((input_ids, attention_mask, labels), wider):
        token_logps(model, model.encode(ids, mask), mask, targets).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_token_logps_sit_at_their_positions():
    """dpo.py sums them per row: a number in the wrong row would not change SFT's total, but would ruin DPO."""
    model, examples = random_model(), random_examples()
    input_ids, attention_mask, labels = collate(examples)
    logps = token_logps(model, model.encode(input_ids, attention_mask), attention_mask, labels)
    full = model(input_ids, attention_mask, shift_right(labels)).log_softmax(-1)
    expected = full.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(
        labels == IGNORE, 0
    )
    assert logps.shape == labels.shape and logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------- learning rate


def test_learning_rate_by_hand():
    """20 steps, a tenth of them warm-up: 1/2, 1, then the cosine from 1 via its midpoint (0.1 + 0.9 / 2) to 0.1068."""
    twenty = schedule(peak_rate=2.0)
    rates = [learning_rate(step, 20, twenty) / 2 for step in range(20)]
    assert rates[:3] == pytest.approx([0.5, 1, 1])
    assert rates[11] == pytest.approx(0.55)
    assert rates[19] == pytest.approx(0.10683651)  # 0.1 + 0.45 * (1 + cos(pi * 17 / 18))


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_learning_rate_rises_evenly_to_the_peak_and_never_leaves_zero_to_peak(ratio):
    """A step at rate 0 is wasted, and one-step training would do nothing; above the peak, training may diverge."""
    numbers = schedule(peak_rate=3e-4, warmup_ratio=ratio)
    for n_steps in (*range(1, 40), 150, 1000):
        rates = [learning_rate(step, n_steps, numbers) for step in range(n_steps)]
        top = rates.index(max(rates))
        assert min(rates) > 0 and max(rates) == pytest.approx(3e-4, rel=1e-12)
        assert top == max(0, math.ceil(ratio * n_steps) - 1)
        assert np.diff([0.0, *rates[: top + 1]]) == pytest.approx(rates[0])
        assert rates[top:] == sorted(rates[top:], reverse=True) and rates[-1] >= 0.1 * 3e-4
    if ratio < 1:
        assert rates[-1] == pytest.approx(
            0.1 * 3e-4, rel=1e-3
        )  # after 1,000 steps: 10 % of the peak, not 0


# ---------------------------------------------------------------------------------------------------------- training


def train(model, examples, n_epochs=1, log=quiet, **changes) -> T5:
    return train_sft(model, examples, n_epochs, schedule(**changes), "SFT", log)


def test_neither_loss_nor_gradient_depends_on_how_memory_cuts_the_batch():
    """Averaging the means of micro-batches would give tokens of short rationales more weight on smaller GPUs."""
    examples = random_examples()
    logs, gradients = [], []
    for budget in (1, 40, 10**6):  # seven micro-batches, a few, one
        with seen_by_optimizer() as steps:
            train(
                random_model(dropout=0.0),
                examples,
                log=logs.append,
                micro_batch_tokens=budget,
                max_grad_norm=1e9,
            )
        gradients.append(steps[0].gradients)
    model = random_model(dropout=0.0)
    loss = sft_loss(model, examples)["loss"] / n_targets(
        examples
    )  # the mean over all tokens of the batch
    loss.backward()
    for log, found in zip(logs, gradients):
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for gradient, parameter in zip(found, model.parameters()):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_two_steps_are_adamw_with_clipping_and_decay():
    """AdamW by hand, in float64: decoupled weight decay, bias-corrected moments, gradient clipped to norm 0.05."""
    model, rate, decay, limit = random_model(dropout=0.0), 1e-2, 0.01, 0.05
    before, logs = [w.double() for w in weights(model)], []
    with seen_by_optimizer() as steps:
        train(
            model, random_examples(), 2, logs.append, peak_rate=rate, weight_decay=decay, max_grad_norm=limit,
            warmup_ratio=1.0, log_every=1,
        )  # fmt: skip
    assert [step.rate for step in steps] == pytest.approx([rate / 2, rate])
    for step, log in zip(steps, logs, strict=True):
        assert log["grad_norm"] > limit  # the log has the norm before clipping
        assert math.sqrt(
            sum(g.double().square().sum().item() for g in step.gradients)
        ) == pytest.approx(limit, rel=1e-3)
    for i, (weight, parameter) in enumerate(zip(before, model.parameters())):
        m = v = torch.zeros_like(weight)
        for t, step in enumerate(steps, 1):
            g = step.gradients[i].double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            weight = weight - step.rate * decay * weight
            weight = weight - step.rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.double(), weight, atol=2e-6, rtol=1e-5)


def test_training_takes_its_steps_at_the_scheduled_rates_and_logs_some():
    """Seven examples in batches of three make three steps per epoch. A rate set after its step would be one step late."""
    logs, numbers = [], schedule(batch_size=3, log_every=4)
    with seen_by_optimizer() as steps:
        train_sft(random_model(), random_examples(), 3, numbers, "warm-up", logs.append)
    assert [step.rate for step in steps] == [learning_rate(step, 9, numbers) for step in range(9)]
    assert [log["step"] for log in logs] == [1, 5, 9]
    assert all(
        log["stage"] == "warm-up" and {"loss", "grad_norm", "learning_rate"} <= set(log)
        for log in logs
    )
    assert [log["learning_rate"] for log in logs] == [steps[i].rate for i in (0, 4, 8)]


def test_the_same_seed_gives_the_same_weights_to_the_byte():
    """Data order and dropout depend only on the seed; with global random state, no stopped run could continue exactly."""
    trained = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        model = random_model()
        torch.manual_seed(noise), np.random.seed(noise)
        trained.append(weights(train(model, random_examples(), 3, batch_size=4, seed=seed)))
    assert same_bytes(trained[0], trained[1])
    assert not same_bytes(trained[0], trained[2])


def test_dropout_is_on_while_training_and_off_afterwards():
    """Without dropout, eight epochs on a few thousand examples overfit; sampling with dropout would add noise."""
    examples = random_examples()
    for dropout in (0.0, 0.1):
        model, logs = random_model(dropout=dropout), []
        still = sft_loss(model, examples)["loss"].item() / n_targets(examples)
        trained = train(model, examples, log=logs.append)
        assert trained is model and not any(module.training for module in model.modules())
        assert (logs[0]["loss"] == pytest.approx(still, rel=1e-6)) == (dropout == 0.0)


def test_dropout_differs_from_step_to_step():
    """If the seed were reset at every step, one mask for all of training would just make a smaller model."""
    logs = []
    train(
        random_model(), random_examples(), 3, logs.append, peak_rate=1e-12, log_every=1
    )  # the weights hardly change
    losses = [log["loss"] for log in logs]
    assert max(losses) - min(losses) > 1e-3


def test_one_batch_is_learned_by_heart_and_decoded_back(tokenizer):
    """If the components work together, 60 steps suffice. Decoding shows more than the loss: with unshifted decoder
    inputs, the model overfits even better, but then writes nothing."""
    texts = {
        f"How many are {a} + {b}?": f"[ {a} + {b} = {a + b}] #### {a + b}"
        for a, b in ((2, 3), (7, 1), (4, 9))
    }
    examples = [
        Example(tokenizer.encode(question), tokenizer.encode(text))
        for question, text in texts.items()
    ]
    model = random_model(vocab_size=tokenizer.vocab_size, dropout=0.0)
    train(model, examples, 60, peak_rate=1e-2)
    with torch.no_grad():
        assert sft_loss(model, examples)["loss"].item() / n_targets(examples) < 0.05
        for question, text in texts.items():
            source, written = torch.tensor([tokenizer.encode(question)]), [0]
            while written[-1] != EOS_ID and len(written) < 40:
                written.append(
                    model(source, torch.ones_like(source), torch.tensor([written]))[0, -1]
                    .argmax()
                    .item()
                )
            assert written[-1] == EOS_ID and tokenizer.decode(written) == text


def test_a_gradient_that_is_not_finite_stops_training_and_names_the_step():
    """Continuing with NaN wastes a night and saves a checkpoint of NaN. The weights must stay as before that step."""
    model = random_model()
    model.lm_head.weight.data[5, 5] = math.inf
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"^SFT\b.*step 1\b") as error:
        train(model, random_examples())
    assert "\n" not in str(error.value) and same_bytes(weights(model), before)
    with pytest.raises(
        FloatingPointError, match=r"^SFT\b.*step 2\b"
    ):  # the first step is far too large
        train(random_model(), random_examples(), 4, peak_rate=1e30)


def test_nothing_to_train_on_is_refused():
    """Training on an empty file of labeled problems must be an error."""
    with pytest.raises(ValueError, match="SFT.*labeled problems"):
        train(random_model(), [])


def test_bf16_is_for_computing_only():
    """Steps of 3e-4 vanish in bf16's three digits: weights and moments stay in fp32; the losses differ only by rounding."""
    losses = {}
    for bf16 in (False, True):
        logs = []
        model = train(random_model(), random_examples(), 3, log=logs.append, log_every=1, bf16=bf16)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses[bf16] = [record["loss"] for record in logs]
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.02)
