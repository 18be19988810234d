"""Downloads from a real local server that imitates both public hosts, with and without faults."""

import errno
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import sources
from data.checkpoints import BIN, SAFETENSORS
from data.problems import load_problems
from data.sources import DownloadError, fetch_datasets, fetch_flan_t5
from tests.conftest import hear_ctrl_c

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

CONFIG = (ROOT / "data" / "tiny" / "config.json").read_bytes()
GSM8K = b'{"question": "How many?", "answer": "2*3 = <<2*3=6>>6\\n#### 6", "ans": 6.0}\n'
MULTIARITH = b'[{"sQuestion": " How many? ", "lSolutions": [39.0]}]'
SVAMP = b'[{"Body": "Tom has 3  pens", "Question": "How many?", "Answer": 3.0}, {"Body": "Two. ", "Question": "Q?", "Answer": 2.0}]'
ASDIV = (
    b"<M>"
    + b"".join(
        b"<Problem><Body>Tom has pens.</Body><Question>How many?</Question><Answer>%s</Answer></Problem>"
        % answer
        for answer in (
            b"9 (pens)",
            b"7",
            b"red",
            b"1:30",
            b"2.5 (pens)",
            b"3; 4",
            b"14  (pens)",
            b"5 (years); 15 (years)",
        )
    )
    + b"</M>"
)


def sha256(body):
    return hashlib.sha256(body).hexdigest()


