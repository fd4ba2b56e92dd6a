"""What an error of a command means to who called it."""

from concurrent.futures.process import BrokenProcessPool

import pytest

from memtl.report.calling import call


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FloatingPointError("the loss is nan"), 1, "memtl it: the loss is nan"),
        (BrokenProcessPool("gone"), 1, "memtl it: a process ended before its work did"),
        (ValueError("got 3"), 2, "memtl it: got 3"),
        (FileNotFoundError("no file x"), 2, "memtl it: no file x"),
        (ImportError("install it"), 2, "memtl it: install it"),
    ],
)
def test_errors(error, status, said, capsys):
    def fails():
        raise error

    assert call("memtl it", {}, "memtl", fails) == status
    assert capsys.readouterr().err.startswith(said)


def test_what_is_no_error_of_the_call_is_raised():
    with pytest.raises(ZeroDivisionError):
        call("memtl it", {}, "memtl", lambda: 1 // 0)


def test_what_is_missing_is_named_before_it_runs(capsys):
    ran = []

    def run() -> int:
        ran.append(1)
        return 7

    assert call("memtl it", {"torch": "torch", "nothing_of_it": "of-it"}, "memtl[x]", run) == 2
    assert capsys.readouterr().err == "memtl it needs of-it: pip install memtl[x]\n" and not ran
    assert call("memtl it", {"torch": "torch"}, "memtl[x]", run) == 7 and ran == [1]
