"""DPO: every number against the equation in float64, the reference that must not move, and pairs that must not be learned."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpo
from dpo import (
    PairExample, PreferencePair, add_reference_logps, dpo_loss, make_pair_examples, pair_loss, score, sequence_logps,
    train_dpo,
)  # fmt: skip
from model import T5, T5Config
from sft import Loss, Schedule
from tokenizer import EOS_ID

CONFIG = T5Config(d_model=32, d_ff=48, n_heads=2, n_layers=2, d_kv=16, vocab_size=48)
NUMBERS = {"loss", "chosen_rewards", "rejected_rewards", "reward_margin", "reward_accuracy"}
BETA = 0.1
WHOLE = Schedule(1e-3, micro_batch_tokens=10**6)  # every batch in one piece


def random_model(seed: int = 0, **changes) -> T5:
    torch.manual_seed(seed)
    return T5(replace(CONFIG, **changes)).eval()


def random_pairs(seed: int = 0) -> list[PairExample]:
    """Seven pairs of three questions, ragged, the questions not side by side."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return rng.integers(3, CONFIG.vocab_size, n).tolist() + [EOS_ID]

    questions = [tuple(ids(n)) for n in (4, 9, 2)]
    lengths = [(0, 5, 8), (1, 2, 3), (0, 12, 1), (2, 6, 6), (1, 9, 4), (0, 1, 14), (2, 3, 10)]
    return [PairExample(questions[q], ids(chosen), ids(rejected)) for q, chosen, rejected in lengths]


def logp(model: T5, question: tuple[int, ...], rationale: list[int]) -> torch.Tensor:
    """log pi(y|x) of one rationale, from the full logits, without a batch, in float64: the slow twin."""
    source = torch.tensor([question])
    logits = model(source, torch.ones_like(source), torch.tensor([[0, *rationale[:-1]]]))[0].double()
    return -F.cross_entropy(logits, torch.tensor(rationale), reduction="sum")


def logps(model: T5, pairs: list[PairExample]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([logp(model, pair.input_ids, pair.chosen) for pair in pairs]),
        torch.stack([logp(model, pair.input_ids, pair.rejected) for pair in pairs]),
    )


def train(policy, pairs, held_out=(), n_steps=1, log=lambda record: None, **changes) -> T5:
    schedule = Schedule(**{"learning_rate": 1e-3, "log_every": 1, **changes})
    return train_dpo(policy, pairs, list(held_out), n_steps, BETA, schedule, log=log)


def weights(model: T5) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_bytes(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------- log-probabilities


def test_sequence_logps_are_minus_the_summed_cross_entropy_of_the_full_logits():
    """A SUM over the rationale's tokens, EOS included, padding not, shifted once; each side of each pair in its place."""
    model, pairs = random_model(), random_pairs()
    for found, expected in zip(sequence_logps(model, pairs), logps(model, pairs), strict=True):
        assert found.shape == (len(pairs),) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_sequence_logps_do_not_depend_on_the_company():
    """Log-probabilities of one pair are compared across batches of any cut: padding must leave no trace in them."""
    model, pairs = random_model(), random_pairs()
    together = torch.stack(sequence_logps(model, pairs), dim=-1)
    alone = torch.cat([torch.stack(sequence_logps(model, [pair]), dim=-1) for pair in pairs])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    shuffled = [5, 0, 3, 6, 1, 4, 2]
    again = torch.stack(sequence_logps(model, [pairs[i] for i in shuffled]), dim=-1)
    torch.testing.assert_close(again, together[shuffled], atol=2e-5, rtol=0)


def test_each_distinct_question_is_encoded_once():
    """A question's three pairs have six sides; encoding it six times would be five times wasted work."""
    model, rows = random_model(), []
    encode = model.encode

    def counted(input_ids, attention_mask):
        rows.extend(tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask))
        return encode(input_ids, attention_mask)

    model.encode = counted
    pairs = random_pairs()
    sequence_logps(model, pairs)
    assert sorted(rows) == sorted({pair.input_ids for pair in pairs}) and len(rows) == 3


def test_pairs_are_cut_like_sft_examples_and_keep_their_eos():
    """The policy learned rationales cut at 300 tokens with an EOS; scoring them without it would compare other texts."""
    letters = SimpleNamespace(encode=lambda text, most: [ord(letter) for letter in text][: most - 1] + [EOS_ID])
    long, short = make_pair_examples(
        [PreferencePair("q" * 400, "c" * 400, "r" * 400), PreferencePair("q", "cc", "rrr")], letters
    )
    assert long.input_ids == (*[ord("q")] * 199, EOS_ID)
    assert (long.chosen, long.rejected) == ([ord("c")] * 299 + [EOS_ID], [ord("r")] * 299 + [EOS_ID])
    assert (short.chosen, short.rejected) == ([ord("c")] * 2 + [EOS_ID], [ord("r")] * 3 + [EOS_ID])


