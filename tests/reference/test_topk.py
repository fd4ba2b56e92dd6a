"""Top-k: the kept set against its set-theoretic definition, values and products against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers import assert_same, assert_within, gamma

BLOCK = 256
SIZES = (1, 7, 8, 255, 256, 257, 512, 600)
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
NO_SCALE = torch.empty(0, dtype=torch.bfloat16)
NO_COUNTS = torch.empty(0, dtype=torch.int16)


def largest(row: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest by the bits of |x|, the first of equal ones winning, ascending."""
    bits = np.abs(row.astype(np.float32)).view(np.int32).astype(np.int64)
    return np.sort(np.argsort(-bits, kind="stable")[:k])


def block_columns(x: torch.Tensor, k: int, k_tail: int) -> list[list[int]]:
    rows = []
    for row in x.float().numpy():
        kept = []
        for start in range(0, len(row), BLOCK):
            block = row[start : start + BLOCK]
            quota = k if len(block) == BLOCK else k_tail
            kept += [start + int(i) for i in largest(block, quota)]
        rows.append(kept)
    return rows


def quotas(n: int, keep: float) -> tuple[int, int]:
    return max(1, round(BLOCK * keep)), max(1, round(n % BLOCK * keep)) if n % BLOCK else 0


def unpack(ops, packed, n, k, k_tail, bitmap, dtype=torch.float32, counts=NO_COUNTS):
    values, positions, scale = packed
    return ops.topk_unpack(values, positions, scale, counts, n, k, k_tail, bitmap, dtype)


def data(kind: str, rows: int, n: int) -> torch.Tensor:
    if kind == "ties":  # seven magnitudes only
        return torch.randint(-3, 4, (rows, n)).float() / 4
    if kind == "not finite":
        x = torch.randn(rows, n)
        chosen = torch.rand(rows, n)
        x[chosen < 0.05] = math.nan
        x[(chosen > 0.1) & (chosen < 0.15)] = math.inf
        x[(chosen > 0.2) & (chosen < 0.25)] = -math.inf
        return x
    if kind == "tiny":  # subnormal in float32, and zeros of either sign
        return torch.randn(rows, n) * 1e-39 * torch.randint(0, 2, (rows, n))
    return torch.randn(rows, n)


@pytest.mark.parametrize("kind", ["normal", "ties", "not finite", "tiny"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bitmap", [False, True], ids=["index", "bitmap"])
def test_kept_set_is_the_stable_sorts(ops, kind, n, bitmap):
    x = data(kind, 4, n)
    for keep in (0.03, 0.1, 0.5, 1.0):
        k, k_tail = quotas(n, keep)
        packed = ops.topk_pack(x, k, k_tail, torch.float32, bitmap)
        expected = torch.zeros_like(x)
        for row, columns in enumerate(block_columns(x, k, k_tail)):
            expected[row, columns] = x[row, columns]
        kept = n // BLOCK * k + k_tail
        assert packed[0].shape == (4, kept)
        assert_same(unpack(ops, packed, n, k, k_tail, bitmap), expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layout_in_order_of_position(ops, n, dtype):
    x = torch.randn(3, n, dtype=torch.float64).to(dtype)
    k, k_tail = quotas(n, 0.2)
    columns = torch.tensor(block_columns(x, k, k_tail))
    values, positions, scale = ops.topk_pack(x, k, k_tail, torch.float32, False)
    assert_same(values, x.float().gather(1, columns))
    assert_same(positions, (columns % BLOCK).to(torch.uint8))
    assert scale.numel() == 0 and scale.dtype == torch.bfloat16
    same, bits, _ = ops.topk_pack(x, k, k_tail, torch.float32, True)
    assert_same(same, values)
    mask = np.zeros((3, n), dtype=np.uint8)
    np.put_along_axis(mask, columns.numpy(), 1, axis=1)
    assert_same(bits, torch.from_numpy(np.packbits(mask, axis=1, bitorder="little")))


@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_bitmap_and_index_unpack_to_the_same(ops, value_dtype, n):
    x = data("not finite", 3, n)
    k, k_tail = quotas(n, 0.25)
    unpacked = [
        unpack(ops, ops.topk_pack(x, k, k_tail, value_dtype, bitmap), n, k, k_tail, bitmap)
        for bitmap in (False, True)
    ]
    assert_same(*unpacked)


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float16])
def test_half_values_are_casts(ops, value_dtype):
    x = data("not finite", 3, 600) * 1000
    packed = ops.topk_pack(x, 40, 12, value_dtype, False)
    exact = unpack(ops, ops.topk_pack(x, 40, 12, torch.float32, False), 600, 40, 12, False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        dense = unpack(ops, packed, 600, 40, 12, False, dtype)
        assert_same(dense, exact.to(value_dtype).to(dtype))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e-38])
