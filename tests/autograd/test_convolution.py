"""Convolutions: patches, which are a linear layer, and all others."""

from __future__ import annotations

import re

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
    if format.exact:
        kept = x.nbytes  # a reference, not a copy of the part that is read
    own = 4 * weight.numel()

    def bytes_when(*needs):
        tensors = leaves((x, weight, bias), needs)
        return saved_bytes(lambda: M.conv2d(*tensors, stride=(4, 3), format=format))

    assert bytes_when(False, True, True) == kept
    assert bytes_when(True, True, True) == kept + own
    assert bytes_when(True, False, True) == own
    assert bytes_when(False, False, True) == 0


# What a general convolution must do with strides, paddings, groups and dilations.
GEOMETRIES = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": (2, 1)},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4},
}


def weight_for(options, channels=4, outputs=8, kernel=(3, 3)):
    return torch.randn(outputs, channels // options.get("groups", 1), *kernel)


@EVERY_FORMAT
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_weight_gradient_is_taken_from_the_unpacked_input(format, options, channels_last):
    x, weight = torch.randn(3, 4, 11, 9), weight_for(options).requires_grad_()
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    out = M.conv2d(x, weight, format=format, **options)
    assert_same(out.detach(), F.conv2d(x, weight, **options).detach())
    g = grad_like(out)
    out.backward(g)
    rows = x.permute(order).reshape(3, -1)
    stored = pack(rows, format).unpack().view([x.shape[i] for i in order])
    stored = stored.permute(0, 3, 1, 2) if channels_last else stored

    def grad(x, g):
        return torch.nn.grad.conv2d_weight(x, weight.shape, g, **options)

    expected = grad(stored.double(), g.double())
    terms = out.shape[0] * out[0, 0].numel()
    bound = gamma(terms + 2) * grad(stored.double().abs(), g.double().abs())
    assert_within(weight.grad, expected, bound)


@EVERY_FORMAT
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_bytes_of_any_convolution(format, options):
    x, weight, bias = torch.randn(3, 4, 11, 9), weight_for(options), torch.randn(8)
    kept = format.nbytes(torch.Size((3, 4 * 11 * 9)), x.dtype)
    own = 4 * weight.numel()

    def bytes_when(*needs, layout=torch.contiguous_format):
        tensors = leaves((x.to(memory_format=layout), weight, bias), needs)
        return saved_bytes(lambda: M.conv2d(*tensors, format=format, **options))

    assert bytes_when(False, True, True) == kept
    assert bytes_when(False, True, True, layout=torch.channels_last) == kept
    assert bytes_when(True, True, True) == kept + own
    assert bytes_when(True, False, True) == own
    assert bytes_when(False, False, True) == 0


def test_a_1x1_convolution_of_stride_2_keeps_a_quarter_of_its_input():
    x, weight = leaves([torch.randn(2, 64, 16, 16), torch.randn(8, 64, 1, 1)], [False, True])
    format = TopK(0.1)
    whole = saved_bytes(M.conv2d, x, weight, format=format)
    assert saved_bytes(M.conv2d, x, weight, stride=2, format=format) < 0.3 * whole


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_every_dimension_in_every_layout_is_stock(name, kind):
    dims = int(name[4])
    name = name.replace("conv", kind)
    x = torch.randn(2, 4, *(6, 5, 7)[:dims])
    shape = (4, 3) if kind == "conv_transpose" else (3, 4)
    weight = torch.randn(*shape, *(3, 2, 3)[:dims])
    views = [x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.repeat(1, 2, *(1,) * dims)[:, ::2]]
    for view in views:
        results = []
        for module, options in ((M, {"format": Dense()}), (F, {})):
            inputs = [view.detach().requires_grad_(), weight.clone().requires_grad_()]
            out = getattr(module, name)(*inputs, stride=2, padding=1, **options)
            out.backward(grad_like(out))
            results.append((out.detach(), *(t.grad for t in inputs)))
        for ours, stock in zip(*results, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
        assert_same(results[0][0], results[1][0])


@pytest.mark.parametrize("kernel", [(4, 4), (3, 2), (1, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_is_torchs(kernel, dilation):
    tensors = torch.randn(2, 3, 9, 8), torch.randn(4, 3, *kernel), torch.randn(4)
    ours, stock = leaves(tensors), leaves(tensors)
    options = {"padding": "same", "dilation": dilation}
    out, expected = M.conv2d(*ours, format=Dense(), **options), F.conv2d(*stock, **options)
    assert_same(out.detach(), expected.detach())
    out.backward(grad_like(out))
    expected.backward(grad_like(out))
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (0, 3, 6, 5)])
def test_sizes_of_zero(shape):
    tensors = torch.randn(shape), torch.randn(4, 3, 3, 3)
    ours, stock = leaves(tensors), leaves(tensors)
    options = {"padding": 1}
    try:
        expected = F.conv2d(*stock, **options)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            M.conv2d(*ours, **options)
        return
    out = M.conv2d(*ours, **options)
    assert_same(out.detach(), expected.detach())
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, stock, strict=True):
        assert_same(a.grad, b.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "full"}, "padding must be numbers, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \(2, 2\)"),
        ({"stride": (1, 2, 3)}, r"expected one number or 2, got \(1, 2, 3\)"),
        ({"groups": 3}, "with 3 groups, got"),
        ({"groups": 0}, "with 0 groups, got"),
    ],
)
def test_bad_options_are_named(options, message):
    x, weight = leaves([torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)])
    with pytest.raises(ValueError, match=f"conv2d: .*{message}"):
        M.conv2d(x, weight, **options)
