"""Flan-T5 in plain PyTorch: the encoder-decoder that DPO-ST trains (paper, section 4.2).

The T5 v1.1 architecture (Raffel et al., 2020; Shazeer, 2020), and checkpoints in the public layout. Left out: losses,
sampling, text, the cache of keys and values (decode.py), fp16 (T5 overflows in it), model parallelism.
Shape letters: B batch, S source tokens, T target tokens, D d_model, H heads, K d_kv, V vocabulary.

    python model.py base        # a shape trace and the parameter count of a size"""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

START_ID = 0  # the decoder's first input: T5 starts from the padding id
N_BUCKETS, MAX_DISTANCE = 32, 128  # of relative positions; in tokens, and all beyond share the last bucket
PACK_FROM = 2**17  # numbers in a matrix
torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new shape anew; with masks, NaN gradients (pytorch #196678)

@dataclass(frozen=True)
class T5Config:
    """The numbers that define a T5 v1.1 model. Lengths are in tokens, widths in features."""
    d_model: int  # width of the residual stream
    d_ff: int  # inner width of the feed-forward layers
    n_heads: int
    n_layers: int  # blocks in the encoder, and again in the decoder
    d_kv: int = 64  # width of one head; n_heads * d_kv need not equal d_model
    vocab_size: int = 32128
    dropout: float = 0.1
    epsilon: float = 1e-6

SIZES = {  # d_model, d_ff, n_heads, n_layers
    "tiny": T5Config(128, 256, 4, 2, d_kv=32, vocab_size=768), "small": T5Config(512, 1024, 6, 8),
    "base": T5Config(768, 2048, 12, 12), "large": T5Config(1024, 2816, 16, 24),
    "xl": T5Config(2048, 5120, 32, 24), "xxl": T5Config(4096, 10240, 64, 24),
}  # fmt: skip

class RMSNorm(nn.RMSNorm):
    """Scale x (..., D) to unit root mean square: no mean is subtracted, no bias added; in fp32, also for bf16. As in torch."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

def relative_position_bucket(distance: Tensor, bidirectional: bool, n_buckets=N_BUCKETS, max_distance=MAX_DISTANCE) -> Tensor:
    """Sort signed distances (key position - query position, int64) into buckets 0..n_buckets-1, same shape.
    The nearest half of the buckets hold one distance each, the others grow logarithmically up to max_distance. The
    encoder spends half of its buckets on keys to the right. Source: Raffel et al. (2020), section 2.1."""
    offset, distance = (distance > 0) * (n_buckets // 2), -distance
    if bidirectional:
        n_buckets, distance = n_buckets // 2, distance.abs()
    else:
        offset, distance = 0, distance.clamp(min=0)
    exact = n_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + growth * (n_buckets - exact)).long().clamp(max=n_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)

class Linear(nn.Linear):
    """x W^T, without a bias; by the packed copy of W while there is one."""
    packed: Tensor | None = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Within this context dropout is off, and on a CPU products of few rows take half the time. Do not train in it.
    F.linear rearranges a matrix at every call, which for 1 to 100 rows costs as much as the product. A second copy in oneDNN's
    layout saves that, by operators of torch.compile's that have no public name: where they are missing, nothing is packed."""
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    dtypes = [torch.float32] + [torch.bfloat16] * (usable and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    layers, was_training = [layer for layer in model.modules() if usable and isinstance(layer, Linear)], model.training
    try:
        model.eval()
        for layer in layers:  # the operator's own overhead does not pay for a small matrix
            if layer.weight.is_cpu and layer.weight.dtype in dtypes and layer.weight.numel() >= PACK_FROM:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        yield
    finally:
        model.train(was_training)
        for layer in layers:
            layer.packed = None

class Layout:
    """Where the N real tokens of a padded (B, T) batch stand. Only attention needs the padded form: everything else works
    on rows (N, D), so that no matrix product is spent on padding, which in a batch of GSM8K is half of all tokens."""
    def __init__(self, shape: tuple[int, int], mask: Tensor | None = None, places: Tensor | None = None):
        self.shape, self.step = shape, shape[1] == 1 or places is not None  # step: every row is of a sequence of its own
        self.places = places if mask is None or mask.is_meta or mask.all() else mask.flatten().nonzero()[:, 0]  # (N,) int64

    def pad(self, x: Tensor) -> Tensor:  # (N, D) -> (B, T, D)
        if self.places is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1]).index_copy(0, self.places, x)
        return x.unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:  # (B, T, D) or ids (B, T) -> (N, D) or (N,)
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

