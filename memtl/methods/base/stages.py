"""The stages of a convolutional network: where its maps change their size, and the blocks there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...training import evaluating
from .transfer import check_module

Map = tuple[int, int, int]
"""Channels, height and width."""


class NoStages(ValueError):
    """A network is none that passes on maps in stages."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a stage: its name, and the maps between which it lies.

    ``entry`` is the module whose input is read as the block's: itself, unless it is the first of a
    stage that has another layer, for downsampling, in front of it; then the stage. ``overwritten``:
    the block changes that input in place.
    """

    name: str
    entry: str
    overwritten: bool
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
            ValueError: it has no size of its own, or takes no images of that size.
        """
        check_module(model)
        channels = _stage_channels(model)
        stages = {name: _blocks(model, name) for name in channels}
        image = _image(model, image_size)
        stem, runs = _run(
            model, image, [*stages, *(b for blocks in stages.values() for b in blocks)]
        )
        found = []
        for stage, names in stages.items():
            gives = runs[names[-1]].gives
            if channels[stage] not in (None, gives[0]):
                why = f"{stage} passes on {list(gives)}, not {channels[stage]} channels first"
                raise _refusal(model, why)
            entries = dict(zip(names, names, strict=True))
            first = runs[names[0]]
            # A stage that is not in the table was not called: timm checkpoints its blocks.
            if stage in runs and runs[stage].x is not first.x:
                entries[names[0]] = stage
            found.append(
                tuple(
                    Block(n, e, runs[n].overwritten, runs[e].reads, runs[n].gives)
                    for n, e in entries.items()
                )
            )
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
    names = list(features)
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1:
        raise _refusal(model, f"its features, {', '.join(names)}, are no neighbours")
    (parent,) = parents
    if missing := [name for name in (parent, *names) if not _has(model, name)]:
        raise _refusal(model, f"it has no module {missing[0]}, one of its features")
    container = model.get_submodule(parent)
    if isinstance(container, nn.Sequential):
        children = [f"{parent}.{name}" for name, _ in container.named_children()]
        names = children[children.index(names[0]) : children.index(names[-1]) + 1]
    return {name: features.get(name) for name in names}


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _blocks(model: nn.Module, stage: str) -> list[str]:
    """Names of the blocks of a stage: members of it, or of its ``blocks``."""
    module = model.get_submodule(stage)
    inner = getattr(module, "blocks", None)
    prefix, members = (f"{stage}.blocks", inner) if inner is not None else (stage, module)
    children = dict(members.named_children())
    listed = isinstance(members, (nn.Sequential, nn.ModuleList))
    alike = len({type(child) for child in children.values()}) == 1
    layers = any(next(child.children(), None) is None for child in children.values())
    if not children or layers or not (listed or alike):
        kind = type(module).__name__
        raise _refusal(model, f"{stage}, one of its features, is {kind} and no list of blocks")
    return [f"{prefix}.{name}" for name in children]


def _image(model: Any, size: int | None) -> Map:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size")
    if size is None and shape is None:
        raise ValueError(
            f"image_size must be given: this {type(model).__name__} does not say for what images "
            "it is made"
        )
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels  # what a timm model says is not in_chans
    if shape is None or size is not None:
        shape = (channels, size, size)
    return (channels, *shape[1:])


@dataclasses.dataclass
class Run:
    """What a module did with a blank image."""

    x: Tensor
    version: int
    reads: Map
    gives: Map = (0, 0, 0)

    @property
    def overwritten(self) -> bool:
        """Whether the module changed what it read."""
        return self.x._version != self.version


@torch.no_grad()
def _run(model: nn.Module, image: Map, names: list[str]) -> tuple[str, dict[str, Run]]:
    """The module that reads the image, and what those of ``names`` that are called did."""
    like = next(model.parameters())
    x = torch.zeros((1, *image), dtype=like.dtype, device=like.device)
    runs: dict[str, Run] = {}
    stems: list[str] = []
    handles = []

    def size_of(name: str, t: Any) -> Map:
        if not isinstance(t, Tensor) or t.dim() != 4:
            got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise _refusal(model, f"{name} passes on {got}, not maps [B, C, H, W]")
        return tuple(t.shape[1:])  # type: ignore[return-value]

    def look(module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
        given = argument(args, kwargs)
        if given is x and next(module.parameters(), None) is not None:
            stems.append(name)
        if name in names:
            runs[name] = Run(given, getattr(given, "_version", 0), size_of(name, given))

    def note(module: nn.Module, args: tuple, output: Any, name: str) -> None:
        runs[name].gives = size_of(name, output)

    for name, module in model.named_modules():
        if name:
            hook = functools.partial(look, name=name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if name in names:
            handles.append(module.register_forward_hook(functools.partial(note, name=name)))
    try:
        with evaluating(model):
            model(x)
    except (RuntimeError, AssertionError) as error:
        kind, why = type(model).__name__, str(error) or type(error).__name__
        raise ValueError(f"this {kind} takes no images {list(image)}: {why}") from error
    finally:
        for handle in handles:
            handle.remove()
    stages = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    if missing := [name for name in names if name not in runs and name not in stages]:
        raise _refusal(model, f"{missing[0]}, one of its blocks, does not run in its forward")
    if not stems:
        raise _refusal(model, "no module of it reads the image")
    return stems[-1], runs


def argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a module is called with first, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)