class PublicHosts(BaseHTTPRequestHandler):
    """Serve `server.files` as the hub does. A large file is redirected to a storage server, and only the
    redirecting reply states its sha256. A small text file is redirected on the same host, and the last reply
    states its git blob id."""

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append(f"{self.command} {path}")
        name = path.removeprefix("/storage").removeprefix("/api")
        body, fault = server.files.get(name), server.faults.get(name.rpartition("/")[2])
        if body is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if "/resolve/" in path and path == name:  # the hub's first reply
            self.send_response(307 if name.endswith(".json") else 302)
            self.send_header(
                "Location",
                ("/api" if name.endswith(".json") else "/storage") + name + "?signature=1",
            )
            if not name.endswith(".json") and fault != "no checksum":
                self.send_header("X-Linked-ETag", f'"{sha256(body)}"')
                self.send_header("X-Linked-Size", str(10**18 if fault == "huge" else len(body)))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        if path.startswith("/api"):
            self.send_header(
                "ETag", 'W/"' + hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest() + '"'
            )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            if fault == "altered":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stalls") else body)
            if fault == "stalls":
                server.released.wait(20)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A server with a small stand-in for every public file; `faults` maps a file name to its fault."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), PublicHosts)
    server.requests, server.faults, server.released, server.files, datasets = (
        [],
        {},
        threading.Event(),
        {},
        {},
    )
    server.datasets = datasets
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name, source in sources.DATASETS.items():
        body = {"gsm8k": GSM8K, "multiarith": MULTIARITH, "asdiv": ASDIV, "svamp": SVAMP}[
            name.partition("/")[0]
        ]
        server.files[f"/{source['address']}"] = body
        datasets[name] = source | {"sha256": sha256(body)}
    for size, revision in sources.FLAN_T5.items():
        folder = f"/google/flan-t5-{size}/resolve/{revision}"
        for weights in ("model.safetensors", "pytorch_model.bin"):
            stem, ending = weights.rsplit(".", 1)
            shards = (
                [f"{stem}-0000{n}-of-00002.{ending}" for n in (1, 2)]
                if size in ("xl", "xxl")
                else [weights]
            )
            for shard in shards:
                server.files[f"{folder}/{shard}"] = f"{size} {shard} ".encode() * 4000
            if len(shards) > 1:
                index = {"weight_map": {"b": shards[1], "a": shards[0], "c": shards[0]}}
                server.files[f"{folder}/{weights}.index.json"] = json.dumps(index).encode()
        server.files |= {
            f"{folder}/config.json": CONFIG,
            f"{folder}/spiece.model": b"the vocabulary" * 1000,
        }
    monkeypatch.setattr(sources, "DATASETS", datasets)
    monkeypatch.setattr(sources, "SHA256", {"spiece.model": sha256(b"the vocabulary" * 1000)})
    monkeypatch.setattr(sources, "readable_formats", lambda: [BIN])  # unless a test says otherwise
    for name, value in {
        "DPO_ST_GITHUB": server.url,
        "HF_ENDPOINT": server.url,
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        "DPO_ST_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "library"),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def refused(fetch, *arguments):
    """Return the one-sentence error of a failed fetch."""
    with pytest.raises(DownloadError) as error:
        fetch(*arguments)
    assert "\n" not in str(error.value) and "DPO_ST_CACHE" in str(error.value)
    return str(error.value)


def test_datasets_are_fetched_converted_and_readable(hosts, tmp_path):
    """The README's command for the paper must give files that the loader accepts, whatever
    their original format."""
    folder = fetch_datasets()
    assert folder == tmp_path / "cache" / "datasets"
    assert (folder / "gsm8k/dev.jsonl").read_bytes() == GSM8K
    questions = {
        name: [(p.question, p.answer) for p in load_problems(folder / name)]
        for name in hosts.datasets
    }
    assert questions["multiarith/test.jsonl"] == [("How many?", 39)]
    assert questions["asdiv/test.jsonl"] == [
        ("Tom has pens. How many?", answer) for answer in (9, 7, 5)
    ]
    assert questions["svamp/test.jsonl"] == [("Tom has 3 pens. How many?", 3), ("Two. Q?", 2)]


def test_what_is_in_the_cache_is_not_asked_for_again(hosts):
    """A second run must work offline: no requests, and the same folders."""
    first = fetch_datasets(), fetch_flan_t5("base"), fetch_flan_t5("xl")
    hosts.requests.clear()
    assert (
        fetch_datasets(),
        fetch_flan_t5("base"),
        fetch_flan_t5("xl"),
    ) == first and hosts.requests == []


@pytest.mark.parametrize("formats, weights", [([SAFETENSORS, BIN], SAFETENSORS), ([BIN], BIN)])
def test_a_checkpoint_is_fetched_in_the_format_that_can_be_read(
    hosts, monkeypatch, formats, weights
):
    """safetensors is optional; a file that cannot be opened here would waste a gigabyte."""
    monkeypatch.setattr(sources, "readable_formats", lambda: formats)
    folder = fetch_flan_t5("base")
    assert files_in(folder) == sorted(["config.json", "spiece.model", weights])
    assert (folder / weights).read_bytes() == f"base {weights} ".encode() * 4000


@pytest.mark.parametrize("size", ["base", "xxl"])
def test_where_the_hub_has_no_safetensors_the_other_format_is_fetched(hosts, monkeypatch, size):
    """No listing of xxl includes safetensors; a 404 for them must not end the run."""
    monkeypatch.setattr(sources, "readable_formats", lambda: [SAFETENSORS, BIN])
    hosts.files = {name: body for name, body in hosts.files.items() if "safetensors" not in name}
    assert any(name.endswith(".bin") for name in files_in(fetch_flan_t5(size)))
    hosts.requests.clear()
    assert fetch_flan_t5(size).exists() and hosts.requests == []


def test_a_known_checksum_is_not_asked_for(hosts, monkeypatch):
    """A checksum pinned here takes precedence over what a host states."""
    monkeypatch.setitem(sources.SHA256, "base/pytorch_model.bin", "0" * 64)
    assert "invalid hash" in refused(fetch_flan_t5, "base")
    assert not [r for r in hosts.requests if r.startswith("HEAD")]


def test_a_sharded_checkpoint_is_fetched_whole(hosts):
    """xl and xxl have an index; each file that it names is fetched once."""
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert files_in(fetch_flan_t5("xl")) == sorted(
        ["config.json", "spiece.model", "pytorch_model.bin.index.json", *shards]
    )
    assert [
        sum(r.startswith("GET") and shard in r and "storage" in r for r in hosts.requests)
        for shard in shards
    ] == [1, 1]


@pytest.mark.parametrize("fault", ["altered", "cut"])
@pytest.mark.parametrize("name", ["train.jsonl", "SVAMP.json", "spiece.model", "pytorch_model.bin"])
def test_a_wrong_byte_or_a_short_body_is_deleted_and_reported(hosts, tmp_path, name, fault):
    """HTTP detects neither fault. The next run must find no trace of the bad file, and succeed."""
    fetch = (
        fetch_datasets if name in ("train.jsonl", "SVAMP.json") else lambda: fetch_flan_t5("base")
    )
    hosts.faults[name] = fault
    assert name in refused(fetch)
    assert not [f for f in files_in(tmp_path) if name in f]
    hosts.faults.clear()
    assert all(path.stat().st_size for path in fetch().rglob("*"))


@pytest.mark.parametrize("fault, words", [(404, "404"), (503, "503")])
def test_an_http_error_names_the_address(hosts, tmp_path, fault, words):
    """The user can then check the address in a browser."""
    hosts.faults.update({"ASDiv.xml": fault, "pytorch_model.bin": fault})
    for fetch, name in (
        (fetch_datasets, "ASDiv.xml"),
        (lambda: fetch_flan_t5("base"), "pytorch_model.bin"),
    ):
        message = refused(fetch)
        assert words in message and hosts.url in message and name in message
        assert not [f for f in files_in(tmp_path) if name in f]


def test_no_network_is_one_sentence(monkeypatch, hosts):
    """No server listens at the address, as on a machine without a network."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for name, fetch in (
        ("DPO_ST_GITHUB", fetch_datasets),
        ("HF_ENDPOINT", lambda: fetch_flan_t5("base")),
    ):
        monkeypatch.setenv(name, nowhere)
        assert "refused" in refused(fetch)


def test_a_host_that_falls_silent_does_not_hang_the_run(hosts, tmp_path, monkeypatch):
    """By default torch.hub waits forever. Our time-out must not leak into the rest of the program."""
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    hosts.faults["pytorch_model.bin"] = "stalls"
    assert "timed out" in refused(fetch_flan_t5, "base")
    assert socket.getdefaulttimeout() is None and not list(tmp_path.rglob("pytorch_model*"))


def test_a_full_disk_is_one_sentence(hosts, tmp_path, monkeypatch):
    """A write that fails midway must not leave a file under the final name."""

    def full(text, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "write_text", full)
    assert "No space left" in refused(fetch_datasets)
    assert "multiarith/test.jsonl" not in " ".join(files_in(tmp_path))


def test_a_folder_that_cannot_be_written_is_one_sentence(hosts, tmp_path):
    """A cache below a plain file represents any place where the user cannot write."""
    (tmp_path / "file").write_text("")
    for fetch in (fetch_datasets, lambda cache: fetch_flan_t5("base", cache)):
        assert "DPO_ST_CACHE" in refused(fetch, tmp_path / "file" / "cache")


def test_weights_without_a_stated_checksum_are_refused(hosts, tmp_path):
    """A mirror may drop the header; a gigabyte that cannot be checked is useless."""
    hosts.faults["pytorch_model.bin"] = "no checksum"
    assert "checksum" in refused(fetch_flan_t5, "base") and not list(
        tmp_path.rglob("pytorch_model*")
    )


@pytest.mark.parametrize("name", ["../evil.bin", "/evil.bin", "a/evil.bin", "a\\evil.bin", "x.bin/../../evil.bin", "..", "",
                                  ".bin", "config.json", "evil.bin\n", 5, None, ["evil.bin"]])  # fmt: skip
def test_an_index_cannot_name_files_outside_the_folder(hosts, tmp_path, name):
    """The names come from the network: "../x" would be written outside the folder, and "config.json" would
    overwrite a file already checked."""
    index = f"/google/flan-t5-xl/resolve/{sources.FLAN_T5['xl']}/pytorch_model.bin.index.json"
    hosts.files[index] = json.dumps(
        {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": name}}
    ).encode()
    assert "not a weight file in its folder" in refused(fetch_flan_t5, "xl")
    assert [Path(f).name for f in files_in(tmp_path)] == ["config.json", "spiece.model"]


@pytest.mark.parametrize("index", [b"{}", b"[]", b"", b'{"weight_map": []}', b"\xff"])
def test_a_broken_index_is_one_sentence(hosts, tmp_path, index):
    """The index must also be removed, or the next start would find it."""
    name = f"/google/flan-t5-xl/resolve/{sources.FLAN_T5['xl']}/pytorch_model.bin.index.json"
    hosts.files[name] = index
    assert "index.json" in refused(fetch_flan_t5, "xl")
    assert [Path(f).name for f in files_in(tmp_path)] == ["config.json", "spiece.model"]


def test_a_broken_index_in_the_librarys_cache_is_passed_over(hosts, tmp_path):
    """Other programs write there: an incomplete copy is left alone, and the files are fetched."""
    folder = tmp_path / f"library/hub/models--google--flan-t5-xl/snapshots/{sources.FLAN_T5['xl']}"
    folder.mkdir(parents=True)
    for name in ("config.json", "spiece.model", "pytorch_model.bin.index.json"):
        (folder / name).write_text("{}")
    assert fetch_flan_t5("xl") != folder and len(files_in(folder)) == 3


@pytest.mark.parametrize(
    "variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"]
)
def test_a_whole_copy_of_the_hub_library_is_used_in_place(hosts, tmp_path, monkeypatch, variable):
    """Many readers already have the weights. A copy that lacks a file is not used: the library's links may be
    broken."""
    library = tmp_path / "elsewhere"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(library))
    library = library / {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(variable, ".")
    folder = library / f"models--google--flan-t5-base/snapshots/{sources.FLAN_T5['base']}"
    folder.mkdir(parents=True)
    for name in ("spiece.model", "pytorch_model.bin"):
        (folder / name).write_text(name)
    (folder / "config.json").write_bytes(CONFIG)
    assert fetch_flan_t5("base") == folder and hosts.requests == []
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "no blob")
    assert fetch_flan_t5("base") != folder


def test_only_the_missing_files_of_a_librarys_copy_are_fetched(hosts, tmp_path):
    """The library's cache may hold 11 GB of weights but, because another program fetched them, no spiece.model."""
    folder = (
        tmp_path / f"library/hub/models--google--flan-t5-base/snapshots/{sources.FLAN_T5['base']}"
    )
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_text("weights")
    (folder / "config.json").write_bytes(CONFIG)
    found = fetch_flan_t5("base")
    assert [name.rpartition("/")[2] for name in hosts.requests if "storage" not in name] == [
        "spiece.model"
    ]
    assert (found / "pytorch_model.bin").read_text() == "weights"
    assert files_in(folder) == ["config.json", "pytorch_model.bin"]  # left as it was


def test_offline_means_no_request(hosts, monkeypatch):
    """HF_HUB_OFFLINE=1 is how users promise that nothing is fetched; a time-out per file would break it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for fetch in (fetch_datasets, lambda: fetch_flan_t5("base")):
        assert "HF_HUB_OFFLINE is set" in refused(fetch)
    assert hosts.requests == []


def test_a_config_that_cannot_be_read_does_not_stay(hosts, tmp_path):
    """A hotel's login page answers every address with 200. config.json has no known checksum, so its content is
    checked, and what an older version kept is fetched again."""
    address = next(name for name in hosts.files if "flan-t5-base" in name and "config" in name)
    hosts.files[address] = b"<html>log in</html>"
    assert "not the config.json" in refused(fetch_flan_t5, "base")
    assert not list(tmp_path.rglob("config.json"))
    hosts.files[address] = CONFIG
    folder = fetch_flan_t5("base")
    (folder / "config.json").write_text("<html>log in</html>")
    assert (fetch_flan_t5("base") / "config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_leaves_nothing_under_its_name(hosts, tmp_path, stop):
    """The process dies with half a file on disk; the same command then succeeds."""
    hosts.faults["pytorch_model.bin"] = "stalls"
    program = "from data import sources; sources.readable_formats = lambda: ['pytorch_model.bin']; sources.SHA256['spiece.model'] = None; print(sources.fetch_flan_t5('base'))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    deadline = time.time() + 30
    while (
        not list(tmp_path.rglob("pytorch_model.bin.*.partial"))
        and time.time() < deadline
        and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(stop)
    assert process.wait(20) != 0
    left = [Path(f).name for f in files_in(tmp_path / "cache")]
    assert [f for f in left if not f.endswith(".partial")] == ["config.json", "spiece.model"]
    assert any(f.endswith(".partial") for f in left) == (stop == signal.SIGKILL)
    hosts.released.set()
    hosts.faults.clear()
    assert (
        fetch_flan_t5("base") / "pytorch_model.bin"
    ).read_bytes() == b"base pytorch_model.bin " * 4000


def test_the_command_prints_the_folders_or_one_sentence(hosts, tmp_path, monkeypatch, capsys):
    """`python -m data.sources base` is typed by hand: an error is one sentence and exit code 2, not a
    traceback."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.sources", *arguments])
        try:
            sources.main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, output, _ = command("base")
    cache = tmp_path / "cache"
    assert (
        code == 0
        and output == f"{cache}/flan-t5-base-{sources.FLAN_T5['base'][:8]}\n{cache}/datasets\n"
    )
    assert command()[0] == 0
    for arguments, words in ((["huge"], "small, base"), (["small"], "404")):
        hosts.faults["pytorch_model.bin"] = 404
        code, _, errors = command(*arguments)
        assert code == 2 and words in errors.splitlines()[-1] and "Traceback" not in errors
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert command("large")[0] == 2
    with pytest.raises(ValueError, match="small, base, large, xl, xxl"):
        fetch_flan_t5("tiny")


