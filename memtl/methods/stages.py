"""The stages of a convolutional network: where its maps change their size, and the blocks there."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..training import evaluating
from .transfer import check_module

Map = tuple[int, int, int]
"""Channels, height and width."""


class NoStages(ValueError):
    """A network is none that passes on maps in stages."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a stage: its name, and the maps between which it lies.

    ``entry`` is the module whose input is read as the block's: itself, unless it is the first of a
    stage that has another layer, for downsampling, in front of it; then the stage.
    """

    name: str
    entry: str
    reads: Map
    gives: Map


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a network behind the first one, which works on the largest maps; with the first
    one where those are a quarter of the image's size already.

    Attributes:
        stem: name of the module that reads the image.
        image: what it reads.
        blocks: of every stage its blocks, in the order in which they run.
    """

    stem: str
    image: Map
    blocks: tuple[tuple[Block, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, image_size: int | None = None) -> Stages:
        """Find the stages of ``model`` by the feature information that timm's networks have, and
        the size of every map by a forward pass on one blank image.

        Args:
            image_size: height and width of the images; None for the network's own.

        Raises:
            TypeError: ``model`` is no module.
            NoStages: it has no stages of blocks that pass on maps [B, C, H, W].
            ValueError: it has no size of its own.
        """
        check_module(model)
        channels = _stage_channels(model)
        stages = {name: _blocks(model, name) for name in channels}
        image = _image(model, image_size)
        names = [*stages, *(name for blocks in stages.values() for name in blocks)]
        stem, inputs, maps = _maps(model, image, names)
        found = []
        for stage, names in stages.items():
            gives = maps[stage][1]
            if channels[stage] not in (None, gives[0]):
                why = f"{stage} passes on {list(gives)}, not {channels[stage]} channels first"
                raise _refusal(model, why)
            entries = dict(zip(names, names, strict=True))
            if inputs[stage] is not inputs[names[0]]:
                entries[names[0]] = stage
            blocks = (Block(n, e, maps[e][0], maps[n][1]) for n, e in entries.items())
            found.append(tuple(blocks))
        return cls(stem, image, tuple(found))


def _refusal(model: nn.Module, why: str) -> NoStages:
    return NoStages(f"this {type(model).__name__} has no stages: {why}")


def _stage_channels(model: Any) -> dict[str, int | None]:
    """Where the network's features come from, with their channels, and what lies between those in
    one ``Sequential``."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not info:
        raise _refusal(model, "no feature_info, by which timm's networks name them")
    info = info[info[0]["reduction"] < 4 :]
    features = {feature["module"]: feature["num_chs"] for feature in info}
    if not features:
        raise _refusal(model, "it has features of one size alone")
    parent = list(features)[-1].rpartition(".")[0]
    names = [name for name in features if name.rpartition(".")[0] == parent]
    container = model.get_submodule(parent)
    if isinstance(container, nn.Sequential):
        children = [f"{parent}.{name}" for name, _ in container.named_children()]
        names = children[children.index(names[0]) : children.index(names[-1]) + 1]
    return {name: features.get(name) for name in names}


def _blocks(model: nn.Module, stage: str) -> list[str]:
    """Names of the blocks of a stage: members of it, or of its ``blocks``."""
    module = model.get_submodule(stage)
    inner = getattr(module, "blocks", None)
    prefix, members = (f"{stage}.blocks", inner) if inner is not None else (stage, module)
    children = dict(members.named_children())
    alike = len({type(child) for child in children.values()}) == 1
    if not children or not (isinstance(members, (nn.Sequential, nn.ModuleList)) or alike):
        kind = type(module).__name__
        raise _refusal(model, f"{stage}, one of its features, is {kind} and no list of blocks")
    return [f"{prefix}.{name}" for name in children]


def _image(model: Any, size: int | None) -> Map:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size")
    if size is None:
        if shape is not None:
            return tuple(shape)
        raise ValueError(
            f"image_size must be given: this {type(model).__name__} does not say for what images "
            "it is made"
        )
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = shape[0] if shape else 3 if first is None else first.in_channels
    return channels, size, size


@torch.no_grad()
def _maps(
    model: nn.Module, image: Map, names: list[str]
) -> tuple[str, dict[str, Tensor], dict[str, tuple[Map, Map]]]:
    """The module that reads the image; what each of ``names`` reads, and the sizes of what it
    reads and gives."""
    like = next(model.parameters())
    x = torch.zeros((1, *image), dtype=like.dtype, device=like.device)
    inputs: dict[str, Tensor] = {}
    maps: dict[str, tuple[Map, Map]] = {}
    stems: list[str] = []
    handles = []

    def size_of(name: str, t: Any) -> Map:
        if not isinstance(t, Tensor) or t.dim() != 4:
            got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise _refusal(model, f"{name} passes on {got}, not maps [B, C, H, W]")
        return tuple(t.shape[1:])  # type: ignore[return-value]

    for name, module in model.named_modules():
        if name in names:

            def note(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                inputs[name] = args[0]
                maps[name] = size_of(name, args[0]), size_of(name, output)

            handles.append(module.register_forward_hook(note))
        if name and next(module.parameters(), None) is not None:

            def look(module: nn.Module, args: tuple, name: str = name) -> None:
                if args and args[0] is x:
                    stems.append(name)

            handles.append(module.register_forward_pre_hook(look))
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in maps]:
        raise _refusal(model, f"{missing[0]}, one of its blocks, does not run in its forward")
    if not stems:
        raise _refusal(model, "no module of it reads the image")
    return stems[-1], inputs, maps
