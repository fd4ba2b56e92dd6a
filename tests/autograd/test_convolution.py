"""Convolutions: patches, which are a linear layer, and all others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memtl import functional as M
from memtl.memory import saved_bytes
from memtl.storage import Dense, TopK, pack
from tests.helpers import FORMATS, assert_same, assert_within, gamma, grad_like, leaves

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def patches_of(x, p, q):
    """F.unfold's patches as [B, patches, C p q]."""
    return F.unfold(x, (p, q), stride=(p, q)).transpose(1, 2)


@EVERY_FORMAT
@pytest.mark.parametrize("channels_last", [False, True])
def test_weight_gradient_is_taken_from_the_unpacked_patches(format, channels_last):
    x, weight = torch.randn(2, 3, 17, 13), torch.randn(6, 3, 4, 3, requires_grad=True)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    out = M.conv2d(x, weight, stride=(4, 3), format=format)
    g = grad_like(out)
    out.backward(g)
    stored = pack(patches_of(x, 4, 3).contiguous(), format).unpack().reshape(-1, 36).double()
    rows = g.permute(0, 2, 3, 1).reshape(-1, 6).double()
    bound = gamma(rows.shape[0] + 2) * rows.T.abs() @ stored.abs()
    assert_within(weight.grad.view(6, 36), rows.T @ stored, bound)


@pytest.mark.parametrize(
    "size, kernel",
    [((8, 8), (4, 4)), ((9, 7), (4, 2)), ((5, 5), (1, 1)), ((6, 4), (6, 4)), ((3, 3), (2, 2))],
)
def test_every_gradient_equals_torch_under_an_exact_format(size, kernel):
    tensors = [torch.randn(2, 3, *size), torch.randn(5, 3, *kernel), torch.randn(5)]
    tensors = [t.double() for t in tensors]
    ours, stock = leaves(tensors), leaves(tensors)
    stride = tuple(max(k, 2) for k in kernel)  # 1x1: every other element
    out = M.conv2d(*ours, stride=stride, format=Dense())
    expected = F.conv2d(*stock, stride=stride)
    assert_same(out.detach(), expected.detach())
    out.backward(grad_like(out))
    expected.backward(grad_like(out))
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_an_image_without_a_batch_dimension():
    """As nn.Conv2d allows."""
    tensors = torch.randn(3, 8, 8), torch.randn(5, 3, 4, 4), torch.randn(5)
    ours, stock = leaves(tensors), leaves(tensors)
    out, expected = M.conv2d(*ours, stride=4, format=Dense()), F.conv2d(*stock, stride=4)
    assert_same(out.detach(), expected.detach())
    out.backward(grad_like(out))
    expected.backward(grad_like(out))
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_backward_reads_no_uninitialised_memory(poison):
    """The gradient of x is asked for with a placeholder in place of x."""
    x, weight = leaves((torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)))
    out = M.conv2d(x, weight, stride=4, format=TopK(0.2))
    out.backward(grad_like(out))
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@EVERY_FORMAT
def test_bytes(format):
    x, weight, bias = torch.randn(2, 3, 17, 13), torch.randn(6, 3, 4, 3), torch.randn(6)
    kept = format.nbytes(torch.Size((2, 4 * 4, 36)), x.dtype)
    own = 4 * weight.numel()

    def bytes_when(*needs):
        tensors = leaves((x, weight, bias), needs)
        return saved_bytes(lambda: M.conv2d(*tensors, stride=(4, 3), format=format))

    assert bytes_when(False, True, True) == kept
    assert bytes_when(True, True, True) == kept + own
    assert bytes_when(True, False, True) == own
    assert bytes_when(False, False, True) == 0
