"""What a method's configuration is: a frozen dataclass that applies itself and reads as JSON."""

from __future__ import annotations

import abc
import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...nn import Report, convert
from ...storage import Format, Quantized, format_from_dict

if TYPE_CHECKING:
    from typing_extensions import Self

Patterns = str | tuple[str, ...] | None

METHODS: dict[str, type[Config]] = {}
"""Name -> configuration of every method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(abc.ABC):
    """The base of every method's configuration. ``method`` is its name, in JSON and in commands;
    ``is_undone``: whether ``unconvert`` takes it back; ``networks``: what it is for, in words."""

    method: ClassVar[str]
    networks: ClassVar[str] = "any network"
    is_undone: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            METHODS[cls.method] = cls

    @abc.abstractmethod
    def apply(self, model: nn.Module) -> Any:
        """Change ``model`` in place and return a report of what was done."""

    def resolved(self, model: nn.Module) -> Config:
        """This configuration with what it left to ``model``, to which it was applied, filled in."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :func:`config_from_dict` reads it back."""
        data: dict[str, Any] = {"method": self.method}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = value.to_dict() if isinstance(value, Format) else value
        return data

    def to_json(self) -> str:
        """The configuration as JSON; :meth:`from_json` reads it back to an equal one."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote; ``Config.from_json`` that of any method.

        Raises:
            ValueError: not JSON, another method's configuration, or unknown fields.
        """
        data = json.loads(text)
        own = getattr(cls, "method", None)
        if not isinstance(data, dict) or own not in (None, data.get("method")):
            raise ValueError(f'expected a JSON object with "method": "{own}"')
        return config_from_dict(data)  # type: ignore[return-value]


def config_from_dict(data: dict[str, Any]) -> Config:
    """The configuration that :meth:`Config.to_dict` described, of whichever method.

    Raises:
        ValueError: ``method`` is missing or unknown, or a field is not one of that method's.
    """
    fields = dict(data)
    name = fields.pop("method", None)
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    cls = METHODS[name]
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown fields {unknown}; {name!r} has {sorted(known)}")
    for field, value in fields.items():
        if isinstance(value, dict):
            fields[field] = format_from_dict(value)
    return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionConfig(Config):
    """The base of configurations that are a format for each role of layers.

    Args:
        target_modules, exclude_modules: as in :func:`memtl.nn.convert`.
    """

    is_undone: ClassVar[bool] = True
    target_modules: Patterns = None
    exclude_modules: Patterns = None

    def __post_init__(self) -> None:
        check_patterns(self, "target_modules", "exclude_modules")

    @abc.abstractmethod
    def formats(self) -> dict[str, Format | None]:
        """Role -> format."""

    def apply(self, model: nn.Module) -> Report:
        """Convert ``model`` in place; which parameters train is left as it is."""
        return convert(
            model,
            self.formats(),
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
        )


def check_patterns(config: Config, *names: str) -> None:
    """Raise unless each of those fields is None, a string or strings; of a list make a tuple."""
    for name in names:
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise TypeError(f"{name} must be None, a string or strings, got {value!r}")
        object.__setattr__(config, name, tuple(value))


def check_bits(config: Config, *names: str) -> None:
    """Raise unless each of those fields is None or bits in which values can be kept."""
    for name in names:
        bits = getattr(config, name)
        if bits is None:
            continue
        try:
            Quantized(bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
