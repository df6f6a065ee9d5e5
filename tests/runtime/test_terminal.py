"""Printing to terminals and pipes that go away: it never fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.runtime.terminal import Terminal, say


def test_a_pipe_that_broke_leads_nowhere_from_then_on() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        terminal = Terminal(stream)
        assert terminal == Terminal(None) and hash(terminal) and terminal != stream
        os.close(reader)
        terminal.write("to nobody\n")
        stream.write("nor this\n")
        stream.flush()  # as Python does at its end
        terminal.flush()
    Terminal(stream).write("closed by now")


def test_words_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    say("step 3: σ")
    assert capsys.readouterr().out == "step 3: σ\n"


def test_streams_that_came_closed_are_not_taken_by_files(tmp_path: Path) -> None:
    """Else what a library writes to descriptor 2 ends up in whatever file the process opened first."""
    code = (
        "import os, sys; from dmd2.runtime.terminal import Terminal, occupy_standard_streams; "
        "occupy_standard_streams(); "
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2; os.write(2, b'noise'); file.write('content'); "
        "Terminal(sys.stderr).write('words')"
    )
    command = ["sh", "-c", '"$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, str(tmp_path / "file")]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2], timeout=600).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


def test_a_terminal_knows_its_width_and_what_it_is(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert Terminal(file).fileno() == file.fileno() and not Terminal(file).isatty()
    assert not Terminal(file).isatty() and not Terminal(None).isatty()
    with pytest.raises(OSError, match="no such stream"):
        Terminal(None).fileno()
