"""The fast decoder must write what the slow one writes, whatever shares its batch; the calculator must reach its row only."""

import io
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
import model as model_file
from conftest import ROOT
from decode import KVCache, RowState, Sample, generate, sample_next_token, uniform_noise
from model import T5, T5Config, load_flan_t5, shift_right
from naive import generate_naive
from tokenizer import EOS_ID, Tokenizer, pad_batch

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle must not look anything up


def sums(n: int, seed: int) -> list[tuple[str, str]]:
    """Questions of one or two steps, and rationales in the formatted spelling, with right results."""
    rng, pairs = random.Random(seed), []
    for _ in range(n):
        total = rng.randrange(2, 30)
        question, steps = f"Ann has {total} nuts.", []
        for _ in range(rng.randint(1, 2)):
            sign, number = rng.choice("+-*"), rng.randrange(2, 20)
            result = total + number if sign == "+" else total - number if sign == "-" else total * number
            verb = {"+": "gets", "-": "eats", "*": "multiplies by"}[sign]
            question += f" She {verb} {number}."
            steps.append(f"{total} {sign} {number} = [ {total} {sign} {number} = {result}] {result} nuts.")
            total = result
        pairs.append((question, " ".join(steps) + f" #### {total}"))
    return pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A vocabulary of at most 300 pieces trained on sums, with T5's ids for padding, end and unknown."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "\n".join(line for pair in sums(400, 0) for line in pair) + "\n" + " ".join("x+-*/()%=[].,")
    (folder / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=300, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> T5:
    """A small T5 that has seen sums for two seconds: it writes brackets, gets arithmetic wrong, ends or rambles on."""
    torch.manual_seed(0)
    net = T5(T5Config(d_model=48, d_ff=64, n_heads=3, n_layers=2, d_kv=16, vocab_size=tokenizer.vocab_size + 28, dropout=0.1))
    optimizer, pairs = torch.optim.Adam(net.parameters(), lr=5e-3), sums(400, 1)
    for step in range(120):
        batch = pairs[step * 12 % 384 :][:12]
        input_ids, mask = pad_batch([tokenizer.encode(question) for question, _ in batch])
        labels, _ = pad_batch([tokenizer.encode(rationale) for _, rationale in batch], padding=-100)
        loss = F.cross_entropy(net(input_ids, mask, shift_right(labels)).flatten(0, 1), labels.flatten(), ignore_index=-100)
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
    """Assert that both wrote the same, forced marks included. Rounding may flip a near-tie: show its gap and allow it."""
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
                cumulative = (logits.topk(min(top_k, len(logits))).values / temperature).softmax(-1).cumsum(-1)
                gap = (cumulative - uniform_noise(seed, question, k, t + 1)[t]).abs().min().item()
            print(f"near-tie: question {question!r} sample {k} step {t}: gap {gap:.1e}")
            assert gap < 1e-4, (question, k, t, gap, a.ids[t : t + 5], b.ids[t : t + 5])


# ------------------------------------------------------------------------------------------ fast equals slow: invariant 1

SETTINGS = [(0.0, True), (0.0, False), (0.8, True), (0.8, False)]


@pytest.fixture(scope="module")
def naive(model, tokenizer):
    """The slow twin's rationales for every setting, written once."""
    return {
        (temperature, calculator): generate_naive(
            model, tokenizer, QUESTIONS, 1 if temperature == 0 else 2, temperature, max_new_tokens=40, calculator=calculator, seed=3
        )
        for temperature, calculator in SETTINGS
    }


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("temperature, calculator", SETTINGS)
def test_the_fast_decoder_writes_what_the_slow_one_writes(model, tokenizer, naive, temperature, calculator, batch_size):
    """Cache, shared clock, refilled slots, shrinking batch, early encoding: all of it is bookkeeping and may not show."""
    expected = naive[temperature, calculator]
    found = generate(
        model, tokenizer, QUESTIONS, len(expected[0]), temperature, max_new_tokens=40, calculator=calculator, seed=3, batch_size=batch_size
    )
    same(model, tokenizer, QUESTIONS, found, expected, temperature, seed=3)


def test_the_fixture_is_worth_its_name(naive):
    """The comparison above means little unless rows end at different times, some never, and the calculator has worked."""
    samples = [sample for setting in SETTINGS for row in naive[setting] for sample in row]
    assert len({len(sample.ids) for sample in samples}) > 5
    assert any(sample.finished for sample in samples) and not all(sample.finished for sample in samples)
    assert sum(any(sample.forced) for row in naive[0.8, True] for sample in row) > 3
    assert not any(any(sample.forced) for row in naive[0.8, False] for sample in row)


@pytest.fixture(scope="module")
def mini_naive(mini):
    net, tokenizer, questions = mini
    return {
        (temperature, calculator): generate_naive(
            net, tokenizer, questions[:3], 2 if temperature and calculator else 1, temperature, max_new_tokens=40, calculator=calculator
        )
        for temperature, calculator in ((0.0, True), (0.7, True), (0.7, False))
    }


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("temperature, calculator", [(0.0, True), (0.7, True), (0.7, False)])
def test_fast_equals_slow_on_real_questions(mini, mini_naive, temperature, calculator, batch_size):
    """The same claim with T5's own 32,128 ids, real questions and fluent rationales."""
    net, tokenizer, questions = mini
    expected = mini_naive[temperature, calculator]
    found = generate(
        net, tokenizer, questions[:3], len(expected[0]), temperature, max_new_tokens=40, calculator=calculator, batch_size=batch_size
    )
    same(net, tokenizer, questions[:3], found, expected, temperature)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("temperature, calculator", [(0.0, True), (0.0, False), (0.7, True), (0.7, False)])
@torch.no_grad()
def test_two_hundred_real_questions_are_answered_as_one_full_pass_would(mini, shared, temperature, calculator, batch_size, slow):
    """The slow twin at a price that allows 200 questions: a rationale is what it would have written if at every place one
    uncached pass over all of it chooses the same id, or the calculator did. Near-ties are shown and allowed. (One by one
    they are 50 without --slow.)"""
    net, tokenizer, _ = mini
    count = 200 if slow or batch_size > 1 else 50
    lines = (shared / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    questions, n, ties, forced = [json.loads(line)["question"] for line in lines], 24, 0, 0
    options = dict(temperature=temperature, max_new_tokens=n, calculator=calculator, batch_size=batch_size)
    samples = [row[0] for row in generate(net, tokenizer, questions, **options)]
    for at in range(0, count, 25):
        input_ids, mask = pad_batch([tokenizer.encode(question, decode.MAX_QUESTION) for question in questions[at : at + 25]])
        labels, _ = pad_batch([[*sample.ids, *[EOS_ID] * sample.finished] for sample in samples[at : at + 25]])
        logits = net(input_ids, mask, shift_right(labels))
        for question, sample, row, scores in zip(questions[at : at + 25], samples[at : at + 25], labels, logits):
            noise = torch.from_numpy(uniform_noise(0, question, 0, n))[: len(row)]
            chosen, state = sample_next_token(scores[: len(noise)], temperature, 50, noise), RowState(tokenizer, calculator)
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


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_packed_weights_choose_the_same_ids(model, tokenizer, monkeypatch, temperature):
    """This small model's matrices are not packed by default, those of a real one are: the ids may not show it."""
    options = dict(n_samples=2, temperature=temperature, max_new_tokens=40, seed=3, batch_size=5)
    expected = generate(model, tokenizer, QUESTIONS, **options)
    monkeypatch.setattr(model_file, "PACK_FROM", 0)

    def process(logits, rows):
        assert (model.lm_head.packed is not None) == torch.backends.mkldnn.is_available()
        return logits

    found = generate(model, tokenizer, QUESTIONS, process=process, **options)
    same(model, tokenizer, QUESTIONS, found, expected, temperature, seed=3)


def test_nothing_is_computed_for_slots_that_stay_idle(model, tokenizer):
    """One long rationale at the end of a batch: without a smaller batch, all other slots would be computed along."""
    sizes = []

    def process(logits, rows):
        sizes.append(len(rows))
        logits[:, EOS_ID] = torch.tensor([-1e9 if row and row.question == 0 else 1e9 for row in rows])
        return logits

    generate(model, tokenizer, QUESTIONS, max_new_tokens=30, batch_size=8, process=process)
    assert sizes[0] == 8 and sizes[5:] == [1] * 25


def test_questions_that_are_over_make_the_cache_narrower(model, tokenizer, monkeypatch):
    """Cross-attention reads every slot's width at every step: the longest question may not set it after its end."""
    widths, advance = [], KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda self: widths.append(self.cross[0][0].shape[2]) or advance(self))
    generate(model, tokenizer, ["Ann has 3 nuts. " * 20, "Ann."], max_new_tokens=10, batch_size=1)
    assert widths[0] > 60 and widths[-1] == len(tokenizer.encode("Ann."))


def test_a_ring_that_always_changes_its_size_changes_nothing(model, tokenizer, monkeypatch):
    """With BLOCK 1 the cache grows or shrinks at almost every step; rows of all ages must survive it."""
    options = dict(n_samples=3, temperature=0.8, max_new_tokens=30, batch_size=4)
    expected = generate(model, tokenizer, QUESTIONS, **options)
    monkeypatch.setattr(KVCache, "BLOCK", 1)
    same(model, tokenizer, QUESTIONS, generate(model, tokenizer, QUESTIONS, **options), expected, 0.8)


@pytest.mark.parametrize("batch_size, n_samples", [(3, 3), (4, 3), (7, 5), (20, 5), (32, 4), (32, 1)])
def test_samples_of_a_question_share_its_keys_and_change_nothing(model, tokenizer, monkeypatch, batch_size, n_samples):
    """A question's keys are read once a step however many samples look at them, or its samples would be little cheaper than
    as many questions. A query that lands in another question's row reads another story."""
    seats, advance, admit = [], KVCache.advance, KVCache.admit

    def counted(self):
        biases = advance(self)
        seats.append((self.n_seats, len(set(self.seats)), len(self.seats)))
        return biases

    options = dict(n_samples=n_samples, temperature=0.8, max_new_tokens=25, batch_size=batch_size)
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "admit", lambda self, slot, questions, row, length, mate: admit(self, slot, questions, row, length))
        expected = generate(model, tokenizer, QUESTIONS, **options)  # a seat for each
    monkeypatch.setattr(KVCache, "advance", counted)
    same(model, tokenizer, QUESTIONS, generate(model, tokenizer, QUESTIONS, **options), expected, 0.8)
    assert seats[0][0] == seats[0][1] == -(-seats[0][2] // n_samples)  # as few as can be, one for each question
    assert all(n <= slots for n, _, slots in seats) and seats[-1][0] == seats[-1][1]


def test_a_new_tenant_never_sees_the_old_cache(model, tokenizer, monkeypatch):
    """NaN planted where a slot's last tenant lived would survive any mask (0 * NaN is NaN), so it shows any leftover."""
    options = dict(n_samples=2, temperature=0.8, max_new_tokens=25, batch_size=3)
    expected, admit, admitted = generate(model, tokenizer, QUESTIONS, **options), KVCache.admit, []

    def haunted(self, slot, *arguments):
        taken = {seat for other, seat in enumerate(self.seats) if other != slot}
        for ring, cross in zip(self.ring, self.cross):
            ring[:, slot] = float("nan")
            cross[:, sorted({*range(3)} - taken)] = float("nan")
        admitted.append(slot)
        admit(self, slot, *arguments)

    monkeypatch.setattr(KVCache, "admit", haunted)
    found = generate(model, tokenizer, QUESTIONS, **options)
    assert len(admitted) == 2 * len(QUESTIONS) and found == expected


def test_each_question_is_encoded_once(model, tokenizer, monkeypatch):
    """Its samples share one encoder pass (DESIGN.md); encoding per sample would triple the encoder's work unnoticed."""
    encode, lengths = model.encode, []
    monkeypatch.setattr(model, "encode", lambda ids, mask: lengths.extend(mask.sum(1).tolist()) or encode(ids, mask))
    generate(model, tokenizer, QUESTIONS, n_samples=5, temperature=1.0, max_new_tokens=4, batch_size=4)
    assert sorted(lengths) == sorted(len(tokenizer.encode(question)) for question in QUESTIONS)


def test_greedy_ids_equal_the_public_librarys(mini):
    """The oracle for the whole decoder: 64 GSM8K test questions, 300 tokens, no calculator, not one id different."""
    transformers = pytest.importorskip("transformers")
    net, tokenizer, questions = mini
    folder = pytest.importorskip("conftest").SHARED / "mini-flan-t5"
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    input_ids, mask = pad_batch([tokenizer.encode(question, 200) for question in questions])
    written = theirs.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=300, do_sample=False, num_beams=1)
    found = generate(net, tokenizer, questions, max_new_tokens=300, calculator=False)
    for [sample], ids in zip(found, written[:, 1:].tolist(), strict=True):
        assert sample.ids == (ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids)
        assert sample.finished == (EOS_ID in ids) and sample.text == tokenizer.decode(ids)


