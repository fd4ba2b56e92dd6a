"""Ctrl-C and SIGTERM: the step that runs is finished, and the run saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """What was interrupted is given up: it can be done again."""


class Interrupt:
    """Inside the context, the first Ctrl-C or SIGTERM is noted as ``signal``; another Ctrl-C raises
    KeyboardInterrupt at once.

    Args:
        again: False: another Ctrl-C means nothing. torchrun hands one on that its processes had
            from the terminal already, and ends them itself if they take long.

    Only the main thread is told of signals; in another one nothing is caught.
    """

    def __init__(self, again: bool = True):
        self.signal: int | None = None
        self._again = again
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is None:
            self.signal = number
            # No print: it may be what was interrupted.
            more = "; Ctrl-C again ends at once" if self._again else ""
            text = f"\nfinishing this step, then saving{more}\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        elif number == signal.SIGINT and self._again:
            raise KeyboardInterrupt
