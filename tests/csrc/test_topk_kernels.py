"""The C++ top-k kernels of every instruction set against the reference.

What is packed and unpacked must be equal bit for bit. The weight gradient is compared with a
float64 product, within what adding up in float32 may err.
"""

import itertools
import math

import pytest
import torch

import memtl  # noqa: F401  (defines and registers the operators)
from memtl import _ops, reference
from tests.helpers import gamma

pytestmark = pytest.mark.usefixtures("isa")
ops = torch.ops.memtl

SIZES = (1, 7, 128, 192, 255, 256, 257, 600, 768)
ROWS = (0, 1, 3, 197)
VALUE_DTYPES = _ops.VALUE_DTYPES
NO_COUNTS = torch.empty(0, dtype=torch.int16)


def numbers(rows, n, kind="normal", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g)
    if kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "mostly zero":
        x = (x - 1).relu()
    elif kind == "one value":
        x = torch.full_like(x, -1.5)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "close":  # equal in the upper 16 bits of |x|
        x = 1 + torch.rand(rows, n, generator=g) * 2.0**-9
    elif kind == "sorted":
        x = x.sort(dim=-1).values
    elif kind == "special":
        odd = torch.tensor(
            [math.inf, -math.inf, math.nan, -math.nan, 1e-40, -1e-40, 3e38, -3e38, 0.0, -0.0]
        )
        pick = torch.randint(len(odd), x.shape, generator=g)
        x = torch.where(torch.rand(x.shape, generator=g) < 0.05, odd[pick], x)
    return x.to(dtype)


KINDS = ("normal", "ties", "mostly zero", "one value", "zero", "close", "sorted", "special")