# ------------------------------------------------------------------------------ what a sample depends on: invariant 2


def test_a_sample_depends_on_question_seed_and_number_alone(model, tokenizer):
    """Not on batch size, order of questions, or how many samples were asked for: else no run could be repeated."""
    options = dict(temperature=0.9, max_new_tokens=30, seed=7)
    expected = generate(model, tokenizer, QUESTIONS, n_samples=3, batch_size=32, **options)
    fewer = [row[:2] for row in expected]
    same(model, tokenizer, QUESTIONS, generate(model, tokenizer, QUESTIONS, n_samples=2, batch_size=5, **options), fewer, 0.9, seed=7)
    backwards = QUESTIONS[::-1]
    found = generate(model, tokenizer, backwards, n_samples=3, batch_size=4, **options)
    same(model, tokenizer, backwards, found, expected[::-1], 0.9, seed=7)
    for question, row in zip(QUESTIONS[:4], expected):
        same(model, tokenizer, [question], generate(model, tokenizer, [question], n_samples=3, **options), [row], 0.9, seed=7)


def test_the_same_question_twice_gives_the_same_samples(model, tokenizer):
    """The datasets repeat a few questions; position in the list is no part of the seed."""
    first, _, third = generate(model, tokenizer, [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], 4, 0.9, max_new_tokens=30)
    same(model, tokenizer, [QUESTIONS[0]], [first], [third], 0.9)


