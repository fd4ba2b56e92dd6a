"""Every public function of memtl.functional beside the function whose forward it must equal.

The contract tests (test_contract.py) run over this table; what one function alone promises is
tested in the file of its kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import (
    FastGELUActivation,
    NewGELUActivation,
    QuickGELUActivation,
)
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from memtl import functional as M


@dataclasses.dataclass(frozen=True)
class Case:
    """``ours(format, *tensors)`` and ``stock(*tensors)``.

    ``exact`` says for each tensor whether its gradient is exact under every format; ``formats`` is
    False where none is taken, ``keeps`` where nothing is kept, ``batch`` where the first dimension
    is no batch.
    """

    function: str
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    exact: tuple[bool, ...]
    formats: bool = True
    random: bool = False
    keeps: bool = True
    batch: bool = True

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in self.shapes]


def _conv1d(x, weight, bias):
    return Conv1D.forward(SimpleNamespace(nf=weight.shape[1], weight=weight, bias=bias), x)


def _llama(x, weight):
    return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=1e-6), x)


def _gemma(x, weight):
    norm = GemmaRMSNorm(0)
    del norm.weight
    norm.weight = weight
    return norm(x)


def _sdpa_case(shapes=((2, 3, 7, 8),) * 3, mask=None, **options):
    """``mask``: shape of an additive mask among the tensors, or a bool tensor."""
    if isinstance(mask, tuple):
        exact = (False,) * 4
        shapes = (*shapes, mask)
    else:
        exact = (False,) * 3
        options = {"attn_mask": mask, **options}
    return Case(
        "scaled_dot_product_attention",
        lambda f, *t: M.scaled_dot_product_attention(*t, **options, format=f),
        lambda *t: F.scaled_dot_product_attention(*t, **options),
        shapes,
        exact,
        random=options.get("dropout_p", 0) > 0,
    )


def _elementwise(name, stock, shape=(3, 5, 43), **options):
    return Case(
        name, lambda f, x: getattr(M, name)(x, **options, format=f), stock, (shape,), (False,)
    )


def _conv(name, shapes, exact=(True, False, True), **options):
    return Case(
        name,
        lambda f, *t: getattr(M, name)(*t, **options, format=f),
        lambda *t: getattr(F, name)(*t, **options),
        shapes,
        exact,
    )


def _batch_norm(shape, training, statistics):
    channels = shape[1]

    def run(function, t, **format):
        given = (None, None)
        if statistics:
            dtype = t[1].dtype if isinstance(t[1], Tensor) and t[1].is_floating_point() else None
            given = tuple(torch.full((channels,), n, dtype=dtype) for n in (0.3, 1.4))
        return function(t[0], *given, *t[1:], training=training, **format)

    return Case(
        "batch_norm",
        lambda f, *t: run(M.batch_norm, t, format=f),
        lambda *t: run(F.batch_norm, t),
        (shape, (channels,), (channels,)),
        (not training, False, True),
    )


def _exact(name, stock, shape, *arguments, keeps=True, **options):
    """A function of one tensor that takes no format."""
    return Case(
        name,
        lambda f, x: getattr(M, name)(x, *arguments, **options),
        lambda x: stock(x, *arguments, **options),
        (shape,),
        (True,),
        formats=False,
        keeps=keeps,
    )


_BOOL_MASK = torch.ones(7, 7, dtype=torch.bool).tril(2)

CASES: dict[str, Case] = {
    "linear": Case(
        "linear",
        lambda f, x, w, b: M.linear(x, w, b, format=f),
        F.linear,
        ((2, 9, 300), (5, 300), (5,)),
        (True, False, True),
    ),
    "linear-no-bias": Case(
        "linear",
        lambda f, x, w: M.linear(x, w, format=f),
        F.linear,
        ((11, 64), (7, 64)),
        (True, False),
    ),
    "linear-vector": Case(
        "linear",
        lambda f, x, w: M.linear(x, w, format=f),
        F.linear,
        ((33,), (4, 33)),
        (True, False),
    ),
    "linear-transposed": Case(
        "linear",
        lambda f, x, w, b: M.linear(x, w, b, format=f, transposed=True),
        _conv1d,
        ((2, 9, 30), (30, 6), (6,)),
        (True, False, True),
    ),
    "layer_norm": Case(
        "layer_norm",
        lambda f, x, w, b: M.layer_norm(x, (70,), w, b, format=f),
        lambda x, w, b: F.layer_norm(x, (70,), w, b),
        ((2, 9, 70), (70,), (70,)),
        (False, False, True),
    ),
    "layer_norm-plain": Case(
        "layer_norm",
        lambda f, x: M.layer_norm(x, (5, 14), eps=1e-6, format=f),
        lambda x: F.layer_norm(x, (5, 14), eps=1e-6),
        ((4, 5, 14),),
        (False,),
    ),
    "layer_norm-one-row": Case(
        "layer_norm",
        lambda f, x, w, b: M.layer_norm(x, (70,), w, b, format=f),
        lambda x, w, b: F.layer_norm(x, (70,), w, b),
        ((70,), (70,), (70,)),
        (False, False, True),
    ),
    "rms_norm": Case(
        "rms_norm",
        lambda f, x, w: M.rms_norm(x, (70,), w, format=f),
        lambda x, w: F.rms_norm(x, (70,), w),
        ((2, 9, 70), (70,)),
        (False, False),
    ),
    "rms_norm-plain": Case(
        "rms_norm",
        lambda f, x: M.rms_norm(x, (5, 14), eps=1e-6, format=f),
        lambda x: F.rms_norm(x, (5, 14), eps=1e-6),
        ((4, 5, 14),),
        (False,),
    ),
    "rms_norm-llama": Case(
        "rms_norm",
        lambda f, x, w: M.rms_norm(x, (70,), w, 1e-6, format=f, style="llama"),
        _llama,
        ((2, 9, 70), (70,)),
        (False, False),
    ),
    "rms_norm-gemma": Case(
        "rms_norm",
        lambda f, x, w: M.rms_norm(x, (70,), w, 1e-6, format=f, style="gemma"),
        _gemma,
        ((2, 9, 70), (70,)),
        (False, False),
    ),
    "gelu": _elementwise("gelu", F.gelu),
    "gelu_fast": _elementwise("gelu_fast", lambda x: FastGELUActivation().forward(x)),
    "gelu_bloom": _elementwise("gelu_bloom", lambda x: BloomGelu().forward(x)),
    "square": _elementwise("square", torch.square),
    "gelu-tanh": _elementwise("gelu", lambda x: F.gelu(x, approximate="tanh"), approximate="tanh"),
    "gelu_new": _elementwise("gelu_new", lambda x: NewGELUActivation().forward(x)),
    "quick_gelu": _elementwise("quick_gelu", lambda x: QuickGELUActivation().forward(x)),
    "silu": _elementwise("silu", F.silu),
    "relu": Case("relu", lambda f, x: M.relu(x), F.relu, ((3, 5, 43),), (True,), formats=False),
    "dropout": Case(
        "dropout",
        lambda f, x: M.dropout(x, 0.3),
        lambda x: F.dropout(x, 0.3),
        ((3, 5, 43),),
        (True,),
        formats=False,
        random=True,
    ),
    "softmax": Case(
        "softmax",
        lambda f, x: M.softmax(x, format=f),
        lambda x: F.softmax(x, -1),
        ((3, 5, 43),),
        (False,),
    ),
    "softmax-middle": Case(
        "softmax",
        lambda f, x: M.softmax(x, 1, torch.float32, format=f),
        lambda x: F.softmax(x, 1, dtype=torch.float32),
        ((3, 5, 43),),
        (False,),
    ),
    "matmul": Case(
        "matmul",
        lambda f, a, b: M.matmul(a, b, format=f),
        torch.matmul,
        ((2, 3, 6, 9), (2, 3, 9, 5)),
        (False, False),
    ),
    "matmul-broadcast": Case(
        "matmul",
        lambda f, a, b: M.matmul(a, b, format=f),
        torch.matmul,
        ((6, 9), (2, 3, 9, 5)),
        (False, False),
        batch=False,
    ),
    "sdpa": _sdpa_case(),
    "sdpa-3d": _sdpa_case(((3, 7, 8),) * 3),
    "sdpa-bool-mask": _sdpa_case(mask=_BOOL_MASK),
    "sdpa-mask": _sdpa_case(mask=(2, 1, 7, 7)),
    "sdpa-causal": _sdpa_case(is_causal=True),
    "sdpa-cross": _sdpa_case(((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8)), is_causal=True),
    "sdpa-gqa": _sdpa_case(((2, 6, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)), enable_gqa=True),
    "sdpa-scale": _sdpa_case(scale=0.7),
    "sdpa-negative-scale": _sdpa_case(scale=-0.3),
    "sdpa-dropout": _sdpa_case(dropout_p=0.4),
    "sdpa-dropout-causal": _sdpa_case(dropout_p=0.4, is_causal=True),
    "conv2d-patches": _conv("conv2d", ((2, 3, 13, 9), (5, 3, 4, 2), (5,)), stride=(4, 2)),
    "conv2d": _conv("conv2d", ((2, 5, 9, 7), (6, 5, 3, 3), (6,)), padding=1),
    "conv2d-strided": _conv(
        "conv2d",
        ((2, 4, 11, 10), (6, 2, 3, 2), (6,)),
        stride=(2, 1),
        padding=(2, 0),
        dilation=(1, 2),
        groups=2,
    ),
    "conv2d-depthwise": _conv("conv2d", ((2, 6, 9, 7), (6, 1, 5, 3), (6,)), padding=2, groups=6),
    "conv2d-pointwise": _conv("conv2d", ((2, 6, 5, 7), (9, 6, 1, 1)), (True, False)),
    "conv2d-pointwise-strided": _conv("conv2d", ((2, 6, 5, 7), (9, 6, 1, 1), (9,)), stride=2),
    "conv2d-same": _conv("conv2d", ((2, 3, 8, 7), (4, 3, 4, 3), (4,)), padding="same"),
    "conv2d-unbatched": dataclasses.replace(
        _conv("conv2d", ((3, 8, 7), (4, 3, 3, 3), (4,))), batch=False
    ),
    "conv1d": _conv("conv1d", ((2, 5, 23), (4, 5, 3), (4,)), stride=2, padding="valid"),
    "conv3d": _conv("conv3d", ((2, 3, 4, 5, 6), (4, 3, 3, 2, 1), (4,)), padding=(1, 0, 0)),
    "conv_transpose1d": _conv(
        "conv_transpose1d", ((2, 4, 11), (4, 3, 3), (3,)), stride=2, output_padding=1
    ),
    "conv_transpose2d": _conv(
        "conv_transpose2d", ((2, 4, 5, 6), (4, 3, 3, 2), (6,)), stride=2, padding=1, groups=2
    ),
    "conv_transpose3d": _conv("conv_transpose3d", ((2, 3, 3, 4, 3), (3, 2, 2, 2, 2), (2,))),
    "batch_norm": _batch_norm((4, 5, 6, 7), training=True, statistics=True),
    "batch_norm-1d": _batch_norm((9, 5), training=True, statistics=False),
    "batch_norm-3d": _batch_norm((2, 3, 2, 3, 4), training=True, statistics=True),
    "batch_norm-evaluation": _batch_norm((4, 5, 6, 7), training=False, statistics=True),
    "batch_norm-plain": Case(
        "batch_norm",
        lambda f, x: M.batch_norm(x, None, None, training=True, format=f),
        lambda x: F.batch_norm(x, None, None, training=True),
        ((4, 5, 6, 7),),
        (False,),
    ),
    "instance_norm": Case(
        "instance_norm",
        lambda f, x, w, b: M.instance_norm(x, None, None, w, b, format=f),
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        ((3, 5, 6, 7), (5,), (5,)),
        (False, False, True),
    ),
    "group_norm": Case(
        "group_norm",
        lambda f, x, w, b: M.group_norm(x, 3, w, b, format=f),
        lambda x, w, b: F.group_norm(x, 3, w, b),
        ((4, 6, 5, 7), (6,), (6,)),
        (False, False, True),
    ),
    "group_norm-plain": Case(
        "group_norm",
        lambda f, x: M.group_norm(x, 1, eps=1e-6, format=f),
        lambda x: F.group_norm(x, 1, eps=1e-6),
        ((4, 6, 11),),
        (False,),
    ),
    "normalize": _elementwise("normalize", lambda x: F.normalize(x, dim=-1), dim=-1),
    "vector_norm": Case(
        "vector_norm",
        lambda f, x: M.vector_norm(x, (1, 2), True, format=f),
        lambda x: torch.linalg.vector_norm(x, 2, (1, 2), True),
        ((3, 5, 43, 2),),
        (False,),
    ),
    "vector_norm-last": Case(
        "vector_norm",
        lambda f, x: M.vector_norm(x, -1, format=f),
        lambda x: x.norm(dim=-1),
        ((3, 5, 43),),
        (False,),
    ),
    "mish": _elementwise("mish", F.mish),
    "hardswish": _elementwise("hardswish", F.hardswish),
    "elu": _elementwise("elu", F.elu),
    "elu-alpha": _elementwise("elu", lambda x: F.elu(x, 0.3), alpha=0.3),
    "selu": _elementwise("selu", F.selu),
    "celu": _elementwise("celu", lambda x: F.celu(x, 1.7), alpha=1.7),
    "softplus": _elementwise("softplus", lambda x: F.softplus(x, 2.0), beta=2.0),
    "logsigmoid": _elementwise("logsigmoid", F.logsigmoid),
    "tanh": _elementwise("tanh", torch.tanh),
    "sigmoid": _elementwise("sigmoid", torch.sigmoid),
    "relu6": _exact("relu6", F.relu6, (3, 5, 43)),
    "hardtanh": _exact("hardtanh", F.hardtanh, (3, 5, 43), -0.4, 0.7),
    "hardsigmoid": _exact("hardsigmoid", F.hardsigmoid, (3, 5, 43)),
    "leaky_relu": _exact("leaky_relu", F.leaky_relu, (3, 5, 43), 0.2),
    "leaky_relu-negative": _exact("leaky_relu", F.leaky_relu, (3, 5, 43), -0.2),
    "threshold": _exact("threshold", F.threshold, (3, 5, 43), 0.1, 5.0),
    "prelu": Case(
        "prelu",
        lambda f, x, w: M.prelu(x, w, format=f),
        F.prelu,
        ((3, 5, 43), (5,)),
        (True, False),
    ),
    "prelu-one": Case(
        "prelu",
        lambda f, x, w: M.prelu(x, w, format=f),
        F.prelu,
        ((3, 5, 43), (1,)),
        (True, False),
    ),
    "mul": Case(
        "mul",
        lambda f, a, b: M.mul(a, b, format=f),
        torch.mul,
        ((3, 5, 43), (3, 5, 43)),
        (False, False),
    ),
    "mul-gate": Case(
        "mul",
        lambda f, a, b: M.mul(a, b, format=f),
        torch.mul,
        ((3, 5, 6, 7), (3, 5, 1, 1)),
        (True, False),
    ),
    "addcmul": Case(
        "addcmul",
        lambda f, c, a, b: M.addcmul(c, a, b, value=0.7, format=f),
        lambda c, a, b: torch.addcmul(c, a, b, value=0.7),
        ((3, 1, 43), (3, 5, 43), (5, 43)),
        (True, False, False),
    ),
    "einsum": Case(
        "einsum",
        lambda f, a, b: M.einsum("bhid,bhjd->bhij", a, b, format=f),
        lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b),
        ((2, 3, 6, 9), (2, 3, 5, 9)),
        (False, False),
    ),
    "baddbmm": Case(
        "baddbmm",
        lambda f, c, a, b: M.baddbmm(c, a, b, beta=0.5, alpha=2.0, format=f),
        lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2.0),
        ((3, 6, 5), (3, 6, 9), (3, 9, 5)),
        (True, False, False),
    ),
    "amax": _exact("amax", torch.amax, (3, 4, 5, 6), (1, -1)),
    "amin": _exact("amin", torch.amin, (3, 4, 5), 1, keepdim=True),
    "max_pool1d": _exact("max_pool1d", F.max_pool1d, (3, 4, 23), 2),
    "max_pool2d": _exact(
        "max_pool2d", F.max_pool2d, (3, 4, 13, 10), 3, stride=2, padding=1, ceil_mode=True
    ),
    "max_pool2d-dilated": _exact(
        "max_pool2d", F.max_pool2d, (3, 4, 13, 17), (5, 4), stride=(1, 3), dilation=2
    ),
    "max_pool2d-large": _exact("max_pool2d", F.max_pool2d, (2, 2, 20, 20), 18, stride=1),
    "max_pool3d": _exact("max_pool3d", F.max_pool3d, (2, 3, 6, 5, 7), 2),
    "adaptive_max_pool1d": _exact("adaptive_max_pool1d", F.adaptive_max_pool1d, (3, 4, 23), 5),
    "adaptive_max_pool2d": _exact(
        "adaptive_max_pool2d", F.adaptive_max_pool2d, (3, 4, 18, 17), (5, 3)
    ),
    "adaptive_max_pool3d": _exact("adaptive_max_pool3d", F.adaptive_max_pool3d, (2, 3, 5, 6, 4), 2),
    "avg_pool1d": _exact("avg_pool1d", F.avg_pool1d, (3, 4, 23), 3, padding=1, keeps=False),
    "avg_pool2d": _exact(
        "avg_pool2d", F.avg_pool2d, (3, 4, 13, 10), 3, 1, 1, count_include_pad=False, keeps=False
    ),
    "avg_pool3d": _exact(
        "avg_pool3d", F.avg_pool3d, (2, 3, 6, 5, 7), 2, ceil_mode=True, keeps=False
    ),
    "adaptive_avg_pool1d": _exact(
        "adaptive_avg_pool1d", F.adaptive_avg_pool1d, (3, 4, 23), 5, keeps=False
    ),
    "adaptive_avg_pool2d": _exact(
        "adaptive_avg_pool2d", F.adaptive_avg_pool2d, (3, 4, 13, 10), (5, None), keeps=False
    ),
    "adaptive_avg_pool3d": _exact(
        "adaptive_avg_pool3d", F.adaptive_avg_pool3d, (2, 3, 5, 6, 4), 2, keeps=False
    ),
    "pad-reflect": _exact("pad", F.pad, (3, 4, 7, 9), (2, 1, 0, 3), mode="reflect", keeps=False),
    "pad-replicate": _exact("pad", F.pad, (3, 4, 7), (2, 1), mode="replicate", keeps=False),
}