@pytest.mark.parametrize("n", SIZES)
def test_int8_values_are_within_half_a_step(ops, n, scale):
    x = torch.randn(4, n) * scale
    k, k_tail = quotas(n, 0.3)
    exact = unpack(ops, ops.topk_pack(x, k, k_tail, torch.float32, False), n, k, k_tail, False)
    packed = ops.topk_pack(x, k, k_tail, torch.int8, False)
    dense = unpack(ops, packed, n, k, k_tail, False)
    assert packed[2].shape == (4, -(-n // BLOCK)) and packed[2].dtype == torch.bfloat16
    assert packed[0].abs().max() <= 126
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        peak = exact[:, block].double().abs().amax(1, keepdim=True)
        # A step is peak / 126 rounded up to bfloat16 (2**-7 at most), never below 2**-126; decoding
        # rounds once in float32.
        step = (peak / 126 * (1 + 2**-7)).clamp_min(2.0**-126)
        assert_within(dense[:, block], exact[:, block], step / 2 + peak * 2**-23)
        assert ((dense[:, block] == 0) | (exact[:, block] != 0)).all()


def test_int8_scale_is_rounded_up(ops):
    x = torch.randn(50, 256)
    _, _, scale = ops.topk_pack(x, 30, 0, torch.int8, False)
    peak = x.abs().amax(1, keepdim=True)
    assert (scale.float() >= peak / 126).all()
    below = torch.nextafter(scale, torch.zeros_like(scale)).float()
    assert (below < peak / 126).all()


@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize("bitmap", [False, True], ids=["index", "bitmap"])
def test_what_is_not_finite_is_kept_first_and_faithfully(ops, value_dtype, bitmap):
    x = torch.randn(2, 300)
    x[0, [3, 250, 299]] = torch.tensor([math.nan, math.inf, -math.inf])
    x[1, [0, 1, 2]] = torch.tensor([-math.inf, -math.nan, math.inf])
    packed = ops.topk_pack(x, 3, 1, value_dtype, bitmap)
    dense = unpack(ops, packed, 300, 3, 1, bitmap)
    assert dense[0, 3].isnan() and dense[0, 250] == math.inf and dense[0, 299] == -math.inf
    assert dense[1, 0] == -math.inf and dense[1, 1].isnan() and dense[1, 2] == math.inf
    # NaN ranks above infinity.
    one = ops.topk_pack(x[1:, :3], 0, 1, value_dtype, bitmap)
    assert unpack(ops, one, 3, 0, 1, bitmap)[0].isnan().tolist() == [False, True, False]


def test_finite_neighbours_of_infinities_keep_their_int8_precision(ops):
    x = torch.randn(1, 256)
    x[0, 17] = math.inf
    dense = unpack(ops, ops.topk_pack(x, 256, 0, torch.int8, False), 256, 256, 0, False)
    others = torch.arange(256) != 17
    peak = x[:, others].abs().max().item()
    assert_within(dense[:, others], x[:, others], peak / 252 * (1 + 2**-7) + peak * 2**-23)


# --------------------------------------------------------------------------------- a whole sample


def paper_mask(row: np.ndarray, keep: float) -> np.ndarray:
    """Jiang et al.: drop what is below the k-th smallest magnitude, k = clip(int(n r), 1, n)."""
    n, sparsity = len(row), 1 - keep
    k = min(max(int(n * sparsity + 1e-9), 1), n)
    magnitude = np.abs(row)
    return magnitude >= np.sort(magnitude)[k - 1]


@pytest.mark.parametrize("n", (1, 7, 256, 257, 600, 1536))
@pytest.mark.parametrize("keep", [0.03, 0.1, 0.5, 0.9, 1.0])
def test_sample_scope_is_the_papers_set(ops, n, keep):
    x = torch.randn(3, n)  # no ties in float32 with this little data, up to the assertion below
    masks = [paper_mask(row, keep) for row in x.numpy()]
    k = int(masks[0].sum())
    assert all(mask.sum() == k for mask in masks)
    for bitmap in (False, True):
        values, positions, scale, counts = ops.topk_pack_sample(x, k, torch.float32, bitmap)
        assert values.shape == (3, k) and counts.dtype == torch.int16
        dense = unpack(ops, (values, positions, scale), n, k, 0, bitmap, counts=counts)
        for row, mask in enumerate(masks):
            expected = torch.where(torch.from_numpy(mask), x[row], 0.0)
            assert_same(dense[row], expected)
            per_block = [mask[i : i + BLOCK].sum() for i in range(0, n, BLOCK)]
            assert counts[row].tolist() == per_block


@pytest.mark.parametrize("kind", ["ties", "not finite", "tiny"])
@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize("n", [7, 256, 600])
def test_sample_scope_cuts_ties_by_position(ops, kind, value_dtype, n):
    x = data(kind, 3, n)
    k = max(1, n // 4)
    expected = torch.zeros_like(x)
    for row in range(3):
        columns = largest(x[row].numpy(), k).tolist()
        expected[row, columns] = x[row, columns]
    dense = {}
    for bitmap in (False, True):
        values, positions, scale, counts = ops.topk_pack_sample(x, k, value_dtype, bitmap)
        dense[bitmap] = unpack(ops, (values, positions, scale), n, k, 0, bitmap, counts=counts)
    assert_same(dense[False], dense[True])
    if value_dtype == torch.float32:
        assert_same(dense[False], expected)
    else:
        finite = expected.isfinite()
        peak = torch.where(finite, expected.abs(), 0).max().item()
        bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.int8: 2**-7}[value_dtype]
        floor = 2.0**-24 if value_dtype == torch.float16 else 2.0**-126
        assert_within(dense[False][finite], expected[finite], peak * bound + floor)
        assert_same(dense[False][~finite], expected[~finite])


# --------------------------------------------------------------------------------- weight gradient


@pytest.mark.parametrize("bitmap", [False, True], ids=["index", "bitmap"])
@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize("features", SIZES)
def test_weight_gradient(ops, bitmap, value_dtype, features):
    """Rows are tokens; the bound is that of a float32 sum over the tokens in any order."""
    for tokens, outputs, keep in ((1, 1, 0.1), (3, 7, 0.1), (40, 33, 0.3)):
        x = torch.randn(tokens, features)
        k, k_tail = quotas(features, keep)
        values, positions, scale = ops.topk_pack(x, k, k_tail, value_dtype, bitmap)
        dense = unpack(ops, (values, positions, scale), features, k, k_tail, bitmap).double()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            g = torch.randn(tokens, outputs, dtype=torch.float64).to(dtype)
            got = ops.topk_weight_grad(
                values, positions, scale, NO_COUNTS, g, features, features, k, k_tail, bitmap
            )
            assert got.dtype == torch.float32
            exact = g.double().T @ dense
            magnitude = g.double().T.abs() @ dense.abs()
            assert_within(got, exact, gamma(tokens + 3) * magnitude)


@pytest.mark.parametrize("bitmap", [False, True], ids=["index", "bitmap"])
@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize("tokens, features", [(1, 7), (5, 60), (3, 257), (16, 96), (2, 512)])
def test_weight_gradient_of_samples(ops, bitmap, value_dtype, tokens, features):
    """A row holds several tokens, whose borders are not those of the blocks."""
    samples, n = 3, tokens * features
    x = torch.randn(samples, n)
    k = max(1, n // 5)
    values, positions, scale, counts = ops.topk_pack_sample(x, k, value_dtype, bitmap)
    dense = unpack(ops, (values, positions, scale), n, k, 0, bitmap, counts=counts)
    dense = dense.double().view(-1, features)
    g = torch.randn(samples * tokens, 9)
    got = ops.topk_weight_grad(values, positions, scale, counts, g, n, features, k, 0, bitmap)
    magnitude = g.double().T.abs() @ dense.abs()
    assert_within(got, g.double().T @ dense, gamma(samples * tokens + 3) * magnitude)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 0, 1), (2, 3, 2)])
