"""LoRAs by path, name, URL and repository of the hub: found, fetched once, refused in one line."""

from __future__ import annotations

import base64
import io
import ipaddress
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import dmd2.models.adapters.lora_files
from dmd2.cli import generate
from dmd2.models.adapters.lora import Lora
from dmd2.models.adapters.lora_files import GUARD, LoraFiles, split_scale
from dmd2.runtime.errors import UserError
from dmd2.weights.guard import Guard, Patience
from tests.hub import Hub, sha256

KEY = "lora_unet_conv_in"


def content(value: float) -> bytes:
    pair = {f"{KEY}.lora_down.weight": torch.full((2, 4), value), f"{KEY}.lora_up.weight": torch.ones(4, 2)}
    return save(pair)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client in this process knows as the only one; it also serves files at any URL."""
    hub = Hub()
    for name in [*os.environ]:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.close()


@pytest.fixture
def files(tmp_path: Path) -> LoraFiles:
    weights = tmp_path / "weights"
    (weights / "lora").mkdir(parents=True)
    (weights / "lora" / "own.safetensors").write_bytes(content(1))
    guard = replace(GUARD, most_bytes=10_000, seconds=5, allowed=(ipaddress.ip_network("127.0.0.0/8"),))
    return LoraFiles(weights, tmp_path / "cache", guard=guard)


def test_the_weights_own_by_name(files: LoraFiles) -> None:
    assert files.find("own").sha256 == files.find("own.safetensors").sha256 == sha256(content(1))
    assert files.find("own") is files.find("own")  # read once
    (files.folder / "lora" / "own.safetensors").write_bytes(content(2) + b"")
    assert files.find("own").sha256 == sha256(content(2))  # unless it changes


def test_paths_only_where_they_are_allowed(files: LoraFiles, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(content(3))
    mine = LoraFiles(files.folder, files.cache, paths=True)
    assert mine.find(str(path)).sha256 == sha256(content(3))
    for source in (str(path), "../some", "../../some.safetensors", f"file://{path}", "~/x", "lora/../../x", "/"):
        with pytest.raises(UserError, match=r"expected an https URL, .*, or one of these weights' own: own$"):
            files.find(source)
    with pytest.raises(UserError, match="expected an https URL"):
        mine.find(str(tmp_path / "nothing.safetensors"))


@pytest.mark.parametrize(
    "source",
    ["l" * 300, "l" * 9000, f"me/{'l' * 300}", "me/a--b", "me/a.git", "~nobody-here", "\0", "a/b/../c.safetensors"],
)
def test_names_that_no_file_and_no_repository_has(files: LoraFiles, source: str) -> None:
    """Not even for the system or for the hub: one line with what would be valid, and none of the server's paths."""
    for each in (files, LoraFiles(files.folder, files.cache, paths=True)):
        with pytest.raises(UserError, match="expected an https URL") as error:
            each.find(source)
        assert str(files.folder) not in str(error.value) and len(str(error.value)) <= 500