class Attention(nn.Module):
    """Multi-head attention without biases. Keys and values come from outside, so one class serves all three uses."""
    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.n_heads * config.d_kv
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.q, self.k, self.v = (Linear(config.d_model, inner) for _ in range(3))
        self.o = Linear(inner, config.d_model)

    def split(self, x: Tensor, layout: Layout) -> Tensor:  # (N, H*K) -> (B, H, T, K)
        return layout.pad(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:  # (N, D) -> twice (B, H, S, K)
        return self.split(self.k(states), layout), self.split(self.v(states), layout)

    def forward(self, x: Tensor, layout: Layout, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Mix values into x (N, D). bias: added to the scores, broadcast to (B, H, T, S); it also masks."""
        queries = self.split(self.q(x), layout)
        if layout.step and x.device.type == "cpu" and not self.training:  # the plain formula, twice as fast here
            mixed = (queries @ keys.transpose(2, 3) + bias).softmax(-1) @ values
        else:  # scale=1: T5 has no 1/sqrt(K) here, its initialisation of q carries that factor instead
            bias, dropout = bias.to(queries.dtype), self.dropout * self.training
            mixed = F.scaled_dot_product_attention(queries, keys, values, bias, dropout, scale=1.0)
        return self.o(layout.unpad(mixed.transpose(1, 2).flatten(2)))  # (N, D)

class GatedFeedForward(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh approximation of GELU. Source: Shazeer (2020), GEGLU."""
    def __init__(self, config: T5Config):
        super().__init__()
        self.gate, self.up = (Linear(config.d_model, config.d_ff) for _ in range(2))
        self.down = Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.gate(x), approximate="tanh") * self.up(x)))

class Block(nn.Module):
    """x + attention(norm(x)), in the decoder again with attention to the source, then x + feed_forward(norm(x))."""
    def __init__(self, config: T5Config, cross: bool):
        super().__init__()
        norm, self.cross = lambda: RMSNorm(config.d_model, config.epsilon), cross
        self.self_attention_norm, self.self_attention = norm(), Attention(config)
        self.feed_forward_norm, self.feed_forward = norm(), GatedFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        if cross:
            self.cross_attention_norm, self.cross_attention = norm(), Attention(config)

    def forward(self, x: Tensor, layout: Layout, bias: Tensor, source_bias=None, states=None, source=None, cache=None, layer=0):
        """x (N, D). The source comes as encoder states (M, D) in their Layout `source`; or, while x is one new token for
        each slot of a decode.KVCache, from layer `layer` of that, which also holds the keys and values of the past."""
        h = self.self_attention_norm(x)
        keys, values = self.self_attention.keys_values(h, layout)
        if cache:
            keys, values = cache.append(layer, keys, values)
        x = x + self.dropout(self.self_attention(h, layout, keys, values, bias))
        if self.cross:  # no position bias here: source_bias holds only the padding mask
            keys, values = cache.cross[layer][:, : cache.n_seats] if cache else self.cross_attention.keys_values(states, source)
            layout = cache.layout if cache else layout
            x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), layout, keys, values, source_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

class Stack(nn.Module):
    """The blocks of one side, their shared relative position bias, and the final norm."""
    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        self.bidirectional = not decoder
        self.relative_bias = nn.Embedding(N_BUCKETS, config.n_heads)  # one for all blocks; checkpoints keep it in the first
        self.blocks = nn.ModuleList(Block(config, cross=decoder) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def position_bias(self, distance: Tensor) -> Tensor:
        """Bias for signed distances (T, S) between key and query -> (1, H, T, S)."""
        return self.relative_bias(relative_position_bucket(distance, self.bidirectional)).permute(2, 0, 1)[None]

def mask_to_bias(mask: Tensor, like: Tensor) -> Tensor:
    """True -> 0, False -> bf16's lowest number (not -inf, which would turn a row without any True into NaN)."""
    return like.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min)

def shift_right(labels: Tensor) -> Tensor:
    """Decoder inputs from labels (B, T) int64: START_ID first, the last dropped, ignored positions -> 0. Position t
    thus sees label t-1 and predicts label t: nothing downstream shifts again."""
    return F.pad(labels, (1, -1), value=START_ID).clamp(min=0)

