"""Checkpoints: one file each, and a pointer to those that count, replaced last.

A checkpoint is a safetensors file: its tensors, and all else as JSON in its header. It is written
aside, brought to the disk and renamed; then ``latest.json``, which names it with its sha256, is
replaced in the same way. Whenever a process dies, the pointer names whole files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import sha256_of, write_aside

POINTER = "latest.json"
_NEW = "new.safetensors"
_NAME = re.compile(r"step-\d{8,}-[0-9a-f]{12}\.safetensors|new\.safetensors")
_ASIDE = re.compile(r"\..+\.\d+")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One that was read: the step after which it was taken, tensors by name, and the rest."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix/``, without it."""
        start = f"{prefix}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


class Checkpoints:
    """The checkpoints of a folder: the latest ones, and the best.

    Args:
        folder: is made where there is none.
        keep: how many of the latest stay.

    Attributes:
        damaged: files that :meth:`latest` passed over, since they are not what was written.

    Raises:
        ValueError: the pointer is damaged.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self.damaged: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._there: list[dict[str, Any]] = []
        self._best: dict[str, Any] | None = None
        path = folder / POINTER
        if not path.exists():
            return
        try:
            record = json.loads(path.read_text())
            self._there, self._best = record["checkpoints"], record["best"]
            for each in (*self._there, *filter(None, [self._best])):
                each["file"], each["step"], each["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, best: bool
    ) -> Path:
        """Write a checkpoint; once this returns, it is the latest, and on the disk.

        Args:
            facts: ready for JSON.
            best: whether it is also the best so far.

        Raises:
            OSError: it cannot be written; the ones before it are as they were.
        """
        from safetensors.torch import save_file

        # Copies, in one piece each: safetensors takes no tensor twice.
        whole = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                 for n, t in tensors.items()}  # fmt: skip
        header = {"step": str(step), "facts": json.dumps(dict(facts))}
        new = self.folder / _NEW
        digest = write_aside(new, lambda aside: save_file(whole, aside, header))
        # Named by its content: a file that the pointer names is never another one.
        path = new.rename(self.folder / f"step-{step:08d}-{digest[:12]}.safetensors")
        entry = {"file": path.name, "step": step, "sha256": digest}
        there = [e for e in self._there if e["step"] < step][-(self.keep - 1) :] * (self.keep > 1)
        self._there = [*there, entry]
        self._best = entry if best else self._best
        record = {"checkpoints": self._there, "best": self._best}
        text = json.dumps(record, indent=2) + "\n"
        write_aside(self.folder / POINTER, lambda aside: aside.write_text(text))
        self.tidy()
        return path

    def tidy(self) -> None:
        """Delete what no pointer names: checkpoints that were followed, and halves of files."""
        named = {e["file"] for e in (*self._there, *filter(None, [self._best]))}
        for path in self.folder.iterdir():
            ours = _NAME.fullmatch(path.name) or _ASIDE.fullmatch(path.name)
            if ours and path.name not in named:
                path.unlink(missing_ok=True)

    def latest(self) -> Checkpoint | None:
        """The latest one that is whole; None where there has been none.

        Raises:
            ValueError: all of them are damaged.
        """
        for entry in reversed(self._there):
            if (found := self._read(entry)) is not None:
                return found
        if self._there:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged or missing: "
                f"{', '.join(path.name for path in self.damaged)}"
            )
        return None

    def best(self) -> Checkpoint | None:
        """The best one; None where nothing was evaluated.

        Raises:
            ValueError: it is damaged.
        """
        if self._best is None:
            return None
        if (found := self._read(self._best)) is None:
            raise ValueError(f"{self.folder / self._best['file']} is damaged or missing")
        return found

    def clear(self) -> None:
        """Delete all of them, the pointer first."""
        (self.folder / POINTER).unlink(missing_ok=True)
        self._there, self._best = [], None
        self.tidy()

    def _read(self, entry: Mapping[str, Any]) -> Checkpoint | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / entry["file"]
        try:
            if sha256_of(path) != entry["sha256"]:
                raise ValueError("another sha256")
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                facts = json.loads(file.metadata()["facts"])
        except (OSError, ValueError, SafetensorError):
            self.damaged.append(path)
            return None
        return Checkpoint(entry["step"], tensors, facts)