def test_samples_differ_from_each_other_and_between_seeds(model, tokenizer):
    """K equal samples would give no preference pair; a seed that did nothing would fake three independent runs."""
    one, other = (generate(model, tokenizer, QUESTIONS[:5], 4, 0.9, max_new_tokens=30, seed=seed) for seed in (0, 1))
    for left, right in zip(one, other):
        assert len({tuple(sample.ids) for sample in left}) == 4
        assert not {tuple(sample.ids) for sample in left} & {tuple(sample.ids) for sample in right}


def test_a_longer_limit_only_continues_a_sample(model, tokenizer):
    """Noise belongs to a position, so a rationale cut at 12 tokens is the start of the one cut at 24."""
    short, long = (generate(model, tokenizer, QUESTIONS[:6], 2, 0.8, max_new_tokens=n) for n in (12, 24))
    for left, right in zip(short, long):
        for a, b in zip(left, right):
            assert a.ids == b.ids[:12] and a.forced == b.forced[:12]


def test_the_global_generators_are_left_alone(model, tokenizer):
    """Sampling between two training stages may neither read nor move the state that dropout uses."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = generate(model, tokenizer, QUESTIONS[:3], 2, 0.9, max_new_tokens=10)
    after = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert after == (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(2), np.random.seed(2)
    assert generate(model, tokenizer, QUESTIONS[:3], 2, 0.9, max_new_tokens=10) == expected


def test_noise_is_reproducible_and_its_own(monkeypatch):
    """Float32 in [0, 1), the same on every machine, another for every seed, question and sample."""
    noise = uniform_noise(0, "How many?", 0, 100_000)
    assert noise.dtype == np.float32 and noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.005 and np.array_equal(noise, uniform_noise(0, "How many?", 0, 100_000))
    assert np.array_equal(noise[:10], uniform_noise(0, "How many?", 0, 10))
    others = [uniform_noise(*key, 4) for key in ((1, "How many?", 0), (0, "How many", 0), (0, "How many?", 1), (0, "", 0),
                                                 ("0 dpo", "How many?", 0), (11, "?", 1), (1, "?", 11), (1, "1?", 1))]  # fmt: skip
    assert len({tuple(row) for row in [noise[:4], *others]}) == len(others) + 1
    assert uniform_noise(0, "\ud800", 0, 1).shape == (1,)  # a lone surrogate, as broken JSON can hold


# ----------------------------------------------------------------------------------------------- choosing one token


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (0.7, 5), (2.0, 3), (0.1, 50)])
def test_frequencies_are_the_softmax_with_temperature_and_top_k(temperature, top_k):
    """A grid of 20,000 evenly spaced noises gives each id its probability times 20,000, give or take its two ends."""
    n, logits = 20_000, torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2
    noise = (torch.arange(n) + 0.5) / n
    counts = sample_next_token(logits.expand(n, -1), temperature, top_k, noise).bincount(minlength=60)
    kept = logits if not top_k else logits.masked_fill(logits < logits.sort(descending=True).values[top_k - 1], -torch.inf)
    expected = (kept.double() / temperature).softmax(-1) * n
    assert (counts - expected).abs().max() <= 2
    assert not counts[kept.isinf()].any()


def test_temperature_zero_and_top_k_one_are_greedy():
    """Both must give the largest logit, whatever the noise."""
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
    assert torch.equal(sample_next_token(logits, 0.7, 50, noise), sample_next_token(logits, 0.7, 0, noise))


def test_the_ends_of_the_noise_choose_possible_ids():
    """Cumulative sums round: the largest noise below 1 must not fall off the end, nor onto an id of probability 0."""
    impossible = torch.full((200, 300), -torch.inf)
    logits = torch.cat((impossible, torch.randn(200, 300, generator=torch.Generator().manual_seed(3)), impossible), 1)
    for noise in (0.0, 2.0**-24, 1 - 2.0**-24):
        for top_k in (0, 50, 600):
            chosen = sample_next_token(logits, 0.7, top_k, torch.full((200,), noise))
            assert ((300 <= chosen) & (chosen < 600)).all()
    halves = torch.zeros(3, 2)
    assert sample_next_token(halves, 1.0, 0, torch.tensor([0.0, 0.5 - 2.0**-24, 0.5])).tolist() == [0, 0, 1]


def test_rows_choose_independently():
    """Row b uses its own logits and its own noise; a broadcast the wrong way would mix them."""
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(4))
    noise = torch.rand(8, generator=torch.Generator().manual_seed(5))
    together = sample_next_token(logits, 0.8, 10, noise)
    assert together.shape == (8,) and together.dtype == torch.int64
    assert together.tolist() == [sample_next_token(logits[b : b + 1], 0.8, 10, noise[b : b + 1]).item() for b in range(8)]


# ---------------------------------------------------------------------------------------------------- the calculator


@pytest.fixture
def scripted(monkeypatch, model, tokenizer):
    """Let each question be answered by a script: the noise of a position is made to spell the id to choose there."""

    def run(scripts: dict[str, list[int]], function=generate, **options):
        def noise(seed, question, sample, n):
            return np.array((scripts[question] + [EOS_ID] * n)[:n], dtype=np.float32) / 1024

        monkeypatch.setattr(decode, "uniform_noise", noise)
        monkeypatch.setattr(decode, "sample_next_token", lambda logits, t, k, noise: (noise * 1024).long())
        rows = function(model, tokenizer, list(scripts), temperature=1.0, **options)
        return {question: row[0] for question, row in zip(scripts, rows)}

    return run


def forced_text(tokenizer, sample) -> str:
    """What the calculator wrote, as text."""
    return "".join(tokenizer.piece(i) for i, forced in zip(sample.ids, sample.forced) if forced).strip()


@pytest.mark.parametrize("function", [generate, generate_naive])
@pytest.mark.parametrize("expression, result", [("3 + 4", "7"), ("10 / 4", "2.5"), ("29 * .01 * 100", "29"), ("2 - 19", "-17"),
                                                ("(2 + 3) * 4", "20"), ("1,200 * 2", "2400"), ("50% * 8", "4")])  # fmt: skip
def test_forced_digits_are_the_calculators_and_close_the_bracket(tokenizer, scripted, function, expression, result):
    """The model goes on with a wrong result; the rationale must hold the right one, `]`, and then the model again."""
    start = tokenizer.encode(f"nuts [ {expression} =")[:-1]
    n = len(tokenizer.encode(f"{result}]")) - 1
    after = tokenizer.encode("nuts. #### 9")[:-1]
    wrong = [tokenizer.encode("9")[0]] * n  # what the model would have written in those places
    sample = scripted({"Q": start + wrong + after}, function, max_new_tokens=80)["Q"]
    assert forced_text(tokenizer, sample) == f"{result}]"
    assert sample.forced == [False] * len(start) + [True] * n + [False] * len(after)
    assert sample.ids[: len(start)] == start and sample.ids[len(start) + n :] == after
    assert sample.text == f"nuts [ {expression} = {result}] nuts. #### 9" and sample.finished


def test_only_the_row_that_asked_is_forced(tokenizer, scripted):
    """A queue shared between rows, or one that outlives its row's slot, would write digits into a neighbour's text."""
    plain = tokenizer.encode("nuts = 3 + 4 = nuts nuts nuts nuts nuts nuts nuts")[:-1]
    asking = tokenizer.encode("[ 3 + 4 =")[:-1] + plain
    scripts = {f"Q{i}": (asking if i % 3 == 1 else plain)[: 3 + 2 * i] for i in range(9)}
    complete = len(tokenizer.encode("[ 3 + 4 =")) - 1
    for batch_size in (1, 3, 9):
        for i, sample in enumerate(scripted(scripts, max_new_tokens=30, batch_size=batch_size).values()):
            if i % 3 == 1 and len(scripts[f"Q{i}"]) >= complete:
                assert forced_text(tokenizer, sample) == "7]"
            else:
                assert sample.ids == scripts[f"Q{i}"] and not any(sample.forced)


def test_a_slots_next_tenant_inherits_no_digits(tokenizer, scripted):
    """The first row is cut in the midst of its forced digits; the next question takes its slot and must start clean."""
    asking = tokenizer.encode("[ 1,200 * 2 =")[:-1]
    plain = tokenizer.encode("nuts")[:-1]
    found = scripted({"A long question": asking, "B": plain}, max_new_tokens=len(asking) + 1, batch_size=1)
    assert found["A long question"].forced[-1] and not found["A long question"].finished
    assert found["B"].ids == plain and not any(found["B"].forced)


@pytest.mark.parametrize("text", ["[ 1 / 0 =", "[ x + 1 =", "[ 2 ** 9 =", "[ =", "[ 3 + =", "3 + 4 =", "[ 3 + 4 ] =", "[ 3 + 4 nuts =", "] 3 + 4 ="])
def test_what_does_not_evaluate_is_left_to_the_model(tokenizer, scripted, text):
    """No bracket, no arithmetic, no result: the model's own ids stand, every one of them."""
    script = tokenizer.encode(text + " 9] nuts. #### 9")[:-1]
    sample = scripted({"Q": script}, max_new_tokens=60)["Q"]
    assert sample.ids == script and not any(sample.forced) and sample.finished


