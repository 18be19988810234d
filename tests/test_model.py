"""Flan-T5 must match the public model: checks by hand, against itself, against transformers, and on disk."""

import copy
import dataclasses
import json
import math
import os
import pickle
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as model_file
from decode import KVCache
from model import (
    SIZES,
    T5,
    RMSNorm,
    T5Config,
    load_flan_t5,
    relative_position_bucket,
    save_flan_t5,
    shift_right,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle must not go online
CONFIG = T5Config(d_model=24, d_ff=40, n_heads=3, n_layers=2, d_kv=8, vocab_size=60)
PARAMETERS = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
}
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@torch.no_grad()
def disturb(net: nn.Module) -> nn.Module:
    """Randomize norms and position biases; their initial values (1 and nearly 0) would hide their misuse."""
    for name, parameter in net.named_parameters():
        if "norm" in name:
            parameter.normal_(1, 0.3)
        elif "relative" in name:
            parameter.normal_(0, 1)
    return net


@pytest.fixture(scope="module")
def model() -> T5:
    torch.manual_seed(0)
    return disturb(T5(CONFIG)).eval()


def ragged(lengths: list[int], vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (B, longest), 0 where the mask of the same shape is 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, vocab_size, mask.shape, generator=generator) * mask, mask


def distance_between(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


# ------------------------------------------------------------------------------------------------------ components


@pytest.mark.parametrize(
    "bidirectional, distance, bucket",
    # Encoder: 16 buckets per direction, 8 of them exact; then 8 + floor(8 * log(d/8) / log(16)); keys to the right: + 16.
    [(True, 0, 0), (True, -1, 1), (True, -7, 7), (True, -8, 8), (True, -16, 10), (True, -32, 12), (True, -64, 14),
     (True, -127, 15), (True, -128, 15), (True, -5000, 15), (True, 1, 17), (True, 7, 23), (True, 8, 24), (True, 11, 24),
     (True, 12, 25), (True, 64, 30), (True, 128, 31), (True, 5000, 31),
     # Decoder: 32 buckets for the past, 16 of them exact; then 16 + floor(16 * log(d/16) / log(8)); the future gets bucket 0.
     (False, 0, 0), (False, -1, 1), (False, -15, 15), (False, -16, 16), (False, -20, 17), (False, -32, 21),
     (False, -64, 26), (False, -127, 31), (False, -128, 31), (False, -5000, 31), (False, 1, 0), (False, 100, 0)],
)  # fmt: skip
def test_buckets_worked_by_hand(bidirectional, distance, bucket):
    """A wrong sign or an off-by-one error shifts every attention score slightly: the model still writes text, but worse."""
    assert relative_position_bucket(torch.tensor([distance]), bidirectional).item() == bucket


def bucket_in_integers(distance: int, bidirectional: bool, n: int, far: int) -> int:
    """The definition without logarithms: exact + the largest k for which (far/exact)^(k/m) <= distance/exact."""
    offset = 0
    if bidirectional:
        n, offset = n // 2, (n // 2 if distance > 0 else 0)
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = n // 2
    if distance < exact:
        return offset + distance
    m = n - exact
    return offset + exact + max(k for k in range(m) if far**k * exact**m <= distance**m * exact**k)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_a_definition_in_whole_numbers(bidirectional):
    """An fp32 logarithm may fall just below a bucket boundary (64 -> 13.9999); integer arithmetic cannot."""
    distances = torch.arange(-700, 701)
    ours = relative_position_bucket(distances, bidirectional).tolist()
    assert ours == [bucket_in_integers(d, bidirectional, 32, 128) for d in distances.tolist()]


def test_norm_by_hand():
    """The root mean square of (3, 4) is sqrt(12.5); a LayerNorm would first subtract the mean."""
    norm = RMSNorm(dataclasses.replace(CONFIG, d_model=2, epsilon=0.0))
    norm.weight.data = torch.tensor([1.0, 10.0])
    assert torch.allclose(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3, 40]]) / 12.5**0.5)


def test_norm_computes_in_fp32():
    """In bf16 the mean of squares keeps 8 bits, too few for T5's large residual stream."""
    norm = RMSNorm(dataclasses.replace(CONFIG, d_model=512))
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * 300
    exact = norm(x.bfloat16().float())
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(norm(x.bfloat16()), exact.bfloat16())


def test_labels_shift_right_by_one():
    """The decoder predicts label t from the labels before t; ignored positions must become a valid id."""
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
    assert shift_right(labels).tolist() == [[0, 5, 6], [0, 7, 1]]
    assert labels[1, 2] == -100  # the loss still needs it


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_those_of_the_public_models(size):
    """Flan-T5 has an untied head, one bias table per stack and no linear biases; anything else changes the count."""
    with torch.device("meta"):
        net = T5(SIZES[size])
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[size]


