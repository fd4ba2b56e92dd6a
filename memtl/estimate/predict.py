"""What a training step will need, found by taking it with tensors that have no memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..memory import SavedTensors, tensors_in
from ..methods import Config, apply
from . import fake
from .live import Live
from .step import Step, check_count, trainable
from .step import optimizer as make_optimizer

Method = Config | Sequence[Config] | Callable[[nn.Module], object] | None
"""What is done to a model: a configuration, several one after the other, a function that changes
it, or nothing."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a training step needs, in bytes.

    Attributes:
        trainable: numbers that train.
        saved: kept for backward, as :class:`memtl.memory.SavedTensors` counts.
        weights: parameters and buffers.
        gradients: of what trains, after backward.
        optimizer: the optimizer's state.
        peak: the most that is in use at once in a step: all of that, the batch, and what operators
            return on the way.
        batch_size: samples of the step.
        by_layer: ``saved`` by layer.
    """

    trainable: int
    saved: int
    weights: int
    gradients: int
    optimizer: int
    peak: int
    batch_size: int
    by_layer: dict[str, int] = dataclasses.field(repr=False, default_factory=dict)

    @property
    def saved_per_sample(self) -> float:
        """Bytes kept for backward, divided by the batch size."""
        return self.saved / self.batch_size

    @property
    def step(self) -> int:
        """What of the peak comes and goes with a step: all but weights and optimizer's state."""
        return self.peak - self.weights - self.optimizer


def predict(
    model: str | Step,
    method: Method = None,
    *,
    batch_size: int = 8,
    optimizer: str = "adamw",
    autocast: torch.dtype | None = None,
    device: str = "cpu",
    **options: Any,
) -> Prediction:
    """The memory of a training step, without allocating it: a model of any size is predicted on
    any machine.

    Model, method, forward, loss, backward and the optimizer's step all run as they will, on
    tensors that have shapes and no data, and the bytes that are alive are added up. Gradients are
    None when a step begins, and the optimizer's state is there. What a kernel allocates and frees
    inside is known of a CPU's convolutions and of memtl's attention, and of no other: not of cuDNN,
    nor what memtl's kernels decode at a time. A causal model of transformers is taken to have a
    mask [B, 1, T, T] of bytes, which it makes where it cannot see that no text is padded or packed.

    Args:
        model: a name as in :meth:`Step.of`, which takes ``options``, or a step of one's own.
        method: what is done to the model first.
        batch_size: samples of the step.
        optimizer: one of ``OPTIMIZERS``; of the parameters that train.
        autocast: the type of an autocast region around forward and loss.
        device: "cpu" or "cuda": which kernels are taken, by torch and by memtl. The device has to
            be there; nothing is allocated on it.

    Raises:
        ImportError: timm or transformers is not installed.
        TypeError: an argument is of the wrong type.
        ValueError: an argument is wrong; the method does not apply to the model; or the model asks
            for numbers in its tensors.
    """
    check_count("batch_size", batch_size)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, bfloat16 or float16, got {autocast}")
    if not isinstance(model, Step):
        model = Step.of(model, **options)
    elif options:
        raise TypeError(f"a Step has its options already, got {', '.join(options)} as well")
    fakes = fake.mode()
    module = fake.build(model.build, lambda module: change(module, method), fakes, device)
    try:
        with fake.nothing_allocated(fakes):
            return _predict(model, module, batch_size, optimizer, autocast, device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{model.name} cannot take this step: {reason}") from error


def _predict(
    step: Step,
    model: nn.Module,
    batch_size: int,
    name: str,
    autocast: torch.dtype | None,
    device: str,
) -> Prediction:
    model.train()
    parameters = trainable(model)
    batch = step.batch(model, batch_size, device)
    optimizer = make_optimizer(name, parameters)

    def end() -> int:
        """The optimizer's step; returns the bytes of the gradients."""
        gradients = _bytes(p.grad for p in parameters if p.grad is not None)
        with fake.Numbers():
            optimizer.step()
        optimizer.zero_grad()
        return gradients

    with SavedTensors(model) as saved:
        loss = step.losses(model, batch, autocast)
    by_layer = saved.by_layer
    del saved
    loss.backward()
    del loss
    end()  # it has its state now
    state = [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]
    own = [*model.parameters(), *model.buffers()]
    gc.collect()
    with Live([*own, *state, *tensors_in(batch)], device) as live:
        step.losses(model, batch, autocast).backward()
        gradients = end()
    return Prediction(
        trainable=sum(p.numel() for p in parameters),
        saved=sum(by_layer.values()),
        weights=_bytes(own),
        gradients=gradients,
        optimizer=_bytes(state),
        peak=live.peak,
        batch_size=batch_size,
        by_layer=by_layer,
    )


def change(model: nn.Module, method: Method) -> None:
    """Do what ``method`` says to ``model``.

    Raises:
        TypeError: it is none of what it may be.
    """
    if method is None:
        return
    if isinstance(method, Config):
        apply(model, method)
    elif isinstance(method, Sequence) and all(isinstance(one, Config) for one in method):
        for one in method:
            apply(model, one)
    elif callable(method):
        method(model)
    else:
        raise TypeError(f"method must be a Config, several, or callable, got {method!r}")


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
