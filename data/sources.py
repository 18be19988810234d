"""Public sources: the paper's four datasets and the Flan-T5 weights, fetched once: `python -m data.sources base`.

Every address is pinned to a commit. A file takes its final name only after its checksum proved right, so what the cache
holds is whole. torch.hub downloads; half a file is not resumed, and a killed process leaves a *.partial file to delete.
Licenses: ASDiv CC BY-NC 4.0 (no commercial use), GSM8K and SVAMP MIT, Flan-T5 Apache-2.0; MultiArith states none.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from xml.etree import ElementTree

import torch.hub

from data.problems import write_jsonl, write_text

TIMEOUT = 60  # seconds without a byte; torch.hub itself waits for ever


def _multiarith(raw: bytes) -> list[dict]:
    return [{"question": p["sQuestion"].strip(), "ans": p["lSolutions"][0]} for p in json.loads(raw)]


def _asdiv(raw: bytes) -> list[dict]:
    rows = []
    for p in ElementTree.fromstring(raw).iter("Problem"):
        if answer := re.fullmatch(r"(\d+)( \(.*\))?", p.findtext("Answer")):  # whole, with or without a unit: 2,096 of 2,305
            rows.append({"question": f"{p.findtext('Body')} {p.findtext('Question')}".strip(), "ans": float(answer[1])})
    return rows


def _svamp(raw: bytes) -> list[dict]:
    rows = []
    for p in json.loads(raw):
        stop = "" if p["Body"].rstrip()[-1] in ".?!,;:" else "."
        rows.append({"question": " ".join(f"{p['Body']}{stop} {p['Question']}".split()), "ans": p["Answer"]})
    return rows


def _gsm8k(part: str) -> list[str]:
    """The paper's split has moved within the authors' repository: the same file at two commits."""
    places = ("e50bce72d6d4ef8fd294856e5ff155a68506b2a7/data", "e41ed260f28c93478541b3a3755da31df7fdc848")
    return [f"TianduoWang/DPO-ST/{place}/gsm8k/{part}.jsonl" for place in places]


DATASETS = {  # file: conversion, sha256 of the source, its address on the host, or several to try in turn
    "gsm8k/train.jsonl": (None, "27c9db60d25ec1fb3d887dee85c1fc1134c0f1e974e654856683333f4c211f8f", *_gsm8k("train")),
    "gsm8k/dev.jsonl": (None, "3117884193f6b49986ee8e951a9dfca739d5078017d1b776f283b51202f9b248", *_gsm8k("dev")),
    "gsm8k/test.jsonl": (None, "17bd4903600088dfff5c92b025e2641cb515dea7fb14f60705fcb0c465997146", *_gsm8k("test")),
    "multiarith/test.jsonl": (
        _multiarith, "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
        "kojima-takeshi188/zero_shot_cot/5ef330fcdeec0cd26aee27943504f91f8ec1c33c/dataset/MultiArith/MultiArith.json"),
    "asdiv/test.jsonl": (
        _asdiv, "ef8904068482919ac48c8eeaaf6df344b8a308ba66d048c2d4d87eab82dc4929",
        "chaochun/nlu-asdiv-dataset/883f90a9a65bf00304ba8f37423910fe743abc47/dataset/ASDiv.xml"),
    "svamp/test.jsonl": (
        _svamp, "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
        "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json"),
}
FLAN_T5 = {  # size: revision of google/flan-t5-SIZE
    "small": "0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab", "base": "7bcac572ce56db69c1ea7c8af255c5d7c9672fc2",
    "large": "0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a", "xl": "7d6315df2c2fb742f0f5b556879d730926ca9001",
    "xxl": "ae7c9136adc7555eeccc78cdd960dfd60fb346ce",
}
SHA256 = {  # one vocabulary serves all sizes; the hub states the sha256 of the other weights
    "spiece.model": (
        "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86",
        "7cfce953c20315582dead0c1fba498ad884ac37c71c48429a75086b18f09a648",  # the same pieces without training settings
    ),
    "small/model.safetensors": ("495fa51e204676f1a857a9fc13c4c89f3f5ba9f480b898cebca02add25e6d749",),
}


class DownloadError(RuntimeError):
    """One sentence: what could not be fetched, and what to do about it."""


def fetch_datasets(cache: str | Path | None = None) -> Path:
    """Return the folder with gsm8k/{train,dev,test}.jsonl and {multiarith,asdiv,svamp}/test.jsonl. Raises DownloadError."""
    folder, host = _cache(cache) / "datasets", os.environ.get("DPO_ST_GITHUB") or "https://raw.githubusercontent.com"
    for name, (convert, sha256, *addresses) in DATASETS.items():
        for address in addresses:
            try:
                _download(f"{host}/{address}", folder / name, (sha256,), convert)
                break
            except DownloadError as error:
                if "404" not in str(error) or address == addresses[-1]:
                    raise
    return folder


def fetch_flan_t5(size: str, cache: str | Path | None = None) -> Path:
    """Return a folder with config.json, spiece.model and weights: from this cache, the hub library's, or the hub.

    Raises ValueError for an unknown size, DownloadError.
    """
    if size not in FLAN_T5:
        raise ValueError(f"There is no Flan-T5 {size!r}; choose among {', '.join(FLAN_T5)}.")
    formats = ["model.safetensors"] * bool(find_spec("safetensors")) + ["pytorch_model.bin"]  # those that can be read
    folder = _cache(cache) / f"flan-t5-{size}-{FLAN_T5[size][:8]}"
    library = os.environ.get("HF_HUB_CACHE") or (os.environ.get("HF_HOME") or "~/.cache/huggingface") + "/hub"
    for place in (folder, Path(library).expanduser() / f"models--google--flan-t5-{size}/snapshots/{FLAN_T5[size]}"):
        for weights in formats:
            if all((place / name).is_file() for name in ["config.json", "spiece.model", *_weight_files(place, weights)]):
                return place
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/google/flan-t5-{size}/resolve/{FLAN_T5[size]}"
    sharded = size in ("xl", "xxl")
    for name in ["config.json", "spiece.model"] + [f"{formats[0]}.index.json"] * sharded:
        _download(f"{url}/{name}", folder / name, SHA256.get(name, ()))
    for name in _weight_files(folder, formats[0]):
        _download(f"{url}/{name}", folder / name, SHA256.get(f"{size}/{name}", ()))
    return folder


def _cache(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get("DPO_ST_CACHE") or "~/.cache/dpo-st").expanduser()


def _weight_files(folder: Path, weights: str) -> list[str]:
    """Name the files that hold the weights: one, or the shards that an index lists."""
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return [weights]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if names and all(re.fullmatch(r"[\w-]+\.(safetensors|bin)", name) for name in names):  # "../x" would lead outside
            return names
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DownloadError(f"{index} does not list plain weight files; delete it and run the same command again.")


class _StopAtChecksum(urllib.request.HTTPRedirectHandler):
    """The hub states a large file's checksum in the reply that redirects to its storage, and only there."""

    def redirect_request(self, request, reply, code, message, headers, url):
        return None if "X-Linked-ETag" in headers else super().redirect_request(request, reply, code, message, headers, url)


