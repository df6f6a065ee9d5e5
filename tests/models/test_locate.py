"""Which weights are used, and tars of weights: unpacked whole, safely and once, or not at all."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmd2.weights.fetch
from dmd2.models.locate import locate
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import DEFAULT, MANIFEST, Manifest, read_manifest, verify, write_manifest

FILES = {"unet/model.safetensors": b"\x00\x01" * 50_000, "vae/config.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What locate takes for weights: a manifest and files that match it."""
    folder = tmp_path / "mine"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, Manifest(name="mine", native_size=(64, 64), licence="Apache-2.0"))
    return folder


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"DMD2_CACHE": str(tmp_path / "cache")}


def pack(folder: Path, tar: Path, top: str = ".", mode: str = "w") -> Path:
    with tarfile.open(tar, mode) as archive:
        archive.add(folder, top)
    return tar


def kept(environ: dict[str, str]) -> list[Path]:
    """What lies in the cache, hidden or not."""
    cache = Path(environ["DMD2_CACHE"]) / "weights"
    return list(cache.iterdir()) if cache.exists() else []


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Which


def test_the_argument_comes_before_the_variable_before_the_download_before_the_embedded(tmp_path: Path) -> None:
    given, variable, root = tmp_path / "given", tmp_path / "variable", tmp_path / "root"
    sdxl = root / "weights" / "sdxl"
    for path in (given, variable, sdxl):
        path.mkdir(parents=True)
    environ = {"DMD2_WEIGHTS": str(variable)}
    assert locate(given, environ, root) == given
    assert locate(str(given), environ, root) == given
    assert locate(None, environ, root) == variable
    assert locate("", environ, root) == variable  # an empty one is none
    assert locate(None, {"DMD2_WEIGHTS": ""}, root) == root / "weights" / "emoji"  # a download that is not finished
    (sdxl / MANIFEST).write_text("{}")
    assert locate(None, {}, root) == sdxl


def test_the_embedded_weights_are_the_default() -> None:
    downloaded = DEFAULT.parent / "sdxl"
    assert locate(environ={}) == (downloaded if (downloaded / MANIFEST).exists() else DEFAULT)


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nowhere: no such file or folder; expected a folder, a tar or the URL"
    ) as error:
        locate(tmp_path / "nowhere", {})
    one_line(error)
    with pytest.raises(UserError, match="no such file"):
        locate("ftp://localhost/weights.tar", {})


def test_home_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/mine", {}) == folder
    pack(folder, tmp_path / "mine.tar")
    found = locate("~/mine.tar", {})
    assert found.parent == tmp_path / ".cache" / "dmd2" / "weights"


# Tars on this machine


