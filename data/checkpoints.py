"""Checkpoint files in the public layout: config.json, spiece.model, and weights, one file or more.

Reads both public formats: .safetensors (where that package is installed) and .bin, a pickle from
which only tensors are loaded. Anything that is not a Flan-T5 is rejected here, in one sentence with
the file's name; model.py then uses every tensor.
"""

import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

BIN = "pytorch_model.bin"
SAFETENSORS = "model.safetensors"
SHARD = re.compile(r"[\w-]+\.(bin|safetensors)")  # a plain file name: `../x` is another folder

REQUIRED = {  # a config.json without these describes a T5 1.0
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
}
STANDARD = {  # every T5 has these, whether or not its config.json states them
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SPECIAL_TOKENS = ("decoder_start_token_id", "pad_token_id", "eos_token_id")
SIZES = ("d_model", "d_ff", "num_heads", "num_layers", "d_kv", "vocab_size")
OPTIONAL = ("d_kv", "vocab_size", "dropout_rate", "layer_norm_epsilon")
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def damaged(path: Path, error: Exception) -> ValueError:
    """One sentence for any error from reading a file, with any of four libraries."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(
        f"{path} is missing, damaged or not part of a checkpoint ({lines[0][:100]}): "
        "fetch it again, or name another folder; if a run made it, delete its folder and run the "
        "same command again"
    )


# ------------------------------------------------------------------------------------- config.json


def read_object(path: Path) -> dict:
    """Read a JSON object. Raises ValueError, naming the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(fields, dict):
        raise damaged(path, ValueError("it is not a JSON object"))
    return fields


def read_fields(folder: Path) -> dict:
    """Read a checkpoint's config.json. Raises ValueError unless it describes a Flan-T5."""
    path = folder / "config.json"
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}: check the path")
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder that holds it")
    if (folder / "log.jsonl").exists():
        raise ValueError(f"{folder} is a run: name a model in it, such as warm-up/sft")
    fields = read_object(path)
    standard = STANDARD | {"num_decoder_layers": fields.get("num_layers")}
    require(path, standard | fields, REQUIRED | standard)
    generation = folder / "generation_config.json"
    if generation.exists():
        wanted = {name: STANDARD[name] for name in SPECIAL_TOKENS}
        require(generation, wanted | read_object(generation), wanted)
    # transformers 5 writes tie_word_embeddings true for every T5; whether the head is really tied,
    # and its logits scaled, is in a separate field.
    tied = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
    if tied is not False:
        raise ValueError(f"{path}: the head is tied (tie_word_embeddings); Flan-T5's is not")
    for name in {*SIZES, *OPTIONAL}:
        if name not in fields and name in OPTIONAL:
            continue
        value = fields.get(name)
        if name in SIZES:
            most = 100 if name == "num_layers" else 10**6
            valid = type(value) is int and 0 < value <= most
        else:  # a probability or a tolerance
            valid = type(value) in (int, float) and 0 <= value < 1
        if not valid:
            raise ValueError(f"{path}: {name} is {value!r}, which is invalid")
    return fields


