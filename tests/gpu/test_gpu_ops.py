"""On an NVIDIA GPU: every operator against its definition run on the CPU, and whole models.

`make gpu` runs this; elsewhere it is skipped.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

import memtl
from memtl import _ops, reference
from memtl.storage.topk import quota
from tests.helpers import assert_derivative_codes, assert_same, assert_within, gamma, unit

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BITS = (8, 4, 3, 2)
SIZES = (0, 1, 7, 64, 255, 256, 257, 1000, 4099)


def to_device(arguments):
    return tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), list(arguments))


def shifted(x):
    """x on the device, beginning one element behind aligned memory."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)
    return flat[1:].copy_(x.flatten()).view(x.shape)


def draw(*size, dtype=torch.float32, special=False, seed=0):
    """Normal numbers; ``special``: with ties, both zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    if special:
        flat = x.view(-1)
        for start, value in enumerate((1.5, -1.5, 0.0, -0.0, torch.inf, -torch.inf, torch.nan)):
            flat[11 + start :: 97] = value
    return x


# ------------------------------------------------------------ operators whose results are identical


def topk_pack_cases():
    for dtype, n in itertools.product(_ops.FLOATING, SIZES):
        x = draw(3, n, dtype=dtype, special=True)
        yield x, 26, quota(n % 256, 0.1), torch.int8, False
    for values, bitmap, keep in itertools.product(
        _ops.VALUE_DTYPES, (False, True), (0.03, 0.3, 1.0)
    ):
        x = draw(5, 1000, special=True)
        yield x, quota(256, keep), quota(1000 % 256, keep), values, bitmap
    yield draw(0, 300), 26, 4, torch.int8, False
    yield draw(600, 7).t(), 26, quota(600 % 256, 0.1), torch.float32, True
    for rows, n in ((5, 512), (1, 4099)):  # rows without a tail, and one whose tail is odd
        for dtype, bitmap in itertools.product(_ops.FLOATING, (False, True)):
            x = draw(rows, n, dtype=dtype, special=True)
            yield x, 26, quota(n % 256, 0.1), torch.int8, bitmap
    for n in (384, 3072):  # a warp packs many blocks
        yield draw(1500, n, dtype=torch.bfloat16), 26, quota(n % 256, 0.1), torch.int8, False


def topk_pack_sample_cases():
    for dtype, n in itertools.product(_ops.FLOATING, SIZES):
        yield draw(3, n, dtype=dtype, special=True), n // 9, torch.int8, False
    for values, bitmap, k in itertools.product(_ops.VALUE_DTYPES, (False, True), (1, 100, 1000)):
        yield draw(5, 1000, special=True), k, values, bitmap
    for dtype, n in itertools.product(_ops.FLOATING, (20_000, 70_003)):
        x = draw(2, n, dtype=dtype, special=True)
        yield x, n // 10, torch.int8, False
        yield x.relu(), 3 * n // 4, torch.bfloat16, True  # many zeros are kept
    yield draw(600, 7).t(), 26, torch.float32, True


def packed_cases():
    """values, positions, scale, counts; n, k, k_tail, bitmap: as both ways to pack give them."""
    for n, values, bitmap in itertools.product((7, 256, 768), _ops.VALUE_DTYPES, (False, True)):
        x = draw(12, n)
        k, k_tail = quota(256, 0.1), quota(n % 256, 0.1)
        empty = torch.empty(0, dtype=torch.int16)
        yield *reference.topk_pack(x, k, k_tail, values, bitmap), empty, n, k, k_tail, bitmap
        x, k = x.view(3, 4 * n), n // 3
        yield *reference.topk_pack_sample(x, k, values, bitmap), 4 * n, k, 0, bitmap


def topk_unpack_cases():
    for (*packed, n, k, k_tail, bitmap), dtype in itertools.product(packed_cases(), _ops.FLOATING):
        yield *packed, n, k, k_tail, bitmap, dtype


def quant_pack_cases():
    """Every type in every number of bits, and of every size; a kernel is compiled for each."""
    for (i, n), (j, bits) in itertools.product(enumerate(SIZES), enumerate(BITS)):
        yield draw(n, dtype=_ops.FLOATING[(i + j) % 4]), bits, 12345
    for bits in BITS:
        yield draw(40, 37, special=True), bits, 2**40 + 1
        yield draw(37, 40).t(), bits, 0


def quant_pack_normalized_cases():
    for x, bits, seed in quant_pack_cases():
        rows, n = x.numel() // max(x.shape[-1], 1), x.shape[-1]
        for size, inner in ((rows, n), (n, 1), (1, n)) if n else ((1, 1),):
            yield x, draw(size, seed=1), draw(size, dtype=x.dtype, seed=2), bits, inner, seed


def with_results(cases):
    """Each with the type of its result; every type in every number of bits."""
    for i, case in enumerate(cases):
        yield case, _ops.FLOATING[i // 5 % 4]


def quant_unpack_cases():
    for (x, bits, seed), dtype in with_results(quant_pack_cases()):
        yield *reference.quant_pack(x, bits, seed), bits, list(x.shape), dtype


def quant_pack_range_cases():
    for x, bits, seed in quant_pack_cases():
        yield x, bits, -0.13, 1.13, seed


def quant_unpack_range_cases():
    for (x, *rest, seed), dtype in with_results(quant_pack_range_cases()):
        yield reference.quant_pack_range(x, *rest, seed), *rest, list(x.shape), dtype


def quant_unpack_affine_cases():
    for codes, params, bits, size, dtype in quant_unpack_cases():
        channels = size[-1]
        w, b = draw(channels, dtype=dtype), draw(channels, seed=1)
        mask = reference.bits_pack(draw(*size, seed=2) > 0)
        yield codes, params, bits, w, b, None, 1, size, dtype
        yield codes, params, bits, w[:1], None, mask, 1, size, dtype
        yield codes, params, bits, w, b, mask, 1, size, dtype, 0.0, 6.0
    for inner, channels in itertools.product((3, 49, 64), (1, 5)):
        packed = reference.quant_pack(draw(4, channels, inner), 4, 1)
        w, b = draw(channels, seed=1), draw(channels, seed=2)
        yield *packed, 4, w, b, None, inner, [4, channels, inner], torch.bfloat16


def quant_apply_range_cases():
    for codes, bits, lo, hi, size, dtype in quant_unpack_range_cases():
        yield draw(*size, dtype=dtype, seed=1), codes, bits, lo, hi


def bits_pack_cases():
    for n in SIZES:
        yield (draw(n) > 0,)
    yield (draw(31, 34)[:, ::2].t() > 0,)
    yield ((draw(31, 34) > 0)[:, ::2],)


def bits_pack_between_cases():
    bounds = ((0.0, None), (None, 0.1), (-0.3, 0.1))
    for dtype, n, (lo, hi) in itertools.product(_ops.FLOATING, SIZES, bounds):
        yield draw(n, dtype=dtype, special=True), lo, hi


def bits_apply_cases():
    scales = (1.0, 1 / 0.9, -1e-3, 0.0)
    for dtype, n, scale in itertools.product(_ops.FLOATING, SIZES, scales):
        x = draw(n, dtype=dtype, special=True)
        yield x, reference.bits_pack(draw(n, seed=1) > 0), scale
    yield draw(31, 34).t(), reference.bits_pack(draw(34, 31, seed=1) > 0), 0.7


def bits_select_cases():
    for dtype, n in itertools.product(_ops.FLOATING, SIZES):
        mask = draw(n, seed=1) > 0
        yield draw(n, dtype=dtype, special=True), reference.bits_pack(mask), int(mask.sum())
    mask = draw(34, 31, seed=1) > 0
    yield draw(31, 34).t(), reference.bits_pack(mask), int(mask.sum())


def bits_expand_cases():
    for x, bits, count in bits_select_cases():
        yield draw(count, dtype=x.dtype, special=True), bits, list(x.shape)


def threshold_magnitude_cases():
    for dtype in _ops.FLOATING:
        xs = [draw(n, dtype=dtype, special=True, seed=n) for n in (*SIZES, 100_003)]
        xs.append(draw(31, 34, dtype=dtype).t())
        masks = [reference.bits_pack(draw(*x.shape, seed=1) > -0.5) for x in xs]
        for k in (0, 1, 100, 3000, 50_000):
            yield xs, [], k
            yield xs, masks, k
    # More tensors than a kernel takes; and those whose keys begin alike, of which many are equal.
    yield [draw(n % 37, seed=n) for n in range(300)], [], 1000
    alike = [1 + draw(5000).abs() / 4096, torch.full((70_001,), 1 + 2.0**-12)]
    for k in (500, 5000, 60_000):
        yield alike, [], k


def threshold_mask_cases():
    for xs, masks, k in threshold_magnitude_cases():
        value, ties = reference.threshold_magnitude(xs, masks, k)
        for i, x in enumerate(xs):
            yield x, masks[i] if masks else None, value, ties[i]


EXACT = {
    "topk_pack": topk_pack_cases,
    "topk_pack_sample": topk_pack_sample_cases,
    "topk_unpack": topk_unpack_cases,
    "quant_pack": quant_pack_cases,
    "quant_pack_normalized": quant_pack_normalized_cases,
    "quant_unpack": quant_unpack_cases,
    "quant_pack_range": quant_pack_range_cases,
    "quant_unpack_range": quant_unpack_range_cases,
    "quant_unpack_affine": quant_unpack_affine_cases,
    "quant_apply_range": quant_apply_range_cases,
    "bits_pack": bits_pack_cases,
    "bits_pack_between": bits_pack_between_cases,
    "bits_apply": bits_apply_cases,
    "bits_select": bits_select_cases,
    "bits_expand": bits_expand_cases,
    "threshold_magnitude": threshold_magnitude_cases,
    "threshold_mask": threshold_mask_cases,
}
CURVES = ("quant_unpack_activation", "quant_activation_grad", "quant_pack_derivative")


def test_every_operator_is_tested():
    sums = {"topk_weight_grad", "topk_conv_weight_grad", "attention_grad"}
    codes = {"quant_pack_derivative"}
    norms = {"quant_norm_grad", "quant_channel_norm_grad"}
    queries = {"query_attention", "query_attention_grad"}  # test_gpu_query_attention.py
    masked = {"masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad"}
    assert {*EXACT, *sums, *codes, *norms, *queries, *masked, *CURVES} == set(_ops.NAMES)


def from_source(name, source):
    """The operator, or Triton's, whoever serves it."""
    if source == "triton":
        return pytest.importorskip("memtl.kernels").OPS[name]
    return getattr(torch.ops.memtl, name)


