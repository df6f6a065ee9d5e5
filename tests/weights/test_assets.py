"""Published files: fetched once, checked ever after, whole or not there. From a server on the loopback."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from huggingface_hub import constants
from pytest import MonkeyPatch

from dmd2.models.edm.folder import load_edm
from dmd2.runtime.errors import UserError
from dmd2.weights.assets import (
    EDM_STATISTICS,
    EDM_TEACHERS,
    LOCK,
    METRICS,
    Asset,
    chosen,
    obtain,
    obtain_clip,
    read_lock,
)
from tests.hub import Hub
from tests.models.edm.test_published import _edm_modules, network, snapshot, write  # noqa: F401 (a fixture, used unseen)

ASSET = Asset("some/where/file.bin", "a licence")
CONTENT = b"\x00\x01\x02" * 70_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ROOT = Path(__file__).resolve().parents[2]


class Server(ThreadingHTTPServer):
    """Serves one content for every path but /missing. `cut` hangs up after that many bytes."""

    daemon_threads = True
    content = CONTENT
    cut: int | None = None
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_first_download_is_recorded_and_the_second_is_none(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    path = obtain(ASSET, tmp_path / "new", base=server.url, say=said.append)
    assert path == tmp_path / "new" / "file.bin" and path.read_bytes() == CONTENT
    record = json.loads((tmp_path / "new" / LOCK).read_text())
    assert record == {
        "file.bin": {"url": f"{server.url}/some/where/file.bin", "sha256": SHA256, "bytes": len(CONTENT)}
    }
    assert "a licence" in said[0] and SHA256 in said[1]
    assert obtain(ASSET, tmp_path / "new", base=server.url, say=said.append) == path
    assert server.asked == ["/some/where/file.bin"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [LOCK, "file.bin"]


def test_a_recorded_sum_is_the_only_one_accepted(server: Server, tmp_path: Path) -> None:
    """Whether the server's file is another one, or the one on disk was changed, or a copy is offered."""
    lock = tmp_path / "mine.json"
    obtain(ASSET, tmp_path / "one", lock=lock, base=server.url)
    server.content = CONTENT[::-1]
    other = hashlib.sha256(server.content).hexdigest()
    refused(
        lambda: obtain(ASSET, tmp_path / "two", lock=lock, base=server.url), server.url, other, SHA256, "mine.json"
    )
    assert list((tmp_path / "two").iterdir()) == []

    (tmp_path / "copy").write_bytes(server.content)
    refused(lambda: obtain(ASSET, tmp_path / "two", lock=lock, source=tmp_path / "copy"), "copy", other)
    (tmp_path / "one" / "file.bin").write_bytes(b"changed")
    refused(lambda: obtain(ASSET, tmp_path / "one", lock=lock, base=server.url), "one/file.bin", SHA256)
    assert read_lock(lock)["file.bin"].sha256 == SHA256


def test_a_local_copy_needs_no_network(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.bin"
    copy.write_bytes(CONTENT)
    path = obtain(ASSET, tmp_path / "new", source=copy, base="http://127.0.0.1:9")
    assert path.read_bytes() == CONTENT and copy.exists()
    assert read_lock(tmp_path / "new" / LOCK)["file.bin"].sha256 == SHA256
    refused(lambda: obtain(ASSET, tmp_path / "new", source=tmp_path / "none"), "none", "No such file")


def test_a_cut_connection_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.cut = len(CONTENT) - 1
    refused(lambda: obtain(ASSET, tmp_path, base=server.url), "/file.bin", "the download failed")
    assert list(tmp_path.iterdir()) == []
    server.cut = None
    assert obtain(ASSET, tmp_path, base=server.url).read_bytes() == CONTENT


def test_a_failed_download_keeps_the_old_file(server: Server, tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    obtain(ASSET, tmp_path, base=server.url)
    missing = Asset("missing/file.bin", "")
    (tmp_path / "file.bin").unlink()
    before = lock.read_bytes()
    refused(lambda: obtain(missing, tmp_path, base=server.url), "/missing/file.bin", "404")
    assert lock.read_bytes() == before and not (tmp_path / "file.bin").exists()


def test_what_no_lock_lists_is_not_believed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    refused(lambda: obtain(ASSET, tmp_path, base=server.url), "does not list it", "`from`")
    assert obtain(ASSET, tmp_path, source=tmp_path / "file.bin").read_bytes() == CONTENT
    assert obtain(ASSET, tmp_path, base=server.url).read_bytes() == CONTENT and server.asked == []


@pytest.mark.parametrize("content", ["", "[]", '{"file.bin": {"url": "", "sha256": "abc", "bytes": 1}}'])
def test_a_damaged_lock_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    refused(lambda: obtain(ASSET, tmp_path, base="http://127.0.0.1:9"), LOCK, "not a lock file")


def test_names_are_known_and_tell_files_apart() -> None:
    assets = [*METRICS.values(), *EDM_TEACHERS.values(), *EDM_STATISTICS.values()]
    assert len({asset.name for asset in assets}) == len(assets)
    assert all(asset.licence for asset in assets)
    assert not EDM_TEACHERS.keys() & EDM_STATISTICS.keys()
    assert list(chosen(["vgg16"], METRICS)) == ["vgg16"]
    refused(lambda: chosen(["inception", "nothing"], METRICS), "nothing", "inception", "vgg16")


def test_download_edm_converts_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickle = write(tmp_path / "local.pkl", snapshot("ddpmpp"))
    run = script("download-edm").run
    name = "cifar10-32x32-cond-vp"
    for _ in range(2):  # the second time, all is there
        run([name], source=pickle, dest=tmp_path / "edm", lock=None, base="http://127.0.0.1:9")
    assert load_edm(tmp_path / "edm" / name, "cpu").config.resolution == network("ddpmpp").config.resolution
    assert (tmp_path / "edm" / f"edm-{name}.pkl").read_bytes() == pickle.read_bytes()
    printed = capsys.readouterr().out
    assert "CC BY-NC-SA 4.0" in printed and "converted already" in printed
    both = ["ffhq-64x64", "afhqv2-64x64"]
    refused(lambda: run(both, source=pickle, dest=tmp_path, lock=None, base=""), "--from", "one NAME")


def test_download_metrics_fetches_both_files(server: Server, tmp_path: Path) -> None:
    script("download-metrics").run(None, clip=None, source=None, dest=tmp_path, lock=None, base=server.url)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, "inception-2015-12-05.pt", "vgg16.pt"]
    assert sorted(server.asked) == [f"/{asset.path}" for asset in METRICS.values()]


def test_clip_comes_from_the_hub_and_keeps_to_its_commit(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    hub = Hub()
    for name in [*os.environ]:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    for name, value in (changes | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}).items():
        monkeypatch.setattr(constants, name, value)
    try:
        files = {"config.json": b'{"model_type": "clip"}', "model.safetensors": CONTENT, "pytorch_model.bin": b"no"}
        first = hub.push("some/clip", files)
        folder, commit = obtain_clip("some/clip", tmp_path)
        assert commit == first and (folder / "model.safetensors").read_bytes() == CONTENT
        assert not (folder / "pytorch_model.bin").exists()
        second = hub.push("some/clip", files | {"config.json": b"{}"})
        assert obtain_clip("some/clip", tmp_path)[1] == first
        assert obtain_clip("some/clip", tmp_path, second)[1] == second
        refused(lambda: obtain_clip("no/such", tmp_path), "no/such")
    finally:
        huggingface_hub.close_session()
        hub.close()