def test_sizes_are_those_of_the_public_configs(shared):
    """The counts above do not fix every number; the public config files do."""
    for size, public in json.loads((shared / "flan-t5/configs.json").read_text()).items():
        ours, theirs = SIZES[size], public["config"]
        assert (
            ours.d_model,
            ours.d_ff,
            ours.n_heads,
            ours.n_layers,
            ours.d_kv,
            ours.vocab_size,
            ours.dropout,
        ) == tuple(
            theirs[k]
            for k in (
                "d_model",
                "d_ff",
                "num_heads",
                "num_layers",
                "d_kv",
                "vocab_size",
                "dropout_rate",
            )
        )
        fixed = (model_file.N_BUCKETS, model_file.MAX_DISTANCE, ours.epsilon)
        assert fixed == tuple(
            theirs.get(k, default)
            for k, default in (
                ("relative_attention_num_buckets", 32),
                ("relative_attention_max_distance", 128),
                ("layer_norm_epsilon", 1e-6),
            )
        )
        assert PARAMETERS[size] == public["parameters"]
        with torch.device("meta"):
            assert len(list(T5(ours).parameters())) == public["parameter_tensors"]


# ------------------------------------------------------------------------------------------------------ self-consistency


def test_a_batch_equals_one_by_one(model):
    """No row may depend on its neighbours, in the encoder or the decoder: source and target lengths differ."""
    sources, targets = [3, 17, 1, 9], [8, 2, 5, 6]
    input_ids, mask = ragged(sources, 60)
    decoder_ids, _ = ragged(targets, 60, seed=1)
    together = model(input_ids, mask, decoder_ids)
    for row, (s, t) in enumerate(zip(sources, targets)):
        alone = model(
            input_ids[row : row + 1, :s], mask[row : row + 1, :s], decoder_ids[row : row + 1, :t]
        )
        assert distance_between(together[row, :t], alone[0]) < 1e-5


def test_padding_changes_no_logit(model):
    """Neither the amount of padding nor its ids may matter: a mask of -1e4, or one added after softmax, would leak."""
    input_ids, mask = ragged([7, 4], 60)
    decoder_ids, _ = ragged([6, 6], 60, seed=1)
    expected = model(input_ids, mask, decoder_ids)
    longer, longer_mask = F.pad(input_ids, (0, 30)), F.pad(mask, (0, 30))
    other = torch.where(longer_mask == 0, 59, longer)
    assert distance_between(model(longer, longer_mask, decoder_ids), expected) < 1e-5
    assert torch.equal(
        model(longer, longer_mask, decoder_ids), model(other, longer_mask, decoder_ids)
    )


def test_the_decoder_does_not_see_the_future(model):
    """If it did, training would reach loss 0 and decoding would produce noise."""
    input_ids, mask = ragged([7], 60)
    decoder_ids, _ = ragged([9], 60, seed=1)
    changed = decoder_ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 60
    before, after = model(input_ids, mask, decoder_ids)[0], model(input_ids, mask, changed)[0]
    assert torch.equal(before[:5], after[:5]) and not torch.allclose(before[5:], after[5:])


@torch.no_grad()
def replay(net: T5, jobs: list[tuple[list[int], list[int]]], n_slots: int, longest: int) -> tuple:
    """Feed (source ids, decoder ids) jobs through `step`; a freed slot takes the next job.

    Return the logits of each job and the number of steps.
    """
    cache = KVCache(net, n_slots, longest, max(len(source) for source, _ in jobs))
    waiting = list(range(len(jobs)))
    rows = [None] * n_slots
    logits = [[] for _ in jobs]
    steps = 0
    while True:
        for slot in range(n_slots):
            if rows[slot] is None and waiting:
                rows[slot] = waiting.pop(0)
                ids = torch.tensor([jobs[rows[slot]][0]])
                cache.admit([slot], net, list(net.encode(ids, torch.ones_like(ids))))
        if not any(job is not None for job in rows):
            return [torch.stack(row) for row in logits], steps
        longest_now = max(len(logits[job]) for job in rows if job is not None)
        cache.narrow(list(range(n_slots)), 1 + longest_now)
        ids = [0 if job is None else jobs[job][1][len(logits[job])] for job in rows]
        out = net.step(torch.tensor(ids), cache)
        steps += 1
        for slot, job in enumerate(rows):
            if job is not None:
                logits[job].append(out[slot])
                if len(logits[job]) == len(jobs[job][1]):
                    rows[slot] = None