def compare(call, name):
    for arguments in EXACT[name]():
        expected = getattr(reference, name)(*arguments)
        actual = call(*to_device(arguments))
        if isinstance(expected, torch.Tensor):
            actual, expected = (actual,), (expected,)
        for a, e in zip(actual, expected, strict=True):
            assert a.device.type == DEVICE and a.is_contiguous()
            assert_same(a.cpu(), e)


@pytest.mark.parametrize("name", EXACT)
def test_operator_gives_what_its_definition_gives(name):
    compare(getattr(torch.ops.memtl, name), name)


@pytest.mark.parametrize(
    "name",
    [
        "topk_pack",
        "topk_pack_sample",
        "topk_unpack",
        "quant_pack",
        "quant_pack_normalized",
        "quant_unpack",
        "quant_pack_range",
        "quant_unpack_range",
        "quant_unpack_affine",
        "quant_apply_range",
        "bits_pack",
        "bits_pack_between",
        "bits_apply",
        "bits_select",
        "bits_expand",
        "threshold_magnitude",
        "threshold_mask",
    ],
)
def test_triton_gives_what_the_definition_gives(name):
    # Whoever serves the operator: the CUDA library goes before Triton where it was built.
    kernels = pytest.importorskip("memtl.kernels")
    compare(kernels.OPS[name], name)


