"""Batch, group and instance normalisation: what is kept, and the formulas on it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import functional as M
from memtl.memory import saved_bytes
from memtl.storage import Dense, Quantized, pack
from tests.helpers import FORMATS, ROOT, assert_same, assert_within, grad_like, leaves, run

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
FOUR = Quantized(4)


def statistics(x):
    """Mean and 1 / standard deviation by channel, [1, C, 1, 1], as the kernel computes them."""
    _, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    return mean.view(1, -1, 1, 1), rstd.view(1, -1, 1, 1)


@EVERY_FORMAT
def test_training_gradients_follow_the_formula_on_the_stored_x_hat(format):
    tensors = [torch.randn(6, 5, 4, 7) * 3 + 1, torch.randn(5), torch.randn(5)]
    out, (grad_x, grad_w, grad_b), _ = run(
        lambda x, w, b: M.batch_norm(x, None, None, w, b, True, format=format), tensors
    )
    x, w, _ = tensors
    mean, rstd = statistics(x)
    x_hat = pack((x - mean) * rstd, format).unpack().double()
    g, dims = grad_like(out).double(), (0, 2, 3)
    projection = x_hat * (g * x_hat).mean(dims, keepdim=True)
    expected = (w.view(1, -1, 1, 1) * rstd) * (g - g.mean(dims, keepdim=True) - projection)
    assert_within(grad_x, expected, 2e-5 * expected.abs().max())
    expected = (g * x_hat).sum(dims)
    assert_within(grad_w, expected, 2e-5 * (g * x_hat).abs().sum(dims).max())
    assert_within(grad_b, g.sum(dims), 2e-5 * g.abs().sum(dims).max())


@EVERY_FORMAT
def test_group_norm_gradients_follow_the_formula_on_the_stored_x_hat(format):
    tensors = [torch.randn(3, 6, 4, 5) * 3 + 1, torch.randn(6), torch.randn(6)]
    out, (grad_x, grad_w, _), _ = run(
        lambda x, w, b: M.group_norm(x, 2, w, b, format=format), tensors
    )
    x, w, _ = tensors
    grouped = x.view(3, 2, -1)
    _, mean, rstd = torch.native_group_norm(x, None, None, 3, 6, 20, 2, 1e-5)
    x_hat = ((grouped - mean.unsqueeze(2)) * rstd.unsqueeze(2)).view(x.shape)
    x_hat = pack(x_hat, format).unpack().double()
    g = grad_like(out).double()
    scaled, flat = (g * w.view(1, -1, 1, 1)).view(3, 2, -1), x_hat.view(3, 2, -1)
    centred = scaled - scaled.mean(2, keepdim=True)
    expected = (centred - flat * (scaled * flat).mean(2, keepdim=True)) * rstd.unsqueeze(2)
    assert_within(grad_x, expected.view(x.shape), 2e-5 * expected.abs().max())
    assert_within(grad_w, (g * x_hat).sum((0, 2, 3)), 1e-4 * (g * x_hat).abs().sum((0, 2, 3)).max())


@pytest.mark.parametrize("training", [True, False])
def test_bytes_of_batch_norm(training):
    x, w, b = torch.randn(6, 5, 4, 7), torch.randn(5), torch.randn(5)
    x_hat, rstd, own = FOUR.nbytes(x.shape, x.dtype), 4 * 5, 4 * 5

    def bytes_when(*needs):
        tensors = leaves((x, w, b), needs)
        buffers = torch.zeros(5), torch.ones(5)
        return saved_bytes(lambda: M.batch_norm(tensors[0], *buffers, *tensors[1:], training))

    assert bytes_when(True, True, True) == x_hat + rstd + own
    assert bytes_when(True, False, True) == (x_hat if training else 0) + rstd + own
    assert bytes_when(True, False, False) == (x_hat if training else 0) + rstd + own
    assert bytes_when(False, True, True) == x_hat
    assert bytes_when(False, False, True) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("function", ["batch_norm", "group_norm", "instance_norm"])
def test_other_layouts_are_stock(function, layout):
    x = torch.randn(4, 6, 5, 8)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.transpose(2, 3)
    arguments = {
        "batch_norm": lambda x, w, b: (x, None, None, w, b, True),
        "group_norm": lambda x, w, b: (x, 3, w, b),
        "instance_norm": lambda x, w, b: (x, None, None, w, b),
    }[function]
    tensors = [x, torch.randn(6), torch.randn(6)]
    ours = run(lambda *t: getattr(M, function)(*arguments(*t), format=Dense()), tensors)
    stock = run(lambda *t: getattr(F, function)(*arguments(*t)), tensors)
    assert_same(ours[0], stock[0])
    assert ours[0].stride() == stock[0].stride()
    for a, b in zip(ours[1], stock[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_modules_keep_their_running_statistics(kind, tracking, momentum):
    stock = kind(5, affine=True, momentum=momentum, track_running_stats=tracking)
    ours = copy.deepcopy(stock)
    memtl.apply(nn.ModuleList([ours]), memtl.BackRazorConfig(norm=Dense()))
    for training in (True, True, False):
        stock.train(training)
        ours.train(training)
        x = torch.randn(4, 5, 6, 7) * 2 + 1
        expected, out = stock(x), ours(x)
        assert_same(out.detach(), expected.detach())
        out.sum().backward()
    for (name, a), b in zip(stock.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_batch_of_one_value_a_channel_is_refused_as_in_torch():
    x, w = torch.randn(1, 5, 1, 1, requires_grad=True), torch.randn(5, requires_grad=True)
    for function in (M.batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            function(x, None, None, w, training=True)
    for function in (M.instance_norm, F.instance_norm):
        with pytest.raises(ValueError, match="more than 1 spatial element when training"):
            function(torch.randn(4, 5, 1, requires_grad=True))


def test_a_batch_of_one_image_trains():
    tensors = [torch.randn(1, 5, 6, 7), torch.randn(5), torch.randn(5)]
    ours = run(lambda x, w, b: M.batch_norm(x, None, None, w, b, True, format=Dense()), tensors)
    stock = run(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), tensors)
    for a, b in zip(ours[1], stock[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_statistics_that_change_before_backward_do_not_matter(needs):
    """In evaluation stock keeps the buffers themselves, and refuses; here their values are kept,
    but for exact formats, which do as stock does."""
    x, w, b = leaves([torch.randn(4, 5, 6), torch.randn(5), torch.randn(5)], needs)
    mean, var = torch.randn(5), torch.rand(5) + 0.5
    out = M.batch_norm(x, mean, var, w, b, format=Dense("fp32"))
    exact = M.batch_norm(x, mean, var, w, b, format=Dense())
    g = grad_like(out)
    expected = torch.autograd.grad(
        out, [t for t in (x, w, b) if t.requires_grad], g, retain_graph=True
    )
    mean.add_(1)
    var.mul_(2)
    found = torch.autograd.grad(out, [t for t in (x, w, b) if t.requires_grad], g)
    for a, e in zip(found, expected, strict=True):
        assert_same(a, e)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exact.backward(g)


def test_statistics_are_needed_in_evaluation():
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(ValueError, match="expected running_mean and running_var in evaluation"):
        M.batch_norm(x, None, None)


@pytest.mark.parametrize("groups", [0, 4])
def test_groups_that_do_not_divide(groups):
    with pytest.raises(ValueError, match=rf"C a multiple of {groups}, got \[2, 6, 3\]"):
        M.group_norm(torch.randn(2, 6, 3, requires_grad=True), groups)


def test_two_processes_normalise_as_one(tmp_path):
    """Against F.batch_norm on both batches together."""
    store = tmp_path / "store"
    script = str(ROOT / "tests" / "autograd" / "sync_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, script, str(store), str(rank)], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    first, second = (torch.load(f"{store}.{rank}") for rank in range(2))

    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(5, 4, 3, 6, generator=generator) * 2 + 1 for _ in range(2))
    weight, bias = (torch.randn(4, generator=generator).requires_grad_() for _ in range(2))
    x.requires_grad_()
    mean, var = torch.zeros(4), torch.ones(4)
    y = F.batch_norm(x, mean, var, weight, bias, True)
    y.backward(g)
    for name, expected in (("y", y.detach()), ("x", x.grad)):
        found = torch.cat((first[name], second[name]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in (("weight", weight), ("bias", bias)):
        torch.testing.assert_close(first[name] + second[name], parameter.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in (("mean", mean), ("var", var)):
        torch.testing.assert_close(first[name], buffer, rtol=1e-5, atol=1e-6)
        assert_same(first[name], second[name])
