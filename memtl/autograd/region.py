"""A region of a network whose saved tensors are dropped, and come from a second run of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..storage.outline import outlines


class Region:
    """The first run is recorded by autograd as ever, so that gradients flow where they always flow
    (to parameters, their hooks, whatever the region reads). Of each tensor that it saves only the
    place in their order remains. The first that backward asks for has ``again`` run, which saves
    the same ones in the same order; it stops at the last.

    Args:
        again: reads what the region was given, and returns what runs it a second time. (Another
            checkpoint around it may have to run everything again for that reading, which is no part
            of the second run.)
    """

    def __init__(self, again: Callable[[], Callable[[], Any]]):
        self._again = again
        self._saved: list[tuple[torch.Size, torch.dtype]] = []
        self._values: dict[int, Tensor] = {}
        self._specs: list[Any] = []  # of each time that one of memtl's Functions kept something
        self._ends_in_keep = False

    def run(self, first: Callable[[], Any]) -> Any:
        """The result of ``first``, the first run."""
        run = Run(self._saved)
        with saved_tensors_hooks(self._place, self._value), outlines(), _running(run):
            result = first()
        self._specs = run.specs
        self._ends_in_keep = run.kept_until == len(self._saved) > 0
        return result

    def _place(self, t: Tensor) -> int:
        self._saved.append((t.shape, t.dtype))
        return len(self._saved) - 1

    _place.memtl_shares = True  # type: ignore[attr-defined]

    def _value(self, place: int) -> Tensor:
        if place not in self._values:
            self._run_again()
        return self._values.pop(place)

    def _run_again(self) -> None:
        """Fill in the values. They go as backward takes them; a second backward makes new ones."""
        values: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            if (t.shape, t.dtype) != self._saved[len(values)]:
                raise changed(f"{list(t.shape)} {t.dtype}", self._at(len(values)))
            # Not t: an output that is kept by what made it would keep itself, and its graph.
            values.append(t.detach())
            if len(values) == len(self._saved):
                raise _Done
            return values[-1]

        note.memtl_shares = True  # type: ignore[attr-defined]
        run = Run(values, last=len(self._specs) if self._ends_in_keep else 0)
        run.first = self._specs
        hooks = saved_tensors_hooks(note, lambda t: t)
        with contextlib.suppress(_Done), torch.enable_grad():
            second = self._again()
            with hooks, outlines(False), _running(run):
                second()
            raise changed("nothing more", self._at(len(values)))
        self._values = dict(enumerate(values))

    def _at(self, place: int) -> str:
        shape, dtype = self._saved[place]
        return f"{list(shape)} {dtype}"


def changed(found: object, was: object) -> RuntimeError:
    """The error of a second run that is not the first one again."""
    return RuntimeError(
        f"a checkpointed block kept {found} in the place of {was} when it was run again in "
        "backward: what it computes must depend on its arguments, its parameters and torch's "
        "random numbers alone"
    )


class _Done(Exception):
    """All that the first run saved is there."""


class Run:
    """One run of a region: how often memtl's Functions kept something, and in which way; and how
    many tensors were saved by the end of the last time.

    Args:
        saved: the tensors so far.
        last: the number of the time that ends the region; 0 where something else does.
    """

    def __init__(self, saved: Sequence[Any], last: int = 0):
        self.saved = saved
        self.last = last
        self.specs: list[Any] = []  # a time that something was kept, each: how
        self.first: Sequence[Any] | None = None  # those of the first run
        self.kept_until = 0
        self.offers: Any = None  # what is shared in this run, and in no other: see share.py


class _Current(threading.local):
    run: Run | None = None


_current = _Current()


@contextlib.contextmanager
def _running(run: Run) -> Iterator[None]:
    before, _current.run = _current.run, run
    try:
        yield
    finally:
        _current.run = before


def current() -> Run | None:
    """The innermost run that is going on in this thread. (torch.compile does not trace what is
    local to a thread; to a region, compiled code is one saver of many.)"""
    return None if torch.compiler.is_compiling() else _current.run


def keeps(saved: Sequence[Tensor | None], specs: Any) -> None:
    """To be told by a Function that is about to save these for its backward, ``specs`` being all
    that it knows of them. The context of the first run reads what the second one kept."""
    if (run := current()) is None:
        return
    place = len(run.specs)
    run.specs.append(specs)
    if run.first is not None and (place >= len(run.first) or run.first[place] != specs):
        raise changed(_told(specs), _told(run.first[place] if place < len(run.first) else ()))
    run.kept_until = len(run.saved) + sum(t is not None for t in saved)


def _told(specs: Sequence[Any]) -> str:
    kept = (spec for spec in specs if spec is not None)
    return ", ".join(f"{list(shape)} as {format!r}" for format, shape, *_ in kept) or "nothing"


def at_the_end() -> bool:
    """Whether the Function that runs now saves the last tensors of a region that is run again:
    what it returns, nobody reads."""
    run = current()
    return run is not None and len(run.specs) + 1 == run.last