QUANT = [name for name in EXACT if name.startswith("quant")]


def anywhere(tensors):
    """The same on the device, in memory that is not aligned."""
    return tree_map_only(torch.Tensor, shifted, list(tensors))


def transposed(tensors):
    """The same on the GPU, matrices lying in memory column by column."""

    def turned(t):
        return t.to(DEVICE).t().contiguous().t() if t.dim() == 2 else t.to(DEVICE)

    return tree_map_only(torch.Tensor, turned, list(tensors))


@pytest.mark.parametrize("way", [anywhere, transposed])
@pytest.mark.parametrize("name", QUANT)
def test_any_view_is_taken(name, way):
    for arguments in itertools.islice(EXACT[name](), 0, None, 7):
        expected = getattr(reference, name)(*arguments)
        actual = getattr(torch.ops.memtl, name)(*way(arguments))
        if isinstance(expected, torch.Tensor):
            actual, expected = (actual,), (expected,)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a.cpu(), e)


@pytest.mark.parametrize("source", ["registered", "triton"])
@pytest.mark.parametrize("name", EXACT)
def test_operator_in_a_cuda_graph(name, source):
    if source == "registered" and memtl.backends.owner(name, DEVICE) == "reference":
        pytest.skip("the definition waits for the GPU")
    *_, arguments = EXACT[name]()
    operator, given = from_source(name, source), to_device(arguments)
    operator(*given)  # what is compiled is, before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*given)
    graph.replay()
    expected = getattr(reference, name)(*arguments)
    if isinstance(expected, torch.Tensor):
        captured, expected = (captured,), (expected,)
    for c, e in zip(captured, expected, strict=True):
        assert_same(c.cpu(), e)


