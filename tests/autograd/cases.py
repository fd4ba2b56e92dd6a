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
from transformers.activations import NewGELUActivation, QuickGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from memtl import functional as M


@dataclasses.dataclass(frozen=True)
class Case:
    """``ours(format, *tensors)`` and ``stock(*tensors)``.

    ``exact`` says for each tensor whether its gradient is exact under every format; ``formats`` is
    False where none is taken.
    """

    function: str
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    exact: tuple[bool, ...]
    formats: bool = True
    random: bool = False

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in self.shapes]


def _conv1d(x, weight, bias):
    return Conv1D.forward(SimpleNamespace(nf=weight.shape[1], weight=weight, bias=bias), x)


def _llama(x, weight):
    return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=1e-6), x)


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
    "patch_conv2d": Case(
        "patch_conv2d",
        lambda f, x, w, b: M.patch_conv2d(x, w, b, format=f),
        lambda x, w, b: F.conv2d(x, w, b, stride=w.shape[2:]),
        ((2, 3, 13, 9), (5, 3, 4, 2), (5,)),
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
        lambda f, x, w: M.rms_norm(x, (70,), w, 1e-6, format=f, llama=True),
        _llama,
        ((2, 9, 70), (70,)),
        (False, False),
    ),
    "gelu": _elementwise("gelu", F.gelu),
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
}
