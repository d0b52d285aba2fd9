"""Remote sources: read by ranges or fetched once, from a server that behaves and from those that do not."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from safetensors.torch import save, save_file

from converters import convert, inspect, open_checkpoint
from converters.errors import CheckpointError, ConverterError, OutputError
from converters.readers import remote
from converters.readers.remote import RemotePath, fetch, ranges
from converters.readers.remote import cache as stored

write = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "tensorflow" / "bundle_writer.py")))
TENSORS = {f"layer{number}.weight": torch.randn(512, 512) for number in range(20)}  # 20 MB


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Checkpoints by name."""
    folder = tmp_path_factory.mktemp("files")
    torch.save({"state_dict": TENSORS}, folder / "model.pth")
    torch.save(TENSORS, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(TENSORS, folder / "model.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test, in which nobody waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(ranges, "PAUSES", (0.0, 0.0))
    return tmp_path / "cache" / "timmport"


class Memory(MemoryFileSystem):
    """fsspec's memory, which counts what is read of it."""

    read: ClassVar[list[tuple[str, int]]] = []


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    read = MemoryFile.read

    def count(self: MemoryFile, size: int = -1) -> bytes:
        Memory.read.append((self.path, size))
        return read(self, size)

    monkeypatch.setattr(MemoryFile, "read", count)
    MemoryFileSystem.store.clear()
    Memory.read.clear()
    yield Memory()
    MemoryFileSystem.store.clear()


@dataclass
class Site:
    """What the web server does, and what it was asked."""

    content: bytes = b""
    ranges: bool = True
    etag: Callable[[int], str] = lambda _: '"one"'  # by the number of the request
    status: Callable[[int], int] = lambda _: 0  # instead of the file
    keep_back: Callable[[int], int] = lambda _: 0  # bytes that are promised and not sent
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.asked.append((self.path, self.headers["Range"]))
        number = len(site.asked)
        if status := site.status(number):
            self.send_response(status)
            for name, value in {"Content-Length": "0", **site.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if site.ranges else None
        start, end = (int(asked[1]), min(int(asked[2]) + 1, len(site.content))) if asked else (0, len(site.content))
        self.send_response(206 if asked else 200)
        said = {"Content-Length": str(end - start), "ETag": site.etag(number)}
        if asked:
            said["Content-Range"] = f"bytes {start}-{end - 1}/{len(site.content)}"
        for name, value in {**said, **site.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(site.content[start : end - site.keep_back(number)])
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(files: dict[str, bytes]) -> Iterator[Site]:
    site = Site(files["model.pth"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}/model.pth?token=secret"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


def assert_whole(tensors: dict[str, Any]) -> None:
    assert {name: bytes(tensor.read()) for name, tensor in tensors.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize("name", ["model.pth", "legacy.pth", "model.safetensors"])
def test_a_look_at_a_file_fetches_little(name: str, memory: Memory, files: dict[str, bytes]) -> None:
    memory.pipe(f"/folder/{name}", files[name])
    found = open_checkpoint(f"memory://folder/{name}")
    assert found.url == str(found.path) == f"memory://folder/{name}"
    assert set(found.specs) == set(TENSORS)
    assert 0 < sum(nbytes for _, nbytes in memory.read) < 0.05 * len(files[name])
    assert {path for path, _ in memory.read} == {f"/folder/{name}"}
    assert_whole(found.tensors)
    assert found.sha256() == hashlib.sha256(files[name]).hexdigest()


def test_memory_is_bounded(memory: Memory, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BLOCKS", 8)
    memory.pipe("/a.pth", files["model.pth"])
    path = remote.open_remote("memory://a.pth")
    source = path.source_file(path)
    for offset in range(0, source.size - 9, 100_003):
        assert source.read(offset, 9) == files["model.pth"][offset : offset + 9]
    assert len(source._ranges._blocks) == 8
    with pytest.raises(CheckpointError, match="lie outside"):
        source.read(source.size - 1, 2)


def test_a_conversion_fetches_once(memory: Memory, cache: Path, tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    memory.pipe("/a/model.pth", content)
    steps: list[tuple[int, int]] = []
    digest = hashlib.sha256(content).hexdigest()
    for number in range(2):
        done = convert(
            "memory://a/model.pth",
            tmp_path / f"out{number}",
            expect_sha256=digest,
            progress=lambda done, total: steps.append((done, total)),
        )
        record = json.loads((tmp_path / f"out{number}" / "conversion.json").read_text())
        assert record["source"]["name"] == "model.pth"
        assert record["source"]["url"] == "memory://a/model.pth"
        assert record["source"]["sha256"] == digest == done.checkpoint.sha256()
    assert (len(content), len(content)) in steps
    assert sum(nbytes for _, nbytes in memory.read) == len(content)
    assert [re.fullmatch(r"[0-9a-f]{64}", path.name) is not None for path in cache.iterdir()] == [True]
    with pytest.raises(CheckpointError, match=r"memory://a/model.pth: has the SHA-256 .*, not the expected one"):
        convert("memory://a/model.pth", tmp_path / "out2", expect_sha256="0" * 64)
    memory.pipe("/a/model.pth", content)  # written anew: another file
    fetch("memory://a/model.pth")
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_is_written_anew_is_refused(memory: Memory, files: dict[str, bytes]) -> None:
    memory.pipe("/a.pth", files["model.pth"])
    found = open_checkpoint("memory://a.pth")
    memory.pipe("/a.pth", files["model.pth"])
    with pytest.raises(CheckpointError, match=r"memory://a.pth: was changed on its server while it was read"):
        found.tensors["layer9.weight"].read()
    with pytest.raises(CheckpointError, match="was changed"):
        found.files[0].check_unchanged()


def test_a_web_server_is_read_by_ranges(site: Site) -> None:
    found = inspect(site.url).checkpoint
    assert set(found.specs) == set(TENSORS)
    assert all(asked for _, asked in site.asked)
    assert str(found.path).endswith("/model.pth") and "secret" not in str(found.path)
    assert_whole(found.tensors)


def test_a_server_without_ranges_is_read_whole(site: Site, cache: Path) -> None:
    site.ranges = False
    found = open_checkpoint(site.url)
    assert found.notes == (remote.NO_RANGES,)
    assert_whole(found.tensors)
    assert len(list(cache.iterdir())) == 1
    asked = len(site.asked)
    open_checkpoint(site.url)
    assert len(site.asked) == asked + 1, "the cache has it"


def test_a_redirect_within_http_is_followed(site: Site) -> None:
    site.status = lambda number: 302 if number == 1 else 0
    site.headers = {"Location": "/elsewhere/model.pth"}
    assert_whole(open_checkpoint(site.url).tensors)
    assert site.asked[1][0] == "/elsewhere/model.pth"


def test_a_server_need_not_say_how_much_it_sends(site: Site) -> None:
    site.ranges, site.headers = False, {"Content-Length": "some"}
    assert_whole(open_checkpoint(site.url).tensors)


def test_what_does_not_end_is_refused(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda _: SimpleNamespace(free=8 << 20))
    with pytest.raises(OutputError, match=r"has no room for the \d+ bytes of http://"):
        fetch(site.url)
    site.ranges, site.headers = False, {"Content-Length": "some"}
    with pytest.raises(CheckpointError, match=r"does not end after \d+ bytes"):
        fetch(site.url)
    assert not list(cache.iterdir())


def test_the_command_keeps_urls_whole(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from converters.cli import main

    monkeypatch.setattr("sys.argv", ["timmport", "inspect", site.url, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["path"] == site.url.partition("?")[0]


def test_faults_that_pass_are_outlived(site: Site) -> None:
    site.status = lambda number: (0, 503, 429)[number % 3]
    site.keep_back = lambda number: 7 if number == 3 else 0
    assert_whole(open_checkpoint(site.url).tensors)


HTML = {"Content-Type": "text/html; charset=utf-8"}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "404": ({"status": lambda _: 404}, r"does not exist \(404\); is the address right"),
    "403": ({"status": lambda _: 403}, r"may not be read \(403\); are your credentials right"),
    "429": ({"status": lambda _: 429}, r"the server asks to wait \(429\); try again later"),
    "500": ({"status": lambda _: 500}, r"the server fails \(500\)"),
    "truncates": ({"keep_back": lambda _: 9}, r"the server sends \d+ of the \d+ bytes|the connection broke"),
    "truncates whole": ({"keep_back": lambda _: 9, "ranges": False}, r"ends after|the connection broke"),
    "changes": ({"etag": lambda number: f'"{number}"'}, "was changed on its server while it was read; run again"),
    "changes whole": ({"etag": lambda n: f'"{n}"', "ranges": False}, "was changed on its server"),
    "html": ({"headers": HTML}, "is an HTML page, not a checkpoint; give the address of the file itself"),
    "compressed": ({"headers": {"Content-Encoding": "gzip"}}, "comes compressed"),
    "empty": ({"status": lambda _: 416}, "is empty"),
    "other ranges": ({"headers": {"Content-Range": "bytes 7-9/20976947"}}, "in other ranges"),
    "no size": ({"headers": {"Content-Range": "bytes 0-9/*"}}, "does not say how large"),
    "to a file": ({"status": lambda _: 302, "headers": {"Location": "file:///etc/hosts"}}, "redirects to"),
    "to ftp": ({"status": lambda _: 302, "headers": {"Location": "ftp://127.0.0.1/a"}}, r"scheme \(ftp\)"),
    "in circles": ({"status": lambda _: 302, "headers": {"Location": "/model.pth"}}, "redirects to"),
}


@pytest.mark.parametrize("fetch_all", [False, True], ids=["inspect", "convert"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_one_line(fault: str, fetch_all: bool, site: Site, cache: Path, tmp_path: Path) -> None:
    changes, message = FAULTS[fault]
    for name, value in changes.items():
        setattr(site, name, value)
    with pytest.raises(ConverterError, match=message) as raised:
        if fetch_all:
            convert(site.url, tmp_path / "out")
        else:
            open_checkpoint(site.url)
    text = str(raised.value)
    assert text.startswith("http://127.0.0.1:") and "/model.pth: " in text
    assert "secret" not in text and "\n" not in text
    assert not list(cache.glob("*")) and not (tmp_path / "out").exists()


def test_a_reset_connection_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(self: _Handler) -> None:
        self.connection.close()

    monkeypatch.setattr(_Handler, "do_GET", reset)
    with pytest.raises(CheckpointError, match="the connection broke; try again later"):
        open_checkpoint(site.url)


def test_nobody_answers_in_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    from converters.readers.remote import stores

    over = Event()
    monkeypatch.setattr(_Handler, "do_GET", lambda self: over.wait(5))
    monkeypatch.setattr(stores, "TIMEOUT", 0.05)
    with pytest.raises(CheckpointError, match="does not answer in time"):
        open_checkpoint(site.url)
    over.set()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://a/b", "nope:// is a scheme that nothing here reads"),
        ("file:///etc/hosts", "is a local file; give its path"),
        ("reference://a.json", "names files through other files"),
        ("zip://a::memory://b.zip", "names files through other files"),
        ("https://me:word@127.0.0.1/a", "https://127.0.0.1/a: has a password in it"),
        ("http://127.0.0.1:port/a", "is no address"),
        ("memory://absent.pth", r"does not exist \(404\)"),
        ("memory://folder", "is a folder without a checkpoint"),
    ],
)
def test_what_is_no_source(url: str, message: str, memory: Memory) -> None:
    memory.pipe("/folder/a", b"a")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(url)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    def lack(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lack)
    with pytest.raises(CheckpointError, match=r"s3:// needs a package; pip install s3fs"):
        open_checkpoint("s3://bucket/model.pth")


INDEX = json.dumps({"weight_map": {"a": "model-00001.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.index.json", INDEX),
        ("model.safetensors.index.json", INDEX.replace(b"model-", b"../model-")),
        ("checkpoint", b'model_checkpoint_path: "model.ckpt"\n'),
        ("model.ckpt.data-00000-of-00001", b"bytes"),
        ("model.ckpt.index", b"bytes"),
        (".metadata", b"bytes"),
        ("saved_model.pb", b"bytes"),
    ],
)
def test_no_neighbour_is_opened(
    name: str, content: bytes, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory:" / "a").mkdir(parents=True)  # what the URL would be, were it taken for a path
    for neighbour in ("model-00001.safetensors", "model.ckpt.index", ".metadata", "saved_model.pb"):
        memory.pipe(f"/a/{neighbour}", b"neighbour")
        (tmp_path / "memory:" / "a" / neighbour).write_bytes(b"neighbour")
    monkeypatch.chdir(tmp_path)
    memory.pipe(f"/a/{name}", content)
    memory.read.clear()
    with pytest.raises(CheckpointError, match=r"not opened|no file beside it|not a checkpoint|no footer"):
        open_checkpoint(f"memory://a/{name}")
    assert {path for path, _ in memory.read} == {f"/a/{name}"}


class Hub(MemoryFileSystem):
    """The Hugging Face Hub, in memory: what it says of a file, and nothing else."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    sha256 = ""
    refuses: Exception | None = None

    def info(self, path: str, **ways: Any) -> dict[str, Any]:
        assert ways == {"refresh": True, "expand_info": True}
        if self.refuses:
            raise self.refuses
        return {**super().info(path), "blob_id": "1", "lfs": {"sha256": type(self).sha256, "size": 1}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Hub:
    import fsspec.core

    found = Hub(skip_instance_cache=True)
    found.pipe("/org/repo@main/model.pth", files["model.pth"])
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (found, url.removeprefix("hf://")))
    monkeypatch.setattr(Hub, "sha256", hashlib.sha256(files["model.pth"]).hexdigest())
    return found


def test_the_hub_states_a_hash(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "hf://org/repo@main/model.pth"
    assert_whole(open_checkpoint(url).tensors)
    local = fetch(url).resolve()
    local.write_bytes(bytes(local.stat().st_size))  # damaged in the cache, and so fetched again
    assert hashlib.sha256(fetch(url).resolve().read_bytes()).hexdigest() == Hub.sha256
    monkeypatch.setattr(Hub, "sha256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"model.pth: is not what its server says: the hash differs"):
        fetch(url)
    assert [path.name for path in cache.iterdir()] == [local.name]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (401, r"may not be read \(401\); log in first"),
        (404, r"does not exist \(404\)"),
        (503, r"the server fails \(503\)"),
    ],
)
def test_the_hub_refuses(code: int, message: str, hub: Hub) -> None:
    hub.refuses = OSError("https://host/file?token=secret")
    hub.refuses.response = type("Response", (), {"status_code": code})()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint("hf://org/repo@main/model.pth")
    assert "secret" not in str(raised.value)


def test_what_a_driver_says_is_shown_without_secrets(hub: Hub) -> None:
    hub.refuses = ValueError("no good: https://host/a?token=secret\nmore")
    with pytest.raises(CheckpointError, match=r"model.pth: cannot be read: no good: https://host/a; is the address"):
        open_checkpoint("hf://org/repo@main/model.pth")


def test_the_hubs_own_file_system_is_asked_for_ranges_only(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, hf_file_system
    from huggingface_hub.hf_api import RepoFile

    content, fetched = files["model.pth"], []
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"size": len(content), "oid": digest, "pointerSize": 1}
    stated = RepoFile(path="a/model.pth", size=len(content), oid="1", lfs=lfs)
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "get_paths_info", lambda *_, **__: [stated])

    def fetch_range(self: Any, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return content[start:end]

    monkeypatch.setattr(hf_file_system.HfFileSystemFile, "_fetch_range", fetch_range)
    found = open_checkpoint("hf://org/repo@main/a/model.pth")
    assert set(found.specs) == set(TENSORS)
    assert 0 < sum(fetched) < len(content) / 20
    assert hashlib.sha256(fetch("hf://org/repo@main/a/model.pth").resolve().read_bytes()).hexdigest() == digest


UNNEEDED = {"training.log": b"x" * 100, "a/b/c/d/e.bin": b"x"}


def shards(number: int = 2) -> dict[str, bytes]:
    """A folder of the Hub, with what nobody needs beside the weights."""
    parts = [f"parts/{one}.safetensors" for one in range(number)]
    holders = {name: parts[one % number] for one, name in enumerate(TENSORS)}
    files = {part: save({name: TENSORS[name] for name in TENSORS if holders[name] == part}) for part in parts}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": holders}).encode()
    return {**files, "config.json": b"{}", **UNNEEDED}


@pytest.fixture
def shelf(memory: Memory, tmp_path: Path) -> Path:
    """A folder in fsspec's memory, and the same on disk."""
    for name, content in shards().items():
        memory.pipe(f"/org/repo/{name}", content)
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(content)
    memory.read.clear()
    return tmp_path / "repo"


@pytest.mark.parametrize("url", ["memory://org/repo", "memory://org/repo/"])
def test_a_folder_is_read_by_what_its_index_names(url: str, shelf: Path, memory: Memory) -> None:
    found, local = open_checkpoint(url), open_checkpoint(shelf)
    assert (found.format, found.specs, found.url) == (local.format, local.specs, "memory://org/repo")
    assert sum(size for _, size in memory.read) < sum(file.size for file in local.files) / 20
    assert {path for path, _ in memory.read} == {
        f"/org/repo/{name}" for name in shards() if "json" in name or "parts" in name
    }
    assert found.sha256() == local.sha256()
    assert_whole(found.tensors)


def test_a_folder_is_fetched_by_what_its_index_names(shelf: Path, memory: Memory, cache: Path) -> None:
    found = open_checkpoint(fetch("memory://org/repo"))
    assert_whole(found.tensors)
    assert sorted(path.stat().st_size for path in cache.iterdir()) == sorted(file.size for file in found.files)
    assert all(file.path.resolve().parent == cache for file in found.files)
    assert sum(size for _, size in memory.read) <= sum(file.size for file in found.files) + 4096
    with pytest.raises(CheckpointError, match=r"memory://org/repo: is a folder; fetch the folder and give its path"):
        remote.fetch_path("memory://org/repo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts/1.safetensors": None}, "needs parts/1.safetensors, which is missing"),
        ({"model.safetensors.index.json": INDEX.replace(b"model-", b"../x/")}, "which is no file beside it"),
        ({"model.safetensors.index.json": INDEX.replace(b"model-", b"http://x/")}, "which is no file beside it"),
        ({"model.safetensors.index.json": None}, "is a folder without a checkpoint"),
        ({"checkpoint": b'model_checkpoint_path: "m"'}, "of which there is no index"),
        ({"checkpoint": b'model_checkpoint_path: "../x/m"'}, "which lies outside its folder"),
        ({"m.index": b"bytes"}, r"memory://org/repo/m\.index: "),
        ({"_METADATA": b"{}", "model.safetensors.index.json": None}, "not opened; fetch the folder"),
    ],
)
def test_a_folder_that_cannot_be_read(
    change: dict[str, bytes | None], message: str, shelf: Path, memory: Memory
) -> None:
    memory.pipe("/org/x/00001.safetensors", b"secret")
    for name, content in change.items():
        if content is None:
            memory.rm(f"/org/repo/{name}")
        else:
            memory.pipe(f"/org/repo/{name}", content)
    memory.read.clear()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("memory://org/repo")
    assert all(path.startswith("/org/repo/") for path, _ in memory.read)


@pytest.mark.parametrize("url", ["memory://org/tf", "memory://org/tf/model.ckpt.index"])
@pytest.mark.parametrize("way", [str, fetch])
def test_a_tensorflow_checkpoint_is_read_by_what_its_index_names(
    url: str, way: Callable[[str], Any], memory: Memory, cache: Path, tmp_path: Path
) -> None:
    data, more = bytes(range(24)), bytes(range(12))
    rows = {b"": write.header(2), b"w": write.entry(data, (2, 3)), b"x": write.entry(more, (3,), shard=1)}
    write.bundle(tmp_path / "model.ckpt", rows, data, more)
    (tmp_path / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt"')
    for path in tmp_path.glob("*"):
        if path.is_file():
            memory.pipe(f"/org/tf/{path.name}", path.read_bytes())
    memory.pipe("/org/tf/model.ckpt.meta", b"graph")
    memory.read.clear()
    found, local = open_checkpoint(way(url)), open_checkpoint(tmp_path)
    assert (found.format, found.specs, found.sha256()) == (local.format, local.specs, local.sha256())
    assert all(tensor.read() == local.tensors[name].read() for name, tensor in found.tensors.items())
    assert not {path for path, _ in memory.read} & {"/org/tf/model.ckpt.meta"}


def test_a_saved_model_is_a_folder(memory: Memory, tmp_path: Path) -> None:
    data = bytes(range(24))
    (tmp_path / "variables").mkdir()
    write.bundle(tmp_path / "variables" / "variables", {b"": write.header(), b"w": write.entry(data, (2, 3))}, data)
    for path in (tmp_path / "variables").iterdir():
        memory.pipe(f"/org/saved/variables/{path.name}", path.read_bytes())
    found, local = open_checkpoint("memory://org/saved"), open_checkpoint(tmp_path)
    assert (found.format, found.specs, found.sha256()) == (local.format, local.specs, local.sha256())
    assert found.tensors["w"].read() == data


def test_a_repository_of_the_hub_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub's own file system sees it, with the Hub's answers made up."""
    from huggingface_hub import HfApi, hf_file_system
    from huggingface_hub.hf_api import RepoFile, RepoFolder

    files = shards()
    entries = {name: RepoFile(path=name, size=len(content), oid="1") for name, content in files.items()}
    entries["parts"] = RepoFolder(path="parts", oid="1")

    def list_tree(self: Any, repo: str, path: str = "", **_: Any) -> Iterator[Any]:
        return (entry for name, entry in entries.items() if name.rpartition("/")[0] == (path or ""))

    def tell(self: Any, repo: str, paths: Any, **_: Any) -> list[Any]:
        return [entries[path] for path in ([paths] if isinstance(paths, str) else paths)]

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "list_repo_tree", list_tree)
    monkeypatch.setattr(HfApi, "get_paths_info", tell)

    def fetch_range(self: Any, start: int, end: int) -> bytes:
        return files[self.resolved_path.path_in_repo][start:end]

    monkeypatch.setattr(hf_file_system.HfFileSystemFile, "_fetch_range", fetch_range)
    assert_whole(open_checkpoint("hf://org/repo@main").tensors)


def test_a_cache_that_cannot_be_written_is_told(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/a.pth", b"a")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"set XDG_CACHE_HOME"):
        fetch("memory://a.pth")


def test_drivers_load_when_a_url_is_given(tmp_path: Path) -> None:
    import subprocess
    import sys

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    code = (
        "import sys; from converters import open_checkpoint; open_checkpoint(sys.argv[1]); "
        "sys.exit('fsspec' in sys.modules or 'converters.readers.remote' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=True)


def test_a_remote_path_has_no_neighbours() -> None:
    path = RemotePath("memory://a/b.pth")
    assert (path.name, path.suffix, path.parent.url) == ("b.pth", ".pth", "memory://a")
    assert not path.is_file() and not path.with_name("c").exists() and not list(path.parent.glob("*"))