def test_the_innermost_open_bracket_counts(tokenizer, scripted):
    """A model that opens a second bracket before closing the first means the second."""
    for text in ("[ 5 nuts [ 3 + 4 =", "[ 1 / 0 = 3] [ 3 + 4 =", "[ [ 3 + 4 ="):
        script = tokenizer.encode(text)[:-1]
        sample = scripted({"Q": script}, max_new_tokens=60)["Q"]
        assert forced_text(tokenizer, sample) == "7]" and sample.ids[: len(script)] == script


def test_every_bracket_of_a_rationale_is_computed(tokenizer, scripted):
    """State left over from the first bracket would spoil the second."""
    first, second = tokenizer.encode("[ 3 + 4 =")[:-1], tokenizer.encode("nuts [ 9 - 4 =")[:-1]
    gap = [EOS_ID + 5] * (len(tokenizer.encode("7]")) - 1)
    sample = scripted({"Q": first + gap + second}, max_new_tokens=80)["Q"]
    assert forced_text(tokenizer, sample).split() == ["7]", "5]"] and sample.text == "[ 3 + 4 = 7] nuts [ 9 - 4 = 5]"


def test_end_waits_for_the_forced_digits(tokenizer, scripted):
    """The model wants to stop right after `=`; the calculator's digits come first, then the end is accepted."""
    start = tokenizer.encode("[ 3 + 4 =")[:-1]
    sample = scripted({"Q": start}, max_new_tokens=40)["Q"]
    assert sample.text == "[ 3 + 4 = 7]" and sample.finished