@torch.no_grad()
def test_a_slot_without_work_never_leaves_its_cache(model):
    """A finished row keeps counting until the batch ends, on a GPU for hundreds of steps: its writes must
    stay within its own columns and must not affect its neighbour."""
    ids = torch.tensor([[3, 4, 5]])
    cache = KVCache(model, 2, 6, 3)
    cache.admit([0, 1], model, [*model.encode(ids, torch.ones_like(ids))] * 2)
    for _ in range(20):
        model.step(torch.tensor([7, 8]), cache)
    cache.admit([1], model, [*model.encode(ids, torch.ones_like(ids))])
    logits = torch.stack([model.step(torch.tensor([7, i]), cache)[1] for i in (0, 9, 10)])
    full = model(ids, torch.ones_like(ids), torch.tensor([[0, 9, 10]]))[0]
    assert distance_between(logits, full) < 1e-5


@torch.no_grad()
def test_cached_lengths_change_in_place(model):
    """On a GPU the step is recorded once and replayed on the same memory: lengths in a new tensor would never grow."""
    cache = KVCache(model, 2, 6, 3)
    ids = torch.tensor([[3, 4, 5]])
    cache.admit([0], model, [*model.encode(ids, torch.ones_like(ids))])
    lengths = cache.lengths
    model.step(torch.tensor([7, 8]), cache)
    assert cache.lengths is lengths and lengths.tolist() == [1, 1]


@pytest.mark.parametrize("n_slots, longest", [(1, 12), (3, 40), (3, 150), (4, 12)])
def test_cached_steps_equal_the_full_pass_at_every_position(model, n_slots, longest):
    """Slots start at different times, are reused, sit idle at the end, and reach distances beyond the last
    bucket (150): a wrong column, bias, mask or length changes the logits at some position of some row."""
    rng = random.Random(longest)
    jobs = []
    for _ in range(20):
        source = [rng.randrange(3, 60) for _ in range(rng.randint(1, 15))]
        jobs.append((source, [0] + [rng.randrange(3, 60) for _ in range(rng.randrange(longest))]))
    jobs.append(([5, 6], [0] + [7] * (longest - 1)))  # one as long as the cache allows
    cached, steps = replay(model, jobs, n_slots, longest)
    assert steps > 2 * longest  # slots have been reused several times
    for number, (source, target) in enumerate(jobs):
        ids = torch.tensor([source])
        full = model(ids, torch.ones_like(ids), torch.tensor([target]))[0]
        assert cached[number].shape == full.shape
        for t in range(len(target)):
            distance = distance_between(cached[number][t], full[t])
            reused = "a reused slot" if number >= n_slots else "a new slot"
            assert distance < 1e-5, f"rationale {number}, in {reused}, first differs at token {t}"


@torch.no_grad()
def test_dropping_idle_slots_leaves_the_others_alone(model):
    """`narrow` shrinks the batch mid-sequence: each remaining slot must keep its own keys, question and length."""
    sources = [[3, 4, 5], [6], [7, 8, 9, 10]]
    targets = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model, 3, 9, 4)
    states = []
    for source in sources:
        ids = torch.tensor([source])
        states.append(model.encode(ids, torch.ones_like(ids))[0])
    cache.admit([0, 1, 2], model, states)
    for t in range(9):
        if t == 4:
            cache.narrow([0, 2], cache.n_columns)
        slots = [0, 1, 2] if t < 4 else [0, 2]
        logits = model.step(targets[slots, t], cache)
    for row, slot in enumerate((0, 2)):
        ids = torch.tensor([sources[slot]])
        full = model(ids, torch.ones_like(ids), targets[slot : slot + 1])[0, -1]
        assert distance_between(logits[row], full) < 1e-5


# ---------------------------------------------------------------------------------------------------------- dropout


def outputs(net: T5) -> torch.Tensor:
    ids = torch.arange(3, 13)[None]
    return net(ids, torch.ones_like(ids), ids).detach()


def test_dropout_only_while_training(model):
    """With dropout on, rationales and DPO's log-probabilities would be random; without it, SFT would overfit sooner."""
    net = copy.deepcopy(model)
    assert torch.equal(outputs(net), outputs(net))
    net.train()
    assert not torch.allclose(outputs(net), outputs(net))
    net.eval()
    assert torch.equal(outputs(net), outputs(model))


def test_dropout_stands_where_t5_has_it(model):
    """Dropout follows both embeddings, both final norms and every residual branch; it is also inside every
    feed-forward layer and on the weights of every attention."""
    net, calls = copy.deepcopy(model), []
    for part in net.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda *_: calls.append(1))
    outputs(net)
    n_layers = CONFIG.n_layers
    assert len(calls) == 2 + 2 + n_layers * (2 + 1 + 1) + n_layers * (3 + 1 + 2)


# ------------------------------------------------------------------------------------------ agreement with transformers


