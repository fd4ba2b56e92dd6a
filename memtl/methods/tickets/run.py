"""A draw that trains, on disk: its rounds, and what it needs to go on."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from pathlib import Path

from torch import Tensor

from ...files import write_aside
from .config import TicketConfig
from .masks import digest
from .ticket import Ticket

RECORD, START, ORIGIN = "draw.json", "start.safetensors", "origin.safetensors"

State = dict[str, Tensor]


class Run:
    """The directory of one draw, iterative or learned.

    ``draw.json`` has the configuration and the fingerprint of the backbone at the start;
    ``start.safetensors`` the head then, so that one made at random need not be made again;
    ``origin.safetensors`` the model after ``rewind_step`` steps, if that is not 0;
    ``round-01.safetensors`` and so on the tickets; ``head-01.safetensors`` and so on the head after
    each round, if it is kept. A round's ticket is written last: without it there was no such round.

    It is one draw's at a time: entering the context locks the directory, where the file system can.

    Raises:
        ValueError: ``directory`` has rounds, but no record of a draw; when entered, another draw
            has it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._ticket(1).exists() and not (self.directory / RECORD).exists():
            raise ValueError(f"{self.directory} has rounds of a ticket, but no {RECORD}")

    def __enter__(self) -> Run:
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"another draw is at work in {self.directory}") from None
        except OSError:
            pass  # some network file systems lock no directories
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def begin(self, config: TicketConfig, state: State, head: set[str]) -> State:
        """The state from which the draw started: ``state``, with the head that was there first. An
        iterative draw may be to another sparsity than the one that is there, if that went through
        the same rounds.

        Raises:
            ValueError: the draw that is there has another configuration, or another start.
        """
        backbone = {name: t for name, t in state.items() if name not in head}
        wanted, fingerprint = config.to_dict(), digest(backbone)
        path = self.directory / RECORD
        if not path.exists():
            text = json.dumps({"config": wanted, "start": fingerprint}, indent=2)
            _write(self.directory / START, {name: state[name] for name in head})
            write_aside(path, lambda aside: aside.write_text(text))
            return state
        try:
            there = json.loads(path.read_text())
            before = TicketConfig.from_dict(there["config"])
            config_there, start = before.to_dict(), there["start"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if config_there != wanted and not self._leads(before, config):
            changed = [
                f"{name} was {config_there.get(name)!r}, is {value!r}"
                for name, value in wanted.items()
                if config_there.get(name) != value
            ]
            raise ValueError(f"{self.directory} has a draw that differs: {'; '.join(changed)}")
        if start != fingerprint:
            raise ValueError(f"{self.directory} has a draw from a backbone with other weights")
        if len(before.rounds()) < len(config.rounds()):
            text = json.dumps({"config": wanted, "start": fingerprint}, indent=2)
            write_aside(path, lambda aside: aside.write_text(text))
        return state | _read(self.directory / START, {name: state[name] for name in head})

    def resume(
        self, config: TicketConfig, origin: State, head: set[str]
    ) -> tuple[int, Ticket | None, State, State]:
        """The last complete round, its ticket, what is gone back to, and the head after it, if that
        is kept; ``origin`` is the start.

        Raises:
            ValueError: a file is damaged.
        """
        done, ticket = self.last(config)
        if ticket is None:
            return 0, None, origin, {}
        if config.rewind_step:
            origin = _read(self.directory / ORIGIN, origin)
        kept = {name: origin[name] for name in head} if config.head == "kept" else {}
        if kept:
            kept = _read(self._head(done), kept)
        return done, ticket, origin, kept

    def last(self, config: TicketConfig) -> tuple[int, Ticket | None]:
        """The last complete round, 0 if there is none, and its ticket.

        Raises:
            ValueError: its file is damaged.
        """
        done = 0
        while done < len(config.rounds()) and self._ticket(done + 1).exists():
            done += 1
        return done, Ticket.load(self._ticket(done)) if done else None

    def keep(self, round: int, ticket: Ticket, origin: State | None, head: State) -> None:
        """Write what a round gave; ``origin`` if it is not the start."""
        if origin is not None and round == 1:
            _write(self.directory / ORIGIN, origin)
        if head:
            _write(self._head(round), head)
        ticket.save(self._ticket(round))

    def _leads(self, before: TicketConfig, config: TicketConfig) -> bool:
        """Whether the complete rounds of one configuration are those of the other too."""
        if dataclasses.replace(before, sparsity=config.sparsity) != config:
            return False
        done = sum(self._ticket(n + 1).exists() for n in range(len(before.rounds())))
        pairs = zip(before.rounds()[:done], config.rounds(), strict=False)
        return config.scheme == "iterative" and all(math.isclose(a, b) for a, b in pairs)

    def _ticket(self, round: int) -> Path:
        return self.directory / f"round-{round:02}.safetensors"

    def _head(self, round: int) -> Path:
        return self.directory / f"head-{round:02}.safetensors"


def _write(path: Path, state: State) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in state.items()}
    metadata = {"sha256": digest(tensors)}
    write_aside(path, lambda aside: save_file(tensors, str(aside), metadata))


def _read(path: Path, like: State) -> State:
    """What was written, on the devices of ``like``, a state of the same names and shapes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            said = (file.metadata() or {}).get("sha256")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if digest(state) != said:
        raise ValueError(f"{path} is damaged or altered: its sha256 is not {said}")
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in like.items()}:
        raise ValueError(f"{path} is of a model with another head: {sorted(state)[:3]}")
    return {name: t.to(like[name].device) for name, t in state.items()}
