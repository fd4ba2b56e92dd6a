"""Training memory as the papers' tables count it: TinyTL's definition, computed and not measured.

Cai, Gan, Zhu, Han: "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning",
NeurIPS 2020; Rep-Net's and Back Razor's tables use it too. It is a model of a framework that keeps
nothing it need not keep. What PyTorch keeps is measured by :mod:`memtl.memory`.

Layers are walked in the order in which they run on one sample, in evaluation mode:

=====================================  ==========================  =======================
layer                                  kept for backward           while it runs
=====================================  ==========================  =======================
convolution                            x, if its weight trains     x, and y / groups
linear                                 x, if its weight trains     x and y
batch, group, layer norm               x, if its weight trains     x
ReLU, ReLU6, leaky ReLU                1 bit an element of x       x
sigmoid, tanh, hard swish and sigmoid  x                           x
others                                 nothing                     nothing
=====================================  ==========================  =======================

at 4 bytes an element. Activation memory is the largest sum, over layers, of what the layer needs
while it runs, what those before it keep, and the inputs of the residual blocks it is in.
Activations keep nothing where none runs after a parameter that trains (a classifier alone). The
total is that times the batch size, and the parameters: 32 bits each where they train, 8 where not.

Not counted: gradients, the optimizer's state, buffers, workspace, what layers outside the table
keep (pooling, dropout, attention), and functions called without a module (``F.relu``,
``x * gate``).

Beyond the published code, which knows the networks of its paper: layer and RMS norms count as group
norms do, transposed convolutions as convolutions, and activations with a curved derivative (GELU,
SiLU, Mish, ...) as the sigmoid does. A layer that is norm and activation in one (timm's
``BatchNormAct2d``) counts as the norm, and its activation as one. A module that runs several times
counts every time by what it is given; in the published code by what it is given last, which makes
0.3 % of torchvision's ResNet-50, whose blocks have one ReLU for three places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .memory import tensors_in
from .nn.weights import compressed

__all__ = ["Analytic", "profile"]

MB = 1e6  # the papers' tables are in millions of bytes
BITS = 32  # of an element of an activation

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# By name, as timm and users have classes of their own for what torch has.
RMS_NORMS = frozenset({"RmsNorm", "RmsNorm2d"})
ONE_BIT = frozenset({"ReLU", "ReLU6", "LeakyReLU"})
CURVED = frozenset(
    "Sigmoid Tanh Hardswish HardSwish HardSwishMe Hardsigmoid HardSigmoid HardSigmoidMe "
    "CELU ELU GELU GELUTanh HardMish HardMishMe Mish MishMe QuickGELU SELU SiLU Softplus Softsign "
    "Swish SwishMe".split()
)

# What a block says of itself: whether it adds its input to what it makes of it.
SAYS = ("has_skip", "use_res_connect", "use_shortcut", "shortcut")
# Blocks that always do: of torchvision's and timm's ResNets, ConvNeXts and transformers.
RESIDUAL = frozenset(
    "BasicBlock Bottleneck PreActBottleneck "
    "CNBlock ConvNeXtBlock MetaNeXtBlock "
    "Block EncoderBlock EvaBlock LayerScaleBlock MixerBlock ParallelScalingBlock "
    "ResBlock ResPostBlock SwinTransformerBlock SwinTransformerV2Block".split()
)


@dataclasses.dataclass(frozen=True)
class Analytic:
    """Training memory by TinyTL's definition, in bytes. ``print`` it.

    Attributes:
        parameter_bytes: of all parameters, as wide as they are taken to be.
        activation_bytes: of one sample; a fraction where the bits of masks end within a byte.
        batch_size: samples of a step.
    """

    parameter_bytes: float
    activation_bytes: float
    batch_size: int

    @property
    def total_bytes(self) -> float:
        """Parameters, and the activations of a batch."""
        return self.parameter_bytes + self.batch_size * self.activation_bytes

    def __str__(self) -> str:
        return (
            f"analytic (TinyTL's definition): {self.total_bytes / MB:.1f} MB at batch "
            f"{self.batch_size}: parameters {self.parameter_bytes / MB:.2f} MB, activations "
            f"{self.activation_bytes / MB:.2f} MB a sample"
        )


def profile(
    model: nn.Module,
    *inputs: Any,
    batch_size: int = 8,
    trainable_bits: int = 32,
    frozen_bits: int = 8,
) -> Analytic:
    """Training memory of ``model`` by TinyTL's definition; what trains is what requires a gradient.

    The model runs once, forward, in evaluation mode and without gradients, and is left as it was.
    A block is residual if its ``has_skip``, ``use_res_connect`` or ``use_shortcut`` says so, or it
    has a ``shortcut`` that is not None, or, where it has none of these, if its class or one that it
    derives from has the name of a block that always is (``RESIDUAL``). What a hook of a block runs
    comes after the block: its input is no longer held, as it is for what its forward runs.

    Args:
        inputs: of the model: samples [B, ...] first. B is divided by.
        batch_size: samples of a training step.
        trainable_bits, frozen_bits: of a parameter that trains, and of one that does not.

    Raises:
        TypeError: ``model`` is no module, the first input no tensor, or a number is no int.
        ValueError: a number is less than 1, or there are no samples.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (
        ("batch_size", batch_size),
        ("trainable_bits", trainable_bits),
        ("frozen_bits", frozen_bits),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not inputs or not isinstance(inputs[0], Tensor):
        kind = type(inputs[0]).__name__ if inputs else "nothing"
        raise TypeError(f"the first input must be a tensor of samples, got {kind}")
    if not inputs[0].ndim or not len(inputs[0]):
        raise ValueError(f"the first input must be samples [B, ...], got {list(inputs[0].shape)}")
    walk = _Walk(model)
    walk.run(inputs)
    parameters = sum(
        p.numel() * (trainable_bits if p.requires_grad else frozen_bits) for p in model.parameters()
    )
    codes = {layer.weight_codes for layer in compressed(model).values()}  # no parameters
    parameters += sum(code.numel() * frozen_bits for code in codes)
    return Analytic(parameters / 8, walk.peak() / 8 / len(inputs[0]), batch_size)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A layer that ran, in bits: what it needs meanwhile, with the residuals; what it keeps."""

    needs: int
    keeps: int = 0
    activation: bool = False


class _Walk:
    """One forward of a model, layer by layer."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._steps: list[_Step] = []
        self._open: list[int] = []  # bits of the inputs of residual blocks that are running
        self._trains: int | None = None  # steps before the first parameter that trains

    def run(self, inputs: tuple) -> None:
        """Run the model; afterwards it is as before."""
        training = {module: module.training for module in self._model.modules()}
        handles = list(self._watch())
        try:
            self._model.eval()
            with torch.no_grad():
                self._model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode

    def peak(self) -> int:
        """The most bits at once."""
        last = max((i for i, step in enumerate(self._steps) if step.activation), default=-1)
        backward = self._trains is not None and self._trains <= last
        kept = most = 0
        for step in self._steps:
            most = max(most, kept + step.needs)
            if backward or not step.activation:
                kept += step.keeps
        return most

    def _watch(self) -> Iterator[Any]:
        for module in self._model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                yield module.register_forward_pre_hook(self._note_training)
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                yield module.register_forward_hook(self._product, with_kwargs=True)
            elif (rule := _rule(module)) is not None:
                # Before it runs: what it is made of (an activation) comes after it.
                yield module.register_forward_pre_hook(self._elementwise(rule), with_kwargs=True)
            if _is_residual(module):
                yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
                # The first of its hooks: others may run modules of their own.
                yield module.register_forward_hook(self._leave, prepend=True)

    def _note_training(self, *_: object) -> None:
        if self._trains is None:
            self._trains = len(self._steps)

    def _product(self, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        x, out = _bits(args, kwargs), BITS * y.numel()
        self._add(x + out // getattr(module, "groups", 1), _if_trains(module, x))

    def _elementwise(self, rule: Callable[[nn.Module, int], int]) -> Callable[..., None]:
        activation = rule is not _if_trains

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = _bits(args, kwargs)
            self._add(x, rule(module, x), activation)

        return hook

    def _add(self, needs: int, keeps: int, activation: bool = False) -> None:
        self._steps.append(_Step(needs + sum(self._open), keeps, activation))

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._open.append(_bits(args, kwargs))

    def _leave(self, *_: object) -> None:
        self._open.pop()


def _rule(module: nn.Module) -> Callable[[nn.Module, int], int] | None:
    """What a norm or an activation keeps of an input of so many bits; None for other modules."""
    names = _names(module)
    if isinstance(module, NORMS) or names & RMS_NORMS:
        return _if_trains
    if names & ONE_BIT:
        return lambda _, x: x // BITS
    return (lambda _, x: x) if names & CURVED else None


def _if_trains(module: nn.Module, x: int) -> int:
    return x if getattr(module.weight, "requires_grad", False) else 0


def _is_residual(module: nn.Module) -> bool:
    for name in SAYS:
        said = getattr(module, name, ...)
        if said is None or isinstance(said, (bool, nn.Module)):
            return said is not None and said is not False
    return bool(_names(module) & RESIDUAL)


def _names(module: nn.Module) -> set[str]:
    """The classes of a module: those of torch, which others derive from, and of its own."""
    return {cls.__name__ for cls in type(module).__mro__}


def _bits(args: tuple, kwargs: dict) -> int:
    """Of the first tensor of a call, at 4 bytes an element."""
    found = next(tensors_in((*args, *kwargs.values())), None)
    return 0 if found is None else BITS * found.numel()
