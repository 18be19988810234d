"""The fast decoder must write what the slow one writes, in any batch; the calculator may affect only its own row."""

import itertools
import json
import os
import random
import re
import sys

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import decode
from data.terminal import run_command
from decode import (
    KVCache,
    RowState,
    Sample,
    generate,
    mark_forced,
    sample_next_token,
    uniform_noise,
)
from model import T5, T5Config, load_flan_t5, shift_right
from tests.naive import generate_naive
from tokenizer import EOS_ID, Tokenizer, pad_batch

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle must not use the network


def sums(n: int, seed: int) -> list[tuple[str, str]]:
    """Questions of one or two steps, with formatted rationales whose results are right."""
    rng, pairs = random.Random(seed), []
    for _ in range(n):
        total = rng.randrange(2, 30)
        question, steps = f"Ann has {total} nuts.", []
        for _ in range(rng.randint(1, 2)):
            sign, number = rng.choice("+-*"), rng.randrange(2, 20)
            result = (
                total + number if sign == "+" else total - number if sign == "-" else total * number
            )
            verb = {"+": "gets", "-": "eats", "*": "multiplies by"}[sign]
            question += f" She {verb} {number}."
            steps.append(
                f"{total} {sign} {number} = [ {total} {sign} {number} = {result}] {result} nuts."
            )
            total = result
        pairs.append((question, " ".join(steps) + f" #### {total}"))
    return pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A vocabulary of at most 300 pieces trained on sums, with T5's ids for padding, EOS and unknown."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = (
        "\n".join(line for pair in sums(400, 0) for line in pair) + "\n" + " ".join("x+-*/()%=[].,")
    )
    (folder / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=300, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> T5:
    """A small T5 trained on sums for two seconds: it writes brackets, gets arithmetic wrong, ends or
    rambles on."""
    torch.manual_seed(0)
    net = T5(
        T5Config(
            d_model=48,
            d_ff=64,
            n_heads=3,
            n_layers=2,
            d_kv=16,
            vocab_size=tokenizer.vocab_size + 28,
            dropout=0.1,
        )
    )
    optimizer, pairs = torch.optim.Adam(net.parameters(), lr=5e-3), sums(400, 1)
    for step in range(120):
        batch = pairs[step * 12 % 384 :][:12]
        input_ids, mask = pad_batch([tokenizer.encode(question) for question, _ in batch])
        labels, _ = pad_batch([tokenizer.encode(rationale) for _, rationale in batch], padding=-100)
        loss = F.cross_entropy(
            net(input_ids, mask, shift_right(labels)).flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


QUESTIONS = [question for question, _ in sums(6, 2)] + ["Ann.", "", "Ann has 3 nuts." * 3]


@pytest.fixture(scope="module")
def mini(shared):
    """The small checkpoint that writes GSM8K rationales, its tokenizer, and real questions."""
    lines = (shared / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    folder = shared / "mini-flan-t5"
    return load_flan_t5(folder), Tokenizer(folder), [json.loads(line)["question"] for line in lines]


@torch.no_grad()
def same(net, tokenizer, questions, found, expected, temperature=0.0, top_k=50, seed=0):
    """Assert that both wrote the same ids and forced marks. Rounding may flip a near-tie: print its gap
    and allow it."""
    for question, left, right in zip(questions, found, expected, strict=True):
        for k, (a, b) in enumerate(zip(left, right, strict=True)):
            if a == b:
                continue
            steps = list(itertools.zip_longest(a.ids, b.ids, fillvalue=EOS_ID))
            t = next((t for t, (x, y) in enumerate(steps) if x != y), len(steps) - 1)
            ids = torch.tensor([tokenizer.encode(question, decode.MAX_QUESTION)])
            logits = net(ids, torch.ones_like(ids), torch.tensor([[0, *b.ids[:t]]]))[0, -1]
            if temperature == 0:
                top = logits.topk(2).values
                gap = (top[0] - top[1]).item()
            else:
                cumulative = (
                    (logits.topk(min(top_k, len(logits))).values / temperature)
                    .softmax(-1)
                    .cumsum(-1)
                )
                gap = (cumulative - uniform_noise(seed, question, k, t + 1)[t]).abs().min().item()
            print(f"near-tie: question {question!r} sample {k} step {t}: gap {gap:.1e}")
            assert gap < 1e-4, (question, k, t, gap, a.ids[t : t + 5], b.ids[t : t + 5])


# ------------------------------------------------------------------------------------------ fast equals slow

SETTINGS = [(0.0, True), (0.0, False), (0.8, True), (0.8, False)]


@pytest.fixture(scope="module")
def naive(model, tokenizer):
    """The slow twin's rationales for every setting, generated once."""
    return {
        (temperature, calculator): generate_naive(
            model,
            tokenizer,
            QUESTIONS,
            1 if temperature == 0 else 2,
            temperature,
            max_new_tokens=40,
            calculator=calculator,
            seed=3,
        )
        for temperature, calculator in SETTINGS
    }


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("temperature, calculator", SETTINGS)
def test_the_fast_decoder_writes_what_the_slow_one_writes(
    model, tokenizer, naive, temperature, calculator, batch_size
):
    """Cache, slot lengths, refilled slots, shrinking batch and early encoding must not change what is
    written."""
    expected = naive[temperature, calculator]
    found = generate(
        model,
        tokenizer,
        QUESTIONS,
        len(expected[0]),
        temperature,
        max_new_tokens=40,
        calculator=calculator,
        seed=3,
        batch_size=batch_size,
    )
    same(model, tokenizer, QUESTIONS, found, expected, temperature, seed=3)


def test_the_fixture_is_worth_its_name(naive):
    """The comparison above means little unless rows end at different times, some never end, and the calculator
    is used."""
    samples = [sample for setting in SETTINGS for row in naive[setting] for sample in row]
    assert len({len(sample.ids) for sample in samples}) > 5
    assert any(sample.finished for sample in samples) and not all(
        sample.finished for sample in samples
    )
    assert sum(any(sample.forced) for row in naive[0.8, True] for sample in row) > 3
    assert not any(any(sample.forced) for row in naive[0.8, False] for sample in row)


@pytest.fixture(scope="module")
def mini_naive(mini):
    net, tokenizer, questions = mini
    return {
        (temperature, calculator): generate_naive(
            net,
            tokenizer,
            questions[:3],
            2 if temperature and calculator else 1,
            temperature,
            max_new_tokens=40,
            calculator=calculator,
        )
        for temperature, calculator in ((0.0, True), (0.7, True), (0.7, False))
    }


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("temperature, calculator", [(0.0, True), (0.7, True), (0.7, False)])
def test_fast_equals_slow_on_real_questions(mini, mini_naive, temperature, calculator, batch_size):
    """The same claim with T5's 32,128 ids, real questions and fluent rationales."""
    net, tokenizer, questions = mini
    expected = mini_naive[temperature, calculator]
    found = generate(
        net,
        tokenizer,
        questions[:3],
        len(expected[0]),
        temperature,
        max_new_tokens=40,
        calculator=calculator,
        batch_size=batch_size,
    )
    same(net, tokenizer, questions[:3], found, expected, temperature)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize(
    "temperature, calculator", [(0.0, True), (0.0, False), (0.7, True), (0.7, False)]
)
@torch.no_grad()
def test_two_hundred_real_questions_are_answered_as_one_full_pass_would(
    mini, shared, temperature, calculator, batch_size, slow
):
    """A cheaper slow twin, for 200 questions: one uncached pass over a complete rationale must choose the same id
    at every position, except where the calculator wrote it. Near-ties are printed and allowed. (At batch size 1,
    25 questions without --slow.)"""
    net, tokenizer, _ = mini
    count = 200 if slow or batch_size > 1 else 25
    lines = (shared / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    questions, n, ties, forced = [json.loads(line)["question"] for line in lines], 24, 0, 0
    options = dict(
        temperature=temperature, max_new_tokens=n, calculator=calculator, batch_size=batch_size
    )
    samples = [row[0] for row in generate(net, tokenizer, questions, **options)]
    for at in range(0, count, 25):
        input_ids, mask = pad_batch(
            [
                tokenizer.encode(question, decode.MAX_QUESTION)
                for question in questions[at : at + 25]
            ]
        )
        labels, _ = pad_batch(
            [[*sample.ids, *[EOS_ID] * sample.finished] for sample in samples[at : at + 25]]
        )
        logits = net(input_ids, mask, shift_right(labels))
        for question, sample, row, scores in zip(
            questions[at : at + 25], samples[at : at + 25], labels, logits
        ):
            noise = torch.tensor(uniform_noise(0, question, 0, n))[: len(row)]
            chosen, state = (
                sample_next_token(scores[: len(noise)], temperature, 50, noise),
                RowState(tokenizer, calculator, Sample(), [0.0] * n),
            )
            for t, label in enumerate([*sample.ids, *[EOS_ID] * sample.finished]):
                state.take(chosen[t].item() if not state.queue else -1)
                if (state.sample.ids[-1] if not state.sample.finished else EOS_ID) == label:
                    continue
                cumulative = (scores[t].topk(50).values / (temperature or 1)).softmax(-1).cumsum(-1)
                top = scores[t].topk(2).values
                gap = top[0] - top[1] if temperature == 0 else (cumulative - noise[t]).abs().min()
                print(f"near-tie: {question!r} step {t}: gap {gap:.1e}")
                assert gap < 1e-4, (question, t, gap)
                ties += 1
                break
            else:
                assert state.sample.forced == sample.forced
                forced += sum(sample.forced)
    assert ties <= 2 and (forced > count / 2) == calculator


def spelling(monkeypatch, model, rule):
    """Replace every step's logits with rule(batch sizes so far, logits)."""
    step, sizes = model.step, []

    def changed(ids, cache):
        sizes.append(len(ids))
        return rule(sizes, step(ids, cache).clone())

    monkeypatch.setattr(model, "step", changed)
    return sizes


def test_nothing_is_computed_for_slots_that_stay_idle(model, tokenizer, monkeypatch):
    """One long rationale is left at the end: unless the batch shrinks, every step computes all the idle
    slots."""

    def all_but_the_first_end(sizes, logits):
        logits[:, EOS_ID] = 1e9
        logits[0, EOS_ID] = -1e9  # the longest question is in the first slot
        return logits

    sizes = spelling(monkeypatch, model, all_but_the_first_end)
    generate(model, tokenizer, QUESTIONS, max_new_tokens=30, batch_size=8)
    assert sizes[0] == 8 and sizes[-25:] == [1] * 25 and len(sizes) <= 33


def test_a_finished_rationale_makes_room_at_once(model, tokenizer, monkeypatch):
    """Continuous refill (section 3.2): rationales of very different lengths must not wait for each other.
    The slots are almost always busy, so there are few more steps than tokens divided by slots."""
    sizes = spelling(monkeypatch, model, lambda sizes, logits: logits)
    samples = generate(model, tokenizer, QUESTIONS, 6, 0.9, max_new_tokens=40, batch_size=4)
    lengths = [len(sample.ids) + sample.finished for row in samples for sample in row]
    assert max(lengths) >= 2 * min(lengths) and sum(sizes) < 1.1 * sum(lengths)


def test_a_new_tenant_never_sees_the_old_cache(model, tokenizer, monkeypatch):
    """A reused slot's old cache is filled with huge numbers: any that passed a mask would change the text."""
    options = dict(n_samples=2, temperature=0.8, max_new_tokens=25, batch_size=3)
    expected = generate(model, tokenizer, QUESTIONS, **options)
    admit, admitted = KVCache.admit, []

    def haunted(self, slots, net, states):
        for part in (self.own, self.cross):
            part[:, :, slots] = 1e4
        admitted.extend(slots)
        admit(self, slots, net, states)

    monkeypatch.setattr(KVCache, "admit", haunted)
    found = generate(model, tokenizer, QUESTIONS, **options)
    assert len(admitted) == 2 * len(QUESTIONS)
    same(model, tokenizer, QUESTIONS, found, expected, 0.8)


def test_each_question_is_encoded_once(model, tokenizer, monkeypatch):
    """Its samples share one encoder pass; encoding per sample would silently multiply the encoder's work."""
    encode, lengths = model.encode, []
    monkeypatch.setattr(
        model, "encode", lambda ids, mask: lengths.extend(mask.sum(1).tolist()) or encode(ids, mask)
    )
    generate(
        model, tokenizer, QUESTIONS, n_samples=5, temperature=1.0, max_new_tokens=4, batch_size=4
    )
    assert sorted(lengths) == sorted(len(tokenizer.encode(question)) for question in QUESTIONS)


def test_greedy_ids_equal_the_public_librarys(mini):
    """The oracle for the complete decoder: 64 GSM8K test questions, 300 tokens, no calculator, every id
    equal."""
    transformers = pytest.importorskip("transformers")
    net, tokenizer, questions = mini
    folder = pytest.importorskip("tests.conftest").SHARED / "mini-flan-t5"
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    input_ids, mask = pad_batch([tokenizer.encode(question, 200) for question in questions])
    written = theirs.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=300, do_sample=False, num_beams=1
    )
    found = generate(net, tokenizer, questions, max_new_tokens=300, calculator=False)
    for [sample], ids in zip(found, written[:, 1:].tolist(), strict=True):
        assert sample.ids == (ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids)
        assert sample.finished == (EOS_ID in ids) and sample.text == tokenizer.decode(ids)


# ------------------------------------------------------------------------------ what a sample depends on


def test_a_sample_depends_on_question_seed_and_number_alone(model, tokenizer):
    """Not on batch size, question order or the number of samples: otherwise no run could be repeated."""
    options = dict(temperature=0.9, max_new_tokens=30, seed=7)
    expected = generate(model, tokenizer, QUESTIONS, n_samples=3, batch_size=32, **options)
    fewer = [row[:2] for row in expected]
    same(
        model,
        tokenizer,
        QUESTIONS,
        generate(model, tokenizer, QUESTIONS, n_samples=2, batch_size=5, **options),
        fewer,
        0.9,
        seed=7,
    )
    backwards = QUESTIONS[::-1]
    found = generate(model, tokenizer, backwards, n_samples=3, batch_size=4, **options)
    same(model, tokenizer, backwards, found, expected[::-1], 0.9, seed=7)
    for question, row in zip(QUESTIONS[:4], expected):
        same(
            model,
            tokenizer,
            [question],
            generate(model, tokenizer, [question], n_samples=3, **options),
            [row],
            0.9,
            seed=7,
        )


def test_the_same_question_twice_gives_the_same_samples(model, tokenizer):
    """The datasets repeat a few questions; position in the list is not part of the seed."""
    first, _, third = generate(
        model, tokenizer, [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], 4, 0.9, max_new_tokens=30
    )
    same(model, tokenizer, [QUESTIONS[0]], [first], [third], 0.9)


def test_samples_differ_from_each_other_and_between_seeds(model, tokenizer):
    """K equal samples would give no preference pair; a seed without effect would make three
    independent runs equal."""
    one, other = (
        generate(model, tokenizer, QUESTIONS[:5], 4, 0.9, max_new_tokens=30, seed=seed)
        for seed in (0, 1)
    )
    for left, right in zip(one, other):
        assert len({tuple(sample.ids) for sample in left}) == 4
        assert not {tuple(sample.ids) for sample in left} & {tuple(sample.ids) for sample in right}


def test_a_longer_limit_only_continues_a_sample(model, tokenizer):
    """Each position has its own noise, so a rationale cut at 12 tokens is the start of the one cut at 24."""
    short, long = (
        generate(model, tokenizer, QUESTIONS[:6], 2, 0.8, max_new_tokens=n) for n in (12, 24)
    )
    for left, right in zip(short, long):
        for a, b in zip(left, right):
            assert a.ids == b.ids[:12] and a.forced == b.forced[:12]


def test_the_global_generators_are_left_alone(model, tokenizer):
    """Sampling between two training stages must neither read nor change the state that dropout uses."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = generate(model, tokenizer, QUESTIONS[:3], 2, 0.9, max_new_tokens=10)
    after = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert after == (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(2), np.random.seed(2)
    assert generate(model, tokenizer, QUESTIONS[:3], 2, 0.9, max_new_tokens=10) == expected


def test_noise_is_reproducible_and_its_own():
    """It is in [0, 1), the same on every machine, and different for every seed, question and sample."""
    noise = np.array(uniform_noise(0, "How many?", 0, 100_000))
    assert noise.min() >= 0 and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.005
    assert noise[:10].tolist() == uniform_noise(0, "How many?", 0, 10)
    assert noise[:2].tolist() == pytest.approx([0.6012124618125626, 0.10879454124157906], abs=1e-15)
    keys = [(1, "How many?", 0), (0, "How many", 0), (0, "How many?", 1), (0, "", 0),
            ("0 dpo", "How many?", 0), (11, "?", 1), (1, "?", 11), (1, "1?", 1)]  # fmt: skip
    others = [tuple(uniform_noise(*key, 4)) for key in keys]
    assert len({tuple(noise[:4]), *others}) == len(others) + 1


# ----------------------------------------------------------------------------------------------- choosing one token


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (0.7, 5), (2.0, 3), (0.1, 50)])
def test_frequencies_are_the_softmax_with_temperature_and_top_k(temperature, top_k):
    """Of 20,000 evenly spaced noise values each id gets its probability times 20,000, give or take one at
    each end."""
    n, logits = 20_000, torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2
    noise = (torch.arange(n) + 0.5) / n
    counts = sample_next_token(logits.expand(n, -1), temperature, top_k, noise).bincount(
        minlength=60
    )
    kept = (
        logits
        if not top_k
        else logits.masked_fill(logits < logits.sort(descending=True).values[top_k - 1], -torch.inf)
    )
    expected = (kept.double() / temperature).softmax(-1) * n
    assert (counts - expected).abs().max() <= 2
    assert not counts[kept.isinf()].any()


def test_temperature_zero_and_top_k_one_are_greedy():
    """Both must choose the largest logit, whatever the noise."""
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(500, generator=torch.Generator().manual_seed(2))
    best = logits.argmax(-1)
    assert torch.equal(sample_next_token(logits, 0, 50, noise), best)
    assert torch.equal(sample_next_token(logits, 0.7, 1, noise), best)
    assert torch.equal(sample_next_token(logits, 0.001, 0, noise), best)


def test_top_k_beyond_the_vocabulary_keeps_all_of_it():
    """A user's own vocabulary may be smaller than the default top-k of 50."""
    logits = torch.randn(100, 20, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(100, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        sample_next_token(logits, 0.7, 50, noise), sample_next_token(logits, 0.7, 0, noise)
    )


def test_the_ends_of_the_noise_choose_possible_ids():
    """Cumulative sums are rounded: the largest noise below 1 must not select a position past the end, or an id of
    probability 0."""
    impossible = torch.full((200, 300), -torch.inf)
    logits = torch.cat(
        (impossible, torch.randn(200, 300, generator=torch.Generator().manual_seed(3)), impossible),
        1,
    )
    for noise in (0.0, 2.0**-24, 1 - 2.0**-24):
        for top_k in (0, 50, 600):
            chosen = sample_next_token(logits, 0.7, top_k, torch.full((200,), noise))
            assert ((300 <= chosen) & (chosen < 600)).all()
    halves = torch.zeros(3, 2)
    assert sample_next_token(halves, 1.0, 0, torch.tensor([0.0, 0.5 - 2.0**-24, 0.5])).tolist() == [
        0,
        0,
        1,
    ]


def test_rows_choose_independently():
    """Row b uses its own logits and its own noise; a wrong broadcast would mix them."""
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(4))
    noise = torch.rand(8, generator=torch.Generator().manual_seed(5))
    together = sample_next_token(logits, 0.8, 10, noise)
    assert together.shape == (8,) and together.dtype == torch.int64
    assert together.tolist() == [
        sample_next_token(logits[b : b + 1], 0.8, 10, noise[b : b + 1]).item() for b in range(8)
    ]


# ---------------------------------------------------------------------------------------------------- the calculator


@pytest.fixture
def scripted(monkeypatch, model, tokenizer):
    """Answer each question from a script: the noise at each position encodes the id to choose there."""

    def run(scripts: dict[str, list[int]], function=generate, **options):
        def noise(seed, question, number, n):
            return [i / 1024 for i in (scripts[question] + [EOS_ID] * n)[:n]]

        monkeypatch.setattr(decode, "uniform_noise", noise)
        monkeypatch.setattr(
            decode, "sample_next_token", lambda logits, t, k, noise: (noise * 1024).long()
        )
        rows = function(model, tokenizer, list(scripts), temperature=1.0, **options)
        return {question: row[0] for question, row in zip(scripts, rows)}

    return run


def forced_text(tokenizer, sample) -> str:
    """The text that the calculator wrote."""
    return "".join(
        tokenizer.piece(i) for i, forced in zip(sample.ids, sample.forced) if forced
    ).strip()


@pytest.mark.parametrize("function", [generate, generate_naive])
@pytest.mark.parametrize("expression, result", [("3 + 4", "7"), ("10 / 4", "2.5"), ("29 * .01 * 100", "29"), ("2 - 19", "-17"),
                                                ("(2 + 3) * 4", "20"), ("1,200 * 2", "2400"), ("50% * 8", "4")])  # fmt: skip
def test_forced_digits_are_the_calculators_and_close_the_bracket(
    tokenizer, scripted, function, expression, result
):
    """The model chooses a wrong result; the rationale must contain the right one and `]`, then the model's choices
    again."""
    start = tokenizer.encode(f"nuts [ {expression} =")[:-1]
    n = len(tokenizer.encode(f"{result}]")) - 1
    after = tokenizer.encode("nuts. #### 9")[:-1]
    wrong = [tokenizer.encode("9")[0]] * n  # what the model would have written there
    sample = scripted({"Q": start + wrong + after}, function, max_new_tokens=80)["Q"]
    assert forced_text(tokenizer, sample) == f"{result}]"
    assert sample.forced == [False] * len(start) + [True] * n + [False] * len(after)
    assert sample.ids[: len(start)] == start and sample.ids[len(start) + n :] == after
    assert sample.text == f"nuts [ {expression} = {result}] nuts. #### 9" and sample.finished


@pytest.mark.parametrize("pieces, result", [(["[", " 3", " +", " 4", " ="], "7]"), (["[ 3 +", " 4="], "7]"), (["[3 +", " 4="], "7]"), ([" [ 3 + 4="], "7]"),
                                            (["[ 3 + 4 = 9"], ""), (["[ 3 + 4", " =9"], ""), (["[ 3 + 4]", " ="], "")])  # fmt: skip
def test_the_calculator_is_called_when_a_piece_ends_in_equals(tokenizer, pieces, result):
    """Pieces may hold more than `=`: `4=` ends the expression, too, but after `=9` the model has begun the result itself,
    and a closed bracket asks for nothing."""
    row = RowState(tokenizer, True, Sample(), [0.0] * 20)
    for piece in pieces:
        row.watch(piece)
    assert "".join(map(tokenizer.piece, row.queue)).strip() == result


def test_end_waits_for_the_forced_digits(tokenizer, scripted):
    """The model tries to end right after `=`: the calculator's digits come first, then the end is accepted."""
    start = tokenizer.encode("[ 3 + 4 =")[:-1]
    sample = scripted({"Q": start}, max_new_tokens=40)["Q"]
    assert sample.text == "[ 3 + 4 = 7]" and sample.finished


@pytest.mark.parametrize(
    "text",
    [
        "[ 1 / 0 =",
        "[ x + 1 =",
        "[ 2 ** 9 =",
        "[ =",
        "[ 3 + =",
        "3 + 4 =",
        "[ 3 + 4 ] =",
        "[ 3 + 4 nuts =",
        "] 3 + 4 =",
    ],
)
def test_what_does_not_evaluate_is_left_to_the_model(tokenizer, scripted, text):
    """Without a bracket, arithmetic or a result, every id is the model's own."""
    script = tokenizer.encode(text + " 9] nuts. #### 9")[:-1]
    sample = scripted({"Q": script}, max_new_tokens=60)["Q"]
    assert sample.ids == script and not any(sample.forced) and sample.finished


def test_only_the_row_that_asked_is_forced(tokenizer, scripted):
    """A queue shared between rows, or kept after its row has left the slot, would write digits into
    another row."""
    plain = tokenizer.encode("nuts = 3 + 4 = nuts nuts nuts nuts nuts nuts nuts")[:-1]
    asking = tokenizer.encode("[ 3 + 4 =")[:-1] + plain
    scripts = {f"Q{i}": (asking if i % 3 == 1 else plain)[: 3 + 2 * i] for i in range(9)}
    complete = len(tokenizer.encode("[ 3 + 4 =")) - 1
    for batch_size in (1, 3, 9):
        for i, sample in enumerate(
            scripted(scripts, max_new_tokens=30, batch_size=batch_size).values()
        ):
            if i % 3 == 1 and len(scripts[f"Q{i}"]) >= complete:
                assert forced_text(tokenizer, sample) == "7]"
            else:
                assert sample.ids == scripts[f"Q{i}"] and not any(sample.forced)


def test_a_slots_next_tenant_inherits_no_digits(tokenizer, scripted):
    """The first row is cut off in the middle of its forced digits; the next question takes its slot and must
    start clean."""
    asking = tokenizer.encode("[ 1,200 * 2 =")[:-1]
    plain = tokenizer.encode("nuts")[:-1]
    found = scripted(
        {"A long question": asking, "B": plain}, max_new_tokens=len(asking) + 1, batch_size=1
    )
    assert found["A long question"].forced[-1] and not found["A long question"].finished
    assert found["B"].ids == plain and not any(found["B"].forced)


def test_the_innermost_open_bracket_counts(tokenizer, scripted):
    """A model that opens a second bracket before closing the first means the second."""
    for text in ("[ 5 nuts [ 3 + 4 =", "[ 1 / 0 = 3] [ 3 + 4 =", "[ [ 3 + 4 ="):
        script = tokenizer.encode(text)[:-1]
        sample = scripted({"Q": script}, max_new_tokens=60)["Q"]
        assert forced_text(tokenizer, sample) == "7]" and sample.ids[: len(script)] == script


def test_every_bracket_of_a_rationale_is_computed(tokenizer, scripted):
    """State left over from the first bracket would corrupt the second."""
    first, second = tokenizer.encode("[ 3 + 4 =")[:-1], tokenizer.encode("nuts [ 9 - 4 =")[:-1]
    gap = [EOS_ID + 5] * (len(tokenizer.encode("7]")) - 1)
    sample = scripted({"Q": first + gap + second}, max_new_tokens=80)["Q"]
    assert (
        forced_text(tokenizer, sample).split() == ["7]", "5]"]
        and sample.text == "[ 3 + 4 = 7] nuts [ 9 - 4 = 5]"
    )


def test_forced_digits_stop_at_the_limit(tokenizer, scripted):
    """max_new_tokens also limits forced ids: the cut at 300 tokens in training relies on it."""
    start = tokenizer.encode("[ 1,200 * 2 =")[:-1]
    result = tokenizer.encode("2400]")[:-1]
    for extra in range(len(result) + 1):
        sample = scripted({"Q": start}, max_new_tokens=len(start) + extra)["Q"]
        assert sample.ids == start + result[:extra] and not sample.finished


def test_without_the_calculator_nothing_is_forced(tokenizer, scripted):
    """The paper's ablation (figure 7) is the same decoder with calculator=False."""
    script = tokenizer.encode("[ 3 + 4 = 9] nuts")[:-1]
    sample = scripted({"Q": script}, max_new_tokens=40, calculator=False)["Q"]
    assert sample.ids == script and not any(sample.forced)


def test_real_rationales_hold_only_right_results(mini):
    """mini-flan-t5 cannot calculate. Every result in a forced bracket must agree with Python's arithmetic."""
    net, tokenizer, questions = mini
    number, checked = r"[1-9]\d*(?:\.\d+)?", 0
    for [sample] in generate(net, tokenizer, questions[:24], max_new_tokens=80):
        for expression, digits in re.findall(
            rf"\[ ({number}(?: [-+*/] {number})*) = (-?[\d.]+)\]", sample.text
        ):
            assert float(digits) == pytest.approx(eval(expression), abs=0.006), (
                sample.text
            )  # digits and signs only
            checked += 1
    assert checked > 10


def test_the_calculator_reads_pieces_as_they_come(tokenizer):
    """However SentencePiece splits an expression (`▁[`, `=`, `4▁=`), the row must see the same characters."""
    for _, rationale in sums(60, 9):
        row, ids = RowState(tokenizer, True, Sample(), [0.0] * 99), tokenizer.encode(rationale)[:-1]
        for i in ids:
            row.take(i)
        written = "".join(tokenizer.piece(i) for i in row.sample.ids)
        for expression in re.findall(r"\[ (.*?) =", rationale):
            assert f"[ {expression} = {eval(expression)}]" in written, (
                rationale,
                written,
            )  # this file's own sums


# ----------------------------------------------------------------------------------------------------------- corners


def test_nothing_asked_nothing_written(model, tokenizer):
    """An empty stage is not an error: no questions, no samples, no tokens."""
    assert generate(model, tokenizer, []) == [] == generate_naive(model, tokenizer, [])
    assert generate(model, tokenizer, QUESTIONS[:2], n_samples=0) == [[], []]
    [[sample]] = generate(model, tokenizer, QUESTIONS[:1], max_new_tokens=0)
    assert sample.ids == [] and sample.text == "" and not sample.finished


def test_an_empty_question_and_one_too_long(model, tokenizer):
    """An empty question is one id, EOS; one of 1,000 words is cut at 200 ids. Neither may affect other
    questions."""
    questions = ["", "Ann has 3 nuts. " * 250, QUESTIONS[0]]
    assert len(tokenizer.encode(questions[1])) > 1000
    expected = generate_naive(model, tokenizer, questions, max_new_tokens=15)
    same(
        model,
        tokenizer,
        questions,
        generate(model, tokenizer, questions, max_new_tokens=15),
        expected,
    )


@pytest.mark.parametrize("function", [generate, generate_naive])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_writing(model, tokenizer, function, training):
    """Sampling happens between training stages: the model must write without dropout in either mode."""
    expected = function(model, tokenizer, QUESTIONS[:2], max_new_tokens=10)
    model.train(training)
    try:
        assert function(model, tokenizer, QUESTIONS[:2], max_new_tokens=10) == expected
    finally:
        model.eval()


def test_weights_stay_trainable(model, tokenizer):
    """inference_mode must not leak: the parameters are trained again after sampling."""
    generate(model, tokenizer, QUESTIONS[:1], max_new_tokens=3)
    ids = torch.tensor([[3, 4]])
    model(ids, torch.ones_like(ids), ids).sum().backward()
    assert model.shared.weight.grad is not None
    model.zero_grad()


def test_progress_is_shown_on_a_terminal_only(model, tokenizer, capsys, monkeypatch):
    """In a log file, a progress bar is a wall of text."""
    generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=10)
    generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=10, title="sampling")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=10, title="sampling")
    bar = capsys.readouterr().err
    assert "sampling" in bar and "of 3" in bar
    assert bar.endswith("\r")  # in the end it has erased itself