@pytest.mark.parametrize("top", [".", "", "weights", "./weights"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_tar_is_unpacked(
    folder: Path, tmp_path: Path, environ: dict[str, str], top: str, suffix: str, mode: str
) -> None:
    found = locate(pack(folder, tmp_path / f"any{suffix}", top, mode), environ)
    assert found.parent == tmp_path / "cache" / "weights"
    assert {p.relative_to(found).as_posix() for p in found.rglob("*") if p.is_file()} == {*FILES, MANIFEST}
    assert all((found / name).read_bytes() == content for name, content in FILES.items())
    assert kept(environ) == [found]


def test_tar_is_unpacked_once_and_known_by_its_content(
    folder: Path, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = locate(pack(folder, tmp_path / "one.tar"), environ)
    (tmp_path / "one.tar").rename(tmp_path / "other.tar")
    with monkeypatch.context() as patch:
        patch.setattr(dmd2.weights.fetch, "_unpack", lambda *args: pytest.fail("unpacked again"))
        assert locate(tmp_path / "other.tar", environ) == first

    (folder / "vae" / "config.json").write_text('{"new": true}')
    write_manifest(folder, read_manifest(folder))
    second = locate(pack(folder, tmp_path / "other.tar"), environ)
    assert second != first and (second / "vae" / "config.json").read_text() == '{"new": true}'
    assert sorted(kept(environ)) == sorted([first, second])


def test_a_faster_process_wins(
    folder: Path, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar, rename = pack(folder, tmp_path / "one.tar"), Path.rename

    def second(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        locate(tar, environ)  # the other process does all of it just before this one's last step
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second)
    found = locate(tar, environ)
    assert kept(environ) == [found]
    verify(found, read_manifest(found))


def damaged_unet(folder: Path) -> str:
    (folder / "unet" / "model.safetensors").write_bytes(b"damaged")
    return "unet/model.safetensors: sha256 is"


def missing_config(folder: Path) -> str:
    (folder / "vae" / "config.json").unlink()
    return "vae/config.json: missing"


def wrong_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text("{}")
    return "dmd2.json: name"


def no_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return "has no dmd2.json at its top or in one folder there"


@pytest.mark.parametrize("damage", [damaged_unet, missing_config, wrong_manifest, no_manifest])
def test_tar_of_broken_weights_names_the_file_and_is_not_kept(
    folder: Path, tmp_path: Path, environ: dict[str, str], damage: Callable[[Path], str]
) -> None:
    expected = damage(folder)
    tar = pack(folder, tmp_path / "broken.tar")
    with pytest.raises(UserError) as error:
        locate(tar, environ)
    assert one_line(error).startswith(f"{tar}: {expected}")
    assert kept(environ) == []


def test_tar_of_two_weights_is_refused(folder: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    with tarfile.open(tmp_path / "two.tar", "w") as archive:
        archive.add(folder, "one")
        archive.add(folder, "other")
    with pytest.raises(UserError, match="in one folder there"):
        locate(tmp_path / "two.tar", environ)
    assert kept(environ) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9])
def test_truncated_tar_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, environ: dict[str, str], mode: str, share: float
) -> None:
    data = pack(folder, tmp_path / "cut.tar", mode=mode).read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError) as error:
        locate(tmp_path / "cut.tar", environ)
    assert one_line(error).startswith(f"{tmp_path / 'cut.tar'}: ")
    assert kept(environ) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("damage", ["at the header", "within the header", "checksum", "kind of length"])
def test_tar_cut_or_damaged_in_a_later_header_is_refused(
    folder: Path, tmp_path: Path, environ: dict[str, str], mode: str, damage: str
) -> None:
    (tmp_path / "README.md").write_text("of no matter to the manifest, which every file before it satisfies")
    tar = pack(folder, tmp_path / "whole.tar")
    with tarfile.open(tar, "a") as archive:
        archive.add(tmp_path / "README.md", "README.md")
    with tarfile.open(tar) as archive:
        offset = archive.getmember("README.md").offset
    data = bytearray(tar.read_bytes())
    match damage:
        case "at the header":
            del data[offset:]
        case "within the header":
            del data[offset + 100 :]
        case "checksum":
            data[offset] ^= 1
        case _:
            data[offset + 124 : offset + 136] = b"not a number"
    cut = tmp_path / "cut.tar"
    cut.write_bytes(gzip.compress(data) if mode == "w:gz" else data)
    with pytest.raises(UserError) as error:
        locate(cut, environ)
    assert one_line(error).startswith(f"{cut}: no tar, or a damaged one: ")
    assert kept(environ) == []


def test_tar_with_extended_headers_without_end_is_one_line(tmp_path: Path, environ: dict[str, str]) -> None:
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 10**10  # would be read into memory
    name = tarfile.TarInfo("././@LongLink")
    name.type = tarfile.GNUTYPE_LONGNAME
    for path, blocks in ((tmp_path / "huge.tar", [huge]), (tmp_path / "chain.tar", [name] * 3000)):
        path.write_bytes(tarfile.TarInfo("first").tobuf() + b"".join(info.tobuf() for info in blocks))
        with pytest.raises(UserError, match="no tar, or a damaged one") as error:
            locate(path, environ)
        one_line(error)
    assert kept(environ) == []


def test_tar_of_folders_1200_deep_or_of_too_many_files_is_one_line(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmd2.weights.fetch, "MOST_MEMBERS", 100)
    for names, why in ((["a/" * 1200 + "end"], "1201 folders deep"), ([f"{i}" for i in range(101)], "more than 100")):
        with tarfile.open(tmp_path / "bad.tar", "w") as archive:
            for name in names:
                archive.addfile(member(name), io.BytesIO(b"bad"))
        with pytest.raises(UserError, match=why) as error:
            locate(tmp_path / "bad.tar", environ)
        assert len(one_line(error)) < 500
    assert kept(environ) == []


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0, 1), st.booleans())
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_tar_is_whole_or_one_line(
    folder: Path, tmp_path: Path, flips: list[tuple[float, int]], share: float, cut: bool
) -> None:
    data = bytearray(pack(folder, tmp_path / "whole.tar").read_bytes())
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for where, value in flips:  # most of a tar is content, which the checksums guard: aim at the headers
        at = headers[int(where * (len(headers) - 1))] + int(where * 1e6) % 512
        data[at] = value
    tar = tmp_path / "damaged.tar"
    tar.write_bytes(data[: int(len(data) * share)] if cut else data)
    with tempfile.TemporaryDirectory(dir=tmp_path) as cache:
        try:
            found = locate(tar, {"DMD2_CACHE": cache})
        except UserError as error:
            assert str(error).isprintable() and not list((Path(cache) / "weights").glob("*"))
        else:
            verify(found, read_manifest(found))
            assert {name: (found / name).read_bytes() for name in FILES} == FILES


