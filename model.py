"""Flan-T5 in plain PyTorch: the encoder-decoder that DPO-ST trains (paper, section 4).

The architecture is T5 v1.1 (Raffel et al., 2020; Shazeer, 2020). `public_name` maps our parameter
names to those of the Hugging Face checkpoints (google/flan-t5-*), called public below. Left out:
losses (sft.py, dpo.py), sampling and its cache (decode.py), text (tokenizer.py), reading and
checking files (data/checkpoints.py), T5's random initialisation (tests/bench/make_tiny.py), and
fp16, because T5 overflows in it.

Shape letters: B batch, S source tokens, T target tokens, D d_model, H heads, K d_kv, V vocabulary.
They are shapes only; the paper's D, S_a and K are other things.

    python model.py base        # the shapes and the number of parameters of a size
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.checkpoints import read_fields, read_tensors, write_checkpoint

START_ID = 0  # the decoder's first input: T5 starts from the padding id
N_BUCKETS = 32  # of relative positions
MAX_DISTANCE = 128  # in tokens; all larger distances share the last bucket
MASKED = -1e30  # added to a masked score; -inf would give NaN where every key is masked


@dataclass(frozen=True)
class T5Config:
    """The numbers that define a T5 v1.1 model."""

    d_model: int  # width of the residual stream
    d_ff: int  # inner width of the feed-forward layers
    n_heads: int
    n_layers: int  # blocks in the encoder, and again in the decoder
    d_kv: int = 64  # width of one head; n_heads * d_kv need not equal d_model
    vocab_size: int = 32128
    dropout: float = 0.1
    epsilon: float = 1e-6  # in RMSNorm


SIZES = {  # the public sizes, and tiny; a checkpoint is built from its own config.json
    "tiny": T5Config(
        d_model=128, d_ff=256, n_heads=4, n_layers=2, d_kv=32, vocab_size=768, dropout=0.0
    ),
    "small": T5Config(d_model=512, d_ff=1024, n_heads=6, n_layers=8),
    "base": T5Config(d_model=768, d_ff=2048, n_heads=12, n_layers=12),
    "large": T5Config(d_model=1024, d_ff=2816, n_heads=16, n_layers=24),
    "xl": T5Config(d_model=2048, d_ff=5120, n_heads=32, n_layers=24),
    "xxl": T5Config(d_model=4096, d_ff=10240, n_heads=64, n_layers=24),
}


class RMSNorm(nn.Module):
    """Scale (..., D) by its root mean square along D: weight * x / sqrt(mean(x^2) + epsilon).

    Unlike LayerNorm it subtracts no mean and adds no bias. torch computes it in fp32, also for a
    bf16 input.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def relative_position_bucket(distance: Tensor, bidirectional: bool) -> Tensor:
    """Map distances (key position - query position, int64, any shape) to buckets 0..N_BUCKETS-1.

    Half of the buckets hold one small distance each; the others cover logarithmically growing
    ranges up to MAX_DISTANCE. Source: Raffel et al. (2020), section 2.1.

    >>> relative_position_bucket(torch.tensor([0, -1, -15, -16, -20, -200]), bidirectional=False)
    tensor([ 0,  1, 15, 16, 17, 31])
    """
    if bidirectional:  # the encoder: half of the buckets are for keys to the right
        n_buckets = N_BUCKETS // 2
        offset = (distance > 0) * n_buckets
        distance = distance.abs()
    else:  # the decoder looks only to the left
        n_buckets = N_BUCKETS
        offset = 0
        distance = (-distance).clamp(min=0)
    n_exact = n_buckets // 2
    ratio = distance.clamp(min=1) / n_exact
    growth = ratio.log() / math.log(MAX_DISTANCE / n_exact)  # 0 at n_exact, 1 at MAX_DISTANCE
    far = (n_exact + growth * (n_buckets - n_exact)).long().clamp(max=n_buckets - 1)
    return offset + torch.where(distance < n_exact, distance, far)


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer without a bias; T5 has no biases."""
    return nn.Linear(n_in, n_out, bias=False)


def embedding(n: int, width: int) -> nn.Embedding:
    """Like nn.Embedding(n, width), which on the meta device imports torch's compiler (1 s)."""
    return nn.Embedding.from_pretrained(torch.randn(n, width), freeze=False)


class Attention(nn.Module):
    """Multi-head attention.

    Keys and values are arguments, so that one class serves self-attention, cross-attention, and
    token-by-token decoding from a cache.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.n_heads * config.d_kv
        self.n_heads = config.n_heads
        self.q = linear(config.d_model, inner)
        self.k = linear(config.d_model, inner)
        self.v = linear(config.d_model, inner)
        self.o = linear(inner, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def split_heads(self, x: Tensor) -> Tensor:  # (B, T, H*K) -> (B, H, T, K)
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, S, D) -> twice (B, H, S, K)
        return self.split_heads(self.k(x)), self.split_heads(self.v(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D) -> a mixture of the values for every position, (B, T, D).

        bias is added to the scores (B, H, T, S); it also carries the mask.
        """
        queries = self.split_heads(self.q(x))  # (B, H, T, K)
        # Other transformers divide by sqrt(K) here; T5 absorbs that factor in q's initialisation.
        scores = queries @ keys.transpose(2, 3) + bias  # (B, H, T, S)
        weights = self.dropout(scores.softmax(-1, dtype=torch.float32).to(values.dtype))
        mixed = weights @ values  # (B, H, T, K)
        return self.o(mixed.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU. Source: Shazeer (2020), GEGLU."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = linear(config.d_model, config.d_ff)
        self.up = linear(config.d_model, config.d_ff)
        self.down = linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate(x), approximate="tanh")
        return self.down(self.dropout(gate * self.up(x)))