def test_weight_gradient_of_a_convolution(
    ops, stride, padding, dilation, value_dtype, channels_last
):
    """The linear layer's on the patches of the input."""
    x = torch.randn(3, 4 * 9 * 8)
    k, k_tail = quotas(288, 0.2)
    packed = ops.topk_pack(x, k, k_tail, value_dtype, False)
    dense = unpack(ops, packed, 288, k, k_tail, False)
    dense = dense.view(3, 9, 8, 4).movedim(-1, 1) if channels_last else dense.view(3, 4, 9, 8)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    patches = torch.nn.functional.unfold(dense, (3, 2), **options).double()
    out = torch.nn.functional.conv2d(dense, torch.zeros(5, 4, 3, 2), **options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        g = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        pairs = ([each] * 2 for each in options.values())
        layout = (channels_last, k, k_tail, False)
        got = ops.topk_conv_weight_grad(*packed, NO_COUNTS, g, [4, 9, 8], [3, 2], *pairs, *layout)
        assert got.dtype == torch.float32 and got.shape == (5, 4, 3, 2)
        rows = g.double().flatten(2)
        exact = torch.einsum("bop,bip->oi", rows, patches)
        magnitude = torch.einsum("bop,bip->oi", rows.abs(), patches.abs())
        terms = patches.shape[0] * patches.shape[2]
        assert_within(got.view(5, 24), exact, gamma(terms + 3) * magnitude)


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_a_gradient_of_any_layout(ops, strides):
    g = {
        "transposed": lambda: torch.randn(6, 11).T,
        "sliced": lambda: torch.randn(11, 12)[:, ::2],
        "expanded": lambda: torch.randn(1, 1).expand(11, 6),
    }[strides]()
    packed = ops.topk_pack(torch.randn(11, 300), 30, 5, torch.int8, False)
    options = (300, 300, 30, 5, False)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, g, *options)
    expected = ops.topk_weight_grad(*packed, NO_COUNTS, g.contiguous(), *options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_stays_visible(ops):
    packed = ops.topk_pack(torch.randn(4, 64), 0, 64, torch.float32, True)
    g = torch.randn(4, 5)
    g[2, 3] = math.nan
    got = ops.topk_weight_grad(*packed, NO_COUNTS, g, 64, 64, 0, 64, True)
    assert got[3].isnan().all() and got[[0, 1, 2, 4]].isfinite().all()


# ------------------------------------------------------------------------------------------ empty


@pytest.mark.parametrize("rows, n", [(0, 300), (3, 0), (0, 0), (0, 256), (0, 5)])
@pytest.mark.parametrize("bitmap", [False, True], ids=["index", "bitmap"])
@pytest.mark.parametrize("value_dtype", VALUES, ids=str)
def test_empty(ops, rows, n, bitmap, value_dtype):
    x = torch.randn(rows, n)
    k, k_tail = quotas(n, 0.1)
    packed = ops.topk_pack(x, k, k_tail, value_dtype, bitmap)
    dense = unpack(ops, packed, n, k, k_tail, bitmap)
    assert dense.shape == (rows, n)
    g = torch.randn(rows, 4)
    grad = ops.topk_weight_grad(*packed, NO_COUNTS, g, n, n, k, k_tail, bitmap)
    assert_same(grad, torch.zeros(4, n))
    kept = min(2, n)
    values, positions, scale, counts = ops.topk_pack_sample(x, kept, value_dtype, bitmap)
    assert values.shape == (rows, kept) and counts.shape == (rows, -(-n // BLOCK))
    dense = unpack(ops, (values, positions, scale), n, kept, 0, bitmap, counts=counts)
    assert dense.shape == (rows, n)


def test_no_outputs(ops):
    packed = ops.topk_pack(torch.randn(4, 64), 0, 6, torch.float32, False)
    got = ops.topk_weight_grad(*packed, NO_COUNTS, torch.randn(4, 0), 64, 64, 0, 6, False)
    assert got.shape == (0, 64)


# ----------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_layout(ops, dtype):
    whole = torch.randn(600, 600, dtype=torch.float64).to(dtype)
    for x in (whole.T[:5], whole[:10:2, ::2], whole[:1].expand(4, 600), whole[3:6, 7:300]):
        n = x.shape[1]
        k, k_tail = quotas(n, 0.1)
        got = ops.topk_pack(x, k, k_tail, torch.int8, False)
        expected = ops.topk_pack(x.contiguous(), k, k_tail, torch.int8, False)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
        got = ops.topk_pack_sample(x, 20, torch.float16, True)
        expected = ops.topk_pack_sample(x.contiguous(), 20, torch.float16, True)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)


def test_float64_is_rounded_to_float32_first(ops):
    """Also where the rounding decides the order: beyond float32, values tie as infinities."""
    x = torch.tensor([[1e300, 1.0, -1e301, 2.0, 1 + 1e-12]], dtype=torch.float64)
    dense = unpack(ops, ops.topk_pack(x, 0, 2, torch.float32, False), 5, 0, 2, False)
    assert dense.tolist() == [[math.inf, 0, -math.inf, 0, 0]]
    one = unpack(ops, ops.topk_pack(x[:, 1:2], 0, 1, torch.float32, False), 1, 0, 1, False)
    assert one.item() == 1.0
    tied = x[:, [4, 1]]  # equal in float32: the first stays
    assert unpack(
        ops, ops.topk_pack(tied, 0, 1, torch.float32, False), 2, 0, 1, False
    ).tolist() == [[1.0, 0.0]]


def test_nothing_uninitialised_comes_back(ops, poison):
    for n in SIZES:
        x = torch.randn(3, n)
        k, k_tail = quotas(n, 0.2)
        for bitmap in (False, True):
            packed = ops.topk_pack(x, k, k_tail, torch.int8, bitmap)
            assert packed[2].isfinite().all()
            assert unpack(ops, packed, n, k, k_tail, bitmap).isfinite().all()
            g = torch.randn(3, 5)
            grad = ops.topk_weight_grad(*packed, NO_COUNTS, g, n, n, k, k_tail, bitmap)
            assert grad.isfinite().all()
