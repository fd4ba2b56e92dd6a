"""The networks that are transferred, where they come from, and what they are transferred to."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import assets
from ..methods.vqt.cache import fingerprint
from ..models import Normalized
from ..models.robust import load_robust
from ..tasks import Glyphs, Split, Task, load_digits
from ..tasks.digits import MEAN, STD
from ..tasks.outside import letters, noise
from ..tasks.pictures import DATASETS, Pixels, load_pictures
from ..tasks.subset import subset
from ..training import seeded

SHIPPED = ("standard", "noise", "fast", "pgd")
"""Pre-training of the shipped network: see :mod:`memtl.assets.pretrain`."""

DIGITS = "digits"
DATA = (DIGITS, *DATASETS)
SOURCE_IMAGES, SOURCE_SEED = 4096, 1000
OUTSIDE_IMAGES = 1000
SUBSET_SEED = 2022
SUBSETS = ("balanced", "first")


@dataclasses.dataclass(frozen=True)
class Domain:
    """Networks and data, which every process loads once.

    Args:
        data: one of :data:`DATA`.
        root: the folder of real data.
        networks: checkpoints by name; empty for those that are shipped.
        arch: timm's name of what the checkpoints are of.
        size: of images, in pixels, where the data is real.
        subset: "balanced": of parts of the data, as many of each class; "first": its first images,
            as in the released code of Chen et al.

    Raises:
        ValueError: the data is unknown, or the values do not go together.
    """

    data: str = DIGITS
    root: Path | None = None
    networks: tuple[tuple[str, str], ...] = ()
    arch: str = "resnet50"
    size: int = 224
    subset: str = "balanced"

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise ValueError(f"data must be one of {', '.join(DATA)}, got {self.data!r}")
        if self.subset not in SUBSETS:
            raise ValueError(f"subset must be one of {SUBSETS}, got {self.subset!r}")
        if (self.data == DIGITS) == (self.root is not None):
            wanted = "no root" if self.root is not None else "a root, the folder that has them"
            raise ValueError(f"{self.data} need {wanted}, got {self.root}")
        if (self.data == DIGITS) == bool(self.networks):
            raise ValueError(
                "the shipped networks know digits, checkpoints pictures: "
                f"{self.data} with {dict(self.networks) or 'the shipped networks'} do not fit"
            )

    @property
    def pretrainings(self) -> tuple[str, ...]:
        """The names of the networks."""
        return tuple(name for name, _ in self.networks) or SHIPPED

    def build(self, pretraining: str, seed: int) -> Normalized:
        """A network with a fresh head, which ``seed`` decides, for images in [0, 1]; the backbone
        that a ticket is about is ``.model``.

        Raises:
            ValueError: there is no such network; or the checkpoint is none.
        """
        classes = task(self).num_classes
        with seeded(seed):
            return self._wrapped(self._network(pretraining, classes))

    def source_network(self, pretraining: str) -> Normalized:
        """The same with the head it was pre-trained with."""
        return self._wrapped(self._network(pretraining, None))

    def _wrapped(self, model: Any) -> Normalized:
        known = model.pretrained_cfg
        mean, std = (known["mean"], known["std"]) if self.networks else (MEAN, STD)
        return Normalized(model, mean, std).to(memory_format=torch.channels_last)

    def _network(self, pretraining: str, classes: int | None) -> nn.Module:
        if pretraining not in self.pretrainings:
            known = ", ".join(self.pretrainings)
            raise ValueError(f"networks are {known}, got {pretraining!r}")
        if not self.networks:
            return assets.load(f"cnn_glyphs_{pretraining}", classes)
        model: Any = load_robust(dict(self.networks)[pretraining], self.arch)
        if classes is not None:
            model.reset_classifier(classes)
        return model

    @property
    def has_source(self) -> bool:
        """Whether there are images of what the networks were pre-trained on."""
        return self.data == DIGITS


@functools.cache
def task(domain: Domain) -> Task:
    """The target, of images in [0, 1]."""
    if domain.data == DIGITS:
        return load_digits(normalised=False)
    assert domain.root is not None
    return load_pictures(domain.root, domain.data, size=domain.size)


@functools.cache
def part(domain: Domain, percent: float) -> Split:
    """So much of the target's training data, always the same.

    Raises:
        ValueError: a class would have no image.
    """
    train = task(domain).train
    if percent == 100:
        return train
    return subset(train, percent / 100, seed=SUBSET_SEED, how=domain.subset)


@functools.cache
def source(domain: Domain) -> Split:
    """Images of what the shipped networks were pre-trained on, none that they were trained with.

    Raises:
        ValueError: there are none.
    """
    if not domain.has_source:
        raise ValueError("the images that the checkpoints were trained on are not here")
    generator = torch.Generator().manual_seed(SOURCE_SEED)
    return Split(*Glyphs(normalised=False).batch(SOURCE_IMAGES, generator))


@functools.cache
def outside(domain: Domain) -> dict[str, Split]:
    """Images that are none of the target's: noise, and letters of a font that no network has seen,
    where the target is digits."""
    test = task(domain).test
    shape = test.images[:1].shape[1:]
    found = {"noise": noise(min(len(test), OUTSIDE_IMAGES), shape=tuple(shape), normalised=False)}
    if domain.data == DIGITS:
        found["letters"] = letters(normalised=False)
    return found


@functools.cache
def fingerprint_of_network(domain: Domain, pretraining: str) -> str:
    """What tells a network from others; of a checkpoint also its architecture and what images it
    takes, which its weights need not show."""
    network = domain.source_network(pretraining)
    parts = sorted(network.model.state_dict().items())
    if domain.networks:
        parts += [(f"mean of {domain.arch}", network.mean), ("std", network.std)]
    return fingerprint(parts)


@functools.cache
def fingerprint_of_data(domain: Domain) -> str:
    """What tells the data from others."""
    loaded = task(domain)
    parts: list[tuple[str, Tensor]] = []
    for name in ("train", "val", "test"):
        split = getattr(loaded, name)
        images, said = split.images, name
        if isinstance(images, Pixels):  # in bytes, as they are kept
            images, said = images.pixels, f"{name} {images.size}"
        parts += [(said, images), (name, split.labels)]
    return fingerprint(parts)
