"""What every format promises: sizes, descriptions, JSON, and a packed tensor that reads back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memtl.storage import (
    Bits,
    CenteredTopK,
    Dense,
    Format,
    Packed,
    Quantized,
    SignMean,
    TopK,
    format_from_dict,
    pack,
)
from memtl.storage.convolution import ConvGeometry, library_weight_grad
from memtl.storage.format import _KINDS
from tests.helpers import FORMATS, assert_same, assert_within, gamma, kept_count, summed, unit

EVERY_FORMAT = {
    **FORMATS,
    "dense-fp32": Dense("fp32"),
    "dense-fp16": Dense("fp16"),
    "topk-3-percent": TopK(0.03),
    "topk-everything": TopK(1.0),
    "topk-bf16-bitmap": TopK(0.6, values="bf16"),
    "topk-sample-int8": TopK(0.03, scope="sample"),
    "topk-sample-bitmap": TopK(0.4, scope="sample", values="fp32"),
    "centered-bitmap": CenteredTopK(0.6, "bf16"),
    "centered-fp32": CenteredTopK(0.03, "fp32"),
    "sign-bitmap": SignMean(0.3, "fp16"),
    "sign-everything": SignMean(1.0),
    "range": Quantized(4, (-0.1, 1.1)),
    "range-3-bit": Quantized(3, (-10.0, 10.0)),
    "range-2-bit": Quantized(2, (-10.0, 10.0), seed=9),
}
EVERY = pytest.mark.parametrize("format", EVERY_FORMAT.values(), ids=EVERY_FORMAT)
SHAPES = [
    (),
    (1,),
    (7,),
    (8,),
    (255,),
    (256,),
    (257,),
    (600,),
    (3, 1),
    (1, 300),
    (5, 256),
    (2, 3, 600),
    (4, 7, 7),
    (2, 3, 5, 64),
    (3, 0),
    (2, 0, 5),
]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@EVERY
@pytest.mark.parametrize("dtype", FLOATING)
def test_nbytes_is_exact(format, dtype):
    for shape in map(torch.Size, SHAPES):
        packed = pack(torch.randn(shape, dtype=torch.float64).to(dtype), format)
        assert packed.nbytes == format.nbytes(shape, dtype), shape
        assert all(t.is_contiguous() for t in packed.tensors)
        own = sum(t.untyped_storage().nbytes() for t in packed.tensors)
        assert own == packed.nbytes, "a packed tensor is a view of something larger"


@EVERY
@pytest.mark.parametrize("dtype", FLOATING)
def test_unpack_gives_shape_and_dtype_back(format, dtype):
    for shape in map(torch.Size, SHAPES):
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        packed = pack(x, format)
        assert packed.shape == shape and packed.dtype == dtype
        dense = packed.unpack()
        assert dense.shape == shape and dense.dtype == dtype and dense.isfinite().all()
        for other in (torch.float32, torch.bfloat16):
            assert packed.unpack(other).dtype == other


@EVERY
def test_packing_keeps_no_reference_to_a_lossy_input(format):
    if format == Dense():
        pytest.skip("by reference is what it promises")
    x = torch.randn(2, 300, dtype=torch.float64)
    packed = pack(x, format)
    expected = packed.unpack()
    x.fill_(7)
    assert_same(packed.unpack(), expected)


@EVERY
@pytest.mark.parametrize("shape", [(9, 60), (2, 9, 257), (4, 300), (5,)])
def test_weight_grad_is_the_product_with_the_unpacked_tensor(format, shape):
    x = torch.randn(shape)
    packed = pack(x, format)
    g = torch.randn(*shape[:-1], 11)
    got = packed.weight_grad(g)
    assert got.dtype == torch.float32
    dense = packed.unpack().double().reshape(-1, shape[-1])
    rows = g.double().reshape(-1, 11)
    size = summed(packed).reshape(-1, shape[-1])
    assert_within(got, rows.T @ dense, gamma(len(rows) + 3) * (rows.T.abs() @ size))


@EVERY
def test_the_layout_of_memory_does_not_matter(format):
    x = torch.randn(4, 6, 5, 64)
    for view in (x.transpose(1, 3), x.contiguous(memory_format=torch.channels_last), x[:, ::2]):
        assert_same(pack(view, format).unpack(), pack(view.contiguous(), format).unpack())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_is_not_finite_never_reads_back_as_a_plausible_number(format, value):
    x = torch.randn(4, 256)
    x[1, 100] = value
    back = pack(x, format).unpack()
    if isinstance(format, Quantized):  # the whole group says so
        assert back[1, 64:128].isnan().all()
        assert back[1, :64].isfinite().all()
    else:
        assert_same(back[1, 100], torch.tensor(value))
        assert back[0].isfinite().all()


def test_everything_kept_in_float32_is_exact():
    x = torch.randn(5, 300)
    assert_same(pack(x, TopK(1.0, values="fp32")).unpack(), x)
    assert_same(pack(x, TopK(1.0, "sample", "fp32")).unpack(), x)


@pytest.mark.parametrize("format", [TopK(), CenteredTopK(), SignMean(None), Bits()], ids=str)
def test_json_of_what_is_open_and_of_masks(format):
    assert format_from_dict(json.loads(json.dumps(format.to_dict()))) == format


@EVERY
def test_json_round_trip(format):
    text = json.dumps(format.to_dict())
    again = format_from_dict(json.loads(text))
    assert again == format and hash(again) == hash(format) and type(again) is type(format)
    x = torch.randn(3, 300)
    assert_same(pack(x, again).unpack(), pack(x, format).unpack())


def test_formats_are_frozen_and_comparable():
    assert len(set(EVERY_FORMAT.values())) == len(EVERY_FORMAT)
    for format in EVERY_FORMAT.values():
        for field in dataclasses.fields(format):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(format, field.name, None)


def test_descriptions_are_short_and_different():
    texts = {name: str(format) for name, format in EVERY_FORMAT.items()}
    assert texts["topk-index"] == "topk 10% int8"
    assert texts["topk-sample"] == "topk 10% fp16/sample"
    assert texts["topk-3-percent"] == "topk 3% int8"
    assert texts["centered"] == "centered topk 10% int8"
    assert texts["sign"] == "sign + topk 3% int8"
    assert texts["4-bit"] == "4-bit" and texts["range"] == "4-bit fixed range"
    assert texts["dense"] == "dense" and texts["dense-bf16"] == "dense bf16"
    assert str(TopK()) == "topk int8" and str(Bits()) == "1 bit"


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "format kind must be one of"),
        ({"kind": "zip"}, "format kind must be one of .* got 'zip'"),
        ({"kind": "topk", "kept": 0.1}, r"format 'topk' has no field \['kept'\]"),
        ({"kind": "dense", "dtype": "int8"}, "dtype must be None or one of"),
        ({"kind": "quantized", "bits": 5}, "bits must be one of"),
        ({"kind": "topk", "keep": 2}, r"keep must be in \(0, 1\], got 2"),
    ],
)
def test_bad_descriptions_are_refused(data, message):
    before = dict(data)
    with pytest.raises(ValueError, match=message):
        format_from_dict(data)
    assert data == before


def test_a_format_of_ones_own_can_be_named():
    @dataclasses.dataclass(frozen=True)
    class Halved(Format):
        kind = "test-halved"
        factor: int = 2

        def pack(self, x):
            return (x[..., :: self.factor].clone(),)

        def unpack(self, packed, shape, dtype):
            dense = torch.zeros(shape, dtype=dtype)
            dense[..., :: self.factor] = packed[0].to(dtype)
            return dense

        def nbytes(self, shape, dtype):
            return shape[:-1].numel() * -(-shape[-1] // self.factor) * dtype.itemsize

        def __str__(self):
            return f"every {self.factor}th"

    try:
        assert format_from_dict({"kind": "test-halved", "factor": 3}) == Halved(3)
        x, g = torch.randn(4, 8), torch.randn(4, 5)
        packed = pack(x, Halved())
        assert packed.nbytes == Halved().nbytes(x.shape, x.dtype) == 64
        torch.testing.assert_close(packed.weight_grad(g), g.T @ packed.unpack())
    finally:
        del _KINDS["test-halved"]


# ------------------------------------------------------------------------------------------- TopK


@pytest.mark.parametrize("keep", [0.03, 0.1, 0.125, 0.13, 0.5, 1.0])
@pytest.mark.parametrize("values, size", [("int8", 1), ("fp16", 2), ("bf16", 2), ("fp32", 4)])
def test_topk_bytes_by_its_docstring(keep, values, size):
    for rows, n in ((1, 256), (4, 600), (3, 7), (2, 257), (5, 768), (1, 1)):
        kept = sum(
            max(1, math.floor(length * keep + 0.5))
            for length in [256] * (n // 256) + [n % 256] * (n % 256 > 0)
        )
        blocks = -(-n // 256)
        index, bitmap = kept, -(-n // 8)
        per_row = kept * size + min(index, bitmap) + (2 * blocks if values == "int8" else 0)
        assert TopK(keep, values=values).nbytes(torch.Size((rows, n)), torch.float32) == (
            rows * per_row
        )


def test_topk_bits_an_element_of_the_docstring():
    shape = torch.Size((10, 256 * 30))
    assert TopK(0.1).nbytes(shape, torch.float32) * 8 / shape.numel() == 1.6875
    assert TopK(0.03).nbytes(shape, torch.float32) * 8 / shape.numel() == 0.5625


@pytest.mark.parametrize("keep", [0.03, 0.1, 0.3, 0.9, 1.0])
def test_topk_sample_bytes(keep):
    for batch, n in ((2, 600), (3, 7), (1, 1536)):
        pruned = min(max(int(n * (1 - keep) + 1e-9), 1), n)
        kept = n - pruned + 1
        positions = min(kept, -(-n // 8)) if kept != n / 8 else kept
        expected = batch * (2 * kept + positions + 2 * -(-n // 256))
        shape = torch.Size((batch, n))
        assert TopK(keep, "sample", "fp16").nbytes(shape, torch.float32) == expected


def test_topk_sample_threshold_is_over_the_whole_sample():
    x = torch.randn(3, 4, 100)
    x[:, 0] *= 100  # all that is kept stands in the first token
    dense = pack(x, TopK(0.2, "sample", "fp32")).unpack()
    assert_same(dense[:, 0].ne(0).sum(1), torch.tensor([81, 81, 81]))
    assert not dense[:, 1:].any()
    blocks = pack(x, TopK(0.2, "block", "fp32")).unpack()
    assert_same(blocks.ne(0).sum(2), torch.full((3, 4), 20))


def test_topk_of_a_vector_is_one_sample():
    x = torch.randn(50)
    dense = pack(x, TopK(0.2, "sample", "fp32")).unpack()
    magnitudes = x.abs().sort().values
    assert_same(dense != 0, x.abs() >= magnitudes[40 - 1])


def test_topk_resolve_fills_in_what_is_open():
    assert TopK().resolve(0.3) == TopK(0.3)
    assert TopK(0.1).resolve(0.3) == TopK(0.1)
    assert CenteredTopK(values="bf16").resolve(0.3) == CenteredTopK(0.3, "bf16")
    assert CenteredTopK(0.1).resolve(0.3) == CenteredTopK(0.1)
    assert SignMean().resolve(0.3) == SignMean(0.03)
    assert SignMean(None).resolve(0.3) == SignMean(0.3)
    assert Quantized(2).resolve(0.3) == Quantized(2)
    for format in (TopK(), CenteredTopK(), SignMean(None)):
        with pytest.raises(ValueError, match=r"keep is not set: give a fraction in \(0, 1\]"):
            format.pack(torch.randn(3))


@pytest.mark.parametrize("kind", [TopK, CenteredTopK, SignMean])
@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, math.nan, math.inf])
def test_topk_refuses_what_is_no_fraction(kind, keep):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got"):
        kind(keep)


@pytest.mark.parametrize("kind", [TopK, CenteredTopK, SignMean])
@pytest.mark.parametrize("keep", [True, "0.1", [0.1]])
def test_topk_refuses_what_is_no_number(kind, keep):
    with pytest.raises(TypeError, match=r"keep must be a number in \(0, 1\], got"):
        kind(keep)


@pytest.mark.parametrize("options", [{"scope": "row"}, {"values": "fp8"}, {"scope": None}])
def test_topk_refuses_unknown_choices(options):
    with pytest.raises(ValueError, match="must be one of .* got"):
        TopK(0.1, **options)


@pytest.mark.parametrize("kind", [CenteredTopK, SignMean])
def test_what_stands_on_topk_refuses_its_unknown_values(kind):
    with pytest.raises(ValueError, match="values must be one of .* got 'fp8'"):
        kind(0.1, "fp8")


# ------------------------------------------------------------------------- CenteredTopK, SignMean


def test_centered_bytes_by_its_docstring():
    for shape in ((9, 600), (2, 3, 257), (50,), (), (0, 7), (3, 0)):
        shape = torch.Size(shape)
        columns = shape[-1] if len(shape) > 1 else 1
        expected = TopK(0.1).nbytes(shape, torch.float32) + 4 * columns
        assert CenteredTopK(0.1).nbytes(shape, torch.float32) == expected


@pytest.mark.parametrize("dtype", FLOATING)
def test_centered_keeps_the_largest_deviations_from_the_column_means(dtype):
    x = (torch.randn(40, 600) + 5 * torch.randn(600)).to(dtype)
    packed = pack(x, CenteredTopK(0.1, "fp32"))
    mean = packed.tensors[-1]
    assert_within(mean, x.double().mean(0), gamma(41) * x.double().abs().mean(0))
    deviation = pack(x - mean, TopK(0.1, values="fp32")).unpack(torch.float32)
    assert_same(packed.unpack(torch.float32), deviation + mean)
    assert (packed.unpack(torch.float32) != mean).sum() == 40 * kept_count(600, 0.1)
    # Where columns have means, far closer than the largest elements themselves.
    error = (packed.unpack(torch.float64) - x.double()).norm()
    assert error < 0.5 * (pack(x, TopK(0.1)).unpack(torch.float64) - x.double()).norm()


def test_centered_of_a_vector_has_one_mean():
    x = torch.randn(50) + 3
    packed = pack(x, CenteredTopK(0.2, "fp32"))
    assert packed.tensors[-1].shape == (1,)
    deviation = pack(x - packed.tensors[-1], TopK(0.2, values="fp32")).unpack()
    assert_same(packed.unpack(), deviation + packed.tensors[-1])


def test_centered_leaves_a_column_with_a_broken_mean_where_it_is():
    x = torch.randn(8, 256) + 1
    x[1, 3], x[2, 5], x[:, 7] = math.nan, -math.inf, 3e38
    packed = pack(x, CenteredTopK(0.1, "fp32"))
    mean, back = packed.tensors[-1], packed.unpack()
    assert mean.isfinite().all() and not mean[[3, 5, 7]].any()
    assert_same(back[[1, 2, 4], [3, 5, 7]], torch.tensor([math.nan, -math.inf, 3e38]))
    back[1, 3] = back[2, 5] = 0
    assert back.isfinite().all()


def test_centered_never_makes_the_dense_activation(monkeypatch):
    packed = pack(torch.randn(30, 300), CenteredTopK(0.1))
    monkeypatch.setattr(CenteredTopK, "unpack", None)
    monkeypatch.setattr(TopK, "unpack", None)
    assert packed.weight_grad(torch.randn(30, 4)).shape == (4, 300)


def test_sign_bytes_by_its_docstring():
    for shape in ((9, 600), (2, 3, 257), (50,), (), (0, 7), (3, 0)):
        shape = torch.Size(shape)
        n = shape.numel()
        expected = TopK(0.1).nbytes(shape, torch.float32) + -(-n // 8) + 2 * -(-n // 64)
        assert SignMean(0.1).nbytes(shape, torch.float32) == expected
    shape = torch.Size((10, 256 * 30))
    assert SignMean().nbytes(shape, torch.float32) * 8 / shape.numel() == 1.8125


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(3, 600), (2, 5, 7), (70,)])
def test_sign_keeps_the_largest_and_the_mean_magnitude_of_the_rest(shape, dtype):
    x = torch.randn(shape).to(dtype)
    back = pack(x, SignMean(0.1, "fp32")).unpack(torch.float32)
    largest = pack(x, TopK(0.1, values="fp32")).unpack(torch.float32)
    kept = largest != 0
    assert kept.sum() == math.prod(shape[:-1]) * kept_count(shape[-1], 0.1)
    assert_same(back[kept], largest[kept])
    rest = torch.where(kept, math.nan, x.double().abs()).flatten()
    for group, read, sign in zip(
        rest.split(64), back.flatten().split(64), x.flatten().sign().split(64), strict=True
    ):
        few = group.isfinite()
        assert (read[few].sign() == sign[few]).all()
        mean = group[few].mean()
        assert_within(
            read[few].abs(), mean.expand(int(few.sum())), mean * (unit(torch.bfloat16) + gamma(65))
        )


def test_sign_of_zero_is_positive_and_kept_zeros_are_exact():
    x = torch.zeros(2, 256)
    x[1, :9], x[1, 9:40] = 5.0, -1.0
    back = pack(x, SignMean(0.03, "fp32")).unpack()
    assert not back[0].any()
    assert_same(back[1, :8], x[1, :8])  # eight are kept, the ninth is one of the rest
    mean = torch.tensor(36 / 56).bfloat16().float()
    assert_same(back[1, 8:64], torch.where(x[1, 8:64] < 0, -mean, mean))
    assert not back[1, 64:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sign_of_a_group_with_more_broken_elements_than_room_is_nan(value):
    x = torch.randn(1, 256)
    x[0, 64:76] = value  # twelve, and room for eight
    back = pack(x, SignMean()).unpack()[0]
    assert_same(back[64:72], torch.full((8,), value))
    assert back[72:128].isnan().all()
    assert back[:64].isfinite().all() and back[128:].isfinite().all()


def test_sign_of_a_mean_beyond_bfloat16_is_nan():
    x = torch.ones(256)
    x[:128] = 3.4e38  # the sum overflows, and the mean would round to infinity
    back = pack(x, SignMean(0.01, "fp32")).unpack()
    assert_same(back[:3], x[:3])
    assert back[3:128].isnan().all()
    assert_same(back[128:], x[128:])


@pytest.mark.parametrize("format", [CenteredTopK(0.1), SignMean()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats_of_several_steps_compile_whole(format, dtype):
    def stored(x):
        packed = format.pack(x)
        return *packed, format.unpack(packed, x.shape, x.dtype)

    compiled = torch.compile(stored, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((5, 300), (2, 7, 64)):
        x = torch.randn(shape).to(dtype)
        for a, b in zip(compiled(x), stored(x), strict=True):
            assert_same(a, b)


# -------------------------------------------------------------------------------- Quantized, Dense


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_quantized_bytes_by_its_docstring(bits):
    for n in (0, 1, 63, 64, 65, 1000):
        groups = math.ceil(n / 64)
        shape = torch.Size((n,))
        assert Quantized(bits).nbytes(shape, torch.float32) == groups * (8 * bits + 4)
        fixed = Quantized(bits, (0.0, 1.0))
        assert fixed.nbytes(shape, torch.float32) == groups * 8 * bits


@pytest.mark.parametrize("bits", [0, 1, 5, 16, True, "4", None, 4.0])
def test_quantized_refuses_other_widths(bits):
    with pytest.raises((TypeError, ValueError), match="bits must be"):
        Quantized(bits)


@pytest.mark.parametrize(
    "range", [(1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (0.0, math.inf), (1.0,), 3.0]
)
def test_quantized_refuses_what_is_no_range(range):
    with pytest.raises((TypeError, ValueError), match="range must be"):
        Quantized(4, range)


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_quantized_refuses_what_is_no_seed(seed):
    with pytest.raises(TypeError, match="seed must be"):
        Quantized(4, seed=seed)


def test_quantized_finer_has_at_least_twice_the_bits_up_to_eight():
    finer = {bits: Quantized(bits, (0.0, 1.0), seed=2).finer() for bits in (2, 3, 4, 8)}
    wanted = {2: 4, 3: 8, 4: 8, 8: 8}
    assert finer == {a: Quantized(b, (0.0, 1.0), seed=2) for a, b in wanted.items()}


def test_quantized_seed_decides_the_rounding():
    x = torch.randn(1000)
    assert_same(pack(x, Quantized(4, seed=3)).unpack(), pack(x, Quantized(4, seed=3)).unpack())
    assert not torch.equal(pack(x, Quantized(4, seed=3)).unpack(), pack(x, Quantized(4)).unpack())


def test_dense_keeps_the_tensor_or_a_cast():
    x = torch.randn(5, 6)
    packed = pack(x, Dense())
    assert packed.tensors[0] is x
    assert_same(pack(x, Dense("bf16")).unpack(), x.bfloat16().float())
    assert_same(pack(x, Dense("fp16")).tensors[0], x.half())
    with pytest.raises(ValueError, match=r"dtype must be None or one of .* got 'int8'"):
        Dense("int8")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "keep, outputs, changes, sparse",
    [
        (0.1, 40, {}, True),
        (0.3, 40, {}, True),
        (0.5, 40, {}, False),  # dense from here on
        (0.1, 3, {}, True),
        (0.2, 3, {}, False),  # too few outputs for so many entries
        (0.1, 8, {"groups": 2}, False),
        (0.1, 40, {"transposed": True}, False),
    ],
)
def test_a_convolution_s_gradient_from_topk(keep, outputs, changes, sparse, channels_last):
    """From the entries alone where that is faster, by any path the same."""
    size, plain = (8, 9, 10), ConvGeometry((1, 1), (1, 1), (1, 1), 1, False, (0, 0))
    geometry = plain._replace(**changes)
    weight = (8, outputs, 3, 3) if geometry.transposed else (outputs, 8 // geometry.groups, 3, 3)
    format, x, g = TopK(keep), torch.randn(3, 720), torch.randn(3, outputs, 9, 10)
    packed = pack(x, format)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    arguments = (size, weight, geometry, channels_last)
    with Watch():
        got = packed.conv_weight_grad(g, *arguments)
    assert (torch.ops.memtl.topk_conv_weight_grad.default in seen) == sparse
    assert (torch.ops.memtl.topk_unpack.default in seen) != sparse
    dense = packed.unpack().double()
    expected = library_weight_grad(dense, g.double(), *arguments)
    bound = library_weight_grad(dense.abs(), g.double().abs(), *arguments)
    assert_within(got, expected, gamma(3 * 90 + 4) * bound)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 43), (0, 4)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack(mask, Bits())
    assert packed.nbytes == Bits().nbytes(mask.shape, mask.dtype) == -(-mask.numel() // 8)
    assert_same(packed.unpack(), mask)
    x = torch.randn(shape)
    assert_same(Bits().apply(packed.tensors, x, 2.0), torch.where(mask, x * 2, 0.0))


def test_bits_in_the_order_of_memory():
    mask = torch.rand(2, 3, 5, 7) < 0.5
    for dims in ((0, 3, 1, 2), (3, 1, 0, 2)):
        laid = mask.permute(dims)
        format = Bits.like(laid)
        packed = pack(laid, format)
        assert packed.nbytes == format.nbytes(laid.shape, laid.dtype) == -(-mask.numel() // 8)
        assert torch.equal(packed.tensors[0], pack(mask, Bits()).tensors[0])
        assert_same(packed.unpack(), laid)
        x = torch.randn(mask.shape).permute(dims)
        for given in (x, x.contiguous()):
            got = format.apply(packed.tensors, given, 2.0)
            assert_same(got, torch.where(laid, x * 2, 0.0))
            assert got.stride() == packed.unpack().stride() == laid.stride()
        assert format_from_dict(json.loads(json.dumps(format.to_dict()))) == format
    with pytest.raises(ValueError, match="order must be a permutation"):
        Bits(order=(0, 2))


def test_packed_is_frozen():
    packed = pack(torch.randn(3), Dense())
    assert isinstance(packed, Packed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.dtype = torch.float16