def require(path: Path, fields: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if fields.get(name) != value:
            found = fields.get(name)
            raise ValueError(f"{path}: {name} is {found!r}; a Flan-T5 has {value!r}")


def refuse_additions(folder: Path) -> None:
    """Raise ValueError for files that change the meaning of the weights: adapters, new tokens."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter: merge it into the weights first")
    texts = []
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        fields = read_object(path) if path.exists() else {}
        try:
            if name == "added_tokens.json":
                texts += fields
            elif name == "tokenizer.json":
                texts += [token["content"] for token in fields.get("added_tokens", [])]
            else:
                texts += fields.get("additional_special_tokens") or []
                decoder = fields.get("added_tokens_decoder", {})
                texts += [token["content"] for token in decoder.values()]
        except (AttributeError, KeyError, TypeError) as error:
            raise damaged(path, error) from None
    for text in map(str, texts):
        if text not in ("<pad>", "</s>", "<unk>") and not text.startswith("<extra_id_"):
            raise ValueError(
                f"{folder} adds the token {text!r}, which T5's vocabulary does not have"
            )


# -------------------------------------------------------------------------------------- vocabulary


def read_vocabulary(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a spiece.model, or the one in a checkpoint folder.

    Raises FileNotFoundError, or ValueError for a file that is not a T5 vocabulary.
    """
    if path.is_dir():
        path = path / "spiece.model"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a checkpoint folder needs its spiece.model")
    try:
        vocabulary = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model: fetch it again") from None
    special = (vocabulary.pad_id(), vocabulary.eos_id(), vocabulary.unk_id())
    if special != (0, 1, 2):
        raise ValueError(
            f"{path}: padding, end and unknown have the ids {special}; T5's are 0, 1, 2"
        )
    return vocabulary


def check_vocabulary(folder: str | Path, model_size: int, tokenizer_size: int) -> None:
    """Raise ValueError if a model and a spiece.model do not match."""
    if not 0 <= model_size - tokenizer_size < 128:  # T5 rounds up to a multiple of 128
        raise ValueError(
            f"{folder}: spiece.model has {tokenizer_size} ids, the model {model_size}: "
            "they do not match"
        )


# ----------------------------------------------------------------------------------------- weights


def readable_formats() -> list[str]:
    """The names of weight files that can be read here, best first."""
    if importlib.util.find_spec("safetensors") is None:
        return [BIN]
    return [SAFETENSORS, BIN]


def weight_files(folder: Path) -> list[Path]:
    """Find a checkpoint's weights, one file or its shards. Raises FileNotFoundError, ValueError."""
    names = readable_formats()
    for name in names:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return shards(index)
    raise FileNotFoundError(
        f"{folder} has none of the files {', '.join(names)}: name the folder of a checkpoint "
        "(for .safetensors files: pip install safetensors)"
    )


def shards(index: Path) -> list[Path]:
    """The files that an index lists, each once; they must be in the same folder."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict):
        raise damaged(index, ValueError("it has no weight_map"))
    paths = []
    for name in sorted({str(name) for name in where.values()}):
        if not SHARD.fullmatch(name):
            raise damaged(index, ValueError(f"{name!r:.60} is not a weight file in its folder"))
        paths.append(index.parent / name)
    return paths


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint by their public names, without running any code in it.

    They are on the CPU. The embedding, which public files store under one to three names, is
    returned as shared.weight alone. Raises ValueError for a damaged file, values that are not
    finite numbers, a name in two shards, an adapter or added tokens; FileNotFoundError without
    weights.
    """
    refuse_additions(folder)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                found = load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
            for name, tensor in found.items():
                name = name.removeprefix("module.").removeprefix("_orig_mod.")  # wrapped models
                if name in tensors:
                    raise ValueError(f"{name} is in two shards")
                tensors[name] = tensor.detach()
        except MemoryError:
            raise
        except Exception as error:  # from pickle, zipfile, safetensors or torch: a bad file
            raise damaged(path, error) from None
    for name in EMBEDDING_COPIES:
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy, tensors.setdefault("shared.weight", copy)):
            raise ValueError(f"{folder}: {name} differs from the other embedding: not a Flan-T5")
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"{folder}: {name} holds {tensor.dtype}, not plain numbers: store bf16 or fp32"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} holds NaN or infinity: fetch it again")
    return tensors


def write_checkpoint(folder: Path, fields: dict, tensors: dict[str, Tensor]) -> None:
    """Write config.json and pytorch_model.bin, and remove older .safetensors. Raises OSError.

    fields: the numbers of this model; what every Flan-T5's config.json states is added.
    """
    architecture = {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    depth = {"num_decoder_layers": fields["num_layers"]}
    text = json.dumps(architecture | REQUIRED | STANDARD | depth | fields, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        path = Path(unfinished) / BIN
        try:
            torch.save(tensors, path)
        except RuntimeError as error:  # torch raises this when the disk is full
            raise OSError(f"{folder / BIN} cannot be written: is the disk full?") from error
        (folder / "config.json").write_text(text, encoding="utf-8")
        os.replace(path, folder / BIN)
    for name in (SAFETENSORS, f"{SAFETENSORS}.index.json"):
        (folder / name).unlink(missing_ok=True)
