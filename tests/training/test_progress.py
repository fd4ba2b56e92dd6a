import contextlib
import io
import sys

import pytest

from memtl.training import track


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Neither the environment nor a notebook has a say."""
    for variable in ("MEMTL_PROGRESS", "TQDM_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


def written(*, terminal: bool = True, progress: bool | None = None) -> str:
    """What counting to five writes to standard error."""
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    with contextlib.redirect_stderr(screen):
        assert list(track(range(5), "counting", progress=progress)) == [0, 1, 2, 3, 4]
    return screen.getvalue()


def test_shows_a_bar_in_a_terminal_and_wipes_it():
    shown = written()
    assert "counting" in shown
    assert "\n" not in shown  # one line, rewritten
    assert shown.rstrip("\r").rsplit("\r", 1)[-1].strip() == ""


def test_is_silent_elsewhere_unless_asked():
    assert written(terminal=False) == ""
    assert written(progress=False) == ""
    assert "counting" in written(terminal=False, progress=True)


def test_shows_in_a_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert "counting" in written(terminal=False)


@pytest.mark.parametrize(("variable", "value"), [("MEMTL_PROGRESS", "0"), ("TQDM_DISABLE", "1")])
def test_the_environment_silences(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert written() == "" == written(progress=True)