def test_a_url_is_fetched_once(files: LoraFiles, hub: Hub) -> None:
    hub.push(
        "me/style", {"a.safetensors": content(4), "big.safetensors": bytes(20_000), "text.safetensors": b"hello"}
    )
    url = f"{hub.endpoint}/me/style/resolve/main"
    for _ in range(2):
        found = files.find(f"{url}/a.safetensors?token=secret")
        assert found.sha256 == sha256(content(4)) and "secret" not in found.name
    assert len(hub.lines("GET /cdn")) == 1
    with pytest.raises(UserError, match="LoRA: larger than 0 MB"):
        files.find(f"{url}/big.safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        files.find(f"{url}/text.safetensors")
    with pytest.raises(UserError, match="LoRA: the server answers 404"):
        files.find(f"{url}/nothing.safetensors")
    with pytest.raises(UserError, match=r"refused, because 127\.0\.0\.1 is no public address"):
        replace(files, guard=GUARD).find(f"{url}/b.safetensors")
    assert len(list(files.cache.iterdir())) == 1  # what is a LoRA


def test_a_lora_in_a_data_url_is_read_and_not_cached(files: LoraFiles) -> None:
    url = f"data:application/octet-stream;base64,{base64.b64encode(content(5)).decode()}"
    found = files.find(url)
    assert (found.name, found.sha256) == ("data URL", sha256(content(5)))
    assert not files.cache.exists()


def test_a_repository_of_the_hub_is_downloaded_once_for_each_commit(files: LoraFiles, hub: Hub) -> None:
    hub.push("me/one", {"README.md": b"hi", "style.safetensors": content(6)})
    for source in ("me/one", "me/one/style.safetensors", "me/one"):
        assert files.find(source).sha256 == sha256(content(6))
    assert len(hub.lines("GET /cdn")) == 1
    hub.push("me/one", {"style.safetensors": content(7)})
    assert files.find("me/one").sha256 == sha256(content(7))  # the newest commit

    hub.push("me/two", {"a.safetensors": content(1), "b/c.safetensors": content(2)})
    assert files.find("me/two/b/c.safetensors").sha256 == sha256(content(2))
    with pytest.raises(UserError, match=r"me/two: has 2 safetensors files \(a\.safetensors, b/c\.safetensors\)"):
        files.find("me/two")
    hub.push("me/usual", {"pytorch_lora_weights.safetensors": content(8), "b.safetensors": content(1)})
    assert files.find("me/usual").sha256 == sha256(content(8))


def test_what_the_hub_has_not_or_should_not_be_had(files: LoraFiles, hub: Hub) -> None:
    hub.push("me/bin", {"lora.bin": b"pickle"})
    hub.push("me/big", {"lora.safetensors": bytes(20_000)})
    hub.push("me/bad", {"lora.safetensors": content(9)})
    hub.on("GET /cdn", damage=True)
    for source, message in (
        ("me/nothing", "LoRA me/nothing: the hub answers 404"),
        ("me/bin", r"has 0 safetensors files \(none\)"),
        ("me/bin/x.safetensors", r"has no x\.safetensors; expected one of none"),
        ("me/big", r"lora\.safetensors: larger than 0 MB"),
        ("me/bad", r"lora\.safetensors: came damaged"),
    ):
        with pytest.raises(UserError, match=message):
            files.find(source)
    assert not list(files.cache.glob("*"))


def test_strangers_get_nothing_by_the_operators_token(
    files: LoraFiles, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("me/private", {"lora.safetensors": content(1)})
    hub.token = "mine"
    monkeypatch.setenv("HF_TOKEN", "mine")
    with pytest.raises(UserError, match="the hub answers 401"):
        files.find("me/private")
    assert replace(files, token=None).find("me/private").sha256 == sha256(content(1))


def test_no_hub_no_lora(files: LoraFiles, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.close()
    with pytest.raises(UserError, match=r"LoRA me/one: .*check the network"):
        files.find("me/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"LoRA me/one: .*HF_HUB_OFFLINE"):
        files.find("me/one")


def test_the_cache_does_not_grow_for_ever(files: LoraFiles, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(content(0))
    monkeypatch.setattr(dmd2.models.adapters.lora_files, "KEPT_FILES", 3 * size)
    monkeypatch.setattr(dmd2.models.adapters.lora_files, "KEPT_LORAS", 2)
    files = replace(files)
    hub.push("me/many", {f"{i}.safetensors": content(i) for i in range(6)})
    for i in range(6):
        found = files.find(f"me/many/{i}.safetensors")
        assert found.sha256 == sha256(content(i))
        for path in files.cache.glob("*"):  # the file system's clock is coarse
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    assert len(list(files.cache.glob("*"))) == 3
    assert files._read.cache_info().currsize == 2
    assert files.find("me/many/5.safetensors").sha256 == sha256(content(5))


def test_several_loras_are_found_each_with_its_own_scale(files: LoraFiles) -> None:
    (files.folder / "lora" / "other.safetensors").write_bytes(content(2))
    found = files.find_all("own other:0.25  own:-1", 0.5)
    assert [(lora.sha256, scale) for lora, scale in found] == [
        (sha256(content(1)), 0.5),
        (sha256(content(2)), 0.25),
        (sha256(content(1)), -1.0),
    ]
    assert files.find_all("") == ()
    with pytest.raises(UserError, match="LoRA: 6 at once; expected at most 5"):
        files.find_all("own " * 6)


def test_all_of_a_request_have_one_deadline_and_end_with_their_client(
    files: LoraFiles, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five slow ones do not take five times as long as may be."""
    hub.push("me/style", {"a.safetensors": content(1), "b.safetensors": content(2)})
    begun: list[Patience] = []
    real = Guard.fetch

    def fetch(self: Guard, url: str, file: BinaryIO, field: str, patience: Patience) -> None:
        begun.append(patience)
        real(self, url, file, field, patience)

    monkeypatch.setattr(Guard, "fetch", fetch)
    gone = threading.Event()
    url = f"{hub.endpoint}/me/style/resolve/main"
    assert len(files.find_all(f"{url}/a.safetensors {url}/b.safetensors", gone=gone)) == 2
    assert begun[0] is begun[1]
    gone.set()
    for source in (f"{url}/a.safetensors?new", "me/style/a.safetensors"):
        with pytest.raises(UserError, match="the download was given up: nobody waits for it"):
            files.find_all(source, gone=gone)
    assert len(list(files.cache.iterdir())) == 2  # nothing half-written is left


def test_a_download_from_the_hub_ends_with_its_client_and_has_the_size_it_should_have(hub: Hub) -> None:
    """Asked at every block: not only once all of it, or 10 MB, are here."""
    hub.push("me/slow", {"a.safetensors": content(1)})
    url, size, gone = f"{hub.endpoint}/me/slow/resolve/main/a.safetensors", len(content(1)), threading.Event()

    def download(size: int) -> bytes:
        file = io.BytesIO()
        dmd2.models.adapters.lora_files._download(url, file, {}, size, "LoRA", Patience(3600, gone))
        return file.getvalue()

    assert download(size) == content(1)
    for wrong in (size - 1, size + 1):
        with pytest.raises(UserError, match="LoRA: came cut or too long"):
            download(wrong)
    gone.set()
    with pytest.raises(UserError, match="LoRA: the download was given up"):
        download(size)


def test_a_repository_of_endless_files_is_given_up(
    files: LoraFiles, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("me/many", {f"{i}.txt": b"" for i in range(40)} | {"z.safetensors": content(1)})
    assert files.find("me/many").sha256 == sha256(content(1))
    monkeypatch.setattr(dmd2.models.adapters.lora_files, "MOST_LISTED", 15)
    before = len(hub.lines("/tree/"))
    with pytest.raises(UserError, match="LoRA me/many: more than 15 files; expected a repository of a LoRA"):
        files.find("me/many")
    assert len(hub.lines("/tree/")) == before + 2  # pages of ten


PEFTS = save({"base_model.model.conv_in.lora_A.weight": torch.ones(2, 4), "conv_in.lora_B.weight": torch.ones(4, 2)})
SETTINGS = b'{"peft_type": "LORA", "r": 2, "lora_alpha": %d}'


def alphas(lora: Lora) -> set[float | None]:
    return {factors.alpha for factors in lora.layers.values()}


def test_pefts_settings_come_along(files: LoraFiles, hub: Hub, tmp_path: Path) -> None:
    """Else the strength is another: from the hub, from any server, of a folder, of the weights' own."""
    two = {"adapter_model.safetensors": PEFTS, "adapter_config.json": SETTINGS % 8, "README.md": b""}
    hub.push("me/peft", two)
    assert alphas(files.find("me/peft")) == {8}
    hub.push("me/peft", two | {"adapter_config.json": SETTINGS % 4})
    assert alphas(files.find("me/peft")) == {4}
    many = {f"text_encoder/{name}": content for name, content in two.items()} | {"x.safetensors": content(1)}
    hub.push("me/many", {f"unet/{name}": content for name, content in two.items()} | many)
    assert alphas(files.find("me/many/unet/adapter_model.safetensors")) == {8}
    assert alphas(files.find(f"{hub.endpoint}/me/many/tree/main/unet")) == {8}

    url = f"{hub.endpoint}/me/peft/resolve/main/adapter_model.safetensors?download=true"
    assert alphas(files.find(url)) == {4}
    hub.push("me/bare", {"adapter_model.safetensors": PEFTS})
    assert alphas(files.find(f"{hub.endpoint}/me/bare/resolve/main/adapter_model.safetensors")) == {None}
    hub.on("GET /me/down/resolve/main/adapter_config", status=503)
    hub.push("me/down", two)
    with pytest.raises(UserError, match=r"^LoRA: adapter_config\.json: the server answers 503"):
        files.find(f"{hub.endpoint}/me/down/resolve/main/adapter_model.safetensors")

    for folder in (files.folder / "lora" / "mine", tmp_path / "folder"):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(PEFTS)
        (folder / "adapter_config.json").write_bytes(SETTINGS % 3)
    assert alphas(files.find("mine")) == {3}
    mine = replace(files, paths=True)
    assert alphas(mine.find(str(tmp_path / "folder"))) == {3}
    (tmp_path / "folder" / "adapter_config.json").write_bytes(SETTINGS % 16)
    assert alphas(mine.find(str(tmp_path / "folder"))) == {16}  # read anew
    with pytest.raises(UserError, match="expected an https URL"):
        files.find(str(tmp_path / "folder"))


def test_pages_of_the_hub_are_what_they_are_about(
    files: LoraFiles, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hub.push("me/one", {"style.safetensors": content(1)})
    hub.push("me/one", {"style.safetensors": content(2)})
    hub.push("me/two", {"a.safetensors": content(3), "b/c.safetensors": content(4)})
    for host in ("https://huggingface.co", "huggingface.co", "http://www.huggingface.co", "HF.co", hub.endpoint):
        for page, value in (
            ("me/one", 2),
            ("me/one/", 2),
            ("me/one/blob/main/style.safetensors", 2),
            (f"me/one/blob/{before}/style.safetensors?x=y#z", 1),
            ("me/one/tree/main", 2),
            ("me/two/tree/main/b", 4),
            ("me/two?show_file_info=b%2Fc.safetensors", 4),
        ):
            assert files.find(f"{host}/{page}").sha256 == sha256(content(value)), page
    assert files.find_all("huggingface.co/me/one:0.5")[0][1] == 0.5
    for page in ("me", "spaces/me/one", "me/one/discussions", "datasets/me/one", "me/one/blob/main/../../x"):
        with pytest.raises(
            UserError, match=r"^LoRA huggingface\.co/.*: is no page of a .*; expected an https URL, a rep"
        ):
            files.find(f"huggingface.co/{page}")
    with pytest.raises(UserError, match=r"^LoRA http://\[::1/x: is no URL"):
        files.find("http://[::1/x")


def test_a_page_of_civitai_stands_for_the_file_it_names(files: LoraFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(self: Guard, url: str, file: BinaryIO, field: str, patience: Patience) -> None:
        fetched.append(url)
        file.write(content(1))

    monkeypatch.setattr(Guard, "fetch", fetch)
    for page in (
        "https://civitai.com/models/12/a-style",
        "civitai.com/models/12",
        "civitai.com/models/12?modelVersionId=x",
    ):
        with pytest.raises(
            UserError, match=r"12.*: is a page about a LoRA; expected the address behind its download"
        ):
            files.find(page)
    assert not fetched
    assert files.find("civitai.com/models/12/a-style?modelVersionId=345").sha256 == sha256(content(1))
    files.find("https://civitai.com/api/download/models/678?token=mine")
    files.find("https://example.org/models/1")
    assert fetched == [
        "https://civitai.com/api/download/models/345",
        "https://civitai.com/api/download/models/678?token=mine",
        "https://example.org/models/1",
    ]


def test_what_is_no_lora_is_not_kept(files: LoraFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page to log in with status 200, a file that stops half-way, NaN: the next time the right one is fetched."""
    page = b"\xef\xbb\xbf\n <!DOCTYPE html><html>Please log in</html>"
    answers = [page, content(1)[:-4], content(float("nan")), content(1)]

    def fetch(self: Guard, url: str, file: BinaryIO, field: str, patience: Patience) -> None:
        file.write(answers.pop(0))

    monkeypatch.setattr(Guard, "fetch", fetch)
    url = "https://example.org/style"
    for message in ("style: a web page is there, no safetensors", "cannot be read as safetensors", "NaN"):
        with pytest.raises(UserError, match=message):
            files.find(url)
        assert not list(files.cache.iterdir())
    assert files.find(url).sha256 == sha256(content(1))
    assert files.find(url).sha256 == sha256(content(1)) and not answers


def test_a_file_of_the_cache_that_turned_bad_is_fetched_again(
    files: LoraFiles, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.push("me/one", {"style.safetensors": content(1)})
    for source in ("me/one", f"{hub.endpoint}/me/one/resolve/main/style.safetensors"):
        for bad in (b"<html>", b"", content(1)[:-1], content(float("inf"))):
            assert files.find(source).sha256 == sha256(content(1))
            (kept,) = files.cache.iterdir()
            kept.write_bytes(bad)
            before = len(hub.lines("GET /cdn"))
            assert files.find(source).sha256 == sha256(content(1))
            assert len(hub.lines("GET /cdn")) == before + 1
            assert "it is fetched again" in caplog.messages[-1]
        kept.write_bytes(b"bad")
        hub.on("GET /cdn", damage=True)
        with pytest.raises(UserError):
            files.find(source)
        assert not list(files.cache.iterdir())  # fetched once more, not for ever
        hub.heal()


def test_commas_part_sources_too(files: LoraFiles) -> None:
    (files.folder / "lora" / "other.safetensors").write_bytes(content(2))
    for text in ("own,other:0.25", "own, other:0.25,", " own ,other:0.25", "own other:0.25"):
        assert [(lora.sha256, scale) for lora, scale in files.find_all(text)] == [
            (sha256(content(1)), 1.0),
            (sha256(content(2)), 0.25),
        ]
    url = f"data:application/octet-stream;base64,{base64.b64encode(content(5)).decode()}"
    assert [lora.name for lora, _ in files.find_all(f"own,other {url}")] == ["own", "other", "data URL"]
    with pytest.raises(UserError, match="LoRA: 6 at once; expected at most 5"):
        files.find_all("own," * 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/one", ("me/one", 1.0)),
        ("me/one:0.8", ("me/one", 0.8)),
        ("a.safetensors:.5", ("a.safetensors", 0.5)),
        ("https://a.b/c:2", ("https://a.b/c", 2.0)),
        ("https://a.b:8080/c", ("https://a.b:8080/c", 1.0)),
        ("https://a.b:3", ("https://a.b:3", 1.0)),
        ("C:x", ("C:x", 1.0)),
        ("me/one:-1", ("me/one", -1.0)),
    ],
)
def test_scales_are_split_off(text: str, expected: tuple[str, float]) -> None:
    assert split_scale(text) == expected


@pytest.mark.parametrize("text", ["own:5", "own:-4.1", "own:1000000"])
def test_scales_have_bounds(text: str) -> None:
    with pytest.raises(UserError, match=r"LoRA own: scale .*; expected -4 to 4"):
        split_scale(text)


def test_the_command_lines_loras_may_be_lists_and_files_with_any_name(
    files: LoraFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a, b.safetensors").write_bytes(content(2))
    found = generate._loras([f"{tmp_path}/a, b.safetensors:0.5", "own,own:2"], files.folder)
    assert [(lora.sha256, scale) for lora, scale in found] == [
        (sha256(content(2)), 0.5),
        (sha256(content(1)), 1.0),
        (sha256(content(1)), 2.0),
    ]
    with pytest.raises(UserError, match="expected an https URL"):
        generate._loras(["x" * 5000], files.folder)