def _ask(url: str) -> tuple[str, int]:
    """Return the checksum ("" if none) and the length in bytes that the host states."""
    try:
        headers = urllib.request.build_opener(_StopAtChecksum).open(urllib.request.Request(url, method="HEAD")).headers
    except HTTPError as error:
        if "X-Linked-ETag" not in (headers := error.headers):
            raise
    checksum = (headers.get("X-Linked-ETag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    return checksum, int(headers.get("X-Linked-Size") or headers.get("Content-Length") or 0)


def _download(url: str, path: Path, known: tuple[str, ...], convert: Callable | None = None) -> None:
    """Fetch a file unless it is there; check it against a known sha256, or else what the host states; convert it."""
    if path.is_file():
        return
    print(f"Fetching {url}", file=sys.stderr)
    arrived = path.with_name(url.rpartition("/")[2])  # `path` itself, unless a conversion follows
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stated, length = _ask(url)
        checksum = stated if stated in known or not known else known[0]
        if (lacking := length - shutil.disk_usage(path.parent).free) > 0:
            raise OSError(f"the disk lacks {lacking / 1e9:.2f} GB")
        if re.fullmatch("[0-9a-f]{64}", checksum):
            torch.hub.download_url_to_file(url, str(arrived), hash_prefix=checksum)
        elif path.suffix == ".json" and re.fullmatch("[0-9a-f]{40}", checksum):  # the git blob id of a small text file
            with urllib.request.urlopen(url) as reply:
                body = reply.read()
            if hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest() != checksum:
                raise OSError("invalid hash value")
            write_text(body.decode(), path)
        else:
            raise OSError("nobody states its checksum")
        if convert:
            write_jsonl(convert(arrived.read_bytes()), path)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: torch.hub's word for a wrong checksum
        raise DownloadError(f"{url} was not fetched into {path.parent}: {error}; mend that, or set DPO_ST_CACHE to another "
                            "folder, and run the same command again.") from error
    finally:
        socket.setdefaulttimeout(timeout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.sources", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"Flan-T5 to fetch too: {', '.join(FLAN_T5)}")
    sizes = parser.parse_args().sizes
    try:
        print(*map(fetch_flan_t5, sizes), fetch_datasets(), sep="\n")
    except (ValueError, DownloadError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
