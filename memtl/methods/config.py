"""What the methods that convert a model share: which modules, and JSON."""

from __future__ import annotations

import abc
import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..nn import Report, convert
from ..storage import Format, format_from_dict

if TYPE_CHECKING:
    from typing_extensions import Self

Patterns = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionConfig(abc.ABC):
    """The base of configurations that are a format for each role of layers.

    Args:
        target_modules, exclude_modules: as in :func:`memtl.nn.convert`.
    """

    method: ClassVar[str]
    target_modules: Patterns = None
    exclude_modules: Patterns = None

    def __post_init__(self) -> None:
        for option in ("target_modules", "exclude_modules"):
            value = getattr(self, option)
            if value is None or isinstance(value, str):
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise TypeError(f"{option} must be None, a string or strings, got {value!r}")
            object.__setattr__(self, option, tuple(value))

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

    def to_json(self) -> str:
        """The configuration as JSON; :meth:`from_json` reads it back to an equal one."""
        data: dict[str, Any] = {"method": self.method}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = value.to_dict() if isinstance(value, Format) else value
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, another method's configuration, or unknown fields.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("method", None) != cls.method:
            raise ValueError(f'expected a JSON object with "method": "{cls.method}"')
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown fields {unknown}; a configuration has {sorted(known)}")
        for name, value in data.items():
            if isinstance(value, dict):
                data[name] = format_from_dict(value)
        return cls(**data)