def test_forced_digits_stop_at_the_limit(tokenizer, scripted):
    """max_new_tokens holds for forced ids too: the training cut at 300 relies on it."""
    start = tokenizer.encode("[ 1,200 * 2 =")[:-1]
    result = tokenizer.encode("2400]")[:-1]
    for extra in range(len(result) + 1):
        sample = scripted({"Q": start}, max_new_tokens=len(start) + extra)["Q"]
        assert sample.ids == start + result[:extra] and not sample.finished


def test_the_scores_can_be_changed_before_an_id_is_chosen(model, tokenizer):
    """The hook that constrains or scripts: here every row must spell its own script, whichever slot it sits in."""
    scripts = [tokenizer.encode(text) for text in ("nuts. #### 9", "[ 3 + 4 =", "#### 1", "nuts nuts nuts nuts")]

    def process(logits, rows):
        assert logits.shape == (len(rows), model.config.vocab_size)
        for scores, row in zip(logits, rows):
            if row:
                scores.fill_(-torch.inf)
                scores[scripts[row.question][min(len(row.sample.ids), len(scripts[row.question]) - 1)]] = 0
        return logits

    for temperature in (0.0, 1.0):
        found = generate(model, tokenizer, QUESTIONS[:4], 2, temperature, calculator=False, batch_size=3, process=process)
        assert [[sample.ids for sample in row] for row in found] == [[script[:-1]] * 2 for script in scripts]


