"""Reading a model layer by layer while it runs: what its blocks give besides their output."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...nn.checkpointed import CheckpointedLayer
from ...nn.swap import swap
from .freezing import evaluate_all_but

State = TypeVar("State")

_BOTH = "a model that is read layer by layer cannot be checkpointed"
CHECKPOINTED = (
    f"{_BOTH}: call set_grad_checkpointing(False) or gradient_checkpointing_disable(); a frozen "
    "backbone keeps nothing anyway"
)


class PerThread(Generic[State]):
    """A state for every thread that calls a model. Copies start afresh.

    torch.compile does not trace what is local to a thread; it sees one state, whose changes become
    part of what it compiles.
    """

    def __init__(self, fresh: Callable[[], State]) -> None:
        self._fresh = fresh
        self._traced = fresh()
        self._local = threading.local()

    @property
    def now(self) -> State:
        """That of this thread."""
        if torch.compiler.is_compiling():
            return self._traced
        if not hasattr(self._local, "state"):
            self._local.state = self._fresh()
        return self._local.state

    def __reduce__(self) -> Any:
        return type(self), (self._fresh,)


@dataclasses.dataclass
class Reading:
    """Whether the model is being called as a whole, and what its blocks have given so far."""

    armed: bool = False
    gathered: list[Tensor] = dataclasses.field(default_factory=list)


class Reader:
    """Takes something at every block, for a classifier that reads it at the end.

    One call: the model's forward arms the reader (:meth:`arm`, a hook), every block hands itself to
    :meth:`block`, the classifier takes what was gathered (:meth:`take`); however the call ends, the
    reader is disarmed (:meth:`disarm`, another). Where the model is not called as a whole,
    ``forward_features`` say, blocks do what they always did.
    """

    def __init__(self, depth: int, trains_backbone: bool) -> None:
        self.depth = depth
        self.trains_backbone = trains_backbone
        self._reading = PerThread(Reading)

    @property
    def now(self) -> Reading:
        """The call that this thread is in."""
        return self._reading.now

    def arm(self, model: Any, args: Any) -> None:
        """A forward pre-hook of the model."""
        if getattr(model, "grad_checkpointing", False):  # timm's
            raise RuntimeError(CHECKPOINTED)
        self.now.armed, self.now.gathered = True, []

    def disarm(self, *_: Any) -> None:
        """A forward hook of the model, called after a failure as well."""
        self.now.armed, self.now.gathered = False, []

    def take(self) -> list[Tensor]:
        """What the blocks gave, in order.

        Raises:
            RuntimeError: not every block has run since the model was called.
        """
        gathered, armed = self.now.gathered, self.now.armed
        self.disarm()
        if not armed or len(gathered) != self.depth:
            raise RuntimeError(
                f"the classifier needs something of each of {self.depth} blocks and got it of "
                f"{len(gathered)}: call the model as a whole, each block once"
            )
        return gathered

    def block(self, block: ReadBlock, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run ``block``, whose forward is ``run``; gather something; return the block's output."""
        raise NotImplementedError


class ReadBlock:
    """In front of the class of a block."""

    memtl_reader: Reader
    memtl_index: int

    if TYPE_CHECKING:
        training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if not self.memtl_reader.now.armed:
            return run(*args, **kwargs)
        if self.training and getattr(self, "gradient_checkpointing", False):  # transformers'
            raise RuntimeError(CHECKPOINTED)
        return self.memtl_reader.block(self, run, args, kwargs)


def attach(model: nn.Module, blocks: tuple[str, ...], head: str, reader: Reader) -> None:
    """Let ``reader`` read the named blocks whenever ``model`` is called.

    Raises:
        ValueError: something reads this model already, or its blocks are checkpointed.
    """
    modules = [model.get_submodule(name) for name in blocks]
    if any(isinstance(module, ReadBlock) for module in modules):
        raise ValueError("this model is read layer by layer already: one such method at a time")
    if any(isinstance(module, CheckpointedLayer) for module in modules):
        raise ValueError(f"{_BOTH}: leave CheckpointConfig out")
    for index, module in enumerate(modules):
        swap(module, ReadBlock, memtl_reader=reader, memtl_index=index)
    model.register_forward_pre_hook(reader.arm)
    model.register_forward_hook(reader.disarm, always_call=True)
    if not reader.trains_backbone:
        evaluate_all_but(model, head)


def check_not_read(model: nn.Module) -> None:
    """Raise where blocks of ``model`` are read, and thus cannot be run a second time."""
    if any(isinstance(module, ReadBlock) for module in model.modules()):
        raise ValueError(f"{_BOTH}: leave CheckpointConfig out")


def gather_for(block: Any, sent: Tensor, given: Tensor, shared: bool) -> None:
    """Let FSDP have the parameters of ``block`` there for the way back from ``given`` to ``sent``.

    It gathers them when a gradient of what the block returned arrives, and ``given`` left it by
    another way. Where the block's own tokens have a gradient (``shared``), it sees to their end.
    """
    if not hasattr(block, "unshard") or not given.requires_grad:
        return
    given.register_hook(lambda _grad: block.unshard())
    if not shared and sent.requires_grad:
        sent.register_hook(lambda _grad: block.reshard())


def tokens(output: Any) -> Tensor:
    """The tokens in what a block returns: some return a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def with_tokens(output: Any, x: Tensor) -> Any:
    """What a block returned, with the tokens ``x`` in the place of its own."""
    return x if isinstance(output, Tensor) else (x, *output[1:])
