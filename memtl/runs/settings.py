"""All that a run is, in one dataclass: from a YAML file, then from what the command line says."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import training
from ..methods import Config
from . import chosen
from .chosen import FULL, nearest, scalar
from .lora import LoRA

_ASSIGNED = re.compile(r"[a-z0-9_.-]+=")
OPTIONS = ("method", "lora")
"""Settings that have options of their own."""


def _setting(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run is; every value is validated here, so that a long run cannot fail on it later.
    What each one means is in its ``help``, which ``memtl train --help`` prints.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is outside its range, or two do not go together.
    """

    model: str = _setting("", "a name: of a shipped network, timm's, hf:NAME or hf:PATH")
    pretrained: bool | str = _setting(True, "weights to begin with: true, false or a file")
    data: str = _setting("", "a name or a folder")
    root: str | None = _setting(None, "where data that goes by a name is")
    size: int | None = _setting(None, "of images, in pixels; none: the model's own")
    tokens: int | None = _setting(None, "of a text; none: the data's own")
    val_fraction: float = _setting(0.1, "of the images, where there is no validation split")
    lora: LoRA | None = dataclasses.field(
        default=None,
        metadata={"help": "rank of peft's LoRA, to which methods are applied; lora.targets=qkv,fc1 "
        "(projections of attention), lora.alpha=16 (the rank), lora.dropout=0.1 (0)"},
    )  # fmt: skip
    method: tuple[Config, ...] = _setting(
        (), f"{FULL} (everything trains), or methods of those below, with commas, in the order in "
        "which they are applied; options follow a dot: method.keep=0.05; in YAML also mappings",
    )  # fmt: skip
    ticket: str | None = _setting(None, "a file of Ticket.save, applied before the method")
    epochs: float | None = _setting(None, "passes over the data (10, unless there are steps)")
    steps: int | None = _setting(None, "of the optimizer, instead of epochs")
    batch_size: int = _setting(32, "samples of a forward, in each process")
    accumulate: int = _setting(1, "forwards of a step")
    learning_rate: float = _setting(1e-3, "its peak; a cosine takes it to 0 from there")
    warmup: float = _setting(0.1, "fraction of the steps over which it rises")
    weight_decay: float = _setting(0.05, "of weights; vectors (biases, norms) are not decayed")
    optimizer: str = _setting("adamw", f"one of {', '.join(training.OPTIMIZERS)}")
    clip_norm: float | None = _setting(None, "gradients of a greater norm are scaled down to it")
    label_smoothing: float = _setting(0.0, "probability mass spread over all classes")
    precision: str = _setting("fp32", f"of forwards: {', '.join(training.PRECISIONS)}")
    ema: float | None = _setting(None, "decay of an average of the weights, which is evaluated")
    compile: bool = _setting(False, "the model, by torch.compile")
    channels_last: bool = _setting(False, "images and convolutions in that layout")
    checkpointing: bool = _setting(False, "the library's own activation checkpointing")
    fsdp: bool = _setting(False, "under torchrun: weights sharded, not a copy in each process")
    seed: int = _setting(0, "of new weights, the data's order, augmentation and dropout")
    device: str = _setting("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    workers: int = _setting(0, "processes that load data, for each process that trains")
    eval_every: int | None = _setting(None, "steps between evaluations; none: an epoch's")
    save_every: int | None = _setting(None, "steps between checkpoints; none: an epoch's")
    keep: int = _setting(2, "latest checkpoints that stay; the best one does in any case")
    tensorboard: bool = _setting(False, "write events for it too")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in OPTIONS:
                read: Any = (chosen.lora if field.name == "lora" else chosen.methods)(value)
            else:
                read = _typed(field.name, value, hints[field.name])
            object.__setattr__(self, field.name, read)
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 10.0)
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps say the same thing twice: give one of them")
        counts = ("size", "tokens", "steps", "batch_size", "accumulate", "eval_every", "save_every",
                  "keep")  # fmt: skip
        for name, valid, wanted in (
            *((n, (v := getattr(self, n)) is None or v >= 1, "at least 1") for n in counts),
            ("epochs", self.epochs is None or self.epochs > 0, "positive"),
            ("val_fraction", 0 < self.val_fraction < 1, "between 0 and 1"),
            ("precision", self.precision in training.PRECISIONS, "fp32, bf16 or fp16"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or none"),
            ("workers", self.workers >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")
        self.training(1)

    def training(self, samples: int, processes: int = 1) -> training.Settings:
        """What the loop is told, for that many samples of training data."""
        a_step = self.batch_size * self.accumulate * processes
        if (steps := self.steps) is None:
            assert self.epochs is not None
            steps = max(1, round(self.epochs * samples / a_step))
        return training.Settings(
            steps, self.batch_size, self.learning_rate, self.warmup, self.weight_decay,
            self.optimizer, label_smoothing=self.label_smoothing, clip_norm=self.clip_norm,
            seed=self.seed,
        )  # fmt: skip

    @property
    def methods(self) -> str:
        """What is done to the network, for people."""
        names = ["lora"] * (self.lora is not None) + [config.method for config in self.method]
        return " + ".join(names) or FULL

    def to_dict(self) -> dict[str, Any]:
        """Ready for YAML and JSON; :func:`read` reads it back."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["lora"] = None if self.lora is None else _plain(dataclasses.asdict(self.lora))
        plain["method"] = [_plain(config.to_dict()) for config in self.method]
        return plain


FREE = {"device", "workers", "save_every", "keep", "tensorboard"}
"""Settings that may be others when a run goes on: its losses do not depend on them."""


def read(data: Mapping[str, Any]) -> RunSettings:
    """The settings of a mapping, as from YAML.

    Raises:
        TypeError, ValueError: a name is unknown (the nearest one is said), or as
            :class:`RunSettings`.
    """
    known = [field.name for field in dataclasses.fields(RunSettings)]
    for name in data:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(name, known)}")
    for name in ("model", "data"):
        if not data.get(name):
            raise ValueError(f"{name} must be given: --{name} NAME")
    return RunSettings(**data)


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, which JSON is too.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, or no mapping.
        ImportError: PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must have lines of `setting: value`, got {data!r}")
    return {str(name): value for name, value in data.items()}


def write_file(path: Path, settings: RunSettings) -> None:
    """Write what :func:`read_file` reads."""
    path.write_text(_yaml().safe_dump(settings.to_dict(), sort_keys=False))


def override(data: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """``data`` with what the words of a command line say: ``--name value``, ``--name=value`` and
    ``name=value``, where a dash in a name is an underscore; ``--name`` alone is true.

    Raises:
        ValueError: a word is none of these; an option of a method that is not one.
    """
    result, words, options = dict(data), list(words), []
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ValueError(f"expected --setting value or setting=value, got {word!r}")
            alone = not words or words[0].startswith("--") or _ASSIGNED.match(words[0])
            text = "true" if alone else words.pop(0)
        name, _, option = name.replace("-", "_").partition(".")
        if not option:
            result[name] = text
        elif name in OPTIONS:
            options.append((name, option, text))
        else:
            raise ValueError(f"{name} has no options of its own: {word!r}")
    for name, option, text in options:  # of what is named anywhere in the line
        result[name] = chosen.with_option(name, result.get(name), option, text)
    return result


def differences(one: RunSettings, other: RunSettings) -> list[str]:
    """Names of settings in which two runs differ that ought to be one run."""
    a, b = one.to_dict(), other.to_dict()
    return [name for name in a if a[name] != b[name] and name not in FREE]


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type hint says; text is read, and a whole number may be a float."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    read = scalar(value) if isinstance(value, str) and kinds != (str,) else value
    if type(read) in kinds:
        return read
    if float in kinds and type(read) is int:
        return float(read)
    if int in kinds and type(read) is float and read.is_integer():
        return int(read)
    if str in kinds and isinstance(value, str):
        return value
    words = ["none" if kind is type(None) else kind.__name__ for kind in kinds]
    raise TypeError(f"{name} must be {' or '.join(words)}, got {value!r}")


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError("settings in YAML need PyYAML: pip install memtl[train]") from None
    return yaml