def test_interrupted_work_is_not_lost(model, tokenizer):
    """Ctrl-C in the midst: what on_finish was given is complete, and the model can be trained or asked again."""
    complete = generate(model, tokenizer, QUESTIONS, 2, 0.9, max_new_tokens=30)
    kept, steps = {}, []

    def process(logits, rows):
        steps.append(len(rows))
        if len(steps) == 40:
            raise KeyboardInterrupt
        return logits

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, QUESTIONS, 2, 0.9, max_new_tokens=30, batch_size=4, process=process,
                 on_finish=lambda i, k, sample: kept.update({(i, k): sample}))  # fmt: skip
    assert 0 < len(kept) < 2 * len(QUESTIONS)
    both = [i for i in range(len(QUESTIONS)) if (i, 0) in kept and (i, 1) in kept]
    found, expected = [[kept[i, 0], kept[i, 1]] for i in both], [complete[i] for i in both]
    assert both
    same(model, tokenizer, [QUESTIONS[i] for i in both], found, expected, 0.9)
    same(model, tokenizer, QUESTIONS, generate(model, tokenizer, QUESTIONS, 2, 0.9, max_new_tokens=30), complete, 0.9)


def test_finished_rationales_come_one_by_one_and_only_once(model, tokenizer):
    """What a caller has written down must be all of the result."""
    heard = []
    found = generate(model, tokenizer, QUESTIONS, 2, 0.9, max_new_tokens=20, batch_size=5, on_finish=lambda *what: heard.append(what))
    assert len(heard) == 2 * len(QUESTIONS) and all(found[i][k] is sample for i, k, sample in heard)


