"""Every operator takes tensors as they come, on the CPU and on a GPU: that begin anywhere, that
have gaps, captured in a CUDA graph; not of two devices; and needs little memory beside its results.
"""

import gc

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from benchmarks.kernels.cases import all_cases, tensor_bytes
from memtl import _ops

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ],
)
SUMS = ("grad", "masked", "attention")
"""In the names of operators that sum up floats, in an order of their own."""
WORKSPACE = 64 * 2**20
"""Bytes beside the results; the tensors in question have 77 MB and more."""


def call_of(op: str, device: str, batch: int = 1, dtype: torch.dtype = torch.bfloat16):
    """The operator with the arguments of its first case."""
    torch.manual_seed(0)
    case = next(c for c in all_cases(batch, device, dtype) if c.op == op)
    call = case.make()["memtl"]
    return call.func, call.args


def changed(arguments: tuple, change) -> list[tuple]:
    """The arguments, one of their tensors changed, for each of them."""
    leaves, spec = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [
        tree_unflatten(
            [change(leaf) if i == place else leaf for i, leaf in enumerate(leaves)], spec
        )
        for place in places
    ]


def elsewhere(t: Tensor) -> Tensor:
    """The same numbers one element behind where memory is aligned."""
    copy = t.new_empty(t.numel() + 1)[1:].view(t.shape)
    return copy.copy_(t)


def with_gaps(t: Tensor) -> Tensor:
    """The same numbers, every other element of a tensor."""
    return torch.stack((t, t), -1)[..., 0]


def assert_alike(op: str, actual, expected) -> None:
    if any(word in op for word in SUMS):
        expected = tree_map_only(Tensor, torch.Tensor.double, expected)
        actual = tree_map_only(Tensor, torch.Tensor.double, actual)
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("change", [elsewhere, with_gaps])
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("op", _ops.NAMES)
def test_any_layout(op, device, change):
    function, arguments = call_of(op, device)
    expected = function(*arguments)
    for others in changed(arguments, change):
        assert_alike(op, function(*others), expected)


@pytest.mark.parametrize("op", _ops.NAMES)
@pytest.mark.parametrize("device", [GPU])
def test_tensors_on_two_devices_are_refused(op, device):
    function, arguments = call_of(op, device)
    given = changed(arguments, lambda t: t.cpu())
    for others in given if len(given) > 1 else []:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"(?i)devices?\b|GPU"):
            function(*others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", _ops.NAMES)
@pytest.mark.parametrize("device", [GPU])
def test_replayed_from_a_graph(op, device, dtype):
    function, arguments = call_of(op, device, dtype=dtype)
    expected = function(*arguments)  # compiles what is compiled at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*arguments)
    tree_map_only(Tensor, lambda t: t.view(torch.uint8).fill_(0x5A) if t.dim() else t, captured)
    graph.replay()
    torch.cuda.synchronize()
    assert_alike(op, captured, expected)


@pytest.mark.parametrize("op", _ops.NAMES)
@pytest.mark.parametrize("device", [GPU])
def test_memory_beside_the_results(op, device):
    function, arguments = call_of(op, device, batch=64)
    function(*arguments)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*arguments)
    peak = torch.cuda.max_memory_allocated() - before
    if op == "attention_grad":  # what torch's own backward needs of the forward that runs again
        assert peak <= 3 * tensor_bytes(result) + WORKSPACE
    else:
        assert peak <= tensor_bytes(result) + WORKSPACE