class T5(nn.Module):
    """Flan-T5: `encode` a question once, then `decode` a whole target or `step` through it token by token."""
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)  # used by both stacks, NOT by the head
        self.encoder, self.decoder = Stack(config, decoder=False), Stack(config, decoder=True)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self.gradient_checkpointing = False
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Random start by fan-in. q is smaller by 1/sqrt(K), the factor that the attention scores lack."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if module is self.shared else 0.1)
        elif isinstance(module, Attention):
            module.q.weight.data.mul_(self.config.d_kv**-0.5)

    @property
    def device(self) -> torch.device:
        return self.shared.weight.device

    def run(self, part: Callable, *inputs):
        """part(*inputs). With gradient checkpointing no more than the inputs is kept, and the part runs again on the way back."""
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        return checkpoint(part, *inputs, use_reentrant=False) if again else part(*inputs)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read questions: input_ids, attention_mask (B, S) int64, mask 1 on real tokens -> states (B, S, D)."""
        stack, layout = self.encoder, Layout(input_ids.shape, attention_mask)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        bias = stack.position_bias(positions[None, :] - positions[:, None])  # (1, H, S, S)
        bias = bias + mask_to_bias(attention_mask.bool(), bias)[:, None, None]  # (B, H, S, S)
        x = stack.dropout(self.shared(layout.unpad(input_ids)))  # (N, D)
        for block in stack.blocks:
            x = self.run(block, x, layout, bias)
        return layout.pad(stack.dropout(stack.final_norm(x)))

    def decode(self, decoder_input_ids: Tensor, states: Tensor, attention_mask: Tensor, real: Tensor | None = None) -> Tensor:
        """Run whole targets at once: ids (B, T), states and mask of their questions (B, S, D) and (B, S) -> hidden (N, D),
        ready for `lm_head`: of the N tokens that are True in real (B, T), row by row, or of all B * T."""
        stack, layout, source = self.decoder, Layout(decoder_input_ids.shape, real), Layout(states.shape[:2], attention_mask)
        positions = torch.arange(decoder_input_ids.shape[1], device=states.device)
        distance = positions[None, :] - positions[:, None]
        bias = stack.position_bias(distance) + mask_to_bias(distance <= 0, states)  # (1, H, T, T)
        source_bias = mask_to_bias(attention_mask.bool(), states)[:, None, None]  # (B, 1, 1, S)
        x, states = stack.dropout(self.shared(layout.unpad(decoder_input_ids))), source.unpad(states)
        for block in stack.blocks:
            x = self.run(block, x, layout, bias, source_bias, states, source)
        return stack.dropout(stack.final_norm(x))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Predict every next token: (B, S), (B, S), (B, T) int64 -> logits (B, T, V)."""
        hidden = self.decode(decoder_input_ids, self.encode(input_ids, attention_mask), attention_mask)
        return self.lm_head(hidden).unflatten(0, decoder_input_ids.shape)

    def cross_keys_values(self, states: Tensor) -> Tensor:
        """Every decoder layer's keys and values of encoder states (B, S, D): (n_layers, 2, B, H, S, K)."""
        x, layout = states.flatten(0, 1), Layout(states.shape[:2])
        return torch.stack([torch.stack(block.cross_attention.keys_values(x, layout)) for block in self.decoder.blocks])

    def step(self, ids: Tensor, cache) -> Tensor:
        """Advance every slot of a decode.KVCache by one token: ids (B,) int64 -> logits (B, V) for the one after it."""
        bias, source_bias = cache.advance()
        x, layout = self.shared(ids), Layout((len(ids), 1))  # (B, D)
        for layer, block in enumerate(self.decoder.blocks):
            x = block(x, layout, bias, source_bias, cache=cache, layer=layer)
        return self.lm_head(self.decoder.final_norm(x))

PUBLIC_NAMES = {  # T5Config's name -> the name in config.json
    "d_model": "d_model", "d_ff": "d_ff", "d_kv": "d_kv", "n_heads": "num_heads", "n_layers": "num_layers",
    "vocab_size": "vocab_size", "dropout": "dropout_rate", "epsilon": "layer_norm_epsilon",
}  # fmt: skip
EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

def checkpoint_name(name: str) -> str:
    """Translate a parameter's name here to its name in the public checkpoints."""
    feed_forward = "layer.1" if name.startswith("encoder") else "layer.2"
    for ours, theirs in (
        ("relative_bias.", "block.0.layer.0.SelfAttention.relative_attention_bias."),
        ("final_norm.", "final_layer_norm."), ("blocks.", "block."),
        ("self_attention_norm.", "layer.0.layer_norm."), ("self_attention.", "layer.0.SelfAttention."),
        ("cross_attention_norm.", "layer.1.layer_norm."), ("cross_attention.", "layer.1.EncDecAttention."),
        ("feed_forward_norm.", f"{feed_forward}.layer_norm."), ("feed_forward.", f"{feed_forward}.DenseReluDense."),
        ("gate.", "wi_0."), ("up.", "wi_1."), ("down.", "wo."),
    ):  # fmt: skip
        name = name.replace("." + ours, "." + theirs)
    return name

@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file, in any of four libraries, becomes one sentence that names it."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"{path} is missing, damaged or not of a Flan-T5 ({reason}): fetch it, or name another folder") from None

