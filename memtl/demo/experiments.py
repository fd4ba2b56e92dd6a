"""What is compared: networks with their tasks, and the ways to fine-tune them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import assets
from ..methods import (
    BackRazorConfig,
    BitFitConfig,
    Config,
    LinearProbeConfig,
    LiteResidualConfig,
    LowBitConfig,
    NormTuningConfig,
    RepNetConfig,
    Ticket,
    apply,
)
from ..tasks import Task, load_digits, load_digits_segmentation
from ..tasks.text import load_docstrings, load_docstrings_mlm

FULL = "full fine-tuning"
"""The method that every ratio refers to."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate, and the candidates from which the validation split chose it."""

    chosen: float
    candidates: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A shipped network and a task.

    Attributes:
        asset: name of the network in :mod:`memtl.assets`.
        network, goal: what the network is and was pre-trained on, and what it learns, in words.
        load_task: makes the task.
        load_model: ``num_classes`` -> the network with a fresh head.
        rates: by kind of method, see :func:`methods`; of the kinds that are compared here.
        batch_size, steps: of a run.
        ticket: file of a lottery ticket for the network, under which it is trained as well.
        notes: what a reader must know besides.
    """

    asset: str
    network: str
    goal: str
    load_task: Callable[[], Task]
    load_model: Callable[[int], nn.Module]
    rates: Mapping[str, Rate]
    batch_size: int = 64
    steps: int = 120
    ticket: Path | None = None
    notes: str = ""


BATCH_NORMS = """
Batch normalisation: the methods that train the whole network normalise with the statistics of the
batch. Where only parts train, the rest is frozen with the statistics of the source task, as in
evaluation. Checkpointing runs each block's forward twice a step, so its running statistics, which
evaluation uses, follow the batches faster.
"""

TICKETS = """
Under a ticket, part of the encoder's weights is zero from the start and stays so: the network is a
pruned one from its first step on, and its forward pass another than that of the whole network.
"""

BERT = "A BERT of 4 layers, pre-trained on docstrings of Python's library by masked words,"
TICKET = assets.encoder() / "ticket-mlm-50.safetensors"
"""Drawn by the same objective, in five rounds, and not on any of the tasks (``memtl tickets``)."""


def _docstrings(task: str, max_length: int, rate: Rate, goal: str) -> Experiment:
    return Experiment(
        asset="bert_docstrings",
        network=BERT,
        goal=goal,
        load_task=lambda: load_docstrings(task, assets.load_tokenizer(), max_length),
        load_model=lambda classes: assets.load_encoder("classifier", classes),
        rates={"full": rate},
        batch_size=32,
        steps=160,
        ticket=TICKET,
        notes=TICKETS,
    )


# Chosen by `memtl demo --tune`, two runs a candidate (vit: three). Scores on the validation split,
# in %, in the order of the candidates:
#   vit, digits        last 95.9 96.6 96.3   full 99.1 99.2 98.7
#   cnn, digits        last 97.8 99.2 99.2   norms 99.3 99.2 98.8   biases 98.8 99.3 99.2
#                      lite residual 99.7 99.5 99.3   Rep-Net 99.7 99.7 99.0
#                      Rep-Net + biases 99.5 99.5 98.7   full 99.7 99.5 99.7
#   cnn, segmentation  last 53.2 53.8 53.8   biases 58.4 60.8 61.9   Rep-Net 61.1 61.7 61.3
#                      Rep-Net + biases 63.6 63.9 63.7   full 71.5 73.5 73.6
#   bert, mlm          full 34.7 34.7 33.6   (other tasks: memtl/lottery/experiments.py)
# The best is taken, of equal ones the smaller rate; so it is of segmentation's last two, a tenth of
# a point apart, since Back Razor and four bits take that rate.
EXPERIMENTS: dict[tuple[str, str], Experiment] = {
    ("vit", "digits"): Experiment(
        asset="vit_glyphs",
        network="A vision transformer, pre-trained on printed characters",
        goal="learns handwritten digits",
        load_task=lambda: load_digits(),
        load_model=lambda classes: assets.load("vit_glyphs", classes),
        rates={
            "last": Rate(1e-2, (3e-3, 1e-2, 3e-2)),
            "full": Rate(2e-3, (1e-3, 2e-3, 4e-3)),
        },
    ),
    ("cnn", "digits"): Experiment(
        asset="cnn_glyphs",
        network="A MobileNetV2, pre-trained on printed characters",
        goal="learns handwritten digits",
        load_task=lambda: load_digits(),
        load_model=lambda classes: assets.load("cnn_glyphs", classes),
        rates={
            "last": Rate(1e-2, (3e-3, 1e-2, 3e-2)),
            "norms": Rate(3e-3, (3e-3, 1e-2, 3e-2)),
            "biases": Rate(1e-2, (3e-3, 1e-2, 3e-2)),
            "lite residual": Rate(3e-3, (3e-3, 1e-2, 3e-2)),
            "Rep-Net": Rate(3e-3, (3e-3, 1e-2, 3e-2)),
            "Rep-Net + biases": Rate(3e-3, (3e-3, 1e-2, 3e-2)),
            "full": Rate(2e-3, (2e-3, 4e-3, 8e-3)),
        },
        notes=BATCH_NORMS,
    ),
    ("cnn", "segmentation"): Experiment(
        asset="cnn_glyphs",
        network="A MobileNetV2, pre-trained on printed characters, with the head of DeepLabV3",
        goal="learns to tell every pixel's digit on canvases with several handwritten ones",
        load_task=lambda: load_digits_segmentation(),
        load_model=lambda classes: assets.load_segmenter("cnn_glyphs", classes),
        rates={
            "last": Rate(8e-3, (4e-3, 8e-3, 1.6e-2)),
            "biases": Rate(3.2e-2, (8e-3, 1.6e-2, 3.2e-2)),
            "Rep-Net": Rate(3.2e-2, (1.6e-2, 3.2e-2, 6.4e-2)),
            "Rep-Net + biases": Rate(3.2e-2, (1.6e-2, 3.2e-2, 6.4e-2)),
            "full": Rate(8e-3, (4e-3, 8e-3, 1.6e-2)),
        },
        batch_size=8,
        steps=240,
        notes=BATCH_NORMS,
    ),
    ("bert", "package"): _docstrings(
        "package",
        32,
        Rate(1e-3, (3e-4, 1e-3, 2e-3)),
        "learns to tell which package of the library a docstring belongs to",
    ),
    ("bert", "kind"): _docstrings(
        "kind",
        32,
        Rate(1e-3, (3e-4, 1e-3, 2e-3)),
        "learns to tell what kind of object a docstring describes",
    ),
    ("bert", "pair"): _docstrings(
        "pair",
        48,
        Rate(3e-4, (1e-4, 3e-4, 1e-3)),
        "learns to tell whether two sentences are of the same docstring",
    ),
    ("bert", "mlm"): Experiment(
        asset="bert_docstrings",
        network=BERT,
        goal="goes on learning to predict masked words",
        load_task=lambda: load_docstrings_mlm(assets.load_tokenizer()),
        load_model=lambda classes: assets.load_encoder("mlm"),
        rates={"full": Rate(1e-4, (1e-4, 3e-4, 1e-3))},
        batch_size=32,
        steps=160,
        ticket=TICKET,
        notes=TICKETS,
    ),
}
"""(model, task) -> what is done."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune: its name, the kind whose learning rate it takes, what it changes."""

    name: str
    kind: str
    prepare: Callable[[nn.Module], object]