# ---------------------------------------------------------------------------------------------------------- the loss


def test_four_numbers_by_hand():
    """Chosen -12 -> -11 and rejected -13 -> -14 at beta 0.1: rewards +0.1 and -0.1, loss log(1 + e^-0.2). And reversed."""
    numbers = [torch.tensor(n) for n in ([-11.0, -13.0], [-14.0, -12.0], [-12.0, -12.0], [-13.0, -13.0])]
    loss, chosen, rejected = dpo_loss(*numbers, beta=0.1)
    assert chosen.tolist() == pytest.approx([0.1, -0.1])
    assert rejected.tolist() == pytest.approx([-0.1, 0.1])
    assert loss.tolist() == pytest.approx([0.59813887, 0.79813887])


def test_loss_rewards_and_gradient_equal_the_equation_in_float64():
    """Eq. 5 and its derivative, beta * sigmoid(-margin), written out: a swapped argument or a lost beta shows at once."""
    rng = np.random.default_rng(0)
    for beta in (0.05, 0.1, 0.5):
        chosen, rejected, reference_chosen, reference_rejected = rng.normal(-40, 10, (4, 100))
        tensors = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (chosen, rejected)]
        references = [torch.tensor(n, dtype=torch.float64) for n in (reference_chosen, reference_rejected)]
        loss, chosen_rewards, rejected_rewards = dpo_loss(*tensors, *references, beta)
        loss.sum().backward()
        margin = beta * (chosen - reference_chosen) - beta * (rejected - reference_rejected)
        sigmoid = 1 / (1 + np.exp(-margin))
        assert loss.tolist() == pytest.approx(-np.log(sigmoid), abs=1e-9)
        assert chosen_rewards.tolist() == pytest.approx(beta * (chosen - reference_chosen))
        assert rejected_rewards.tolist() == pytest.approx(beta * (rejected - reference_rejected))
        assert tensors[0].grad.tolist() == pytest.approx(-beta * (1 - sigmoid), abs=1e-9)
        assert tensors[1].grad.tolist() == pytest.approx(beta * (1 - sigmoid), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_margins_give_finite_losses_and_gradients(dtype):
    """log(sigmoid(-1000)) written plainly is log(0): the loss of a badly wrong pair is its margin, its gradient beta."""
    chosen = torch.tensor([-1e4, 1e4, -1e6], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(3, dtype=dtype)
    loss, _, _ = dpo_loss(chosen, zeros, zeros, zeros, 0.1)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e3, 0.0, 1e5])
    assert chosen.grad.tolist() == pytest.approx([-0.1, 0.0, -0.1])


def test_parameter_gradients_equal_the_equation_in_float64():
    """The whole way from weights to loss, one rationale at a time in float64, against the batch in float32."""
    policy, reference, pairs = random_model(1), random_model(2), random_pairs()
    terms = pair_loss(policy, add_reference_logps(reference, pairs, WHOLE), BETA)
    terms["loss"].backward()
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    (chosen, rejected), (reference_chosen, reference_rejected) = logps(exact, pairs), logps(reference.double(), pairs)
    chosen_rewards, rejected_rewards = BETA * (chosen - reference_chosen), BETA * (rejected - reference_rejected)
    loss = -torch.log(1 / (1 + torch.exp(rejected_rewards - chosen_rewards))).sum()
    loss.backward()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms["chosen_rewards"].item() == pytest.approx(chosen_rewards.sum().item(), rel=1e-5)
    assert terms["rejected_rewards"].item() == pytest.approx(rejected_rewards.sum().item(), rel=1e-5)
    assert terms["reward_accuracy"].item() == (chosen_rewards > rejected_rewards).sum().item()
    for ours, theirs in zip(policy.parameters(), exact.parameters()):
        difference = (ours.grad - theirs.grad).abs().max().item()
        assert difference <= 1e-4 * theirs.grad.abs().max().item()


def test_the_gradient_raises_chosen_and_lowers_rejected():
    """A sign error trains the opposite of the paper, and at the start, where both losses are log 2, looks the same."""
    policy = random_model()
    pairs = add_reference_logps(policy, random_pairs(), WHOLE)
    before = sequence_logps(policy, pairs)
    pair_loss(policy, pairs, BETA)["loss"].backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 1e-2 * parameter.grad
    after = sequence_logps(policy, pairs)
    assert (after[0] > before[0]).all() and (after[1] < before[1]).all()


# ----------------------------------------------------------------------------------------------------- the reference