@pytest.mark.parametrize("name", EXACT)
def test_opcheck(name):
    *_, arguments = EXACT[name]()
    finite = tree_map_only(  # NaN equals nothing in what it compares
        torch.Tensor, lambda t: t.nan_to_num() if t.is_floating_point() else t, arguments
    )
    torch.library.opcheck(getattr(torch.ops.memtl, name), tuple(to_device(finite)))


@pytest.mark.parametrize("activation", _ops.ACTIVATIONS)
def test_activations_are_those_of_the_cpu(activation):
    """Up to what either may be off."""
    for bits, dtype in zip(BITS, _ops.FLOATING, strict=True):
        x, g, u = 4 * draw(40, 37, special=True), draw(40, 37, seed=1), torch.finfo(dtype).eps
        codes, params = reference.quant_pack(x, bits, 1)
        packed, g = (codes, params, bits, activation), g.to(dtype)
        for op, arguments in (
            ("quant_unpack_activation", (*packed, [40, 37], dtype)),
            ("quant_activation_grad", (g, *packed)),
        ):
            expected = getattr(reference, op)(*arguments)
            actual = getattr(torch.ops.memtl, op)(*to_device(arguments)).cpu()
            assert (actual.isnan() == expected.isnan()).all()
            finite = expected.isfinite()
            size_of = expected[finite].double().abs()
            bound = (4e-6 + u) * (1 + size_of + g[finite].double().abs())
            assert_within(actual[finite], expected[finite], bound)


@pytest.mark.parametrize("activation", _ops.ACTIVATIONS)
def test_codes_of_a_derivative_are_those_of_float64(activation):
    """But where f' is that near to a boundary."""
    for bits, dtype in zip(BITS, _ops.FLOATING, strict=True):
        x = 4 * draw(40, 37, dtype=dtype, special=True)
        arguments = x, bits, activation, -0.13, 1.13, 2**40 + 1
        codes = torch.ops.memtl.quant_pack_derivative(*to_device(arguments)).cpu()
        assert_derivative_codes(codes, *arguments, 4e-6)


def assert_gradients(name, dtype, way, *arguments):
    """In another order of summation."""
    expected = getattr(reference, name)(*arguments)
    actual = getattr(torch.ops.memtl, name)(*way(arguments))
    for a, e in zip(actual, expected, strict=True):
        bound = 1e-4 + (torch.finfo(dtype).eps if e is expected[0] else 0)
        assert a.dtype == e.dtype and a.is_contiguous()
        assert_within(a.cpu(), e, bound * (1 + e.double().abs()))


@pytest.mark.parametrize("way", [to_device, anywhere, transposed])
@pytest.mark.parametrize("centered", [True, False])
def test_norm_gradients_are_those_of_the_cpu(centered, way):
    for i, (bits, n) in enumerate(itertools.product(BITS, (1, 7, 64, 257, 768, 5000, 8200))):
        packed, dtype = reference.quant_pack(draw(33, n), bits, 1), _ops.FLOATING[i % 4]
        g, rstd, weight = draw(33, n, dtype=dtype, seed=1), draw(33, seed=2), draw(n, seed=3)
        rest = (*packed, bits, rstd, weight if i % 3 else None, n, centered)
        assert_gradients("quant_norm_grad", dtype, way, g, *rest)


@pytest.mark.parametrize("way", [to_device, anywhere, transposed])
def test_channel_norm_gradients_are_those_of_the_cpu(way):
    for i, (bits, inner) in enumerate(itertools.product(BITS, (1, 7, 49, 64, 257, 5001))):
        packed, dtype = reference.quant_pack(draw(3, 5, inner), bits, 1), _ops.FLOATING[i % 4]
        g, rstd, weight = draw(3, 5, inner, dtype=dtype, seed=1), draw(5, seed=2), draw(5, seed=3)
        rest = (*packed, bits, rstd, weight if i % 3 else None, inner)
        assert_gradients("quant_channel_norm_grad", dtype, way, g, *rest)


