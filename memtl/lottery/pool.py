"""Doing many things, one after another or in several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def each(function: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """What ``function`` gives for every tuple of arguments, as soon as it is there.

    Args:
        function: of a module, since other processes import it.
        jobs: how many processes; with 1 everything is done in this one, in order, with torch's
            threads as they are, in more of them each has one thread.

    Raises:
        Whatever ``function`` raises; what has not begun is not begun any more.
    """
    jobs = min(jobs, len(calls))
    if jobs <= 1:
        yield from (function(*arguments) for arguments in calls)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """In a new process: one thread, and an end with the process that started it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