def same_shape_as(transformers, **numbers):
    """A random, untied transformers model with randomized norms and biases, and logits as large as a trained model's."""
    config = transformers.T5Config(
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **numbers,
    )
    torch.manual_seed(0)
    net = transformers.T5ForConditionalGeneration(config)
    head = net.lm_head.weight.detach().clone()  # release 5 ties the head of what a config builds
    net.lm_head.weight = torch.nn.Parameter(head)
    net = disturb(net).eval()
    net.lm_head.weight.data.mul_(0.1)
    return net


SMALL = dict(vocab_size=32128, d_model=512, d_ff=1024, num_layers=8, num_heads=6, d_kv=64)
BASE = dict(vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12, d_kv=64)


@pytest.fixture(scope="module", params=["mini", "small", "base"])
def pair(request, tmp_path_factory):
    """(name, the transformers model, our model), both models from the same folder."""
    transformers = pytest.importorskip("transformers")
    if request.param == "mini":
        folder = request.getfixturevalue("shared") / "mini-flan-t5"
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        yield request.param, theirs, load_flan_t5(folder)
    else:
        folder = tmp_path_factory.mktemp(request.param)
        theirs = same_shape_as(transformers, **(SMALL if request.param == "small" else BASE))
        theirs.save_pretrained(folder)
        yield request.param, theirs, load_flan_t5(folder)
        shutil.rmtree(folder)  # up to a gigabyte


@pytest.fixture(scope="module")
def batch():
    """Ragged questions, the longest reaching beyond the last bucket, and ragged labels."""
    input_ids, mask = ragged([7, 150, 31], 32100, seed=3)
    labels, label_mask = ragged([12, 3, 8], 32100, seed=4)
    return input_ids, mask, labels.masked_fill(label_mask == 0, -100)


def our_loss(net: T5, input_ids, mask, labels):
    logits = net(input_ids, mask, shift_right(labels))
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@torch.no_grad()
def test_states_logits_and_loss_equal_the_public_librarys(pair, batch):
    """Given the same checkpoint and ids, our model must compute the same numbers as transformers."""
    _, theirs, ours = pair
    input_ids, mask, labels = batch
    expected = theirs(input_ids=input_ids, attention_mask=mask, labels=labels)
    states = ours.encode(input_ids, mask)
    assert (
        distance_between(states[mask.bool()], expected.encoder_last_hidden_state[mask.bool()])
        < 1e-4
    )
    logits, loss = our_loss(ours, input_ids, mask, labels)
    assert (
        distance_between(logits, expected.logits) < 1e-4
    )  # including the logits of padding: their inputs are the same
    assert abs(loss - expected.loss) < 1e-5 * max(1, expected.loss)