def test_references_come_back_in_the_order_of_the_pairs():
    """Pairs are scored longest first to save padding; a reference on the wrong pair is a reward out of thin air."""
    model, pairs = random_model(), random_pairs()
    pairs = [*pairs, pairs[2], copy.deepcopy(pairs[0])]  # the same pair twice, as one object and as two
    for budget in (1, 60, 10**6):
        scored = add_reference_logps(model, pairs, Schedule(1e-3, micro_batch_tokens=budget))
        assert [(p.input_ids, p.chosen, p.rejected) for p in scored] == [(p.input_ids, p.chosen, p.rejected) for p in pairs]
        chosen, rejected = logps(model, pairs)
        assert [p.reference_logps[0] for p in scored] == pytest.approx(chosen.tolist(), abs=1e-4)
        assert [p.reference_logps[1] for p in scored] == pytest.approx(rejected.tolist(), abs=1e-4)


def test_scoring_with_the_reference_is_without_dropout_and_leaves_it_alone():
    """The policy arrives from SFT; a reference scored with dropout would be noise in every reward of the training."""
    model, pairs = random_model(dropout=0.5), random_pairs()
    before = weights(model)
    quiet = add_reference_logps(model, pairs, WHOLE)
    assert add_reference_logps(model.train(), pairs, WHOLE) == quiet
    assert same_bytes(weights(model), before) and all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_stays_where_training_began():
    """Rewards logged after step t must be those against a frozen copy. A reference that follows the policy keeps all
    rewards at 0 and the loss at log 2 for ever, which a log that is not read closely will not betray."""
    policy, pairs = random_model(), random_pairs()
    frozen, steps = copy.deepcopy(policy), []

    def compare(record: dict) -> None:
        with torch.no_grad():
            (chosen, rejected), (reference_chosen, reference_rejected) = logps(policy, pairs), logps(frozen, pairs)
        chosen, rejected = BETA * (chosen - reference_chosen), BETA * (rejected - reference_rejected)
        assert record["held_out_chosen_rewards"] == pytest.approx(chosen.mean().item(), abs=1e-4)
        assert record["held_out_rejected_rewards"] == pytest.approx(rejected.mean().item(), abs=1e-4)
        assert record["held_out_loss"] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), abs=1e-4)
        steps.append(abs(record["held_out_reward_margin"]))

    train(policy, pairs, pairs, n_steps=4, log=compare)
    assert len(steps) == 4 and steps[-1] > 0.01


# ------------------------------------------------------------------------------------------------------ the training


def test_the_first_loss_is_log_two_in_bf16():
    """Nearly: with gradients attention takes another kernel than without, and each rounds by its own. The reference is scored
    in bf16 too, though in half the time and no more alike."""
    logs = []
    for bf16 in (False, True):
        train(random_model(), random_pairs(), random_pairs(1), log=logs.append, learning_rate=1e-12, bf16=bf16)
    assert [record["loss"] for record in logs] == pytest.approx([math.log(2)] * 2, abs=2e-3)
    precise, rounded = ([pair.reference_logps for pair in add_reference_logps(random_model(), random_pairs(), schedule)]
                        for schedule in (WHOLE, replace(WHOLE, bf16=True)))  # fmt: skip
    assert precise != rounded and torch.tensor(precise).allclose(torch.tensor(rounded), rtol=0.02)


def test_the_first_loss_is_log_two():
    """Policy and reference are the same model at the start, so every margin is 0 and -log sigmoid(0) = log 2. Dropout left
    on, a mean on one side only, or references in another order: each moves this number."""
    policy, logs = random_model(dropout=0.1).train(), []
    train(policy, random_pairs(), random_pairs(1), log=logs.append, micro_batch_tokens=60, learning_rate=1e-12)
    for prefix in ("", "held_out_"):
        assert logs[0][prefix + "loss"] == pytest.approx(math.log(2), abs=1e-5)
        for key in ("chosen_rewards", "rejected_rewards", "reward_margin"):
            assert logs[0][prefix + key] == pytest.approx(0, abs=1e-5)


def test_training_raises_the_margin():
    """The point of it all: after some steps every chosen rationale is likelier than it was, relative to its rejected one."""
    policy, pairs, logs = random_model(), random_pairs(), []
    frozen = copy.deepcopy(policy)
    assert train(policy, pairs, n_steps=12, log=logs.append, batch_size=4) is policy
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"] and logs[-1]["reward_margin"] > 0.2
    chosen, rejected = (after - before for after, before in zip(logps(policy, pairs), logps(frozen, pairs)))
    assert (chosen > rejected).all()
    assert not any(module.training for module in policy.modules())


