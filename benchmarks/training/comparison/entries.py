"""What is compared: three networks, and the ways to fine-tune them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import memtl
from memtl.demo.experiments import EXPERIMENTS, Experiment, Method, Rate
from memtl.estimate.ways import lora
from memtl.models.bert import Classifier
from memtl.tasks import Split, Task

from ..released_back_razor import apply_released_back_razor
from ..workloads import Mode, apply_fast

FULL = "full fine-tuning"
"""The way that others are compared with."""

CHECKPOINTING = "checkpointing"
RATES = {
    "whole": (3e-4, 1e-3, 3e-3),
    "part": (3e-3, 1e-2, 3e-2),
}
"""Learning rates that are tried, of ways that train the whole network, or a part of it."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One of the demo's networks with its task, on a smaller budget.

    Args:
        name, task: for the demo.
        target: validation accuracy, the time to which is measured.
        steps, batch_size: of a run; of small batches a step would show how long Python takes.
        batch_norms: whether it has any. Under checkpointing batches pass through them twice, and
            running statistics are others.
        every: steps from one evaluation on the validation split to the next.
        watched: samples of that split that are evaluated then.
        most: samples of a split that are used at all; None for all of them.
    """

    name: str
    task: str
    target: float
    steps: int
    batch_size: int = 32
    batch_norms: bool = False
    every: int = 5
    watched: int = 100
    most: int | None = None

    @property
    def experiment(self) -> Experiment:
        """The demo's, with this budget."""
        return dataclasses.replace(
            EXPERIMENTS[self.name, self.task],
            rates={kind: Rate(rates[1], rates) for kind, rates in RATES.items()},
            steps=self.steps,
            batch_size=self.batch_size,
        )

    def load_task(self) -> Task:
        """The demo's, with no more than ``most`` samples of a split."""
        task = EXPERIMENTS[self.name, self.task].load_task()
        splits = {name: getattr(task, name) for name in ("train", "val", "test")}
        fewer = {n: Split(s.images[: self.most], s.labels[: self.most]) for n, s in splits.items()}
        return dataclasses.replace(task, **fewer)


BACKBONES = (
    Backbone("vit", "digits", target=0.95, steps=50),
    Backbone("cnn", "digits", target=0.95, steps=40, batch_size=64, batch_norms=True),
    Backbone("bert", "kind", target=0.65, steps=80, every=10),
)


@dataclasses.dataclass(frozen=True)
class Entry(Mode):
    """A way to train, as its difference from training the whole network by PyTorch.

    Args:
        part: whether it trains a part of the network.
        only: names of the backbones it is for; empty for all.
        same_as: name of the entry whose gradients it computes, but for rounding: it takes that
            one's learning rate, and its accuracy where running statistics are the same too.
    """

    part: bool = False
    only: tuple[str, ...] = ()
    same_as: str | None = None

    @property
    def kind(self) -> str:
        """Whose learning rates are tried, of :data:`RATES`."""
        return "part" if self.part else "whole"

    @property
    def method(self) -> Method:
        """What the demo's engine trains and measures."""

        def prepare(model: nn.Module) -> None:
            self.prepare(model.model if isinstance(model, Classifier) else model)

        return Method(self.name, self.kind, prepare)

    def trained_as(self, backbone: Backbone) -> str:
        """Name of the entry whose accuracy is this one's."""
        again = self.same_as is None or (backbone.batch_norms and not self.part)
        return self.name if again else str(self.same_as)


def blocks(model: Any) -> Iterator[nn.Module]:
    """Of a timm network, or a BERT of transformers."""
    if hasattr(model, "bert"):
        yield from model.bert.encoder.layer
        return
    for block in model.blocks:
        yield from block if isinstance(block, nn.Sequential) else [block]


COUNTED = (
    {"respect_saved_tensors_hooks": True}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)
"""So that what selective checkpointing keeps is seen; older releases of torch cannot."""


def _checkpoint(block: Any, **options: Any) -> None:
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def checkpoint_every_other(model: nn.Module) -> None:
    """Half of the blocks keep their input alone."""
    for i, block in enumerate(blocks(model)):
        if i % 2 == 0:
            _checkpoint(block)


def checkpoint_but_products(model: nn.Module) -> None:
    """Every block keeps the results of matrix products, convolutions and attention, from which the
    rest is computed again."""
    aten: Any = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default]
    kept.append(aten._scaled_dot_product_flash_attention_for_cpu.default)
    for block in blocks(model):
        _checkpoint(
            block,
            context_fn=functools.partial(create_selective_checkpoint_contexts, kept),
            **COUNTED,
        )


TRANSFORMERS = ("vit", "bert")


def _razor(name: str = "fast", keep: float = 0.1) -> memtl.BackRazorConfig:
    return memtl.BackRazorConfig.preset(name, keep=keep)


def _lora(name: str, config: memtl.FrozenConfig | None = None, **fields: Any) -> Entry:
    """On a transformer's projections to queries, keys and values."""
    return Entry(name, change=lora, config=config, part=True, only=TRANSFORMERS, **fields)


Change = Callable[[nn.Module], object]
_RELEASED: Change = apply_released_back_razor

ENTRIES = (
    Entry(FULL),
    Entry(CHECKPOINTING, checkpointing=True, same_as=FULL),
    Entry("checkpointing, every other", change=checkpoint_every_other, same_as=FULL),
    Entry("checkpointing but products", change=checkpoint_but_products, same_as=FULL),
    Entry("Back Razor 0.1", config=_razor()),
    Entry("Back Razor 0.03", config=_razor(keep=0.03)),
    Entry("Back Razor 0.1, small", config=_razor("small")),
    Entry("4 bits, once", config=memtl.LowBitConfig(bits=4)),
    Entry(
        "Back Razor 0.1, blocks in 8 bits",
        change=apply_fast,
        config=memtl.CheckpointConfig(),
        only=TRANSFORMERS,
    ),
    Entry("released Back Razor 0.1", change=_RELEASED, only=TRANSFORMERS),
    _lora("LoRA"),
    _lora("LoRA, frozen", memtl.FrozenConfig(), same_as="LoRA"),
    Entry("VQT", config=memtl.VQTConfig(num_queries=1), part=True, only=TRANSFORMERS),
    Entry("Rep-Net", config=memtl.RepNetConfig(), part=True, only=("cnn",)),
    Entry("BitFit", config=memtl.BitFitConfig(), part=True),
    Entry("last layer", config=memtl.LinearProbeConfig(convert=True), part=True),
)


def entries(backbone: Backbone) -> list[Entry]:
    """Those for that network, in the order of the table."""
    return [entry for entry in ENTRIES if not entry.only or backbone.name in entry.only]
