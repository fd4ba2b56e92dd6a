"""Small modules beside the blocks of a frozen convolutional network, added to what those give.

What the lite residual modules of TinyTL and the modules of Rep-Net have in common.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.standardized import StandardizedConv2d
from .partial import PartialConfig, is_bias, parameters_outside
from .reading import PerThread
from .stages import Block, Map, argument
from .transfer import Trained, check_count, check_flag, check_module, replace

EPS = 1e-3  # of the batch norms, as in the published networks
DIVISOR = 8  # of the channels in the middle


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideConfig(PartialConfig):
    """The base of methods that add such modules.

    Their batch norms follow the batch in training, which therefore needs two images where a
    module's maps are one pixel.

    Args:
        num_classes, convert, weight_bits: as in :class:`memtl.methods.base.partial.PartialConfig`.
        expand: channels in the middle of a module, as a multiple of those it reads, rounded to a
            multiple of 8.
        groups: of its spatial convolution (1 where what it reads cannot be divided so).
        weight_standardization: let the modules' convolutions use their weights standardised.
        bias: let the biases of the network, those of its norms too, train as well; the last bias
            of a module, which would be another one of the same sum, does not train then.
        image_size: height and width of the images, of which the modules' kernels depend; None for
            the size that the network says it is made for.
    """

    networks: ClassVar[str] = "convolutional networks"
    expand: float = 1.0
    groups: int = 2
    weight_standardization: bool = True
    bias: bool = False
    image_size: int | None = None

    name: ClassVar[str]
    """Under which submodule of the model the modules are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.expand, bool) or not isinstance(self.expand, (int, float)):
            raise TypeError(f"expand must be a number, got {type(self.expand).__name__}")
        if not 0 < self.expand < math.inf:
            raise ValueError(f"expand must be positive and finite, got {self.expand}")
        check_count("groups", self.groups)
        check_flag("weight_standardization", self.weight_standardization)
        check_flag("bias", self.bias)
        if self.image_size is not None:
            check_count("image_size", self.image_size)

    def sites(self, model: nn.Module) -> list[Site]:
        """Where the modules are to be."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> Trained:
        """Give ``model`` its side modules, as one submodule, and freeze the rest of it but for its
        classifier and, with ``bias``, its biases.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: as :meth:`Stages.of` and :meth:`PartialConfig.freeze`.
        """
        check_module(model)
        if hasattr(model, self.name):
            raise ValueError(
                f"this {type(model).__name__} has a {self.name} already, where side modules go"
            )
        sites = self.sites(model)
        biases = parameters_outside(model, is_bias) if self.bias else []
        modules = SideModules(self, sites).to(next(model.parameters()).dtype)
        head = self.freeze(model)
        for parameter in biases:
            parameter.requires_grad_(True)
        replace(model, self.name, modules)
        modules.connect(model)
        return self.finish(model, self.name, head)


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for a side module: what it reads, where that is added, and how it gets there.

    Attributes:
        entry: name of the module whose input is read.
        target: name of the block to whose output the module's is added.
        reads, gives: those two maps.
        pool: by how much the average pooling in front makes what is read smaller.
        kernel, stride: of the spatial convolution.
        early: whether the module has to run before the block does.
    """

    entry: str
    target: str
    reads: Map
    gives: Map
    pool: int
    kernel: int
    stride: int = 1
    early: bool = False

    @classmethod
    def at(cls, block: Block, **options: int) -> Site:
        """Beside that block."""
        early = block.overwritten or block.entry != block.name
        return cls(block.entry, block.name, block.reads, block.gives, **options, early=early)


class Pool(nn.AvgPool2d):
    """Average pooling of what there is: a map smaller than the window becomes one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, min(self.kernel_size, *x.shape[2:]))


class SideModule(nn.Module):
    """x [B, C, H, W] -> average pooling, grouped convolution, batch norm, ReLU, 1x1 convolution,
    batch norm: [B, O, h, w]. The last norm's scale starts at 0: at first it adds 0."""

    def __init__(self, config: SideConfig, site: Site) -> None:
        super().__init__()
        channels, gives = site.reads[0], site.gives[0]
        middle = divisible(channels * config.expand)
        groups = math.gcd(config.groups, channels, middle)
        convolution = StandardizedConv2d if config.weight_standardization else nn.Conv2d
        self.pool = Pool(site.pool)
        self.conv1 = convolution(
            channels, middle, site.kernel, site.stride, site.kernel // 2, groups=groups, bias=False
        )
        self.bn1 = nn.BatchNorm2d(middle, EPS)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = convolution(middle, gives, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(gives, EPS)
        for module in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.bn2.weight)
        self.bn2.bias.requires_grad_(not config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.pool(x))
        if self.training and x.numel() == x.shape[1]:
            raise ValueError(
                "a side module normalises by the batch, which in training takes more than one "
                "image where its maps are one pixel"
            )
        return self.bn2(self.conv2(self.act(self.bn1(x))))


def divisible(channels: float) -> int:
    """The nearest multiple of 8, no more than a tenth below, as the published networks round."""
    nearest = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return nearest if nearest >= 0.9 * channels else nearest + DIVISOR


def added(x: Tensor, side: Tensor) -> Tensor:
    """x [B, O, H, W] + ``side`` [B, O, h, w], resized to it."""
    if side.shape[2:] != x.shape[2:]:
        side = F.interpolate(side, x.shape[2:], mode="bilinear")
    return x + side


@dataclasses.dataclass
class Made:
    """What modules have made for blocks that have not run yet, by the index of the module."""

    maps: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class SideModules(nn.ModuleList):
    """The side modules of a network, and the hooks by which they read it and add to it."""

    def __init__(self, config: SideConfig, sites: list[Site]) -> None:
        super().__init__(SideModule(config, site) for site in sites)
        self.sites = sites
        self.state = PerThread(Made)

    def connect(self, model: nn.Module) -> None:
        """Place the hooks."""
        model.register_forward_pre_hook(Forget(self))
        for index, site in enumerate(self.sites):
            target = model.get_submodule(site.target)
            if site.early:
                entry = model.get_submodule(site.entry)
                entry.register_forward_pre_hook(Before(self, index), with_kwargs=True)
                target.register_forward_hook(Behind(self, index))
            else:
                target.register_forward_hook(Beside(self, index), with_kwargs=True)


# Hooks are objects, since copies of a model copy its hooks.


@dataclasses.dataclass
class Forget:
    """Drop what a forward that did not end has left."""

    modules: SideModules

    def __call__(self, model: nn.Module, args: tuple) -> None:
        self.modules.state.now.maps.clear()


@dataclasses.dataclass
class Hook:
    """A hook of the side module of that index."""

    modules: SideModules
    index: int


class Beside(Hook):
    """Add to a block's output what the module makes of the block's input."""

    def __call__(
        self, block: nn.Module, args: tuple, kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        return added(output, self.modules[self.index](argument(args, kwargs)))


class Before(Hook):
    """Run the module on what another one is given, in front of the block."""

    def __call__(self, entry: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        made = self.modules[self.index](argument(args, kwargs))
        self.modules.state.now.maps[self.index] = made


class Behind(Hook):
    """Add to the block's output what :class:`Before` has made."""

    def __call__(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        side = self.modules.state.now.maps.pop(self.index, None)
        if side is None:
            raise RuntimeError(
                "what a side module made was used up: this network cannot be checkpointed here "
                "(set_grad_checkpointing(False)); frozen it keeps little anyway"
            )
        return added(output, side)