def assert_identical(got, wanted):
    """Equal in shape, dtype and every bit, but for the bits of NaN."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.is_contiguous()
        if a.is_floating_point():
            integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
            nan = a.isnan()
            assert torch.equal(nan, b.isnan())
            a, b = (t.view(integer).masked_fill(nan, 0) for t in (a, b))
        assert torch.equal(a, b)


def quota(n, keep):
    """k, k_tail."""
    return round(keep * 256), math.ceil(keep * (n % 256))


def check_pack(x, k, k_tail, value_dtype, bitmap):
    got = ops.topk_pack(x, k, k_tail, value_dtype, bitmap)
    assert_identical(got, reference.topk_pack(x, k, k_tail, value_dtype, bitmap))
    return got


def check_pack_sample(x, k, value_dtype, bitmap):
    got = ops.topk_pack_sample(x, k, value_dtype, bitmap)
    assert_identical(got, reference.topk_pack_sample(x, k, value_dtype, bitmap))
    return got


# --------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_pack(value_dtype, bitmap):
    for n in SIZES:
        for rows in ROWS:
            x = numbers(rows, n)
            for keep in (0.03, 0.1, 0.5):
                check_pack(x, *quota(n, keep), value_dtype, bitmap)
            check_pack_sample(x, n // 10, value_dtype, bitmap)


@pytest.mark.parametrize("dtype", _ops.FLOATING)
@pytest.mark.parametrize("kind", KINDS)
def test_pack_of_any_numbers(kind, dtype):
    x = numbers(5, 600, kind, dtype)
    for value_dtype in VALUE_DTYPES:
        for k, k_tail in ((0, 0), (1, 1), (26, 9), (255, 87), (256, 88), (0, 5), (7, 0)):
            check_pack(x, k, k_tail, value_dtype, k % 2 == 0)
        for k in (0, 1, 60, 599, 600):
            check_pack_sample(x, k, value_dtype, k % 2 == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, n", [(3, 20_000), (1, 600_037)])
def test_pack_sample_of_long_rows(rows, n, kind):
    """Rows whose threshold is searched from a sample, by one thread or by several."""
    x = numbers(rows, n, kind)
    for keep in (0.03, 0.9):
        check_pack_sample(x, int(keep * n), torch.int8, keep == 0.9)


def test_pack_sample_where_the_sample_misleads():
    """Where all the large magnitudes stand in a place that few of the sampled ones come from."""
    x = numbers(2, 50_000)
    x[0, 1000:1900] += 1000
    x[1, 40_000:] = 0
    for k in (500, 5000, 20_000, 41_000):
        check_pack_sample(x, k, torch.float32, False)


def test_pack_of_no_elements():
    for rows in (0, 3):
        x = torch.empty(rows, 0)
        for bitmap in (False, True):
            check_pack(x, 26, 0, torch.float32, bitmap)
            check_pack_sample(x, 0, torch.float32, bitmap)


def test_pack_of_strided_input():
    wide = numbers(40, 1200)
    for x in (wide.t()[:600], wide[::2], wide[:, ::2], wide[:, 3:603], wide[:1].expand(4, -1)):
        check_pack(x, 26, x.shape[1] % 256 // 10, torch.bfloat16, False)
        check_pack_sample(x, x.shape[1] // 10, torch.int8, True)


def test_packing_reads_no_random_state():
    state = torch.get_rng_state()
    ops.topk_pack_sample(numbers(1, 100_000), 5000, torch.float32, False)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_unpack(value_dtype, bitmap):
    for n in SIZES:
        for rows in (2, 197):
            x = numbers(rows, n, "special")
            k, k_tail = quota(n, 0.2)
            packed = *ops.topk_pack(x, k, k_tail, value_dtype, bitmap), NO_COUNTS
            of_sample = ops.topk_pack_sample(x, n // 5, value_dtype, bitmap)
            for dtype in _ops.FLOATING:
                for tensors, layout in ((packed, (n, k, k_tail)), (of_sample, (n, 0, 0))):
                    args = (*tensors, *layout, bitmap, dtype)
                    assert_identical((ops.topk_unpack(*args),), (reference.topk_unpack(*args),))


def test_unpack_of_no_rows():
    x = torch.empty(0, 600)
    packed = *ops.topk_pack(x, 26, 9, torch.int8, False), NO_COUNTS
    assert ops.topk_unpack(*packed, 600, 26, 9, False, torch.float32).shape == (0, 600)
    packed = ops.topk_pack_sample(x, 60, torch.int8, False)
    assert ops.topk_unpack(*packed, 600, 0, 0, False, torch.float32).shape == (0, 600)


def test_unpack_of_strided_tensors():
    x = numbers(6, 600)
    packed = ops.topk_pack(x, 26, 9, torch.int8, False)
    values, positions, scale = (torch.stack((t, t), -1)[..., 0] for t in packed)
    assert not values.is_contiguous()
    wanted = ops.topk_unpack(*packed, NO_COUNTS, 600, 26, 9, False, torch.float32)
    got = ops.topk_unpack(values, positions, scale, NO_COUNTS, 600, 26, 9, False, torch.float32)
    assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------- weight gradient


def assert_weight_grad(got, grad_out, x):
    """x and grad_out are what the kernel multiplies; T products are added up in float32."""
    tokens = grad_out.shape[0]
    g, x = grad_out.double(), x.double().view(tokens, -1)
    if grad_out.dtype == torch.float64:
        g = grad_out.float().double()
    bound = gamma(tokens + 1) * (g.abs().t() @ x.abs())
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert ((got.double() - g.t() @ x).abs() <= bound).all()


@pytest.mark.parametrize("dtype", _ops.FLOATING)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("keep", [0.1, 0.6])
def test_weight_grad(keep, value_dtype, dtype):
    """Both sides of the density from which on a dense product is faster."""
    for n, outputs in ((7, 3), (600, 10), (768, 100)):
        for bitmap in (False, True):
            k, k_tail = quota(n, keep)
            packed = ops.topk_pack(numbers(197, n), k, k_tail, value_dtype, bitmap)
            grad_out = numbers(197, outputs, dtype=dtype, seed=1)
            layout = (k, k_tail, bitmap)
            x = ops.topk_unpack(*packed, NO_COUNTS, n, *layout, torch.float32)
            got = ops.topk_weight_grad(*packed, NO_COUNTS, grad_out, n, n, *layout)
            assert_weight_grad(got, grad_out, x)


@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize(
    "rows, n, features",
    [
        (3, 197 * 64, 64),  # a row a sample of 197 tokens
        (2, 300 * 256, 256),
        (5, 57 * 11, 57),  # blocks cross tokens
        (20, 100, 250),  # tokens cross rows
        (2, 300, 4),
        (2, 300, 1),
        (1, 3000, 3000),
        (140, 3500, 3500),
    ],
)
def test_weight_grad_of_any_row(rows, n, features, bitmap):
    x = numbers(rows, n)
    tokens = rows * n // features
    grad_out = numbers(tokens, 70, seed=1)
    for keep in (0.05, 0.7):
        packed = ops.topk_pack_sample(x, int(keep * n), torch.bfloat16, bitmap)
        dense = ops.topk_unpack(*packed, n, 0, 0, bitmap, torch.float32)
        got = ops.topk_weight_grad(*packed, grad_out, n, features, 0, 0, bitmap)
        assert_weight_grad(got, grad_out, dense)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 33, 63, 64, 65, 130])
def test_weight_grad_of_any_output(outputs):
    packed = ops.topk_pack(numbers(300, 520), 26, 2, torch.float32, False)
    x = ops.topk_unpack(*packed, NO_COUNTS, 520, 26, 2, False, torch.float32)
    grad_out = numbers(300, outputs, seed=1)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, grad_out, 520, 520, 26, 2, False)
    assert_weight_grad(got, grad_out, x)


@pytest.mark.parametrize("keep", [0.1, 0.6])
def test_weight_grad_of_strided_grad(keep):
    k, _ = quota(256, keep)
    packed = ops.topk_pack(numbers(50, 256), k, 0, torch.float32, False)
    x = ops.topk_unpack(*packed, NO_COUNTS, 256, k, 0, False, torch.float32)
    wide = numbers(50, 80, seed=1)
    for grad_out in (wide[:, ::2], numbers(80, 50, seed=1).t(), wide[:, :1].expand(-1, 30)):
        got = ops.topk_weight_grad(*packed, NO_COUNTS, grad_out, 256, 256, k, 0, False)
        assert_weight_grad(got, grad_out, x)


@pytest.mark.parametrize("k", [26, 200])
def test_weight_grad_of_nothing(k):
    packed = ops.topk_pack(numbers(4, 256), k, 0, torch.float32, False)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, torch.ones(4, 0), 256, 256, k, 0, False)
    assert got.shape == (0, 256)
    packed = ops.topk_pack(torch.empty(0, 256), k, 0, torch.float32, False)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, torch.ones(0, 5), 256, 256, k, 0, False)
    assert torch.equal(got, torch.zeros(5, 256))
    packed = ops.topk_pack(numbers(4, 256), 0, 0, torch.float32, False)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, torch.ones(4, 5), 256, 256, 0, 0, False)
    assert torch.equal(got, torch.zeros(5, 256))


def test_weight_grad_does_not_depend_on_threads():
    packed = ops.topk_pack(numbers(300, 768), 26, 0, torch.float32, False)
    grad_out = numbers(300, 200, seed=1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            args = (*packed, NO_COUNTS, grad_out, 768, 768, 26, 0, False)
            results.append(ops.topk_weight_grad(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_weight_grad_shows_what_is_not_finite():
    x = torch.zeros(4, 256)
    x[1, 3], x[2, 5] = math.inf, math.nan
    packed = ops.topk_pack(x, 26, 0, torch.int8, False)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, torch.ones(4, 2), 256, 256, 26, 0, False)
    assert got[:, 3].isinf().all() and got[:, 5].isnan().all()


# --------------------------------------------------------------- weight gradient of a convolution


def conv_shape(size, kernel, stride, padding, dilation):
    """Of grad_out, spatial."""
    of_each = zip(size[1:], kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in of_each]


def conv_grad(x, grad_out, size, kernel, geometry, channels_last):
    """In float64, one offset of the kernel at a time."""
    stride, padding, dilation = geometry
    channels, *spatial = size
    rows = len(x)
    x = x.view(rows, *spatial, channels).movedim(-1, 1) if channels_last else x.view(rows, *size)
    for d, p in enumerate(padding):
        shape = list(x.shape)
        shape[2 + d] = p
        x = torch.cat((x.new_zeros(shape), x, x.new_zeros(shape)), 2 + d)
    out = torch.empty(grad_out.shape[1], channels, *kernel, dtype=torch.float64)
    for offset in itertools.product(*map(range, kernel)):
        part = x
        for d, at in enumerate(offset):
            first, count = at * dilation[d], grad_out.shape[2 + d]
            places = torch.arange(count) * stride[d] + first
            part = part.index_select(2 + d, places)
        product = torch.einsum("bop,bcp->oc", grad_out.flatten(2), part.flatten(2))
        out[(slice(None), slice(None), *offset)] = product
    return out


def check_conv(packed, layout, grad_out, size, kernel, geometry, channels_last):
    """layout: k, k_tail, bitmap; geometry: stride, padding, dilation."""
    options = (list(size), list(kernel), *map(list, geometry), channels_last)
    got = ops.topk_conv_weight_grad(*packed, grad_out, *options, *layout)
    x = ops.topk_unpack(*packed, math.prod(size), *layout, torch.float32).double()
    g = grad_out.float().double()
    wanted = conv_grad(x, g, size, kernel, geometry, channels_last)
    magnitude = conv_grad(x.abs(), g.abs(), size, kernel, geometry, channels_last)
    terms = len(g) * math.prod(g.shape[2:])
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == wanted.shape
    assert ((got.double() - wanted).abs() <= gamma(terms + 1) * magnitude).all()
    return got


CONVOLUTIONS = {
    "1x1": ((20, 9, 15), (1, 1), ((1, 1), (0, 0), (1, 1))),
    "3x3": ((5, 17, 13), (3, 3), ((1, 1), (1, 1), (1, 1))),
    "valid": ((70, 8, 9), (3, 2), ((1, 1), (0, 0), (1, 1))),
    "strided": ((6, 17, 14), (3, 3), ((2, 2), (1, 1), (1, 1))),
    "1x1 strided": ((33, 7, 7), (1, 1), ((2, 3), (0, 0), (1, 1))),
    "kernel smaller than stride": ((9, 11, 11), (2, 2), ((3, 3), (0, 0), (1, 1))),
    "dilated": ((4, 15, 16), (3, 2), ((1, 1), (2, 0), (2, 3))),
    "strided and dilated": ((4, 15, 16), (3, 4), ((2, 3), (3, 2), (3, 2))),
    "wide padding": ((3, 5, 4), (1, 2), ((1, 2), (3, 4), (1, 1))),
    "offsets that meet nothing": ((3, 1, 2), (5, 5), ((2, 3), (2, 2), (1, 1))),
    "7x7": ((3, 30, 31), (7, 7), ((2, 2), (3, 3), (1, 1))),
    "1d": ((40, 50), (5,), ((2,), (2,), (1,))),
    "long": ((3, 2000), (3,), ((1,), (400,), (300,))),
    "3d": ((7, 5, 6, 7), (3, 1, 2), ((1, 2, 1), (1, 0, 1), (1, 1, 2))),
    "one pixel": ((300, 1, 1), (1, 1), ((1, 1), (0, 0), (1, 1))),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_weight_grad(name, channels_last):
    size, kernel, geometry = CONVOLUTIONS[name]
    n, shape = math.prod(size), conv_shape(size, kernel, *geometry)
    for i, (rows, outputs) in enumerate(((1, 1), (5, 70), (2, 16))):
        x, bitmap, dtype = numbers(rows, n), i % 2 == 1, VALUE_DTYPES[i + 1]
        grad_out = numbers(rows, outputs * math.prod(shape), seed=1).view(rows, outputs, *shape)
        if i == 1:
            grad_out = grad_out.movedim(1, -1).contiguous().movedim(-1, 1)
        k, k_tail = quota(n, 0.1)
        packed = *ops.topk_pack(x, k, k_tail, dtype, bitmap), NO_COUNTS
        args = (grad_out, size, kernel, geometry, channels_last)
        check_conv(packed, (k, k_tail, bitmap), *args)
        packed = ops.topk_pack_sample(x, max(1, n // 4), dtype, bitmap)
        check_conv(packed, (0, 0, bitmap), *args)


def test_conv_weight_grad_of_random_geometries():
    g = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=g))

    for _ in range(40):
        dims = draw(1, 3)
        size = (draw(1, 40), *(draw(1, (60, 20, 9)[dims - 1]) for _ in range(dims)))
        kernel, stride, padding, dilation = (
            tuple(draw(low, high) for _ in range(dims))
            for low, high in ((1, 4), (1, 3), (0, 3), (1, 3))
        )
        shape = conv_shape(size, kernel, stride, padding, dilation)
        if min(shape) < 1:
            continue
        rows, n, outputs, bitmap = draw(1, 6), math.prod(size), draw(1, 80), draw(0, 1) == 1
        packed = ops.topk_pack_sample(numbers(rows, n), draw(0, n), torch.float32, bitmap)
        grad_out = numbers(rows, outputs * math.prod(shape)).view(rows, outputs, *shape)
        geometry = (stride, padding, dilation)
        check_conv(packed, (0, 0, bitmap), grad_out, size, kernel, geometry, draw(0, 1) == 1)


@pytest.mark.parametrize("dtype", _ops.FLOATING)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_conv_weight_grad_of_any_dtype_and_stride(value_dtype, dtype):
    size, kernel, geometry = (6, 9, 11), (3, 3), ((1, 1), (1, 1), (1, 1))
    packed = *ops.topk_pack(numbers(3, 594), 26, 8, value_dtype, False), NO_COUNTS
    wide = numbers(6, 80 * 99, dtype=dtype, seed=1).view(6, 80, 9, 11)
    for grad_out in (
        wide[:3],
        wide[::2, ::2],
        wide[:3].contiguous(memory_format=torch.channels_last),
        wide[:3, :, :1].expand(-1, -1, 9, -1),
        wide[:1, :1, :1, :1].expand(3, 20, 9, 11),
        wide[:3].mT.contiguous().mT,
    ):
        check_conv(packed, (26, 8, False), grad_out, size, kernel, geometry, True)


def test_conv_weight_grad_of_nothing():
    geometry = ([1, 1], [1, 1], [1, 1])

    def call(rows, outputs, size, k=26):
        k_tail = min(k, math.prod(size) % 256)
        packed = (
            *ops.topk_pack(numbers(rows, math.prod(size)), k, k_tail, torch.int8, False),
            NO_COUNTS,
        )
        grad_out = torch.ones(rows, outputs, *conv_shape(size, (3, 3), *geometry))
        return ops.topk_conv_weight_grad(
            *packed, grad_out, list(size), [3, 3], *geometry, False, k, k_tail, False
        )

    assert call(2, 0, (4, 5, 5)).shape == (0, 4, 3, 3)
    assert call(2, 5, (0, 5, 5)).shape == (5, 0, 3, 3)
    assert torch.equal(call(0, 5, (4, 5, 5)), torch.zeros(5, 4, 3, 3))
    assert torch.equal(call(2, 5, (4, 5, 5), 0), torch.zeros(5, 4, 3, 3))
    assert torch.equal(call(2, 5, (4, 1, 1)), call(2, 5, (4, 1, 1)))


def test_conv_weight_grad_does_not_depend_on_threads():
    size, kernel, geometry = (40, 14, 14), (3, 3), ((1, 1), (1, 1), (1, 1))
    packed = *ops.topk_pack(numbers(20, 40 * 196), 26, 16, torch.float32, False), NO_COUNTS
    grad_out = numbers(20, 70 * 196, seed=1).view(20, 70, 14, 14)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            results.append(
                check_conv(packed, (26, 16, False), grad_out, size, kernel, geometry, False)
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_conv_weight_grad_shows_what_is_not_finite():
    x = torch.zeros(2, 4 * 36)
    x[0, 14], x[1, 40] = math.inf, math.nan  # inside of the images
    packed = *ops.topk_pack(x, 0, 14, torch.int8, False), NO_COUNTS
    got = ops.topk_conv_weight_grad(
        *packed,
        torch.ones(2, 3, 6, 6),
        [4, 6, 6],
        [3, 3],
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        0,
        14,
        False,
    )
    assert got[:, 0].isinf().all()
    assert got[:, 1, :, 1].isnan().all() and got[:, 2:].isfinite().all()


def test_conv_weight_grad_refuses_what_does_not_fit():
    packed = *ops.topk_pack(numbers(3, 600), 26, 9, torch.float32, False), NO_COUNTS
    good = {
        "grad_out": torch.ones(3, 5, 10, 20),
        "size": [3, 10, 20],
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
    }

    def call(packed=packed, **changes):
        args = (good | changes).values()
        return ops.topk_conv_weight_grad(*packed, *args, False, 26, 9, False)

    assert call().shape == (5, 3, 3, 3)
    for match, changes in (
        ("grad_out", {"grad_out": torch.ones(3, 5, 10)}),
        ("grad_out", {"grad_out": torch.ones(2, 5, 10, 20)}),
        ("grad_out", {"grad_out": torch.ones(3, 5, 10, 19)}),
        ("grad_out", {"grad_out": torch.ones(3, 5, 10, 20).int()}),
        ("grad_out", {"padding": [0, 1]}),
        ("values", {"size": [3, 10, 10], "grad_out": torch.ones(3, 5, 10, 10)}),
        ("input_size", {"size": [30, 20]}),
        ("input_size", {"stride": [1]}),
        ("input_size", {"kernel": [], "size": [600], "grad_out": torch.ones(3, 5)}),
        ("1 or more", {"stride": [1, 0]}),
        ("1 or more", {"kernel": [3, 0]}),
        ("1 or more", {"dilation": [-1, 1]}),
        ("0 or more", {"padding": [1, -1]}),
        ("less than the kernel", {"kernel": [3, 23]}),
        ("less than the kernel", {"size": [3, -10, -20]}),
    ):
        with pytest.raises(RuntimeError, match=f"topk_conv_weight_grad.*{match}"):
            call(**changes)
    values, positions, *rest = packed
    repeated = positions.clone()
    repeated[2, 1] = repeated[2, 0]
    with pytest.raises(RuntimeError, match="ascend"):
        call((values, repeated, *rest))


# ---------------------------------------------------------------------------------------- errors


def reads(packed, n, k, k_tail, bitmap, tokens, match):
    """Both operators that read raise."""
    with pytest.raises(RuntimeError, match=match):
        ops.topk_unpack(*packed, n, k, k_tail, bitmap, torch.float32)
    for outputs in (3, 100):
        grad_out = torch.ones(tokens, outputs)
        with pytest.raises(RuntimeError, match=match):
            ops.topk_weight_grad(*packed, grad_out, n, n, k, k_tail, bitmap)


@pytest.mark.parametrize("k", [26, 200])
def test_malformed_quota(k):
    x = numbers(5, 600)
    v, p, s = ops.topk_pack(x, k, 9, torch.int8, False)
    none = NO_COUNTS
    reads((v, p, s, none), 600, k, 8, False, 5, "values")
    reads((v, p, s, none), 600, k - 1, 9, False, 5, "values")
    reads((v, p, s, none), 600, k, 89, False, 5, "k_tail")
    reads((v, p, s, none), 600, 300, 9, False, 5, "k in")
    reads((v, p[:, 1:], s, none), 600, k, 9, False, 5, "positions")
    reads((v, p[1:], s, none), 600, k, 9, False, 5, "positions")
    reads((v, p.to(torch.int16), s, none), 600, k, 9, False, 5, "positions")
    reads((v, p, s[:, 1:], none), 600, k, 9, False, 5, "scale")
    reads((v, p, s.float(), none), 600, k, 9, False, 5, "scale")
    reads((v, p, torch.empty(0), none), 600, k, 9, False, 5, "scale")
    reads((v.to(torch.int32), p, s, none), 600, k, 9, False, 5, "values")
    reads((v[0], p, s, none), 600, k, 9, False, 5, "values")
    beyond = p.clone()
    beyond[3, -1] = 88  # the last block has 88 elements
    reads((v, beyond, s, none), 600, k, 9, False, 5, "positions below 88")
    early = p.clone()
    early[3, -9] = 200
    reads((v, early, s, none), 600, k, 9, False, 5, "positions below 88")
    repeated = p.clone()
    repeated[2, 1] = repeated[2, 0]
    reads((v, repeated, s, none), 600, k, 9, False, 5, "ascend")


def test_malformed_counts():
    x = numbers(5, 600)
    v, p, s, counts = ops.topk_pack_sample(x, 60, torch.int8, False)

    def changed(*changes):
        new = counts.clone()
        for row, block, by in changes:
            new[row, block] += by
        return new

    for bad, match in (
        (changed((1, 0, 1)), "sum"),
        (changed((4, 2, -1)), "sum"),
        (changed((0, 0, 300), (0, 1, -300)), "counts"),
        (changed((0, 2, 200), (0, 1, -200)), "counts"),
        (counts[:, 1:], "counts"),
        (counts[1:], "counts"),
        (counts.int(), "counts"),
    ):
        reads((v, p, s, bad), 600, 0, 0, False, 5, match)


def test_malformed_bitmap():
    x = numbers(5, 603)
    v, p, s = ops.topk_pack(x, 26, 9, torch.bfloat16, True)
    more, less, beyond = p.clone(), p.clone(), p.clone()
    byte = int((p[2] != 255).nonzero()[0])
    more[2, byte] = 255
    less[2, int((p[2] != 0).nonzero()[0])] = 0
    beyond[2, -1] |= 128
    for bad in (more, less, beyond):
        reads((v, bad, s, NO_COUNTS), 603, 26, 9, True, 5, "bits")
    reads((v, p[:, 1:], s, NO_COUNTS), 603, 26, 9, True, 5, "positions")
    reads((v, p, s, NO_COUNTS), 603, 25, 9, True, 5, "values")
    v, p, s, counts = ops.topk_pack_sample(x, 60, torch.bfloat16, True)
    wrong = counts.clone()
    wrong[0, 0] += 1
    wrong[0, 1] -= 1
    reads((v, p, s, wrong), 603, 0, 0, True, 5, "counts")


def test_wrong_arguments():
    x = numbers(3, 600)
    raises = pytest.raises(RuntimeError, match="topk_pack")
    for args in (
        (x[0], 26, 9, torch.float32, False),
        (x.int(), 26, 9, torch.float32, False),
        (x, 257, 9, torch.float32, False),
        (x, -1, 9, torch.float32, False),
        (x, 26, 89, torch.float32, False),
        (x, 26, -1, torch.float32, False),
        (x, 26, 9, torch.float64, False),
    ):
        with raises:
            ops.topk_pack(*args)
    for args in (
        (x[0], 60, torch.float32, False),
        (x.bool(), 60, torch.float32, False),
        (x, 601, torch.float32, False),
        (x, -1, torch.float32, False),
        (x, 60, torch.int16, False),
    ):
        with raises:
            ops.topk_pack_sample(*args)
    packed = *ops.topk_pack(x, 26, 9, torch.float32, False), NO_COUNTS
    with pytest.raises(RuntimeError, match="topk_unpack"):
        ops.topk_unpack(*packed, 600, 26, 9, False, torch.int32)
    for grad_out, features in (
        (torch.ones(3), 600),
        (torch.ones(4, 5), 600),
        (torch.ones(3, 5, dtype=torch.int32), 600),
        (torch.ones(3, 5), 599),
        (torch.ones(3, 5), -600),
    ):
        with pytest.raises(RuntimeError, match="topk_weight_grad"):
            ops.topk_weight_grad(*packed, grad_out, 600, features, 26, 9, False)
