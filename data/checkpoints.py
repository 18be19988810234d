"""The files of a checkpoint in the public layout: config.json, and weights in one file or shards.

Both public formats are read, .safetensors (where that package is installed) and .bin, a pickle from
which nothing but tensors is ever built. What a damaged file makes other libraries say becomes one
sentence with its name. What the tensors mean is model.py's concern.
"""

import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

BIN = "pytorch_model.bin"
SAFETENSORS = "model.safetensors"
SHARD = re.compile(r"[\w-]+\.(bin|safetensors)")  # a plain file name: `../x` would lead outside


def damaged(path: Path, error: Exception) -> ValueError:
    """One sentence for whatever went wrong with a file, in any of four libraries."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(
        f"{path} is missing, damaged or not of a checkpoint ({lines[0][:100]}): "
        "fetch it again, or name another folder"
    )


def read_fields(path: Path) -> dict:
    """Read a JSON object, such as config.json. Raises ValueError, naming the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(fields, dict):
        raise damaged(path, ValueError("it is no JSON object"))
    return fields


def read_number(path: Path, fields: dict, name: str, default: float | None) -> float:
    """One of config.json's numbers: a probability or a tolerance below 1, or a size."""
    value = fields.get(name, default)
    if name in ("dropout_rate", "layer_norm_epsilon"):
        valid = type(value) in (int, float) and 0 <= value < 1
    else:
        most = 100 if name == "num_layers" else 10**6
        valid = type(value) is int and 0 < value <= most
    if not valid:
        raise ValueError(f"{path}: {name} is {value!r}: no model has that")
    return value


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
    """The files that an index lists, each once; they must lie beside it."""
    where = read_fields(index).get("weight_map")
    if not isinstance(where, dict):
        raise damaged(index, ValueError("it has no weight_map"))
    paths = []
    for name in sorted({str(name) for name in where.values()}):
        if not SHARD.fullmatch(name):
            raise damaged(index, ValueError(f"{name!r:.60} is no weight file of its own folder"))
        paths.append(index.parent / name)
    return paths


def refuse_additions(folder: Path) -> None:
    """Raise ValueError for files that change what the weights mean: an adapter, new tokens."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter: merge it into the weights first")
    texts = []
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        fields = read_fields(path) if path.exists() else {}
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
            raise ValueError(f"{folder} adds the token {text!r} to T5's vocabulary: not read here")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint by their public names, without running any code in it.

    They come on the CPU. Raises ValueError for a damaged file, a name that two shards hold, an
    adapter or added tokens, FileNotFoundError where there are no weights.
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
                if name in tensors:
                    raise ValueError(f"{name} stands in two shards")
                tensors[name] = tensor.detach()
        except MemoryError:
            raise
        except Exception as error:  # of pickle, zipfile, safetensors or torch: the file is bad
            raise damaged(path, error) from None
    return tensors


def write_checkpoint(folder: Path, fields: dict, tensors: dict[str, Tensor]) -> None:
    """Write config.json and pytorch_model.bin, and remove older .safetensors. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        path = Path(unfinished) / BIN
        try:
            torch.save(tensors, path)
        except RuntimeError as error:  # torch's word for a disk that is full
            raise OSError(f"{folder / BIN} cannot be written: is the disk full?") from error
        text = json.dumps(fields, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        os.replace(path, folder / BIN)
    for name in (SAFETENSORS, f"{SAFETENSORS}.index.json"):
        (folder / name).unlink(missing_ok=True)
