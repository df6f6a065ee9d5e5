"""Files on their way out: never the same name, gone within a minute, gone with their process."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmd2.service.outbox
from dmd2.service.outbox import PREFIX, Outbox, _remove_cogs


def wait_until_gone(path: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    until = time.monotonic() + 300
    while path.exists():
        assert time.monotonic() < until
        meanwhile()
        time.sleep(0.01)


def test_files_keep_their_bytes_and_get_names_of_their_own(tmp_path: Path) -> None:
    outbox = Outbox(root=tmp_path)
    paths = [outbox.write(bytes([i]), "7", "webp") for i in range(50)]
    assert len(set(paths)) == 50
    assert [path.read_bytes() for path in paths] == [bytes([i]) for i in range(50)]
    assert all(path.suffix == ".webp" and path.name.startswith("7-") for path in paths)
    outbox.close()
    assert list(tmp_path.iterdir()) == []


def test_old_files_go_and_new_ones_stay(tmp_path: Path) -> None:
    now = [100.0]
    outbox = Outbox(keep_seconds=30, tick_seconds=0.02, root=tmp_path, clock=lambda: now[0])
    old = outbox.write(b"old", "1", "png")
    now[0] += 20
    new = outbox.write(b"new", "2", "png")
    now[0] += 11
    wait_until_gone(old)
    assert new.read_bytes() == b"new"
    outbox.close()


def test_files_are_gone_within_a_minute_by_default(tmp_path: Path) -> None:
    outbox = Outbox(root=tmp_path)
    assert outbox._keep + outbox._tick < 60
    outbox.close()


def test_only_what_it_made_is_deleted(tmp_path: Path) -> None:
    """Not what links lead to, what others put there, nor the outbox of another process, whatever its name says."""
    letters = tmp_path / "letters"
    others = [letters, tmp_path / f"{PREFIX}0-x", tmp_path / f"{PREFIX}{os.getpid()}-x", tmp_path / f"{PREFIX}note"]
    for folder in others:
        folder.mkdir()
        (folder / "old").write_bytes(b"kept")
        os.utime(folder / "old", (0, 0))
    (tmp_path / f"{PREFIX}0-link").symlink_to(letters)
    (tmp_path / f"{PREFIX}file").write_bytes(b"kept")
    outbox = Outbox(keep_seconds=0.0, tick_seconds=0.01, root=tmp_path)
    assert outbox.folder.stat().st_mode & 0o777 == 0o700
    (outbox.folder / "folder").mkdir()
    (outbox.folder / "link").symlink_to(letters)
    (outbox.folder / "old").write_bytes(b"kept")
    os.utime(outbox.folder / "old", (0, 0))
    for number in range(3):  # it sweeps, and goes on sweeping
        wait_until_gone(outbox.write(b"x", str(number), "png"))
    kept = outbox.folder
    outbox.close()
    outbox.close()
    assert [(folder / "old").read_bytes() for folder in [*others, kept]] == [b"kept"] * 5
    assert sorted(path.name for path in kept.iterdir()) == ["folder", "link", "old"]


def test_a_file_that_became_something_else_does_not_stop_the_sweeping(tmp_path: Path) -> None:
    now = [0.0]
    outbox = Outbox(keep_seconds=1, tick_seconds=0.01, root=tmp_path, clock=lambda: now[0])
    first, second = outbox.write(b"x", "1", "png"), outbox.write(b"x", "2", "png")
    first.unlink()
    first.mkdir()
    now[0] = 2
    wait_until_gone(second)
    wait_until_gone(outbox.write(b"x", "3", "png"), lambda: now.__setitem__(0, now[0] + 2))
    assert first.is_dir()
    outbox.close()


@pytest.mark.parametrize("lost", ["removed", "moved", "replaced by a link", "with its root"])
def test_a_lost_folder_is_made_anew(tmp_path: Path, lost: str) -> None:
    root, letters, away = tmp_path / "root", tmp_path / "letters", tmp_path / "away"
    root.mkdir()
    letters.mkdir()
    outbox = Outbox(root=root)
    outbox.write(b"1", "1", "png")
    path = outbox.folder
    if lost in ("removed", "with its root"):
        shutil.rmtree(root if lost == "with its root" else path)
    else:
        path.rename(away)
    if lost == "replaced by a link":
        path.symlink_to(letters)
    second = outbox.write(b"2", "2", "png")
    assert second.read_bytes() == b"2" and second.parent != path and not second.parent.is_symlink()
    assert not list(letters.iterdir())
    outbox.close()
    assert not second.parent.exists()
    assert not away.exists() or not list(away.iterdir())  # the moved folder's files went, too: they were its own


def test_a_full_disk_is_an_error_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(root=tmp_path)

    def full(name: str, data: bytes, folder: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/{name}")

    with monkeypatch.context() as patch:
        patch.setattr(dmd2.service.outbox, "_write_new", full)
        with pytest.raises(OSError, match="could not store the image") as caught:
            outbox.write(b"x", "1", "png")
    assert "No space left" in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert outbox.write(b"x", "1", "png").read_bytes() == b"x"
    shutil.rmtree(tmp_path)
    tmp_path.write_bytes(b"a file where the folder was")
    with pytest.raises(OSError, match="could not store the image") as caught:
        outbox.write(b"x", "1", "png")
    assert str(tmp_path) not in str(caught.value)
    tmp_path.unlink()
    outbox.close()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.sampled_from(["write", "later", "remove", "move", "link", "stranger", "steal"]), min_size=1, max_size=12
    )
)
def test_whatever_happens_new_files_are_readable_and_strangers_files_stay(steps: list[str]) -> None:
    now = [0.0]
    with tempfile.TemporaryDirectory() as temporary:
        root, letters = Path(temporary) / "root", Path(temporary) / "letters"
        root.mkdir()
        letters.mkdir()
        (letters / "letter").write_bytes(b"kept")
        outbox = Outbox(keep_seconds=10, tick_seconds=1000, root=root, clock=lambda: now[0])
        alive: list[tuple[Path, float]] = []
        strangers: list[Path] = []
        for number, step in enumerate(steps):
            folder = outbox.folder
            if step == "write":
                alive.append((outbox.write(b"%d" % number, str(number), "png"), now[0]))
                assert alive[-1][0].read_bytes() == b"%d" % number
            elif step == "later":
                now[0] += 6
                outbox._delete_old()
            elif not folder.is_dir() or folder.is_symlink():
                continue
            elif step == "stranger":
                strangers.append(folder / f"stranger-{number}")
                strangers[-1].write_bytes(b"kept")
            elif step == "steal" and alive:
                alive[-1][0].unlink(missing_ok=True)
                alive.pop()
            elif step in ("move", "link", "remove"):
                if step == "remove":
                    shutil.rmtree(folder)
                else:
                    folder.rename(letters / str(number))
                if step == "link":
                    folder.symlink_to(letters)
                alive.clear()
                strangers.clear()
            for path, since in alive:
                assert path.exists() == (now[0] - since <= 10)
            assert all(path.read_bytes() == b"kept" for path in strangers)
        outbox.close()
        assert not any(path.exists() for path, _ in alive)
        assert all(path.read_bytes() == b"kept" for path in [*strangers, letters / "letter"])
        assert not list(Path(temporary).rglob("*.png"))


def test_descriptors_of_lost_folders_are_closed(tmp_path: Path) -> None:
    now = [0.0]
    outbox = Outbox(keep_seconds=1, tick_seconds=1000, root=tmp_path, clock=lambda: now[0])
    for number in range(5):
        outbox.write(b"x", str(number), "png")
        shutil.rmtree(outbox.folder)
    assert len(outbox._folders) == 5
    outbox.write(b"x", "last", "png")
    now[0] = 2
    outbox._delete_old()
    assert len(outbox._folders) == 1
    outbox.close()


def test_empty_folders_of_cog_go_after_ten_minutes(tmp_path: Path) -> None:
    cog, long_ago = tmp_path / "cog", time.time() - 601
    for name in ("old", "new", "used"):
        (cog / name / "inputs").mkdir(parents=True)
        (cog / name / "outputs").mkdir()
    (cog / "used" / "outputs" / "file").write_bytes(b"kept")
    for name in ("old", "used"):
        os.utime(cog / name, (long_ago, long_ago))
    outbox = Outbox(tick_seconds=0.02, root=tmp_path, cog_folders=cog)
    for _ in range(200):
        if not (cog / "old").exists():
            break
        time.sleep(0.02)
    outbox.close()
    assert sorted(path.name for path in cog.iterdir()) == ["new", "used"]
    assert (cog / "used" / "outputs" / "file").read_bytes() == b"kept"


def test_in_cogs_folder_nothing_is_followed_and_nothing_but_empty_folders_goes(tmp_path: Path) -> None:
    cog, letters = tmp_path / "cog", tmp_path / "letters"
    (letters / "inputs").mkdir(parents=True)
    (letters / "outputs").mkdir()
    cog.mkdir()
    (cog / "link").symlink_to(letters)
    (cog / "file").write_bytes(b"kept")
    (cog / "half" / "inputs").mkdir(parents=True)
    (cog / "half" / "outputs").mkdir()
    (cog / "half" / "outputs" / "file").write_bytes(b"kept")
    (cog / "other" / "mine").mkdir(parents=True)
    (cog / "old" / "inputs").mkdir(parents=True)
    for path in [letters, *cog.iterdir()]:
        os.utime(path, (0, 0))
    list(_remove_cogs(cog))
    assert sorted(path.name for path in cog.iterdir()) == ["file", "half", "link", "other"]
    assert (letters / "inputs").is_dir() and (cog / "half" / "inputs").is_dir() and (cog / "other" / "mine").is_dir()
    (tmp_path / "linked").symlink_to(cog)
    (cog / "old" / "inputs").mkdir(parents=True)
    os.utime(cog / "old", (0, 0))
    list(_remove_cogs(tmp_path / "linked"))
    list(_remove_cogs(tmp_path / "none" / "none"))
    assert (cog / "old" / "inputs").is_dir()


def test_thousands_of_cogs_folders_do_not_keep_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cog = tmp_path / "cog"
    for number in range(100):
        (cog / str(number) / "inputs").mkdir(parents=True)
        os.utime(cog / str(number), (0, 0))
    rmdir = os.rmdir

    def slow(path: str, *, dir_fd: int | None = None) -> None:
        time.sleep(0.002)
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", slow)
    outbox = Outbox(keep_seconds=0.05, tick_seconds=0.05, root=tmp_path, cog_folders=cog)
    path = outbox.write(b"x", "a", "png")
    until = time.monotonic() + 300
    while path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert len(list(cog.iterdir())) > 10  # there was more to do than it had waited for
    while list(cog.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.05)
    outbox.close()
