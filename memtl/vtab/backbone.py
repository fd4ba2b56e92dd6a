"""The pre-trained network that every method starts from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from .. import assets, models
from ..training import seeded


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network by name: one that ships with memtl (``vit_glyphs``), or one of timm's.

    Args:
        name: of the network.
        channels: of the images that it is given: 3, or 1 for grey ones.
        size: height and width of those images; None: what the network is made for.
        pretrained: load timm's weights, which may mean a download.
        checkpoint: load that file instead, whatever its last layer. With neither, timm's network
            has random weights, always the same.

    Raises:
        FileNotFoundError: ``checkpoint`` is not there.
        ValueError: the network is unknown, cannot be had with these options, or ``checkpoint`` does
            not hold its weights.
        ImportError: timm is not installed.
    """

    name: str
    channels: int = 3
    size: int | None = None
    pretrained: bool = False
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.checkpoint and not self.checkpoint.is_file():
            raise FileNotFoundError(f"there is no checkpoint {self.checkpoint}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained weights or those of a checkpoint, not both")
        if self.shipped:
            if self.pretrained or self.checkpoint:
                raise ValueError(f"{self.name} ships with its weights: it takes no others")
            size = assets.metadata(self.name)["architecture"].get("img_size", 32)
            if (self.channels, self.size or size) != (1, size):
                raise ValueError(
                    f"{self.name} takes images of 1 channel and {size} x {size} pixels: choose a "
                    "network of timm's for others"
                )

    @property
    def shipped(self) -> bool:
        """Whether it is one of memtl's own."""
        return self.name in assets.names()

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.size or (32 if self.shipped else self.source.default_cfg["input_size"][-1])

    @cached_property
    def weights(self) -> str:
        """What tells its weights from others."""
        if self.shipped:
            return f"sha256 {assets.metadata(self.name)['sha256']}"
        if self.checkpoint:
            return f"sha256 {hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()}"
        if self.pretrained:
            config = self.source.pretrained_cfg
            return f"timm {config['architecture']}.{config.get('tag', '')}"
        return "random"

    @cached_property
    def source(self) -> Any:
        """The network with its pre-trained weights and the last layer of its source task."""
        if self.shipped:
            return assets.load(self.name)
        options = {"in_chans": self.channels, "pretrained": self.pretrained}
        try:
            with seeded(0):
                network = models.timm_model(self.name, size=self.size, **options)
        except Exception as error:  # a download can fail in many ways
            if not self.pretrained:
                raise
            raise ValueError(f"the weights of {self.name} cannot be had: {line(error)}") from error
        if self.checkpoint:
            _load(network, self.name, self.checkpoint)
        return network

    def build(self, num_classes: int, seed: int) -> nn.Module:
        """A copy of it with a fresh last layer, which ``seed`` alone decides."""
        network = copy.deepcopy(self.source)
        with seeded(seed):
            network.reset_classifier(num_classes)
        return network


def line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _load(network: Any, name: str, path: Path) -> None:
    """Put the weights of a file, but for the last layer's, into a network of timm's."""
    from timm.models import load_checkpoint

    last = network.default_cfg["classifier"]
    prefixes = tuple(f"{part}." for part in ((last,) if isinstance(last, str) else last))

    def rest(state: dict, _: object) -> dict:
        return {key: value for key, value in state.items() if not key.startswith(prefixes)}

    try:
        keys = load_checkpoint(network, str(path), strict=False, filter_fn=rest)
    except Exception as error:  # of pickle, safetensors, numpy, torch: whatever a file can cause
        raise ValueError(f"{path} does not hold the weights of {name}: {line(error)}") from error
    if keys is None:  # of a .npz, which the network reads by itself
        return
    missing = [key for key in keys.missing_keys if not key.startswith(prefixes)]
    for kind, found in (("lacks", missing), ("also has", keys.unexpected_keys)):
        if found:
            raise ValueError(f"{path} does not hold the weights of {name}: it {kind} {found[0]}")
