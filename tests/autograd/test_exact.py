"""Under an exact format gradients are stock's, bit for bit, and what is kept is kept by reference.

Every function over the table in cases.py; then the bytes of each kind of layer, by formula, and
what is rebuilt from what.
"""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import functional as M
from memtl.autograd import share
from memtl.memory import saved_bytes
from memtl.nn import ROLES, convert
from memtl.storage import Dense
from tests.autograd.cases import CASES
from tests.helpers import assert_same, grad_like, leaves

EXACT = Dense(rebuild=True)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# torch folds the broadcast operand into a product of another shape.
ANOTHER_ORDER = (CASES["matmul-broadcast"],)
NO_16_BITS = ("avg_pool3d",)  # torch has none
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def step(fn, tensors, needs=None, autocast=False):
    """(y, gradients) of ``fn`` on fresh leaves; the layout of tensors is kept."""
    inputs = [
        t.detach().as_strided(t.shape, t.stride()).requires_grad_(need)
        for t, need in zip(tensors, needs or [True] * len(tensors), strict=True)
    ]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = fn(*inputs)
    out.backward(grad_like(out))
    return out.detach(), [t.grad for t in inputs]


def check(case, tensors, needs=None, autocast=False):
    expected, stock = step(case.stock, tensors, needs, autocast)
    for format in (EXACT, Dense()):
        out, ours = step(lambda *t: case.ours(format, *t), tensors, needs, autocast)  # noqa: B023
        assert_same(out, expected)
        for a, b in zip(ours, stock, strict=True):
            if case in ANOTHER_ORDER and b is not None:
                assert (a - b).norm() <= 4 * torch.finfo(out.dtype).eps * b.norm()
            elif b is None:
                assert a is None
            else:
                assert_same(a, b)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_stock_bit_for_bit(case, dtype):
    if case.function in NO_16_BITS and dtype.itemsize == 2:
        pytest.skip("torch has none")
    if dtype == torch.float64 and case.function == "rms_norm":
        pytest.skip("transformers' computes in float32")
    check(case, case.tensors(dtype))


@EVERY
def test_gradients_are_stock_bit_for_bit_under_autocast(case):
    check(case, case.tensors(), autocast=True)


@EVERY
def test_each_gradient_alone_is_stock_bit_for_bit(case):
    tensors = case.tensors()
    for i in range(len(tensors)):
        check(case, tensors, [j == i for j in range(len(tensors))])


def _last(t):
    """Channels last in memory, of any number of dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


def _every_second(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def _transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@EVERY
@pytest.mark.parametrize("layout", [_last, _every_second, _transposed])
def test_gradients_are_stock_bit_for_bit_in_every_layout(case, layout):
    if case is CASES["linear-transposed"]:
        pytest.skip("Conv1D takes views of contiguous tensors")
    tensors = case.tensors()
    check(case, [layout(tensors[0]), *tensors[1:]])


@EVERY
def test_no_more_is_kept_than_by_stock(case):
    """The generator's state, 5056 bytes, stands for the mask of attention's dropout."""
    tensors = case.tensors()
    for needs in ([True] * len(tensors), [True] + [False] * (len(tensors) - 1)):
        stock = saved_bytes(case.stock, *leaves(tensors, needs))
        ours = saved_bytes(case.ours, EXACT, *leaves(tensors, needs))
        assert ours <= stock + 5056 * (case.random and case.function != "dropout")
