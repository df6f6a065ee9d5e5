"""Files on their way out: never the same name, gone within a minute, gone with their process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmd2.service.outbox import PREFIX, Outbox


def test_files_keep_their_bytes_and_get_names_of_their_own(tmp_path: Path) -> None:
    outbox = Outbox(root=tmp_path)
    paths = [outbox.write(bytes([i]), "7", "webp") for i in range(50)]
    assert len(set(paths)) == 50
    assert [path.read_bytes() for path in paths] == [bytes([i]) for i in range(50)]
    assert all(path.suffix == ".webp" and path.name.startswith("7-") for path in paths)
    outbox.close()
    assert list(tmp_path.iterdir()) == []


def test_old_files_go_and_new_ones_stay(tmp_path: Path) -> None:
    outbox = Outbox(keep_seconds=30, tick_seconds=0.02, root=tmp_path)
    old, new = outbox.write(b"old", "1", "png"), outbox.write(b"new", "2", "png")
    os.utime(old, (time.time() - 31, time.time() - 31))
    for _ in range(200):
        if not old.exists():
            break
        time.sleep(0.02)
    assert not old.exists()
    assert new.read_bytes() == b"new"
    outbox.close()


def test_files_are_gone_within_a_minute_by_default(tmp_path: Path) -> None:
    outbox = Outbox(root=tmp_path)
    assert outbox._keep + outbox._tick < 60
    outbox.close()


def test_what_a_killed_process_left_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f"{PREFIX}{process.pid}-x"
    mine = tmp_path / f"{PREFIX}{os.getppid()}-x"  # of a process that runs
    other = tmp_path / f"{PREFIX}notes"
    for folder in (left, mine, other):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"a")
    outbox = Outbox(root=tmp_path)
    assert not left.exists()
    assert mine.exists() and other.exists()
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


def test_a_neighbour_that_ends_at_that_moment_does_not_stop_the_sweeping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is listed, and gone when it is looked into."""
    gone = tmp_path / f"{PREFIX}1-gone"
    glob = Path.glob

    def listing(self: Path, pattern: str) -> Iterator[Path]:
        yield from [gone] if self == tmp_path else []
        yield from glob(self, pattern)

    monkeypatch.setattr(Path, "glob", listing)
    outbox = Outbox(keep_seconds=0.05, tick_seconds=0.02, root=tmp_path, cog_folders=tmp_path / "none")
    for number in range(3):
        path = outbox.write(b"x", str(number), "png")
        until = time.monotonic() + 300
        while path.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    outbox.close()


def test_thousands_of_cogs_folders_do_not_keep_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cog = tmp_path / "cog"
    for number in range(300):
        (cog / str(number) / "inputs").mkdir(parents=True)
        os.utime(cog / str(number), (0, 0))
    rmdir = Path.rmdir

    def slow(self: Path) -> None:
        time.sleep(0.002)
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", slow)
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
