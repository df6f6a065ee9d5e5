import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.data.prompts import read_prompts
from dmd2.models.edm.folder import read_edm_config
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import atomic_bytes, atomic_path, atomic_text, read_bounded, sha256_file
from dmd2.runtime.precision import recorded_precision
from dmd2.weights.assets import read_lock


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_and_replaced_files_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    atomic_text(path, "σ = 80\n")
    assert path.read_bytes() == "σ = 80\n".encode()
    atomic_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    with atomic_path(path) as temporary:
        temporary.write_text("third")
    assert path.read_text() == "third"
    assert names(tmp_path) == ["notes.txt"]


def test_temporary_is_a_hidden_sibling_that_no_suffix_glob_finds(target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".")
        assert temporary not in target.parent.glob("*.safetensors")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_mid_write_keeps_the_old_file(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("ha")
        raise error("half-way")
    assert target.read_text() == "old"
    assert names(target.parent) == [target.name]


def test_block_that_writes_nothing_is_an_error(target: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_text() == "old"


def test_target_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        atomic_text(folder, "text")
    assert names(tmp_path) == ["folder"]


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_text(tmp_path / "nowhere" / "file", "text")


def test_killed_process_leaves_the_old_file(target: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from dmd2.runtime.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code, target], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(names(target.parent)) == 2  # the half-written one is still there, hidden
    assert list(target.parent.glob("*.safetensors")) == [target]

    atomic_text(target, "new")  # and the leftover is in nobody's way
    assert target.read_text() == "new"


def test_file_is_flushed_before_the_rename_and_the_folder_after(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def noted_replace(source: Path, destination: Path) -> Path:
        steps.append("rename")
        return replace(source, destination)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    atomic_text(target, "new")
    assert steps == ["flush file", "rename", "flush folder"]


def test_file_that_cannot_be_flushed_does_not_replace_the_old_one(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_text(target, "new")
    assert target.read_text() == "old"
    assert names(target.parent) == [target.name]


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_long_names_fit(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes of the usual 255
    atomic_text(path, "long")
    assert path.read_text() == "long"


def test_sha256_file_hashes_files_larger_than_a_block_and_empty_ones(tmp_path: Path) -> None:
    content = b"0123456789abcdef" * 200_000  # 3 MB: several blocks
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_are_read_with_and_without_a_byte_order_mark(tmp_path: Path, encoding: str, end: str) -> None:
    prompts = ["ein Bär", "über\x85\u2028uns", "a cat"]
    path = tmp_path / "prompts.txt"
    path.write_bytes(end.join([*prompts[:2], "", "  ", *prompts[2:], ""]).encode(encoding))
    assert read_prompts(path) == prompts


def test_no_text_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for content in (b"\xff\xfea", b"caf\xe9", b"\xff" * 1_000_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^prompts: .*prompts\.txt: cannot be read as text in UTF-8") as raised:
            read_prompts(path)
        assert len(str(raised.value)) < 500 + len(str(path))
    for content in (b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is empty"):
            read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere")


def test_files_of_our_own_that_an_editor_saved_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a.zip": {"url": "x", "sha256": "%s", "bytes": 1}}' % ("0" * 64), encoding="utf-8-sig")
    assert read_lock(path)["a.zip"].bytes == 1
    (tmp_path / "config.json").write_text('{"architecture": "ddpmpp", "resolution": 8}', encoding="utf-8-sig")
    with pytest.raises(UserError) as raised:  # its other fields are asked for, not its first byte
        read_edm_config(tmp_path)
    assert "JSON" not in str(raised.value)
    (tmp_path / "recipe.json").write_text('{"precision": "bf16"}', encoding="utf-8-sig")
    assert recorded_precision(tmp_path) == "bf16"


def test_what_is_read_is_bounded_as_a_file_and_as_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1_000_001))
    assert read_bounded(path, 1_000_001, "file") == read_bounded(bytes(1_000_001), 1_000_001, "file")
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match=r"^input: larger than 1 MB; expected a smaller file$"):
            read_bounded(source, 1_000_000, "input")
    with pytest.raises(UserError, match=r"^input: cannot be read \(No such file or directory\)$"):
        read_bounded(tmp_path / "missing", 1, "input")