def test_ids_and_marks_match_in_length_and_text(naive, tokenizer):
    """`forced` has one mark per id; EOS is not among the ids, and `text` is the decoded ids."""
    for rows in naive.values():
        for sample in itertools.chain(*rows):
            assert len(sample.ids) == len(sample.forced) <= 40 and EOS_ID not in sample.ids
            assert sample.finished or len(sample.ids) == 40
            assert sample.text == tokenizer.decode(sample.ids)


def test_forced_text_is_marked_and_nothing_else(tokenizer):
    """The reader sees which digits the calculator wrote, in the middle of a text and at its end."""
    asked, digits = tokenizer.encode("[ 3 * 4 =")[:-1], tokenizer.encode("12]")[:-1]
    after = tokenizer.encode("nuts.")[:-1]
    forced = [False] * len(asked) + [True] * len(digits)
    whole = Sample("", asked + digits + after, forced + [False] * len(after))
    assert mark_forced(tokenizer, whole) == "[ 3 * 4 = «12]» nuts."
    assert mark_forced(tokenizer, Sample("", asked + digits, forced)) == "[ 3 * 4 = «12]»"
    assert mark_forced(tokenizer, Sample()) == ""


@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "no/such/folder", "Q?"], "no/such/folder"), (["--checkpoint", "tests", "Q?"], "config.json")
])  # fmt: skip
def test_mistakes_of_the_command_are_one_sentence(monkeypatch, capsys, arguments, words):
    """A mistyped folder is the most common mistake."""
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_command(decode.main)
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_bytes_that_are_no_text_in_a_question_do_not_end_in_a_traceback(monkeypatch, capsys):
    """Python turns such command-line bytes into lone surrogates, which no tokenizer accepts."""
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", 3)
    monkeypatch.setattr(sys, "argv", ["decode.py", "caf\udce9 has 3"])
    decode.main()
    assert "caf? has 3" in capsys.readouterr().out


def test_several_samples_are_shown_with_how_many_agree(monkeypatch, capsys):
    """What the paper does with a model, on one screen: samples at a temperature, the calculator's tokens marked,
    and the answer that most of them reach; without the calculator nothing is marked."""
    question = "Tom has 6 boxes with 24 shells in each. How many shells does he have?"
    monkeypatch.setattr(sys, "argv", ["decode.py", question, "--samples", "3"])
    decode.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0] == question
    assert all("«" in line for line in lines[1:4])
    assert re.fullmatch(r"  [123] of 3 samples end in #### \d+", lines[4])
    monkeypatch.setattr(sys, "argv", ["decode.py", question, "--no-calculator"])
    decode.main()
    assert "«" not in capsys.readouterr().out
