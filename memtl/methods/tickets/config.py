"""How a ticket is drawn: which weights, how many of them, in how many rounds."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from .patterns import GROUPED, UNSTRUCTURED, n_of_m

CHOICES = {
    "scheme": ("magnitude", "iterative", "learned", "random"),
    "level": ("global", "layer"),
    "of": ("original", "remaining"),
    "head": ("kept", "reset"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TicketConfig:
    """How :func:`memtl.draw_ticket` draws. The defaults of an iterative draw are those of the code
    that Chen et al. released.

    Args:
        scheme: "magnitude", the largest weights of the model as it is; "iterative", of the model
            trained again and again from the same start, with fewer and fewer weights; "learned",
            those that, unchanged, serve a task best: scores of the weights are trained in their
            place; "random", any.
        sparsity: how much of the weights in scope is pruned, in [0, 1).
        scope: which weights: None for those of every linear layer and convolution of the backbone;
            or patterns ("encoder.layer.*.weight") over names in the backbone. Embeddings, the
            head, and whatever has one dimension (biases, norms) are never pruned.
        pattern: "unstructured": every weight for itself. Or what survives or falls together, by
            the mean magnitude of its weights: "row", those of a kernel's row, weight[o, i, h, :];
            "kernel", weight[o, i]; "channel", weight[o], all of an output channel, and with it its
            bias and its entries in the batch norms behind (:func:`channel_vectors`; in a model
            that torch.fx cannot trace its bias alone). A linear layer
            is a convolution of size 1, so that its rows and kernels are single weights. As many
            of the smallest are pruned as have together no more weights than an unstructured ticket
            prunes: less than one group is missing to ``sparsity``, and :attr:`Ticket.sparsity` is
            what came out. Or "N:M", as "2:4": of every M consecutive inputs of a linear layer (of a
            convolution, input channels, at each place of the kernel) the N largest survive, in a
            single round; ``sparsity`` has to be 1 - N/M, the numbers of inputs (in a group of
            channels) divisible by M. Output channels are those of the layer, wherever its weight
            has them (transposed convolutions, transformers' Conv1D).
        level: "global" prunes the smallest of all weights, "layer" the same share of each; with
            "N:M" there is no difference.
        amount: iterative: how much a round prunes, in (0, 1]; the last one prunes what is left to
            ``sparsity``.
        of: iterative: ``amount`` of the "original" weights (10, 20, 30 ... %), or of the
            "remaining" ones (10, 19, 27.1 ... %), as in the paper's Algorithm 1.
        rewind_step: iterative: after every round the weights go back to what they were after so
            many steps of the first one; 0: to the start.
        head: iterative: whether the head, between rounds, is "kept", or "reset" with the others.
        seed: random: what decides.

    Raises:
        TypeError, ValueError: a value is none of these.
    """

    scheme: str = "magnitude"
    sparsity: float
    scope: tuple[str, ...] | None = None
    pattern: str = UNSTRUCTURED
    level: str = "global"
    amount: float = 0.1
    of: str = "original"
    rewind_step: int = 0
    head: str = "kept"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("sparsity", "amount"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if not 0 < self.amount <= 1:
            raise ValueError(f"amount must be in (0, 1], got {self.amount}")
        for name in ("rewind_step", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.of == "remaining" and self.amount == 1:
            raise ValueError("amount must be below 1 of the remaining weights, got 1")
        self._check_pattern()
        if self.scope is None:
            return
        patterns = self.scope
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(f"scope must be None or a tuple of patterns, got {patterns!r}")
        if not patterns:
            raise ValueError("scope must have a pattern at least, got ()")
        object.__setattr__(self, "scope", tuple(patterns))

    def _check_pattern(self) -> None:
        if self.pattern in (UNSTRUCTURED, *GROUPED):
            return
        n, m = (isinstance(self.pattern, str) and n_of_m(self.pattern)) or (0, 0)
        if not 0 < n < m:
            raise ValueError(
                f"pattern must be one of {(UNSTRUCTURED, *GROUPED)} or 'N:M' with 0 < N < M, "
                f"as '2:4', got {self.pattern!r}"
            )
        if not math.isclose(self.sparsity, 1 - n / m, abs_tol=1e-9):
            raise ValueError(
                f"the pattern {self.pattern!r} has a sparsity of 1 - {n}/{m} = {1 - n / m:.6g}: "
                f"sparsity must be that, got {self.sparsity}"
            )

    def rounds(self) -> tuple[float, ...]:
        """The sparsity after each round; of one round unless the scheme is iterative, and with the
        pattern "N:M"."""
        if self.scheme != "iterative" or self.sparsity == 0 or n_of_m(self.pattern):
            return (self.sparsity,)
        if self.of == "original":
            count = math.ceil(self.sparsity / self.amount - 1e-9)
            reached = [self.amount * r for r in range(1, count)]
        else:
            count = math.ceil(math.log1p(-self.sparsity) / math.log1p(-self.amount) - 1e-9)
            reached = [1 - (1 - self.amount) ** r for r in range(1, count)]
        return (*reached, self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_dict` reads it back."""
        data = dataclasses.asdict(self)
        data["scope"] = None if self.scope is None else list(self.scope)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TicketConfig:
        """Read what :meth:`to_dict` made.

        Raises:
            TypeError, ValueError: unknown or missing fields, or a value is none that there is.
        """
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {data!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown fields {unknown}; a ticket's are {sorted(known)}")
        if "sparsity" not in data:
            raise ValueError("expected a field 'sparsity', found none")
        return cls(**data)

    def to_json(self) -> str:
        """The configuration as JSON; :meth:`from_json` reads it back to an equal one."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TicketConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            TypeError, ValueError: not JSON, or as :meth:`from_dict`.
        """
        return cls.from_dict(json.loads(text))
