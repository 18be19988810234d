"""Public sources: the paper's four datasets and the Flan-T5 weights, fetched once: `python -m data.sources base`.

Every address, in sources.json, is pinned to a commit. A file takes its final name only after its checksum proved right, so
what the cache holds is whole. Half a file is not resumed; a killed process leaves a *.partial file to delete.
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
    texts = [[p.findtext(tag) for tag in ("Body", "Question", "Answer")] for p in ElementTree.fromstring(raw).iter("Problem")]
    whole = [(b, q, re.fullmatch(r"(\d+)( \(.*\))?", a)) for b, q, a in texts]  # with or without a unit: 2,096 of 2,305
    return [{"question": f"{body} {question}".strip(), "ans": float(n[1])} for body, question, n in whole if n]

def _svamp(raw: bytes) -> list[dict]:
    rows = []
    for p in json.loads(raw):
        stop = "" if p["Body"].rstrip()[-1] in ".?!,;:" else "."
        rows.append({"question": " ".join(f"{p['Body']}{stop} {p['Question']}".split()), "ans": p["Answer"]})
    return rows

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_CONVERSIONS = {"multiarith/test.jsonl": _multiarith, "asdiv/test.jsonl": _asdiv, "svamp/test.jsonl": _svamp}
# file: conversion, sha256 of the source, its addresses on the host; size: revision; file: known sha256
DATASETS = {name: (_CONVERSIONS.get(name), row["sha256"], *row["addresses"]) for name, row in _TABLE["datasets"].items()}
FLAN_T5, SHA256 = _TABLE["flan-t5"], _TABLE["sha256"]

def _cache(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get("DPO_ST_CACHE") or "~/.cache/dpo-st").expanduser()

class DownloadError(OSError):
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
    Raises ValueError for an unknown size, DownloadError."""
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
    """The checksum ("" if none) and the length in bytes that the host states."""
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
    try:
        print(*map(fetch_flan_t5, parser.parse_args().sizes), fetch_datasets(), sep="\n")
    except (ValueError, DownloadError) as error:
        parser.exit(2, f"{error}\n")

if __name__ == "__main__":
    main()