class Block(nn.Module):
    """Residual sub-layers, each x + sublayer(norm(x)): self-attention, in the decoder also
    cross-attention to the question, and feed-forward."""

    def __init__(self, config: T5Config, layer: int, is_decoder: bool):
        super().__init__()
        self.layer = layer
        self.is_decoder = is_decoder
        self.self_attention_norm = RMSNorm(config)
        self.self_attention = Attention(config)
        if is_decoder:
            self.cross_attention_norm = RMSNorm(config)
            self.cross_attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = GatedFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, states=None, source_bias=None, cache=None) -> Tensor:
        """x (B, T, D) -> (B, T, D). bias is that of self-attention.

        A decoder block reads the question from `states` (B, S, D), the encoder's output, or from
        `cache` (see T5.step), which also holds the keys and values of the earlier tokens;
        source_bias (B, 1, 1, S) masks the question's padding.
        """
        normed = self.self_attention_norm(x)
        keys, values = self.self_attention.keys_values(normed)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        x = x + self.dropout(self.self_attention(normed, keys, values, bias))
        if self.is_decoder:
            if cache is not None:
                keys, values = cache.source(self.layer)
            else:
                keys, values = self.cross_attention.keys_values(states)
            normed = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(normed, keys, values, source_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    """The encoder or the decoder: its blocks, the position bias they share, and the final norm."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.bidirectional = not is_decoder
        self.relative_bias = embedding(N_BUCKETS, config.n_heads)
        blocks = [Block(config, layer, is_decoder) for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout)

    def position_bias(self, distance: Tensor) -> Tensor:
        """The bias of every head for these distances: (..., T, S) -> (..., H, T, S)."""
        buckets = relative_position_bucket(distance, self.bidirectional)
        return self.relative_bias(buckets).movedim(-1, -3)

    def forward(self, x: Tensor, bias: Tensor, states=None, source_bias=None, cache=None) -> Tensor:
        """Embedded tokens x (B, T, D) -> hidden states (B, T, D); the rest as in Block.forward."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, bias, states, source_bias, cache)
        return self.dropout(self.final_norm(x))


def padding_bias(mask: Tensor) -> Tensor:
    """A mask (B, S), 1 on real tokens -> a bias on attention scores, (B, 1, 1, S) fp32."""
    return torch.where(mask.bool(), 0.0, MASKED)[:, None, None, :]


def shift_right(labels: Tensor) -> Tensor:
    """Decoder inputs from labels (B, T) int64: prepend START_ID, drop the last label.

    Position t then reads label t-1 and predicts label t: nothing downstream shifts again. The
    labels of padding, -100 (sft.IGNORE), become 0.
    """
    return F.pad(labels, (1, -1), value=START_ID).clamp(min=0)


class T5(nn.Module):
    """Flan-T5: `encode` a question once, then `decode` a complete target, or `step` through it.

    `decode` here is the decoder's forward pass; it does not turn ids into text (Tokenizer.decode),
    and choosing tokens is decode.py's task.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        # Shared by both stacks, NOT by the head.
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = linear(config.d_model, config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.shared.weight.device

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read questions: ids and mask (B, S) int64, 1 on real tokens -> states (B, S, D)."""
        positions = torch.arange(input_ids.shape[1], device=self.device)
        distance = positions[None, :] - positions[:, None]  # (S, S)
        bias = self.encoder.position_bias(distance) + padding_bias(attention_mask)  # (B, H, S, S)
        return self.encoder(self.shared(input_ids), bias)

    def decode(self, decoder_input_ids: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Read complete targets: ids (B, T) -> hidden states (B, T, D), ready for `lm_head`.

        states (B, S, D) and attention_mask (B, S) belong to the questions.
        """
        positions = torch.arange(decoder_input_ids.shape[1], device=self.device)
        distance = positions[None, :] - positions[:, None]  # (T, T)
        causal = torch.where(distance <= 0, 0.0, MASKED)
        bias = self.decoder.position_bias(distance) + causal  # (H, T, T)
        source_bias = padding_bias(attention_mask)  # cross-attention has no position bias
        return self.decoder(self.shared(decoder_input_ids), bias, states, source_bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Predict every next token: (B, S), (B, S), (B, T) int64 -> logits (B, T, V)."""
        states = self.encode(input_ids, attention_mask)
        return self.lm_head(self.decode(decoder_input_ids, states, attention_mask))

    def step(self, ids: Tensor, cache) -> Tensor:
        """Read one more token in every row of a batch: ids (B,) int64 -> logits (B, V).

        The cache (decode.KVCache) offers three methods:
            advance()                    -> the biases of this step, for own tokens and question
            append(layer, keys, values)  -> all so far, with this token's, which it stores
            source(layer)                -> the keys and values of the question
        """
        bias, source_bias = cache.advance()
        x = self.shared(ids[:, None])  # (B, 1, D)
        hidden = self.decoder(x, bias, source_bias=source_bias, cache=cache)
        return self.lm_head(hidden)[:, 0]


# ------------------------------------------------------------------------------ public checkpoints


PUBLIC_FIELDS = {  # our name -> the name in config.json
    "d_model": "d_model",
    "d_ff": "d_ff",
    "n_heads": "num_heads",
    "n_layers": "num_layers",
    "d_kv": "d_kv",
    "vocab_size": "vocab_size",
    "dropout": "dropout_rate",
    "epsilon": "layer_norm_epsilon",
}


def public_name(name: str) -> str:
    """Translate one of our parameter names to its name in the public checkpoints.

    >>> public_name("decoder.blocks.3.feed_forward.gate.weight")
    'decoder.block.3.layer.2.DenseReluDense.wi_0.weight'
    """
    feed_forward = "layer.2" if name.startswith("decoder") else "layer.1"
    translations = {
        "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias",
        "final_norm": "final_layer_norm",
        "blocks": "block",
        "self_attention_norm": "layer.0.layer_norm",
        "self_attention": "layer.0.SelfAttention",
        "cross_attention_norm": "layer.1.layer_norm",
        "cross_attention": "layer.1.EncDecAttention",
        "feed_forward_norm": f"{feed_forward}.layer_norm",
        "feed_forward": f"{feed_forward}.DenseReluDense",
        "gate": "wi_0",
        "up": "wi_1",
        "down": "wo",
    }
    return ".".join(translations.get(part, part) for part in name.split("."))


def read_config(folder: str | Path) -> T5Config:
    """Read a checkpoint's config.json. Raises ValueError unless it describes a Flan-T5."""
    fields = read_fields(Path(folder))
    numbers = {}
    for ours, public in PUBLIC_FIELDS.items():
        if public in fields:  # a field may be left out; T5Config's default is Flan-T5's
            numbers[ours] = fields[public]
    return T5Config(**numbers)


def load_flan_t5(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> T5:
    """Build a T5 from a checkpoint folder in the public layout, in evaluation mode.

    dtype is the dtype that the model computes in, fp32 or bf16; the file may store fp16. Loading is
    strict: every tensor is used exactly once. Raises ValueError or FileNotFoundError for damaged
    files, other architectures, missing or unknown tensors, and for a dtype of fp16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype}: T5 overflows in fp16, use torch.float32 or torch.bfloat16")
    with torch.device("meta"):  # allocate nothing for weights that are replaced below
        model = T5(read_config(folder))
    tensors = read_tensors(Path(folder))
    state = {}
    for name, parameter in model.named_parameters():
        public = public_name(name)
        tensor = tensors.pop(public, None)
        if tensor is None:
            raise ValueError(f"{folder} lacks the tensor {public}: fetch the checkpoint again")
        if tensor.shape != parameter.shape:
            found, wanted = list(tensor.shape), list(parameter.shape)
            raise ValueError(f"{folder}: {public} has the shape {found}, not {wanted}")
        state[name] = tensor.to(dtype)
    if tensors:
        raise ValueError(f"{folder} contains {min(tensors)}, a tensor that no Flan-T5 has")
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def save_flan_t5(model: T5, folder: str | Path) -> None:
    """Write config.json and pytorch_model.bin in the public layout, in the model's own dtype.

    Weights that were in the folder before are replaced. Raises OSError.
    """
    fields = {public: getattr(model.config, ours) for ours, public in PUBLIC_FIELDS.items()}
    fields["torch_dtype"] = str(model.shared.weight.dtype).removeprefix("torch.")
    tensors = {public_name(name): tensor.cpu() for name, tensor in model.state_dict().items()}
    write_checkpoint(Path(folder), fields, tensors)


def main() -> None:
    size = sys.argv[1] if len(sys.argv) > 1 else "small"
    if size not in SIZES:
        sys.exit(f"model.py: there is no size {size!r}: choose from {', '.join(SIZES)}")
    with torch.device("meta"):  # shapes only: even xxl takes no memory
        model = T5(SIZES[size])
        question = torch.zeros(2, 7, dtype=torch.long)
        target = torch.zeros(2, 5, dtype=torch.long)
        states = model.encode(question, torch.ones_like(question))
        logits = model(question, torch.ones_like(question), target)
    print(f"Flan-T5 {size}: {model.config}")
    print(f"question {list(question.shape)} -> encoder states {list(states.shape)}")
    print(f"target {list(target.shape)} -> logits {list(logits.shape)}")
    for name, part in [*model.named_children(), ("total", model)]:
        print(f"{name:>8}: {sum(p.numel() for p in part.parameters()):>14,} parameters")


if __name__ == "__main__":
    main()
