"""Progress, wherever it is read."""

import io
import re
import sys

import pytest

from fomaml_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(monkeypatch, stream, total=10, **kwargs):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.progress("training", total, **kwargs) as tell:
        for done in (4, 7, 10):
            tell(done, f"loss {done}")
    return stream.getvalue()


def test_a_log_file_gets_lines(monkeypatch):
    monkeypatch.setattr(progress, "LINES_EVERY", 0.0)
    first, second, last = told(monkeypatch, io.StringIO()).splitlines()
    line = r"training  40%: 4 of 10 tasks in 0:00, [^,]* tasks/s, loss 4"
    assert re.fullmatch(line, first)
    assert "tasks in 0:00, 0:00 left, " in second
    assert last.startswith("training 100%: 10 of 10 tasks")


def test_a_log_file_is_not_flooded_and_has_the_end(monkeypatch):
    (line,) = told(monkeypatch, io.StringIO()).splitlines()
    assert line.endswith("loss 10")


def test_without_a_total_there_is_no_time_left(monkeypatch):
    (line,) = told(monkeypatch, io.StringIO(), total=None).splitlines()
    assert line.startswith("training: 10 tasks in 0:00, ")
    assert "left" not in line


def test_a_terminal_gets_a_bar(monkeypatch):
    drawn = told(monkeypatch, Terminal(), done=4).split("\r")[-1]
    assert re.search(r"training: 100%\|.*10\.0/10\.0 \[.*tasks.*, loss 10\]", drawn)


def test_without_tqdm_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert told(monkeypatch, Terminal()).startswith("training 100%: 10 of 10 tasks")


def test_without_a_name_there_is_nothing(capsys):
    with progress.progress(None, 10) as tell:
        tell(10, "done")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "clock"), [(3.4, "0:03"), (75, "1:15"), (3661, "1:01:01")])
def test_the_clock(seconds, clock):
    assert progress._clock(seconds) == clock


def test_lines_without_a_note_end_without_a_comma(capsys):
    with progress.progress("training", 10) as tell:
        tell(5, "")
    assert re.search(r"tasks/s\n$", capsys.readouterr().err)