def _applied(config: Config) -> Callable[[nn.Module], object]:
    return lambda model: apply(model, config)


def _checkpoint_blocks(model: Any) -> None:  # Any: a method of timm's models and of encoders
    model.set_grad_checkpointing()


PARTS = (
    Method("last layer only", "last", _applied(LinearProbeConfig(convert=True))),
    Method("norms + last layer", "norms", _applied(NormTuningConfig())),
    Method("biases + last layer", "biases", _applied(BitFitConfig())),
    Method("lite residual + biases", "lite residual", _applied(LiteResidualConfig())),
    Method("Rep-Net", "Rep-Net", _applied(RepNetConfig())),
    Method("Rep-Net + biases", "Rep-Net + biases", _applied(RepNetConfig(bias=True))),
)
"""Those that train parts of the network."""


def _with_ticket(path: Path | None, keep: float) -> list[Method]:
    """The whole network again, its encoder pruned, and on that what keeps less."""
    if path is None:
        return []
    ticket = Ticket.load(path)

    def pruned(config: Config | None = None) -> Callable[[nn.Module], object]:
        def prepare(model: Any) -> None:
            ticket.apply(model.model)
            if config is not None:
                apply(model, config)

        return prepare

    name = f"ticket {100 * ticket.sparsity:.0f} %"
    return [
        Method(name, "full", pruned()),
        Method(f"{name} + Back Razor {keep:g}", "full", pruned(BackRazorConfig(keep=keep))),
        Method(f"{name} + 4 bits, once", "full", pruned(LowBitConfig(bits=4))),
    ]


def methods(experiment: Experiment, keeps: Sequence[float]) -> list[Method]:
    """The methods compared, in the order of the table."""
    back_razor = [
        Method(f"Back Razor {keep:g}", "full", _applied(BackRazorConfig(keep=keep)))
        for keep in dict.fromkeys(keeps)
    ]
    small = BackRazorConfig.preset("small", keep=keeps[0])
    whole = [
        Method(FULL, "full", lambda model: None),
        Method("full + checkpointing", "full", _checkpoint_blocks),
        *back_razor,
        Method(f"Back Razor {keeps[0]:g}, small", "full", _applied(small)),
        Method("4 bits, once", "full", _applied(LowBitConfig(bits=4))),
        *_with_ticket(experiment.ticket, keeps[0]),
    ]
    return [method for method in (*PARTS, *whole) if method.kind in experiment.rates]


def build(
    experiment: Experiment,
    method: Method,
    num_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network, ready for a method. What is new in it ``seed`` alone decides, and the head is
    the same for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = experiment.load_model(num_classes)
        method.prepare(model)
    return model.to(device)