@pytest.mark.parametrize("dtype", _ops.FLOATING, ids=str)
def test_topk_in_memory_that_is_not_aligned(dtype):
    x, k, k_tail = draw(5, 776, dtype=dtype, special=True), 26, 3
    none = torch.empty(0, dtype=torch.int16)
    for values, bitmap in itertools.product(_ops.VALUE_DTYPES, (False, True)):
        packed = reference.topk_pack(x, k, k_tail, values, bitmap)
        sample = reference.topk_pack_sample(x, 70, values, bitmap)
        for actual, expected in (
            (torch.ops.memtl.topk_pack(shifted(x), k, k_tail, values, bitmap), packed),
            (torch.ops.memtl.topk_pack_sample(shifted(x), 70, values, bitmap), sample),
        ):
            for a, e in zip(actual, expected, strict=True):
                assert_same(a.cpu(), e)
        for arguments in ((*packed, none), sample):
            options = 776, k, k_tail, bitmap, dtype
            actual = torch.ops.memtl.topk_unpack(*map(shifted, arguments), *options)
            assert_same(actual.cpu(), reference.topk_unpack(*arguments, *options))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["registered", "triton"])
def test_beyond_32_bit_offsets(source):
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    names = (*(f"bits_{verb}" for verb in ("pack", "apply", "select", "expand")),)
    names += ("threshold_magnitude", "threshold_mask")
    operators = {name: getattr(torch.ops.memtl, name) for name in names}
    if source == "triton":
        operators = pytest.importorskip("memtl.kernels").OPS
    mask = torch.zeros(numel, dtype=torch.bool, device=DEVICE)
    mask[::3] = True
    bits = operators["bits_pack"](mask)
    assert bits.numel() == numel // 8 + 1
    assert_same(bits[-2048:-1].cpu(), reference.bits_pack(mask[-8 * 2047 - 3 : -3].cpu()))
    assert_same(bits[-1:].cpu(), reference.bits_pack(mask[-3:].cpu()))
    y = operators["bits_apply"](torch.ones(numel, dtype=torch.float16, device=DEVICE), bits, 2.0)
    for part in (slice(0, 2**20), slice(-(2**20), None)):
        assert torch.equal(y[part], 2 * mask[part].half())
    assert y.count_nonzero() == mask.count_nonzero()
    del y, mask

    x = torch.arange(1, 2048, dtype=torch.float16, device=DEVICE).repeat(numel // 2047 + 1)[:numel]
    values = operators["bits_select"](x, bits, len(range(0, numel, 3)))
    assert torch.equal(values, x[::3])
    dense = operators["bits_expand"](values, bits, [numel])
    assert torch.equal(dense[::3], values) and dense.count_nonzero() == values.numel()
    del values, dense

    k = numel // 5
    value, ties = operators["threshold_magnitude"]([x], [], k)
    assert value == 2047 - k // (numel // 2047 + 1)
    bits = operators["threshold_mask"](x, None, value, ties[0])
    assert operators["bits_apply"](x, bits, 1.0).count_nonzero() == k


@pytest.mark.slow
@pytest.mark.parametrize("source", ["registered", "triton"])
def test_topk_beyond_32_bit_offsets(source):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    if memtl.backends.owner("topk_pack", DEVICE) == "reference":
        pytest.skip("the definition takes more memory than that")
    verbs = ("pack", "pack_sample", "unpack")
    pack, pack_sample, unpack = (from_source(f"topk_{verb}", source) for verb in verbs)
    x = torch.zeros(2**23 + 5, 257, dtype=torch.float16, device=DEVICE)
    x[-60:] = draw(60, 257, dtype=torch.float16).to(DEVICE)
    packed = pack(x, 8, 1, torch.int8, False)
    last = [t[-60:].cpu() for t in packed]
    wanted = reference.topk_pack(x[-60:].cpu(), 8, 1, torch.int8, False)
    for actual, expected in zip(last, wanted, strict=True):
        assert_same(actual, expected)
    no_counts, options = torch.empty(0, dtype=torch.int16), (257, 8, 1, False, x.dtype)
    dense = unpack(*packed, no_counts.to(DEVICE), *options)
    expected = reference.topk_unpack(*last, no_counts, *options)
    assert_same(dense[-60:].cpu(), expected)
    assert dense.count_nonzero() == expected.count_nonzero()
    del dense
    x = x.zero_().view(1, -1)
    x[:, :: 2**20] = 1
    n, k = x.shape[1], _ops.ceil_div(x.shape[1], 2**20)
    packed = pack_sample(x, k, torch.float32, False)
    assert packed[0].shape == (1, k) and (packed[0] == 1).all()
    assert torch.equal(unpack(*packed, n, k, 0, False, x.dtype), x)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_codes_beyond_32_bit_offsets(bits):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    if memtl.backends.owner("quant_pack", DEVICE) == "reference":
        pytest.skip("the definition takes more memory than that")
    x = torch.empty(2**31 + 4099, dtype=torch.float16, device=DEVICE).uniform_(-1, 1)
    parts = [slice(0, 2**20), slice(-(2**20), None)]
    wanted = [x[part].float() for part in parts]
    packed = torch.ops.memtl.quant_pack(x, bits, 1)
    y = torch.ops.memtl.quant_unpack(*packed, bits, x.shape, x.dtype)
    codes = torch.ops.memtl.quant_pack_range(x, bits, -1.0, 1.0, 1)
    x = torch.ops.memtl.quant_unpack_range(codes, bits, -1.0, 1.0, y.shape, y.dtype)
    for part, exact in zip(parts, wanted, strict=True):
        assert_within(y[part].cpu(), exact.cpu(), 2.02 / (2**bits - 1) + 1e-3)
        assert_within(x[part].cpu(), exact.cpu(), 2 / (2**bits - 2) + 1e-3)


# ------------------------------------------------------------------- operators that sum up floats


def rounding(dtype, values):
    """Of the unpacked x, relative: in 16 bits it may be read in grad_out's dtype."""
    return 0.0 if dtype.itemsize > 2 or dtype == values else unit(dtype)


@pytest.mark.parametrize("source", ["registered", "triton"])
@pytest.mark.parametrize("dtype", _ops.FLOATING, ids=str)
def test_topk_weight_grad(dtype, source):
    for *packed, n, k, k_tail, bitmap in packed_cases():
        features = n if packed[3].numel() == 0 else n // 4
        dense = reference.topk_unpack(*packed, n, k, k_tail, bitmap, torch.float64)
        x = dense.view(-1, features)
        grad_out = draw(x.shape[0], 33, dtype=dtype)
        arguments = (*packed, grad_out, n, features, k, k_tail, bitmap)
        actual = from_source("topk_weight_grad", source)(*to_device(arguments))
        assert actual.dtype == torch.float32
        grad_out = grad_out.float().double()
        bound = weight_grad_bound(grad_out, x, dtype, packed[0].dtype)
        assert_within(actual.cpu(), grad_out.t() @ x, bound)


def weight_grad_bound(grad_out, x, dtype, values=None):
    """Dot products of T terms in float32, summed in any order by units that cut off what does not
    fit, which is twice an error of rounding; x is rounded before, and may underflow in float16."""
    size = grad_out.abs().t() @ x.abs()
    rounded = rounding(dtype, values)
    underflow = 2.0**-25 * grad_out.abs().sum(0)[:, None] if rounded else 0
    return (2 * gamma(x.shape[0]) * (1 + rounded) + rounded) * size + underflow


WEIGHT_GRADS = (
    # tokens, outputs, row, features, keep: tiles whole and cut off, few rows and many, rows of
    # several tokens, blocks of features that are no packed blocks
    (12_608, 768, 768, 768, 0.1),
    (4_097, 131, 777, 777, 0.03),
    (500, 1_000, 2_048, 512, 0.06),
    (2_000, 96, 768, 384, 0.1),
    (40_000, 10, 300, 300, 0.25),
)


@pytest.mark.parametrize("dtype", _ops.FLOATING, ids=str)
@pytest.mark.parametrize("case", WEIGHT_GRADS, ids=str)
def test_topk_weight_grad_of_many_tokens(case, dtype):
    tokens, outputs, n, features, keep = case
    k, k_tail, bitmap = quota(256, keep), quota(n % 256, keep), keep > 0.125
    rows = draw(tokens * features // n, n).to(DEVICE)
    packed = torch.ops.memtl.topk_pack(rows, k, k_tail, torch.int8, bitmap)
    counts = torch.empty(0, dtype=torch.int16, device=DEVICE)
    layout = (n, k, k_tail, bitmap)
    dense = torch.ops.memtl.topk_unpack(*packed, counts, *layout, torch.float64)
    x = dense.view(tokens, features)
    grad_out = draw(tokens + 1, outputs, dtype=dtype, seed=1).to(DEVICE)
    elsewhere = grad_out.flatten()[1 : 1 + tokens * outputs].view(tokens, outputs)
    for grad in (grad_out[1:], elsewhere, grad_out.t().contiguous().t()[1:]):
        arguments = (*packed, counts, grad, n, features, k, k_tail, bitmap)
        actual = torch.ops.memtl.topk_weight_grad(*arguments)
        assert actual.shape == (outputs, features) and actual.is_contiguous()
        assert torch.equal(actual, torch.ops.memtl.topk_weight_grad(*arguments)), "not repeatable"
        grad = grad.float().double()
        assert_within(actual, grad.t() @ x, weight_grad_bound(grad, x, dtype))


@pytest.mark.parametrize("dtype", _ops.FLOATING, ids=str)
def test_masked_linear(dtype):
    x, weight, bias = draw(70, 130, dtype=dtype), draw(33, 130, seed=1), draw(33, seed=2)
    grad_out = draw(70, 33, dtype=dtype, seed=3)
    mask = reference.bits_pack(draw(33, 130, seed=4) > 1)
    same = weight.to(dtype), mask
    for name, arguments in (
        ("masked_linear", (x, weight, mask, bias)),
        ("masked_linear_input_grad", (grad_out, weight, mask)),
        ("masked_linear", (x, *same, bias.to(dtype))),
        ("masked_linear", (x, *same, None)),
        ("masked_linear_input_grad", (grad_out, *same)),
        ("masked_linear_weight_grad", (grad_out, x, mask)),
        ("masked_linear_weight_grad", (grad_out[:0], x[:0], mask)),
    ):
        actual = getattr(torch.ops.memtl, name)(*to_device(arguments)).cpu()
        exact = [a if a is None or a is mask else a.double() for a in arguments]
        expected = getattr(reference, name)(*exact)
        assert actual.dtype == getattr(reference, name)(*arguments).dtype
        # Sums of some 130 terms of a few units, and a rounding to the dtype.
        assert_within(actual, expected, 1e-4 + torch.finfo(actual.dtype).eps * expected.abs())


@pytest.mark.parametrize("source", ["registered", "triton"])
@pytest.mark.parametrize("dtype", _ops.FLOATING, ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_topk_conv_weight_grad(dtype, channels_last, source):
    for *packed, n, k, k_tail, bitmap in packed_cases():
        rows, width = packed[0].shape[0], n // 4 if n % 4 == 0 else n
        options = ([n // width, width], [3], [2], [1], [1], channels_last, k, k_tail, bitmap)
        pixels = (width - 1) // 2 + 1
        grad_out = draw(rows, 33 * pixels, dtype=dtype).view(rows, 33, pixels)
        arguments = (*packed, grad_out, *options)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            actual = from_source("topk_conv_weight_grad", source)(*to_device(arguments))
        assert actual.dtype == torch.float32
        # As above, of what the definition gives on the CPU, which errs as well; in 16 bits the sum
        # may be rounded, too.
        expected = reference.topk_conv_weight_grad(*packed, grad_out.float(), *options)
        magnitudes = (packed[0].abs(), *packed[1:], grad_out.float().abs())
        size = reference.topk_conv_weight_grad(*magnitudes, *options)
        bound = 2 * gamma(rows * pixels + 2)
        if dtype.itemsize == 2:
            bound += rounding(dtype, packed[0].dtype) + unit(dtype)
        assert_within(actual.cpu(), expected, bound * size)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "gqa": {"enable_gqa": True},
    "bool mask": {"mask": torch.bool},
    "additive mask": {"mask": torch.float32},
    "trained mask": {"mask": torch.float32, "mask_grad": True},
}


def attention_operands(dtype, enable_gqa=False, mask=None, **_):
    heads = 2 if enable_gqa else 4
    shapes = ((2, 4, 50, 64), (2, heads, 50, 64), (2, heads, 50, 64), (2, 4, 50, 64))
    operands = [draw(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate(shapes)]
    attn_mask = None
    if mask is not None:
        attn_mask = draw(2, 4, 50, 50, seed=9).to(DEVICE)
        attn_mask = attn_mask > -1 if mask == torch.bool else attn_mask.to(dtype)
    return *operands, attn_mask


def sdpa_grads(q, k, v, grad_out, mask, mask_grad=False, **options):
    """Gradients through torch's own attention, in the dtype of the operands."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([mask] if mask_grad else []))]
    attn_mask = leaves[3] if mask_grad else mask
    out = F.scaled_dot_product_attention(*leaves[:3], attn_mask, **options)
    return torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_grad(case, dtype):
    options = dict(ATTENTION[case])
    q, k, v, grad_out, mask = attention_operands(dtype, **options)
    options.pop("mask", None)
    plain = sdpa_grads(q, k, v, grad_out, mask, **options)
    double = [
        t if t is None or t.dtype == torch.bool else t.double() for t in (q, k, v, grad_out, mask)
    ]
    exact = sdpa_grads(*double, **options)
    actual = torch.ops.memtl.attention_grad(
        grad_out,
        q,
        k,
        v,
        mask,
        0.0,
        None,
        options.get("is_causal", False),
        options.get("scale"),
        options.get("enable_gqa", False),
        options.get("mask_grad", False),
    )
    if not options.get("mask_grad"):
        assert actual[3].numel() == 0
    for a, p, e in zip(actual, plain, exact, strict=False):
        assert a.dtype == dtype and a.shape == e.shape and a.is_contiguous()
        # Twice the error of torch's own kernels in this dtype, and one rounding of the result.
        band = torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= 2 * (p - e).abs().max() + band


# queries, keys, d, e
ATTENTION_SIZES = (
    (1, 1, 1, 1),
    (100, 100, 64, 64),
    (197, 197, 64, 64),
    (70, 300, 32, 32),
    (300, 70, 64, 64),
    (130, 513, 40, 24),
    (65, 300, 80, 80),
    (65, 300, 128, 128),
    (33, 129, 256, 256),
    (9, 17, 264, 264),
)


@pytest.mark.parametrize("is_causal", (False, True), ids=("all", "causal"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("size", ATTENTION_SIZES, ids=str)
def test_attention_grad_at_sizes(size, dtype, is_causal):
    queries, keys, d, e = size
    shapes = ((queries, d), (keys, d), (keys, e), (queries, e))
    operands = [draw(2, *s[:1], 3, *s[1:], seed=i) for i, s in enumerate(shapes)]
    q, k, v, grad_out = (t.to(DEVICE, dtype).transpose(1, 2) for t in operands)  # not contiguous
    with sdpa_kernel(SDPBackend.MATH):
        plain = sdpa_grads(q, k, v, grad_out, None, is_causal=is_causal)
        double = [t.double() for t in (q, k, v, grad_out)]
        exact = sdpa_grads(*double, None, is_causal=is_causal)
    arguments = grad_out, q, k, v, None, 0.0, None, is_causal, None, False, False
    actual = torch.ops.memtl.attention_grad(*arguments)
    for a, p, x in zip(actual, plain, exact, strict=False):
        assert a.dtype == dtype and a.shape == x.shape and a.is_contiguous()
        band = torch.finfo(dtype).eps * x.abs().max()  # as above
        # In float32 what counts is the order of sums.
        more = 5 if dtype == torch.float32 else 2
        assert (a - x).abs().max() <= more * (p - x).abs().max() + band


def test_attention_grad_replays_dropout():
    q, k, v, grad_out, _ = attention_operands(torch.float32)
    with sdpa_kernel(SDPBackend.MATH):  # the one whose backward sums up in a fixed order
        state = torch.cuda.get_rng_state()
        expected = sdpa_grads(q, k, v, grad_out, None, dropout_p=0.25)
        after = torch.cuda.get_rng_state()
        actual = torch.ops.memtl.attention_grad(
            grad_out, q, k, v, None, 0.25, state, False, None, False, False
        )
    assert torch.equal(torch.cuda.get_rng_state(), after)
    for a, e in zip(actual, expected, strict=False):
        assert torch.equal(a, e)


# ---------------------------------------------------------------------------------- whole models


def vit():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_base_patch16_224", num_classes=10)
    return model, {"x": draw(8, 3, 224, 224).to(DEVICE)}


def bert():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=10))
    ids = torch.randint(30000, (8, 128), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids.to(DEVICE)}


# Stock autocast keeps 16-bit tensors, beside which 4 bits save less: a ViT has no more to give.
LEAST_RATIO = {(vit, False): 8, (vit, True): 6, (bert, False): 8, (bert, True): 8}


@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "autocast bfloat16"))
@pytest.mark.parametrize("build", (vit, bert), ids=lambda build: build.__name__)
def test_back_razor(build, autocast):
    torch.manual_seed(0)
    stock, arguments = build()
    stock.to(DEVICE).train()
    converted = copy.deepcopy(stock)
    memtl.apply(converted, memtl.BackRazorConfig(keep=0.1))
    target = (torch.arange(8) % 10).to(DEVICE)
    logits, last_biases, profiles = [], [], []
    for model in (stock, converted):
        torch.manual_seed(1)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            output = model(**arguments)
            output = output if isinstance(output, torch.Tensor) else output.logits
            loss = F.cross_entropy(output, target)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        logits.append(output.detach())
        last_biases.append(
            [p.grad for n, p in model.named_parameters() if n.endswith("bias")][-1].clone()
        )
        del output, loss
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            profiles.append(memtl.memory.profile(model, **arguments, batch_size=8))
    assert torch.equal(*logits)
    assert torch.equal(*last_biases), "no stored activation enters this gradient"
    before, after = profiles
    assert after.saved * LEAST_RATIO[build, autocast] <= before.saved
    assert after.peak < before.peak