def test_a_batch_that_cannot_fit_is_refused_at_once(model, tokenizer, monkeypatch):
    """Better one sentence now than the machine's swap, or its out-of-memory killer, an hour later."""
    c = model.config
    slot = 2 * c.n_layers * c.n_heads * c.d_kv * 4 * (64 + max(len(tokenizer.encode(question)) for question in QUESTIONS))
    assert decode.free_memory(torch.device("cpu")) > 2**20
    monkeypatch.setattr(decode, "free_memory", lambda device: 6 * slot)
    with pytest.raises(torch.OutOfMemoryError, match="batch size of at most 4$"):
        generate(model, tokenizer, QUESTIONS, 2, max_new_tokens=40, batch_size=7, process=lambda *_: pytest.fail("too late"))
    assert len(generate(model, tokenizer, QUESTIONS, max_new_tokens=40, batch_size=4)) == len(QUESTIONS)
    monkeypatch.setattr(decode, "free_memory", lambda device: 1000)
    with pytest.raises(torch.OutOfMemoryError, match="none fits"):
        generate(model, tokenizer, QUESTIONS, max_new_tokens=40, batch_size=1)


def test_without_the_calculator_nothing_is_forced(tokenizer, scripted):
    """The paper's ablation (figure 7) is the same decoder with calculator=False."""
    script = tokenizer.encode("[ 3 + 4 = 9] nuts")[:-1]
    sample = scripted({"Q": script}, max_new_tokens=40, calculator=False)["Q"]
    assert sample.ids == script and not any(sample.forced)


def test_real_rationales_hold_only_right_results(mini):
    """mini-flan-t5 cannot calculate. Whatever stands in a forced bracket must be what Python's own arithmetic says."""
    net, tokenizer, questions = mini
    number, checked = r"[1-9]\d*(?:\.\d+)?", 0
    for [sample] in generate(net, tokenizer, questions[:24], max_new_tokens=80):
        for expression, digits in re.findall(rf"\[ ({number}(?: [-+*/] {number})*) = (-?[\d.]+)\]", sample.text):
            assert float(digits) == pytest.approx(eval(expression), abs=0.006), sample.text  # digits and signs only
            checked += 1
    assert checked > 10


def test_the_calculator_reads_pieces_as_they_come(tokenizer):
    """However SentencePiece cuts an expression (`▁[`, `=`, `4▁=`), the row must see the same characters."""
    for _, rationale in sums(60, 9):
        row, ids = RowState(tokenizer, calculator=True), tokenizer.encode(rationale)[:-1]
        for i in ids:
            row.take(i)
        written = "".join(tokenizer.piece(i) for i in row.sample.ids)
        for expression in re.findall(r"\[ (.*?) =", rationale):
            assert f"[ {expression} = {eval(expression)}]" in written, (rationale, written)  # this file's own sums


# ----------------------------------------------------------------------------------------------------------- corners


def test_nothing_asked_nothing_written(model, tokenizer):
    """An empty stage is not an error: no questions, no samples, no tokens."""
    assert generate(model, tokenizer, []) == [] == generate_naive(model, tokenizer, [])
    assert generate(model, tokenizer, QUESTIONS[:2], n_samples=0) == [[], []]
    [[sample]] = generate(model, tokenizer, QUESTIONS[:1], max_new_tokens=0)
    assert sample.ids == [] and sample.text == "" and not sample.finished


def test_an_empty_question_and_one_too_long(model, tokenizer):
    """`` is one id, EOS; a question of 1,000 words is cut at 200 ids. Neither may disturb the other or the rest."""
    questions = ["", "Ann has 3 nuts. " * 250, QUESTIONS[0]]
    assert len(tokenizer.encode(questions[1])) > 1000
    expected = generate_naive(model, tokenizer, questions, max_new_tokens=15)
    same(model, tokenizer, questions, generate(model, tokenizer, questions, max_new_tokens=15), expected)