def read_config(folder: Path) -> T5Config:
    """Read config.json (public field names). Raises ValueError if it describes anything but a Flan-T5."""
    with naming(folder / "config.json"):
        fields = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        values = {ours: fields.get(theirs, getattr(T5Config, ours, None)) for ours, theirs in PUBLIC_NAMES.items()}
        for name, wanted, default in (  # the defaults are those of T5 1.0
            ("model_type", "t5", None), ("feed_forward_proj", "gated-gelu", "relu"), ("tie_word_embeddings", False, True),
            ("num_decoder_layers", *[fields.get("num_layers")] * 2), ("relative_attention_num_buckets", *[N_BUCKETS] * 2),
            ("relative_attention_max_distance", *[MAX_DISTANCE] * 2),
        ):  # fmt: skip
            if (found := fields.get(name, default)) != wanted:
                raise ValueError(f"{name} is {found!r}, not {wanted!r}")
        for ours, value in values.items():
            fraction, most = ours in ("dropout", "epsilon"), 99 if ours == "n_layers" else 2**20
            if not (type(value) in (int, float) and 0 <= value < 1 if fraction else type(value) is int and 0 < value < most):
                raise ValueError(f"{PUBLIC_NAMES[ours]} is {value!r}")
    return T5Config(**values)

def weight_files(folder: Path) -> list[Path]:
    """Find a checkpoint's weight files, or shards: .safetensors before .bin if that package is there."""
    for name in ("model.safetensors", "pytorch_model.bin")[:: 1 if importlib.util.find_spec("safetensors") else -1]:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            with naming(index):
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                if not all(re.fullmatch(r"[\w-]+\.(bin|safetensors)", shard) for shard in shards):
                    raise ValueError("it does not list files of its own folder")
                return [folder / shard for shard in shards]
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin: not a checkpoint")

def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one weight file without running any code in it. Raises ValueError, naming it."""
    with naming(path):
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in tensors.items()}

def load_flan_t5(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> T5:
    """Build a T5 from a folder in the public layout: config.json and the weights, stored in fp32, bf16 or fp16.
    Every tensor must be used once, with the shape that config.json implies. The model comes in evaluation mode. Raises
    FileNotFoundError or ValueError, for damaged files, other architectures or tensors, fp16: in one sentence each."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype} is not supported: T5 overflows in fp16, use torch.float32 or torch.bfloat16")
    with torch.device("meta"):  # no memory and no random start for weights that are replaced at once
        model = T5(read_config(Path(folder)))
    wanted, state = {checkpoint_name(name): name for name in model.state_dict()}, {}
    for path in weight_files(Path(folder)):
        tensors = read_tensors(path)
        tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)  # in some old T5 files
        for name, tensor in tensors.items():
            ours = wanted.get(EMBEDDING_NAMES[0] if name in EMBEDDING_NAMES else name)  # it has up to three names
            shape = model.get_parameter(ours).shape if ours else None
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, not {shape and list(shape)}")
            if not torch.equal(state.setdefault(ours, tensor.to(dtype)), tensor.to(dtype)):
                raise ValueError(f"{path} holds {name} twice, or differing embeddings ({', '.join(EMBEDDING_NAMES)})")
    if missing := [public for public, ours in wanted.items() if ours not in state]:
        raise ValueError(f"{folder} lacks the tensor {missing[0]} (and {len(missing) - 1} more): fetch it again")
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()

def save_flan_t5(model: T5, folder: str | Path) -> None:
    """Write config.json and pytorch_model.bin in the public layout, in the model's own dtype. Raises OSError."""
    fields = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": START_ID,
        "relative_attention_num_buckets": N_BUCKETS, "relative_attention_max_distance": MAX_DISTANCE,
        "torch_dtype": str(model.shared.weight.dtype).removeprefix("torch."), "num_decoder_layers": model.config.n_layers,
        **{theirs: getattr(model.config, ours) for ours, theirs in PUBLIC_NAMES.items()},
    }  # fmt: skip
    tensors = {checkpoint_name(name): tensor.cpu() for name, tensor in model.state_dict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_tensors(tensors, Path(folder, "pytorch_model.bin"))

def save_tensors(content, path: Path) -> None:
    """torch.save; but when the disk is full, raise the OSError that says so, not the RuntimeError that follows from it."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise error.__context__ or error from None

if __name__ == "__main__":
    size = sys.argv[1] if len(sys.argv) > 1 else "small"
    if size not in SIZES:
        sys.exit(f"model.py: no size {size!r}: choose from {', '.join(SIZES)}")
    with torch.device("meta"):  # shapes only: even xxl takes no memory
        model, ids = T5(SIZES[size]), torch.zeros(2, 7, dtype=torch.long)
        states, logits = model.encode(ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids), ids[:, :5])
    print(f"Flan-T5 {size}: {model.config}")
    print(f"ids {list(ids.shape)} -> encoder states {list(states.shape)}; 5 target ids -> logits {list(logits.shape)}")
    for name, part in (*model.named_children(), ("total", model)):
        print(f"{name:>8}: {sum(p.numel() for p in part.parameters()):>14,} parameters")
