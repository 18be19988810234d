"""Public sources: the paper's four datasets and the Flan-T5 weights, fetched once.

Every address, in sources.json, is pinned to a commit. A file gets its final name only after its
checksum has been verified, so files in the cache are complete. Interrupted downloads start again.

    python -m data.sources base        # fetches the datasets and the weights of a size
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
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from xml.etree import ElementTree

import torch.hub

from data.checkpoints import BIN, read_fields, readable_formats, shards, weight_files
from data.folder import write_text
from data.problems import to_jsonl

TIMEOUT = 60  # seconds without a byte; torch.hub itself would wait forever
TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
DATASETS = TABLE["datasets"]
FLAN_T5 = TABLE["flan-t5"]  # size: revision
SHA256 = TABLE["sha256"]  # file: its checksum, where it is known


class DownloadError(OSError):
    """One sentence: what could not be fetched, and what to do about it."""


def fetch_datasets(cache: str | Path | None = None) -> Path:
    """Return the folder with gsm8k/{train,dev,test}.jsonl and {multiarith,asdiv,svamp}/test.jsonl.

    Raises DownloadError.
    """
    folder = cache_folder(cache) / "datasets"
    host = host_of("DPO_ST_GITHUB", "https://raw.githubusercontent.com")
    for name, source in DATASETS.items():
        path = folder / name
        url = f"{host}/{source['address']}"
        convert = CONVERSIONS.get(name)
        raw = path if convert is None else path.with_name(url.rpartition("/")[2])
        download(url, raw, source["sha256"])
        try:
            content = raw.read_bytes()
        except OSError as error:
            raise DownloadError(f"{raw} cannot be read ({error})") from error
        if hashlib.sha256(content).hexdigest() != source["sha256"]:
            raise DownloadError(f"{raw} has been changed: delete it, and run this again")
        if convert is None:
            continue
        try:
            text = to_jsonl(convert(content))
            if not path.exists() or path.read_bytes() != text.encode():
                write_text(text, path)
        except OSError as error:
            raise DownloadError(f"{path} cannot be written ({error}): set DPO_ST_CACHE") from error
    return folder


def fetch_flan_t5(size: str, cache: str | Path | None = None) -> Path:
    """Return a folder with config.json, spiece.model and weights.

    It is in this cache, in the Hugging Face library's cache, or fetched from the hub. Raises
    ValueError for an unknown size, DownloadError.
    """
    if size not in FLAN_T5:
        raise ValueError(f"there is no Flan-T5 {size!r}: choose from {', '.join(FLAN_T5)}")
    folder = cache_folder(cache) / f"flan-t5-{size}-{FLAN_T5[size][:8]}"
    library = library_cache() / f"models--google--flan-t5-{size}/snapshots/{FLAN_T5[size]}"
    for place in (folder, library):
        if is_complete(place):
            return place
    host = host_of("HF_ENDPOINT", "https://huggingface.co")
    url = f"{host}/google/flan-t5-{size}/resolve/{FLAN_T5[size]}"
    adopt(library, folder)
    download(f"{url}/spiece.model", folder / "spiece.model", SHA256["spiece.model"])
    if not readable_config(folder):
        (folder / "config.json").unlink(missing_ok=True)
        download(f"{url}/config.json", folder / "config.json")
        if not readable_config(folder):  # no sha256 is known for it: check its content
            (folder / "config.json").unlink()
            error = ValueError("what came is not the config.json of a Flan-T5")
            raise not_fetched(f"{url}/config.json", folder, error)
    for name in readable_formats():
        if is_complete(folder):
            break
        try:
            fetch_weights(url, folder, name, size)
        except DownloadError as error:
            missing = isinstance(error.__cause__, HTTPError) and error.__cause__.code == 404
            if not missing or name == BIN:  # the hub has no .safetensors of xxl
                raise
    return folder


def adopt(library: Path, folder: Path) -> None:
    """Link the files of an incomplete checkpoint in the library's cache: fetch only the others."""
    for path in library.glob("*") if library.is_dir() else ():
        wanted = path.suffix in (".model", ".bin", ".safetensors") or path.name == "config.json"
        if wanted and path.is_file() and not (folder / path.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                (folder / path.name).symlink_to(path.resolve())
            except OSError:  # Windows without the right to make links
                shutil.copyfile(path, folder / path.name)


def fetch_weights(url: str, folder: Path, name: str, size: str) -> None:
    """Fetch the weights in one format: a file, or for xl and xxl the shards of an index."""
    paths = [folder / name]
    if size in ("xl", "xxl"):
        index = folder / f"{name}.index.json"
        download(f"{url}/{index.name}", index)
        try:
            paths = shards(index)
        except ValueError as error:
            index.unlink()  # remove the broken index
            raise not_fetched(f"{url}/{index.name}", index, error) from error
    for path in paths:
        if not path.is_file():
            address = f"{url}/{path.name}"
            known = SHA256.get(f"{size}/{path.name}")
            download(address, path, known or stated_sha256(address, path))


def is_complete(folder: Path) -> bool:
    """Whether a folder has all files of a checkpoint, and a config.json that can be read."""
    try:
        files = [folder / "spiece.model", *weight_files(folder)]
        return all(path.is_file() for path in files) and readable_config(folder)
    except (OSError, ValueError):  # no weights, a broken index, or no permission
        return False


def readable_config(folder: Path) -> bool:
    try:
        read_fields(folder)
    except (OSError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------------- places


def cache_folder(cache: str | Path | None) -> Path:
    """Where fetched files are kept: the argument, $DPO_ST_CACHE, or the user's cache folder."""
    cache = cache or os.environ.get("DPO_ST_CACHE")
    if cache:
        return Path(cache)
    return user_cache() / "dpo-st"


def library_cache() -> Path:
    """Where the Hugging Face library keeps the files that it has fetched."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]) / "hub"
    return user_cache() / "huggingface" / "hub"


def user_cache() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home folder
        raise DownloadError(
            "there is no home folder to keep files in: set DPO_ST_CACHE to one of your folders"
        ) from None


def host_of(variable: str, default: str) -> str:
    return (os.environ.get(variable) or default).rstrip("/")


# ---------------------------------------------------------------------------------------- downloads


def not_fetched(url: str, path: Path, error: Exception) -> DownloadError:
    return DownloadError(
        f"{url} could not be fetched into {path.parent} ({error}): without a network, run "
        "`python -m data.sources SIZE` elsewhere and copy its cache folder; if the disk is full, "
        "set DPO_ST_CACHE to another folder; then run the same command again"
    )


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch and check a file unless it exists. Raises DownloadError and then leaves no file."""
    if path.is_file():
        return
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise not_fetched(url, path, ValueError("HF_HUB_OFFLINE is set"))
    print(f"Fetching {url}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        # RuntimeError: a wrong checksum
        raise not_fetched(url, path, error) from error
    finally:
        socket.setdefaulttimeout(timeout)


class StopAtChecksum(urllib.request.HTTPRedirectHandler):
    """The hub states the sha256 of a large file only in the reply that redirects to its storage."""

    def redirect_request(self, request, reply, code, message, headers, url):
        if "X-Linked-ETag" in headers:
            return None
        return super().redirect_request(request, reply, code, message, headers, url)


def stated_sha256(url: str, path: Path) -> str:
    """The sha256 that the hub states for a large file. Raises DownloadError if it states none."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        headers = urllib.request.build_opener(StopAtChecksum).open(request, timeout=TIMEOUT).headers
    except HTTPError as error:  # a redirect that was not followed
        if "X-Linked-ETag" not in error.headers:
            raise not_fetched(url, path, error) from error
        headers = error.headers
    except (OSError, HTTPException, ValueError) as error:
        raise not_fetched(url, path, error) from error
    checksum = headers.get("X-Linked-ETag", "").strip('"')  # a plain ETag is not a sha256
    if not re.fullmatch("[0-9a-f]{64}", checksum):
        raise not_fetched(url, path, ValueError("its checksum is not known"))
    return checksum


# -------------------------------------------------------------- the three sets in other formats


def multiarith(raw: bytes) -> list[dict]:
    rows = []
    for problem in json.loads(raw):
        question = problem["sQuestion"].strip()
        rows.append({"question": question, "answer": problem["lSolutions"][0]})
    return rows


def asdiv(raw: bytes) -> list[dict]:
    """The 2,096 of 2,305 problems whose answer is an integer, alone or with one unit."""
    rows = []
    for problem in ElementTree.fromstring(raw).iter("Problem"):
        answer = re.fullmatch(r"(\d+)( \(.*\))?", problem.findtext("Answer"))
        if answer:
            question = f"{problem.findtext('Body')} {problem.findtext('Question')}".strip()
            rows.append({"question": question, "answer": float(answer[1])})
    return rows


def svamp(raw: bytes) -> list[dict]:
    rows = []
    for problem in json.loads(raw):
        body = problem["Body"].rstrip()
        if body[-1] not in ".?!,;:":
            body += "."
        question = " ".join(f"{body} {problem['Question']}".split())
        rows.append({"question": question, "answer": problem["Answer"]})
    return rows


CONVERSIONS = {
    "multiarith/test.jsonl": multiarith,
    "asdiv/test.jsonl": asdiv,
    "svamp/test.jsonl": svamp,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.sources", description="Fetch the datasets and the weights of a size."
    )
    sizes = ", ".join(FLAN_T5)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"Flan-T5 to fetch too: {sizes}")
    try:
        for size in parser.parse_args().sizes:
            print(fetch_flan_t5(size))
        print(fetch_datasets())
    except (ValueError, DownloadError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