@pytest.mark.parametrize("function", [generate, generate_naive])
@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_and_dropout_is_off(model, tokenizer, function, training):
    """Sampling happens between training stages: it must not dropout while writing, nor switch dropout off for later."""
    expected = function(model, tokenizer, QUESTIONS[:2], max_new_tokens=10)
    model.train(training)
    try:
        assert function(model, tokenizer, QUESTIONS[:2], max_new_tokens=10) == expected
        assert model.training is training and all(part.training is training for part in model.modules())
        function(model, tokenizer, [], max_new_tokens=10)
        assert model.training is training
    finally:
        model.eval()


def test_weights_stay_trainable(model, tokenizer):
    """inference_mode must not leak: the parameters are trained further after sampling."""
    generate(model, tokenizer, QUESTIONS[:1], max_new_tokens=3)
    ids = torch.tensor([[3, 4]])
    model(ids, torch.ones_like(ids), ids).sum().backward()
    assert model.shared.weight.grad is not None
    model.zero_grad()


def test_progress_is_shown_in_tokens_per_second_or_not_at_all(model, tokenizer, capsys, monkeypatch):
    """A bar on anything longer than five seconds, but only on a terminal: in a log file it is a wall of text."""
    generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=10)
    generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=10, progress="sampling")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    generate(model, tokenizer, QUESTIONS[:3], max_new_tokens=10, progress="sampling")
    bar = capsys.readouterr().err
    assert "sampling" in bar and "tokens/s" in bar and "3/3" in bar


def test_ids_and_marks_match_in_length_and_text(naive, tokenizer):
    """`forced` belongs to `ids` one by one; EOS is in neither, and text is their decoding."""
    for rows in naive.values():
        for sample in itertools.chain(*rows):
            assert len(sample.ids) == len(sample.forced) <= 40 and EOS_ID not in sample.ids
            assert sample.finished or len(sample.ids) == 40
            assert sample.text == tokenizer.decode(sample.ids)


def test_samples_vote_on_the_answer_question_by_question(monkeypatch, capsys):
    """Self-consistency: the answer that most rationales reach, for each line of standard input by itself. What has no answer,
    or was cut before it, does not vote: it must not be taken for one."""

    def answer(model, tokenizer, questions, n_samples, temperature):
        assert (questions, n_samples, temperature) == (["one?", "one?", "two?", "three?"], 3, 0.7)
        texts = ("#### 10", "#### 7", "#### 10"), ("#### ", "He has 3 and", "#### 3"), ("#### 5", "#### 5", "#### 8"), ("so", "so", "")
        return [[Sample(text, tokenizer.encode(text)[:-1], [False] * 9) for text in row] for row in texts]

    monkeypatch.setattr(decode, "generate", answer)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--samples", "3", "-"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("one?\none?\n\n two? \nthree?\n"))
    decode.main()
    lines = capsys.readouterr().out.splitlines()
    assert "  -> 10 (2 of 3 votes)" in lines and "  -> 5 (2 of 3 votes)" in lines
    assert "  -> 3 (1 of 3 votes)" in lines  # the same question twice: each with its own samples
    assert "  -> no answer (0 of 3 votes)" in lines
    assert lines.index("one?") < lines.index("  -> 10 (2 of 3 votes)") < lines.index("two?")


@pytest.mark.parametrize("terminal, no_color, marks", [(True, "", "\033[7m"), (True, "1", "«"), (False, "", "«")])
def test_the_calculators_digits_are_marked_in_colour_on_a_terminal_only(monkeypatch, capsys, terminal, no_color, marks):
    """Escape codes in a file or a pipe are rubbish, and NO_COLOR (no-color.org) asks for none."""
    tokenizer = Tokenizer(ROOT / "data" / "tiny")
    ids = tokenizer.encode("[ 3 * 4 =")[:-1], tokenizer.encode("12]")[:-1]
    sample = Sample("", ids[0] + ids[1], [False] * len(ids[0]) + [True] * len(ids[1]))
    monkeypatch.setattr(decode, "generate", lambda *_: [[sample]])
    monkeypatch.setattr(sys, "argv", ["decode.py", "one?"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    decode.main()
    assert f"{marks}12]" in (said := capsys.readouterr().out) and ("\033" in said) == (marks != "«")


def test_bytes_that_are_no_text_in_a_question_become_question_marks(monkeypatch, capsys):
    """Python hands over such bytes of the command line, and in the C locale of a pipe, as half surrogates, which neither the
    tokenizer nor a terminal takes: that ended in a traceback from inside sentencepiece."""
    for question, given in (["-"], "caf\udce9 has 3\n"), (["caf\udce9 has 3"], ""):
        monkeypatch.setattr(decode, "generate", lambda model, tokenizer, questions, *_: [[Sample(str(tokenizer.encode(questions[0])))]])
        monkeypatch.setattr(sys, "argv", ["decode.py", *question])
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        decode.main()
        assert "caf? has 3" in capsys.readouterr().out
