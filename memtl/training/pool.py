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


class Workers:
    """Processes that are started when they are needed, and end with the ``with``.

    Args:
        jobs: how many; with 1 everything is done in this process, in order, with torch's threads
            as they are; of more each has one thread.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(jobs, context, initializer=_begin)

    def each(self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        """What ``function``, which other processes import, gives for every tuple of arguments, as
        soon as it is there.

        Raises:
            Whatever ``function`` raises; what has not begun is not begun any more.
        """
        if self._pool is None:
            yield from (function(*arguments) for arguments in calls)
            return
        futures = [self._pool.submit(function, *arguments) for arguments in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _begin() -> None:
    """In a new process: one thread, and an end with the process that started it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