def test_a_user_without_a_home_is_told_what_to_set(hosts, monkeypatch):
    """Containers may run under user ids without an account."""
    monkeypatch.delenv("DPO_ST_CACHE")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert "home" in refused(fetch_datasets)


def test_an_address_may_end_in_a_slash(hosts, monkeypatch):
    """Users copy a mirror's address from a browser."""
    monkeypatch.setenv("HF_ENDPOINT", hosts.url + "/")
    monkeypatch.setenv("DPO_ST_GITHUB", hosts.url + "/")
    fetch_flan_t5("base"), fetch_datasets()
    assert not [r for r in hosts.requests if "//" in r]


@pytest.mark.skipif(
    not (SHARED / "sources").is_dir(),
    reason="the original public files are not next to the repository",
)
def test_the_real_sources_become_the_real_datasets(hosts, tmp_path, monkeypatch):
    """With the real checksums and files, the result equals the paper's datasets byte for byte."""
    monkeypatch.undo()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in {
        "DPO_ST_GITHUB": hosts.url,
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name, source in sources.DATASETS.items():
        origin = SHARED / "data" / name
        if name in sources.CONVERSIONS:
            origin = SHARED / "sources" / Path(source["address"]).name
        hosts.files[f"/{source['address']}"] = origin.read_bytes()
    folder = fetch_datasets(tmp_path / "cache")
    for name in sources.DATASETS:
        expected = (SHARED / "data" / name).read_text(encoding="utf-8")
        if name in sources.CONVERSIONS:
            expected = expected.replace(', "ans": ', ', "answer": ')
        assert (folder / name).read_text(encoding="utf-8") == expected, name


@pytest.mark.skipif(
    not (SHARED / "flan-t5").is_dir(), reason="the Flan-T5 facts are not next to the repository"
)
def test_the_pinned_revisions_are_the_known_ones():
    """A typo in forty digits would show up only on a machine with a network."""
    facts = json.loads((SHARED / "flan-t5/configs.json").read_text())
    assert {size: fact["revision"] for size, fact in facts.items()} == sources.FLAN_T5
    known = facts["small"]["weight_files"]["model.safetensors"]["sha256"]
    assert known == sources.SHA256["small/model.safetensors"]