def test_every_line_says_how_it_stands_on_training_and_on_held_out_pairs():
    """These numbers are read to see whether DPO works. They are means per pair; training ones come from before the step,
    held-out ones from after it, and without held-out pairs there are none."""
    pairs, held_out, logs = random_pairs(), random_pairs(1), []
    policy = train(random_model(), pairs, held_out, n_steps=3, log=logs.append)
    assert [log["step"] for log in logs] == [1, 2, 3]
    for log in logs:
        assert NUMBERS | {"held_out_" + key for key in NUMBERS} <= set(log)
        assert log["reward_margin"] == pytest.approx(log["chosen_rewards"] - log["rejected_rewards"], abs=1e-5)
        assert log["reward_accuracy"] * 7 == pytest.approx(round(log["reward_accuracy"] * 7))
    references = add_reference_logps(random_model(), held_out, WHOLE)
    expected = pair_loss(policy, references, BETA)
    for key in NUMBERS:
        assert logs[-1]["held_out_" + key] == pytest.approx(expected[key].item() / len(held_out), abs=1e-5)
        assert score(Loss(policy, partial(pair_loss, beta=BETA), False), references, 40)[key] == pytest.approx(expected[key].item() / len(held_out), abs=1e-5)
    train(random_model(), pairs, log=logs.append)
    assert NUMBERS <= set(logs[-1]) and not any(key.startswith("held_out") for key in logs[-1])


def test_held_out_pairs_are_never_trained_on():
    """DIFFERS from the authors, who score the pairs they train on. The weights must not know whether anyone was held out."""
    with_them = train(random_model(), random_pairs(), random_pairs(1), n_steps=3, batch_size=4)
    without = train(random_model(), random_pairs(), n_steps=3, batch_size=4)
    assert same_bytes(weights(with_them), weights(without))


def test_the_reference_scores_only_what_training_visits(monkeypatch):
    """The paper trains 150 steps of 96 on up to 19,100 pairs: for the quarter that never comes the reference would work in vain.
    What comes is drawn by lot, each pair once before any comes again; where there are steps enough nobody draws."""
    pairs, scored, trained = random_pairs(), [], []
    known = [pair.chosen for pair in pairs]
    count = lambda model, pairs, schedule: scored.append(pairs) or add_reference_logps(model, pairs, schedule)
    watch = lambda model, pairs, beta: trained.extend(pairs) or pair_loss(model, pairs, beta)
    monkeypatch.setattr(dpo, "add_reference_logps", count)
    monkeypatch.setattr(dpo, "pair_loss", watch)
    drawn = set()
    for seed in range(8):
        scored.clear(), trained.clear()
        train(random_model(), pairs, n_steps=2, batch_size=2, seed=seed)
        ids = [known.index(pair.chosen) for pair in scored[0]]
        assert len(ids) == 4 and sorted(known.index(pair.chosen) for pair in trained) == ids and scored[1] == []
        drawn |= {*ids}
    assert drawn == {*range(7)}
    for n_steps in (4, 5, 9):  # 8, 10 and 18 places for 7 pairs
        scored.clear(), trained.clear()
        train(random_model(), pairs, n_steps=n_steps, batch_size=2)
        assert scored[0] == pairs and {known.index(pair.chosen) for pair in trained} == {*range(7)}


def test_neither_loss_nor_gradient_depends_on_how_memory_cuts_the_batch():
    """The loss is a mean over PAIRS of the whole batch: cut into pieces of one, a few or all, it is the same number."""
    pairs, first_gradients, second_losses = random_pairs(), [], []
    for budget in (1, 60, 10**6):
        gradients, logs = [], []

        def remember(optimizer, args, kwargs):
            gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

        handle = register_optimizer_step_pre_hook(remember)
        train(random_model(), pairs, n_steps=2, log=logs.append, micro_batch_tokens=budget, max_grad_norm=1e9)
        handle.remove()
        first_gradients.append(gradients[0])
        second_losses.append(logs[1]["loss"])  # by then the policy has left its reference, and pairs differ in loss
    model = random_model()
    (pair_loss(model, add_reference_logps(model, pairs, WHOLE), BETA)["loss"] / len(pairs)).backward()
    for gradients in first_gradients:
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)
    assert second_losses == pytest.approx([second_losses[0]] * 3, abs=1e-3) and second_losses[0] < 0.6


def test_the_same_seed_gives_the_same_weights_to_the_byte():
    """The order of the pairs hangs on the seed and on no global generator, or no stopped run could be continued exactly."""
    trained = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        policy = random_model(dropout=0.1)
        torch.manual_seed(noise), np.random.seed(noise)
        trained.append(weights(train(policy, random_pairs(), n_steps=3, batch_size=2, seed=seed)))
    assert same_bytes(trained[0], trained[1]) and not same_bytes(trained[0], trained[2])


def test_nothing_to_train_on_is_refused():
    """A model that solves everything, or nothing, gives no pair; a DPO of no pairs must not pass for one."""
    with pytest.raises(ValueError, match="DPO"):
        train(random_model(), [], random_pairs())
