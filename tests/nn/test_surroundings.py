"""Converted models where people put them: shared modules, wrappers, memory formats, compilers."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import memtl
from memtl.memory import saved_bytes
from memtl.storage import Dense, TopK

ROLES = ("linear", "convolution", "attention", "norm", "activation")
EXACT = memtl.BackRazorConfig(**dict.fromkeys(ROLES, Dense()))


def small_cnn():
    """Everything a MobileNet and a ResNet do: in place, depthwise, strided, squeezed, pooled."""

    class Gate(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.reduce = nn.Conv2d(channels, 4, 1)
            self.expand = nn.Conv2d(4, channels, 1)

        def forward(self, x):
            gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
            return x * gate.sigmoid()

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="reflect"),
        nn.GroupNorm(4, 16),
        nn.Hardswish(inplace=True),
        Gate(16),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).train()


def images(batch=4):
    return torch.randn(batch, 3, 32, 32)


def gradients(call, x, model=None, accumulate=False):
    """Output and gradients of ``call(x)`` along a fixed direction."""
    model = call if model is None else model
    if not accumulate:
        model.zero_grad()
    out = call(x)
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator))
    return out.detach(), [p.grad.clone() for p in model.parameters()]


def assert_close(found, expected):
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_cnn_under_exact_formats_is_stock(mode, batch):
    model, x = getattr(small_cnn(), mode)(), images(batch)
    twin = copy.deepcopy(model)
    report = memtl.apply(twin, EXACT)
    assert {row.kind for row in report.skipped} == set()
    assert_close(gradients(twin, x), gradients(model, x))
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_cnn_saves():
    model, x = small_cnn(), images(8)
    stock = saved_bytes(model, x)
    memtl.apply(model, memtl.BackRazorConfig(keep=0.1))
    assert stock / saved_bytes(model, x) > 6


@pytest.mark.parametrize("both", [True, False])
def test_channels_last(both):
    model, x = small_cnn(), images().to(memory_format=torch.channels_last)
    if both:
        model = model.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    memtl.apply(twin, EXACT)
    assert_close(gradients(twin, x), gradients(model, x))
    memtl.unconvert(twin)
    memtl.apply(twin, memtl.BackRazorConfig(keep=0.1))
    out, grads = gradients(twin, x)
    assert torch.equal(out, gradients(copy.deepcopy(model), x)[0])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_a_module_with_two_parents_is_converted_once():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(inplace=True)),
        nn.Sequential(shared, nn.Hardswish(inplace=True)),
    )
    twin, x = copy.deepcopy(model), images()
    report = memtl.apply(twin, EXACT)
    assert [row.name for row in report.converted] == ["0.0", "0.1", "0.2", "1.1"]
    assert_close(gradients(twin, x), gradients(model, x))
    assert memtl.unconvert(twin) == 4


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_distributed_data_parallel(one_process, wrapped_first):
    model, x = small_cnn(), images()
    twin = copy.deepcopy(model)
    if wrapped_first:
        parallel = nn.parallel.DistributedDataParallel(twin)
        report = memtl.apply(parallel, EXACT)
    else:
        report = memtl.apply(twin, EXACT)
        parallel = nn.parallel.DistributedDataParallel(twin)
    assert report.converted[0].name == "0"
    for _ in range(2):
        assert_close(gradients(parallel, x), gradients(model, x))


def test_synchronised_batch_norm_without_a_group_is_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_cnn())
    twin, x = copy.deepcopy(model), images()
    memtl.apply(twin, EXACT)
    assert_close(gradients(twin, x), gradients(model, x))


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_as_one_graph(compiled_first):
    torch._dynamo.reset()
    model, x = small_cnn(), images()
    twin = copy.deepcopy(model)
    expected = gradients(model, x)
    memtl.apply(model, EXACT)
    if compiled_first:
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        compiled(x)  # a graph of the stock model is there
        twin[1].reset_running_stats()
        twin[5].reset_running_stats()
        memtl.apply(compiled, EXACT)
    else:
        memtl.apply(twin, EXACT)
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, x), expected)


def test_lossy_formats_compiled_equal_eager():
    torch._dynamo.reset()
    """Top-k alone: the dither of few bits is a hash of the data, down to its last bits."""
    model, x = small_cnn(), images()
    memtl.apply(model, dataclasses.replace(EXACT, convolution=TopK(0.2, values="fp32")))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, x), gradients(model, x))


def test_compiled_code_keeps_no_more():
    torch._dynamo.reset()
    model, x = small_cnn(), images(8)
    model[7].padding_mode = "zeros"  # torch.compile does not show reflection to a mode
    memtl.apply(model, memtl.BackRazorConfig(keep=0.1))
    kept = saved_bytes(model, x)
    assert saved_bytes(torch.compile(model, backend="aot_eager", fullgraph=True), x) <= 1.02 * kept


def test_checkpointing_and_accumulation():
    model, x = small_cnn(), images()
    memtl.apply(model, memtl.BackRazorConfig(keep=0.2))
    model.eval()  # running statistics would move between the runs
    expected = gradients(model, x)
    checkpointed = gradients(lambda x: checkpoint(model, x, use_reentrant=False), x, model)
    assert torch.equal(checkpointed[0], expected[0])
    for a, b in zip(checkpointed[1], expected[1], strict=True):
        assert torch.equal(a, b)
    twice = gradients(model, x), gradients(model, x, accumulate=True)
    for a, b in zip(*(grads for _, grads in twice), strict=True):
        torch.testing.assert_close(b, 2 * a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model, x = small_cnn().to(dtype), images().to(dtype)
    twin = copy.deepcopy(model)
    memtl.apply(twin, memtl.BackRazorConfig(keep=0.2))
    out, grads = gradients(twin, x)
    assert torch.equal(out, gradients(model, x)[0])
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


def test_autocast():
    model, x = small_cnn(), images()
    twin = copy.deepcopy(model)
    memtl.apply(twin, memtl.BackRazorConfig(keep=0.2))
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = model(x), twin(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in twin.parameters())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(mode, padding):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode))
    twin, x = copy.deepcopy(model), images(2).requires_grad_()
    memtl.apply(twin, EXACT)
    stock = saved_bytes(model, x)
    assert_close(gradients(twin, x), gradients(model, x))
    memtl.unconvert(twin)
    memtl.apply(twin, memtl.BackRazorConfig(keep=0.1))
    assert saved_bytes(twin, x) < stock / 10


def test_exclusion_reaches_functions_called_by_a_layer_itself():
    model = small_cnn()
    report = memtl.apply(model, memtl.BackRazorConfig(exclude_modules=["10"]))
    assert {row.name for row in report.skipped} == {"10.reduce", "10.expand"}
    assert "10" not in {row.name for row in report.converted}