def gradients_under_public_names(net: T5, folder) -> dict[str, torch.Tensor]:
    """Save the gradients as if they were weights, so that they get the checkpoint's names."""
    gradients = T5(net.config)
    gradients.load_state_dict({name: parameter.grad for name, parameter in net.named_parameters()})
    save_flan_t5(gradients, folder)
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize("pair", ["mini", "small"], indirect=True)  # base is the same code, larger
def test_every_gradient_equals_the_public_librarys(pair, batch, tmp_path):
    """Training must update each weight as transformers would: a detached bias or norm passes every forward test."""
    _, theirs, ours = pair
    input_ids, mask, labels = batch
    theirs(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
    our_loss(ours, input_ids, mask, labels)[1].backward()
    found = gradients_under_public_names(ours, tmp_path)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and distance_between(found[name], gradient) < 1e-4, name
    for net in (theirs, ours):
        net.zero_grad()


@pytest.mark.parametrize("pair", ["mini", "small"], indirect=True)  # base is the same code, larger
@torch.no_grad()
def test_the_public_library_loads_what_we_save(pair, batch, tmp_path):
    """Other tools must be able to read our checkpoints: no missing key, no unexpected key, the same logits."""
    _, theirs, ours = pair
    save_flan_t5(ours, tmp_path)
    back, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    tied = getattr(back.config, "scale_decoder_outputs", back.config.tie_word_embeddings)
    assert tied is False and back.config.dropout_rate == theirs.config.dropout_rate
    input_ids, mask, labels = batch
    expected = theirs(input_ids=input_ids, attention_mask=mask, labels=labels).logits
    assert torch.equal(
        back.eval()(input_ids=input_ids, attention_mask=mask, labels=labels).logits, expected
    )


@pytest.mark.parametrize("safe", [True, False])
def test_shards_written_by_the_public_library_load(tmp_path, safe):
    """The xl and xxl checkpoints are sharded, with an index written by transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = same_shape_as(
        transformers, vocab_size=60, d_model=24, d_ff=40, num_layers=2, num_heads=3, d_kv=8
    )
    theirs.save_pretrained(tmp_path, max_shard_size="20KB", safe_serialization=safe)
    assert len(list(tmp_path.glob("*-of-*"))) > 2 and len(list(tmp_path.glob("*.index.json"))) == 1
    ours = load_flan_t5(tmp_path)
    ids = torch.arange(3, 10)[None]
    expected = theirs(input_ids=ids, decoder_input_ids=ids).logits
    assert distance_between(ours(ids, torch.ones_like(ids), ids).detach(), expected.detach()) < 1e-5


# ---------------------------------------------------------------------------------------------------------- loading

NAME = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}


def read(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def write(folder, tensors: dict, kind: str = "bin", shards: int = 1) -> None:
    """Store tensors in one of the public layouts, replacing the existing files."""
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    for old in (*folder.glob("*.bin"), *folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        old.unlink()
    stem, suffix = NAME[kind].split(".")
    where = {}
    for i in range(shards):
        file = NAME[kind] if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        where.update(dict.fromkeys(part, file))
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            from safetensors.torch import save_file

            save_file(
                {name: tensor.contiguous() for name, tensor in part.items()},
                folder / file,
                {"format": "pt"},
            )
    if shards > 1:
        (folder / f"{NAME[kind]}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )


@pytest.fixture
def folder(model, tmp_path):
    """A valid checkpoint of the small random model, to be loaded or damaged."""
    save_flan_t5(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def equal(a: T5, b: T5) -> bool:
    return a.config == b.config and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())
    )


@pytest.mark.parametrize("kind", NAME)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_loads_the_same_model(model, folder, kind, shards):
    """.bin or .safetensors, one file or shards: users may have any of the four."""
    write(folder, read(folder), kind, shards)
    loaded = load_flan_t5(folder)
    assert equal(loaded, model) and not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert len({p.data_ptr() for p in loaded.parameters()}) == len(
        list(loaded.parameters())
    )  # nothing is tied


@pytest.mark.parametrize("kind", NAME)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_storage_type_loads_as_fp32(model, folder, kind, stored):
    """Some public copies are in half precision: the stored values must be kept, and computation is in fp32."""
    write(folder, {name: tensor.to(stored) for name, tensor in read(folder).items()}, kind)
    loaded = load_flan_t5(folder)
    for a, b in zip(loaded.parameters(), model.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.to(stored).float())


@pytest.mark.parametrize(
    "names", [EMBEDDINGS[:1], EMBEDDINGS[1:2], EMBEDDINGS[2:], EMBEDDINGS, EMBEDDINGS[1:]]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_embedding_loads_under_each_of_its_names(model, folder, names, shards):
    """.bin files store the embedding under three names that share memory, small safetensors files under one."""
    tensors = read(folder)
    table = tensors.pop("shared.weight")
    write(folder, tensors | dict.fromkeys(names, table), "bin", shards)
    assert equal(load_flan_t5(folder), model)


def test_a_name_in_the_index_may_be_absent_from_its_shard(model, folder):
    """The public xl and xxl indices list embed_tokens, but judging by their sizes the shards hold no copy."""
    write(folder, read(folder), "bin", 2)
    index = folder / "pytorch_model.bin.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] |= dict.fromkeys(EMBEDDINGS[1:], next(iter(fields["weight_map"].values())))
    index.write_text(json.dumps(fields))
    assert equal(load_flan_t5(folder), model)


def test_a_checkpoint_of_release_5_loads(model, folder):
    """Release 5 of transformers writes tie_word_embeddings true for every T5; a separate field says whether
    the head is tied. Flan-T5 has two different tensors."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | {"tie_word_embeddings": True}
    path.write_text(json.dumps(fields | {"scale_decoder_outputs": False}))
    assert equal(load_flan_t5(folder), model)
    path.write_text(json.dumps(fields | {"scale_decoder_outputs": True}))
    with pytest.raises(ValueError, match="tied"):
        load_flan_t5(folder)


def test_saving_and_loading_is_lossless(model, folder):
    """A stage resumes from its checkpoint, which must keep every byte and the config; the folder may already exist."""
    other = T5(dataclasses.replace(CONFIG, dropout=0.25, epsilon=1e-5)).bfloat16()
    save_flan_t5(other, folder)
    assert read(folder)["shared.weight"].dtype == torch.bfloat16
    assert equal(load_flan_t5(folder, torch.bfloat16), other)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_what_is_saved_beside_old_weights_is_what_loads_next(model, folder):
    """.safetensors takes precedence over .bin: if the old file stayed, the saved weights would be silently ignored."""
    for shards in (1, 3):
        write(folder, read(folder), "safetensors", shards)
        other = T5(CONFIG).eval()
        save_flan_t5(other, folder)
        assert equal(load_flan_t5(folder), other) and not equal(other, model)


def test_bf16_works_on_cpu(model, folder):
    """bf16 has 8 bits of precision: its logits are only close to fp32's; cached steps are close to the bf16 full pass."""
    half = load_flan_t5(folder, torch.bfloat16)
    input_ids, mask = ragged([9, 4], 60)
    logits = half(input_ids, mask, input_ids).detach()
    assert (
        logits.dtype == torch.bfloat16
        and distance_between(logits, model(input_ids, mask, input_ids).detach()) < 0.05
    )
    cached, _ = replay(half, [(input_ids[0].tolist(), input_ids[0].tolist())], 1, 9)
    assert cached[0].dtype == torch.bfloat16 and distance_between(cached[0], logits[0]) < 0.05


def test_fp16_is_refused(folder):
    """T5 overflows in fp16 and would train on NaN; integers are not valid either."""
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(ValueError, match="bfloat16"):
            load_flan_t5(folder, dtype)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_a_wrapped_model_load(model, folder, prefix):
    """DistributedDataParallel and torch.compile put a prefix before every name; the weights are the same."""
    write(folder, {prefix + name: tensor for name, tensor in read(folder).items()})
    assert equal(load_flan_t5(folder), model)


def test_eight_bit_weights_are_one_sentence(folder):
    """torch cannot even test them for NaN: without a check the user sees its traceback."""
    write(folder, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in read(folder).items()})
    with pytest.raises(ValueError, match="float8.*store bf16 or fp32"):
        load_flan_t5(folder)