def test_what_is_no_tar_is_one_line(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "page.tar").write_text("<!doctype html>" * 100)
    with pytest.raises(UserError, match=r"page\.tar: no tar, or a damaged one") as error:
        locate(tmp_path / "page.tar", environ)
    one_line(error)
    assert kept(environ) == []


# Tars that mean harm


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 3) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (member("../outside"), "leads out of the folder"),
        (member("unet/../../../outside"), "leads out of the folder"),
        (member("/outside"), "leads out of the folder"),
        (member("link", tarfile.SYMTYPE, "/etc/hostname"), "neither a file nor a folder"),
        (member("link", tarfile.SYMTYPE, "vae/config.json"), "neither a file nor a folder"),
        (member("link", tarfile.LNKTYPE, "../../../outside"), "neither a file nor a folder"),
        (member("pipe", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("device", tarfile.CHRTYPE), "neither a file nor a folder"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_dangerous_member_is_refused_by_name(
    folder: Path, tmp_path: Path, environ: dict[str, str], bad: tarfile.TarInfo, why: str
) -> None:
    tar = pack(folder, tmp_path / "bad.tar")
    with tarfile.open(tar, "a") as archive:
        archive.addfile(bad, io.BytesIO(b"bad"))
    with pytest.raises(UserError) as error:
        locate(tar, environ)
    assert one_line(error).startswith(f"{tar}: {bad.name}: refused") and why in str(error.value)
    assert kept(environ) == []
    assert not list(tmp_path.rglob("outside")) and not Path("/outside").exists()


@pytest.mark.parametrize("filters", [True, False])
def test_modes_in_a_tar_are_harmless(
    folder: Path, tmp_path: Path, environ: dict[str, str], filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:  # as Python 3.11.3 and older
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (folder / "vae" / "config.json").chmod(0o4777)
    (folder / "unet" / "model.safetensors").chmod(0o400)
    found = locate(pack(folder, tmp_path / "modes.tar"), environ)
    assert (found / "vae" / "config.json").stat().st_mode & 0o7022 == 0  # no set-uid, written by nobody else
    assert (found / "unet" / "model.safetensors").stat().st_mode & 0o600 == 0o600


def test_tar_for_which_there_is_no_room_is_refused(folder: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    with tarfile.open(tmp_path / "huge.tar", "w") as archive:
        info = tarfile.TarInfo("zeros")  # a sparse file: a few bytes in the tar, 10 PB unpacked
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10**16)}
        archive.addfile(info)
    with pytest.raises(
        UserError, match=r"huge\.tar: needs 10000000\.0 GB or more, but the cache's disk has"
    ) as error:
        locate(tmp_path / "huge.tar", environ)
    one_line(error)
    assert kept(environ) == []


def test_disk_that_fills_up_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = pack(folder, tmp_path / "one.tar")

    def full(self: tarfile.TarFile, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(UserError, match=r"one\.tar: cannot be unpacked into .*: .*No space left on device") as error:
        locate(tar, environ)
    one_line(error)
    assert kept(environ) == []


# URLs


class Server(ThreadingHTTPServer):
    """Serves one content on the loopback. `cut` stops after that many bytes, without a word."""

    daemon_threads = True
    content = b""
    cut: int | None = None
    asked: list[str]
    hang_up: threading.Event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("moved", "found"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/found"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content[: self.server.cut])
        elif self.path.startswith("/huge"):
            self.send_response(200)
            self.send_header("Content-Length", str(10**16))
            self.end_headers()
        elif self.path.startswith("/silent"):
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.server.hang_up.wait(10)
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.hang_up = [], threading.Event()
    server.content = pack(folder, tmp_path / "served.tgz", "weights", "w:gz").read_bytes()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.hang_up.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_url_is_downloaded_once(server: Server, environ: dict[str, str]) -> None:
    found = locate(f"{server.url}/found.tgz", environ)
    verify(found, read_manifest(found))
    assert kept(environ) == [found] and server.asked == ["/found.tgz"]
    server.shutdown()
    server.server_close()  # no network is needed any more
    assert locate(f"{server.url}/found.tgz", environ) == found
    assert locate(None, environ | {"DMD2_WEIGHTS": f"{server.url}/found.tgz"}) == found


def test_url_that_went_through_path_is_still_one(server: Server, environ: dict[str, str]) -> None:
    found = locate(Path(f"{server.url}/found.tgz"), environ)
    assert locate(f"{server.url}/found.tgz", environ) == found
    assert server.asked == ["/found.tgz"]


def test_redirections_are_followed_and_queries_tell_urls_apart(server: Server, environ: dict[str, str]) -> None:
    one = locate(f"{server.url}/moved?version=1", environ)
    other = locate(f"{server.url}/moved?version=2", environ)
    assert server.asked == ["/moved?version=1", "/found?version=1", "/moved?version=2", "/found?version=2"]
    assert sorted(kept(environ)) == sorted([one, other])


def test_bad_answer_is_one_line_that_names_the_url_but_no_secret(server: Server, environ: dict[str, str]) -> None:
    url = server.url.replace("//", "//me:password@")
    with pytest.raises(UserError) as error:
        locate(f"{url}/gone.tar?signature=secret", environ)
    assert one_line(error) == f"{server.url}/gone.tar: the server answered 404 Not Found"
    assert kept(environ) == []


def test_cut_transfer_is_noticed_and_can_be_repeated(server: Server, environ: dict[str, str]) -> None:
    server.cut = len(server.content) - 1
    with pytest.raises(UserError, match=r"/found\.tgz: the download failed: .* complete message body") as error:
        locate(f"{server.url}/found.tgz", environ)
    one_line(error)
    assert kept(environ) == []
    server.cut = None
    found = locate(f"{server.url}/found.tgz", environ)
    verify(found, read_manifest(found))


def test_server_that_falls_silent_is_given_up(
    server: Server, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmd2.weights.fetch, "SILENCE", 0.1)
    with pytest.raises(UserError, match="/silent: the download failed: timed out"):
        locate(f"{server.url}/silent", environ)
    assert kept(environ) == []


def test_download_for_which_there_is_no_room_is_refused(server: Server, environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"/huge: needs 10000000\.0 GB or more"):
        locate(f"{server.url}/huge", environ)
    assert kept(environ) == []


def test_no_server_and_no_url_are_one_line(server: Server, environ: dict[str, str]) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"/found\.tgz: the download failed: .*refused") as error:
        locate(f"{server.url}/found.tgz", environ)
    one_line(error)
    for url in ("http://:80/a.tar", "http://[::1/a.tar", "https://host:port/a.tar"):
        with pytest.raises(UserError, match="the download failed") as error:
            locate(url, environ)
        one_line(error)
    assert kept(environ) == []


def test_page_instead_of_a_tar_is_one_line(server: Server, environ: dict[str, str]) -> None:
    server.content = b"<!doctype html>" * 100
    with pytest.raises(UserError, match=r"/found\.tar: no tar, or a damaged one") as error:
        locate(f"{server.url}/found.tar", environ)
    one_line(error)
    assert kept(environ) == []
