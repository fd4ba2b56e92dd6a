"""Queries through a block: beside its own tokens, with its own weights, to its own keys."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ...functional import query_attention
from ...nn.calls import Tap
from ..base.reading import PerThread, ReadBlock, Reader, gather_for, tokens

JACOBIAN_DTYPES = {"fp32": None, "bf16": torch.bfloat16}

Keep = Literal["auto", "jacobian", "kv"]


@dataclasses.dataclass(frozen=True)
class Attended:
    """What one attention of a block let its tokens read: key [B, H, N, d], value [B, H, N, e], the
    row of the mask that the first token has, or None, and the scale."""

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None


class Seeing(Tap):
    """Notes what the attentions of a block read, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Attended] = []

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest
    ):
        if query.shape[:3] != key.shape[:3] or is_causal or any(rest.values()):
            raise NotImplementedError(
                "queries can read an attention of all tokens to all tokens only, got query "
                f"{list(query.shape)} and key {list(key.shape)}"
                f"{', causal' if is_causal else ''}{', of grouped queries' if rest else ''}"
            )
        # A query has no place among the tokens: it takes the first one's, the class token's.
        mask = None if attn_mask is None else attn_mask[..., :1, :].detach()
        self.seen.append(Attended(key.detach(), value.detach(), mask, scale))
        return NotImplemented


class Answering(Tap):
    """Gives the queries of a block what its tokens read; their own keys and values go unused."""

    def __init__(self, seen: list[Attended], keep: Keep, jacobian: torch.dtype | None) -> None:
        super().__init__()
        self.seen = iter(seen)
        self.keep = keep
        self.jacobian = jacobian

    def attention(self, query, key, value, *args, **kwargs):
        read = next(self.seen)
        return query_attention(
            query,
            read.key,
            read.value,
            read.mask,
            read.scale,
            keep=self.keep,
            jacobian_dtype=self.jacobian,
        )


@dataclasses.dataclass
class Noted:
    """What a backbone gives: of each block what its attentions read, and the model's feature."""

    seen: list[list[Attended]] = dataclasses.field(default_factory=list)
    features: Tensor | None = None


@dataclasses.dataclass
class Noting:
    """Where what a backbone gives is noted, if it is."""

    noted: Noted | None = None


class QueryReader(Reader):
    """Sends the queries of each block through it, once its tokens have passed."""

    def __init__(
        self,
        depth: int,
        trains_backbone: bool,
        keep: Keep,
        jacobian: torch.dtype | None,
        queries: Callable[[int, int], Tensor],
    ) -> None:
        super().__init__(depth, trains_backbone)
        self.keep = keep
        self.jacobian = jacobian
        self.queries = queries
        self._noting = PerThread(Noting)

    @contextlib.contextmanager
    def noting(self) -> Iterator[Noted]:
        """Inside, a call of the model notes what its backbone gives, and sends no query."""
        self._noting.now.noted = noted = Noted()
        try:
            yield noted
        finally:
            self._noting.now.noted = None

    @property
    def noted(self) -> Noted | None:
        """Where to note, inside :meth:`noting`."""
        return self._noting.now.noted

    def block(self, block: ReadBlock, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        enabled = torch.is_grad_enabled()
        with torch.set_grad_enabled(enabled and self.trains_backbone), Seeing() as seeing:
            output = run(*args, **kwargs)
        batch = tokens(output).shape[0]
        if not seeing.seen or any(read.key.shape[0] != batch for read in seeing.seen):
            raise NotImplementedError(
                f"block {block.memtl_index} does not attend to all of its tokens at once by "
                "F.scaled_dot_product_attention, so queries cannot read it (timm: fused_attn, "
                'transformers: attn_implementation="sdpa"; windows are not supported)'
            )
        if self.noted is not None:
            self.noted.seen.append(seeing.seen)
        else:
            self.now.gathered.append(self.read(block, run, batch, seeing.seen))
        return output

    def read(
        self, block: ReadBlock, run: Callable[..., Any], batch: int, seen: list[Attended]
    ) -> Tensor:
        """Z'_m [B, T, D] of ``block``, whose forward is ``run``."""
        queries = self.queries(block.memtl_index, batch)
        with Answering(seen, self.keep, self.jacobian):
            given = tokens(run(queries))
        gather_for(block, queries, given, self.trains_backbone)
        return given