class Malicious:
    """Unpickling this object in an unsafe loader creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spoil_tensors(change):
    def spoil(folder):
        tensors = read(folder)
        change(tensors)
        write(folder, tensors)

    return spoil


def spoil_weights(data, kind="bin"):
    def spoil(folder):
        write(folder, read(folder), kind)
        whole = (folder / NAME[kind]).read_bytes()
        (folder / NAME[kind]).write_bytes(data(whole) if callable(data) else data)

    return spoil


def spoil_index(change):
    def spoil(folder):
        write(folder, read(folder), "bin", 2)
        path = folder / "pytorch_model.bin.index.json"
        fields = json.loads(path.read_text())
        fields = change(fields, folder) or fields
        path.write_text(fields if isinstance(fields, str) else json.dumps(fields))

    return spoil


def spoil_config(text=None, remove=(), **fields):
    def spoil(folder):
        path = folder / "config.json"
        changed = {
            k: v for k, v in json.loads(path.read_text()).items() if k not in remove
        } | fields
        path.write_bytes(json.dumps(changed).encode() if text is None else text)

    return spoil


def point_outside(fields, folder):
    """A valid shard outside the folder: loading it would read a file that the user did not ask for."""
    first = sorted(set(fields["weight_map"].values()))[0]
    shutil.move(folder / first, folder.parent / first)
    fields["weight_map"] = {
        k: f"../{v}" if v == first else v for k, v in fields["weight_map"].items()
    }


def point_absolute(fields, folder):
    fields["weight_map"] = {k: str(folder / v) for k, v in fields["weight_map"].items()}


WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
BIN, SAFE, INDEX, CONF = (
    "pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "config.json",
)
HUGE = {"d_model": 2**40, "num_heads": 2**40, "vocab_size": 10**15, "d_ff": 2**62, "d_kv": 2**80}


def put(name: str, fields: dict):
    """Add a file next to the weights that changes their meaning."""
    return lambda folder: (folder / name).write_text(json.dumps(fields))


def spoil_first_weight(folder) -> None:
    """Set one weight to NaN: every answer would be empty."""
    tensors = torch.load(folder / BIN, weights_only=True)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    torch.save(tensors, folder / BIN)


FAILURES = {
    # name: (how to damage the folder, what the message must name)
    "missing tensor": (spoil_tensors(lambda t: t.pop(WO)), WO),
    "missing head": (spoil_tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "missing embedding": (spoil_tensors(lambda t: t.pop("shared.weight")), "shared.weight"),
    "missing bias table": (spoil_tensors(lambda t: t.pop("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")),
                           "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    "unexpected tensor": (spoil_tensors(lambda t: t.update({"encoder.pooler.weight": torch.zeros(3)})), "encoder.pooler.weight"),
    "a linear bias": (spoil_tensors(lambda t: t.update({WO[:-6] + "bias": torch.zeros(24)})), WO[:-6] + "bias"),
    "a block too many": (spoil_tensors(lambda t: t.update({WO.replace("1", "2", 1): t[WO]})), WO.replace("1", "2", 1)),
    "a bias table in another block": (spoil_tensors(lambda t: t.update({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 3)})),
                                      "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    "misshapen tensor": (spoil_tensors(lambda t: t.update({WO: t[WO].T.contiguous()})), WO),
    "short vocabulary": (spoil_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:50].clone()})), "lm_head.weight"),
    "integer tensor": (spoil_tensors(lambda t: t.update({WO: t[WO].long()})), WO),
    "different embeddings": (spoil_tensors(lambda t: t.update({EMBEDDINGS[1]: t[EMBEDDINGS[0]] + 1})), EMBEDDINGS[1]),
    "a number instead of a tensor": (spoil_tensors(lambda t: t.update({WO: 3})), BIN),
    "truncated bin": (spoil_weights(lambda whole: whole[: len(whole) // 2]), BIN),
    "truncated safetensors": (spoil_weights(lambda whole: whole[: len(whole) // 2], "safetensors"), SAFE),
    "bin without its last byte": (spoil_weights(lambda whole: whole[:-1]), BIN),
    "safetensors without its last byte": (spoil_weights(lambda whole: whole[:-1], "safetensors"), SAFE),
    "empty bin": (spoil_weights(b""), BIN),
    "empty safetensors": (spoil_weights(b"", "safetensors"), SAFE),
    "zero bytes": (spoil_weights(bytes(1000)), BIN),
    "zero bytes as safetensors": (spoil_weights(bytes(1000), "safetensors"), SAFE),
    "random bytes": (spoil_weights(random.Random(0).randbytes(5000)), BIN),
    "random bytes as safetensors": (spoil_weights(random.Random(0).randbytes(5000), "safetensors"), SAFE),
    "a web page": (spoil_weights(b"<!DOCTYPE html>\n<html>not found</html>\n"), BIN),
    "a git-lfs pointer": (spoil_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 990\n"), BIN),
    "a pickled list": (spoil_weights(pickle.dumps([1, 2])), BIN),
    "a saved list": (lambda folder: torch.save([torch.zeros(2)], folder / BIN), BIN),
    "no weights": (lambda folder: (folder / BIN).unlink(), BIN),
    "a missing shard": (spoil_index(lambda fields, folder: next(folder.glob("*-of-*")).unlink()), "-of-"),
    "an index to outside": (spoil_index(point_outside), INDEX),
    "an index with absolute paths": (spoil_index(point_absolute), INDEX),
    "an index to the parent": (spoil_index(lambda fields, folder: {"weight_map": {WO: ".."}}), INDEX),
    "an index of numbers": (spoil_index(lambda fields, folder: {"weight_map": {WO: 5}}), INDEX),
    "an index of lists": (spoil_index(lambda fields, folder: {"weight_map": {WO: ["a"]}}), INDEX),
    "an index without its map": (spoil_index(lambda fields, folder: {"metadata": {}}), INDEX),
    "an empty index": (spoil_index(lambda fields, folder: {"weight_map": {}}), ""),
    "an index that is a list": (spoil_index(lambda fields, folder: "[]"), INDEX),
    "a broken index": (spoil_index(lambda fields, folder: "{"), INDEX),
    "no config": (lambda folder: (folder / CONF).unlink(), CONF),
    "an empty config": (spoil_config(b""), CONF),
    "a broken config": (spoil_config(b'{"model_type": "t5",'), CONF),
    "a config that is a list": (spoil_config(b"[1]"), CONF),
    "a config that is a number": (spoil_config(b"5"), CONF),
    "a config in no encoding": (spoil_config(b"\xff\xfe{}"), CONF),
    "a config of brackets": (spoil_config(b"[" * 100_000), CONF),
    "another model": (spoil_config(model_type="bert"), "bert"),
    "no model": (spoil_config(remove=("model_type",)), "model_type"),
    "tied T5 1.0": (spoil_config(tie_word_embeddings=True), "tie_word_embeddings"),
    "tied by default": (spoil_config(remove=("tie_word_embeddings",)), "tie_word_embeddings"),
    "relu": (spoil_config(feed_forward_proj="relu"), "relu"),
    "relu by default": (spoil_config(remove=("feed_forward_proj",)), "feed_forward_proj"),
    "gated silu": (spoil_config(feed_forward_proj="gated-silu"), "gated-silu"),
    "a shallower decoder": (spoil_config(num_decoder_layers=1), "num_decoder_layers"),
    "no width": (spoil_config(remove=("d_model",)), "d_model"),
    "not a number: dropout_rate": (spoil_config(dropout_rate=math.nan), "dropout_rate"),
    "everything dropped": (spoil_config(dropout_rate=1.0), "dropout_rate"),
    "buckets that do not reach": (spoil_config(relative_attention_max_distance=8), "relative_attention_max_distance"),
    **{f"a wrong type: {value!r}": (spoil_config(d_model=value), "d_model") for value in ("24", 24.0, None, True, [24])},
    **{f"a wrong type: {name}": (spoil_config(**{name: "x"}), name) for name in ("d_kv", "dropout_rate", "layer_norm_epsilon")},
    **{f"negative: {name}": (spoil_config(**{name: -1}), name) for name in ("d_model", "num_heads", "vocab_size", "dropout_rate", "d_ff")},
    **{f"zero: {name}": (spoil_config(**{name: 0}), name) for name in ("d_model", "d_ff", "d_kv", "num_heads", "relative_attention_max_distance")},
    **{f"huge: {name}": (spoil_config(**{name: value}), name) for name, value in HUGE.items()},
    "another activation": (spoil_config(dense_act_fn="relu"), "dense_act_fn"),
    "an adapter beside the weights": (put("adapter_config.json", {}), "adapter"),
    "a new token": (put("added_tokens.json", {"<extra_id_0>": 63, "{": 64}), "'{'"),
    "a new token, as of release 4.34": (
        put("tokenizer_config.json", {"added_tokens_decoder": {"64": {"content": "{"}}}), "'{'"
    ),
    "a new token, in one file with all": (
        put("tokenizer.json", {"added_tokens": [{"content": "</s>"}, {"content": "{"}]}), "'{'"
    ),
    "a new special token": (
        put("tokenizer_config.json", {"additional_special_tokens": ["<extra_id_0>", "<calc>"]}),
        "<calc>",
    ),
    "tokens of another form": (put("tokenizer_config.json", {"added_tokens_decoder": [1]}), "tokenizer_config"),
    "another end, in generation": (put("generation_config.json", {"eos_token_id": 5}), "eos_token_id"),
    "weights that are no numbers": (spoil_first_weight, "NaN"),
    "another start": (spoil_config(decoder_start_token_id=1), "decoder_start_token_id"),
    "other padding": (spoil_config(pad_token_id=5), "pad_token_id"),
    "no depth": (spoil_config(num_layers=0, num_decoder_layers=0), ""),
    "many heads": (spoil_config(num_heads=2**23), CONF),
    "huge depth": (spoil_config(num_layers=2000, num_decoder_layers=2000), "num_layers"),  # a billion would fill memory
    "a wrong type: num_layers": (spoil_config(num_layers="x", num_decoder_layers="x"), "num_layers"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, culprit", FAILURES.values(), ids=FAILURES)
def test_every_failure_is_one_sentence_that_names_the_culprit(folder, spoil, culprit):
    """The user sees this after a broken download or with the wrong folder, not a traceback through four libraries."""
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_flan_t5(folder)
    sentence = str(refused.value)
    assert culprit in sentence and "\n" not in sentence and 20 < len(sentence) < 600, sentence


def test_a_missing_folder_is_one_sentence(tmp_path):
    """A mistyped --weights is the most common mistake."""
    with pytest.raises(ValueError, match="no folder .*nowhere.*check the path"):
        load_flan_t5(tmp_path / "nowhere")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_code_in_a_checkpoint_is_executed(folder, tmp_path, protocol):
    """A .bin file is a pickle, which can call any function; weights_only must prevent this in every file format."""
    trap = tmp_path / "executed"
    bare = pickle.dumps({WO: Malicious(trap)}, protocol)
    (folder / BIN).write_bytes(bare)
    with pytest.raises(ValueError, match=BIN) as refused:
        load_flan_t5(folder)
    assert "\n" not in str(refused.value)
    torch.save({WO: Malicious(trap)}, folder / BIN, pickle_protocol=max(protocol, 2))
    with pytest.raises(ValueError, match=BIN):
        load_flan_t5(folder)
    assert not trap.exists()
    pickle.loads(bare)
    assert trap.exists()  # the trap does work


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_folder_is_refused_or_harmless(model, folder, seed):
    """Fifty folders with a bit flipped, or a file truncated, deleted or missing some bytes. A flip in one number
    cannot be detected without a checksum (downloads have one); any other damage must be refused with one
    sentence or leave the model unchanged."""
    rng = random.Random(seed)
    write(folder, read(folder), rng.choice(("bin", "safetensors")), rng.choice((1, 3)))
    victim = rng.choice(sorted(folder.iterdir()))
    data = bytearray(victim.read_bytes())
    at, damage = rng.randrange(len(data)), rng.choice(("flip", "truncate", "delete", "gap"))
    if damage == "flip":
        data[at] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    elif damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(
            data[:at] if damage == "truncate" else data[:at] + data[at + rng.randint(1, 100) :]
        )
    try:
        loaded = load_flan_t5(folder)
    except (ValueError, FileNotFoundError) as refused:
        assert str(refused) and "\n" not in str(refused)
        return
    changed = sum((a != b).sum().item() for a, b in zip(loaded.parameters(), model.parameters()))
    assert changed <= (damage == "flip"), f"{damage} of {victim.name} at {at} was not detected"
    assert (
        loaded.config == model.config or victim.name == CONF
    )  # a different dropout rate is also a valid config
