"""Formats: what they keep to the byte, what comes back, and what they are as values."""

import dataclasses
import json

import pytest
import torch

from memtl.storage import Bits, Dense, Quantized, TopK, format_from_dict, pack
from tests.helpers import FORMATS

SHAPES = [(0,), (1,), (7,), (5, 0), (3, 63), (4, 64), (2, 255), (2, 256), (3, 257), (2, 3, 600),
          (2, 5, 3, 8)]  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_exactly_those_announced_and_the_shape_comes_back(name, shape, dtype):
    format = FORMATS[name]
    x = torch.randn(shape).to(dtype)
    packed = pack(x, format)
    assert packed.nbytes == format.nbytes(x.shape, dtype)
    back = packed.unpack()
    assert back.shape == x.shape
    assert back.dtype == dtype
    assert back.is_contiguous()


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_of_memory_does_not_matter(name):
    format = FORMATS[name]
    x = torch.randn(4, 6, 5, 64)
    for view in (x.transpose(1, 3), x.contiguous(memory_format=torch.channels_last), x[:, ::2]):
        assert torch.equal(pack(view, format).unpack(), pack(view.contiguous(), format).unpack())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 64), (6, 257), (2, 5, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_gradient_is_that_of_what_unpacks(name, shape, dtype):
    format = FORMATS[name]
    x = torch.randn(shape).to(dtype)
    packed = pack(x, format)
    grad_out = torch.randn(*shape[:-1], 11).to(dtype)
    found = packed.weight_grad(grad_out)
    stored = packed.unpack(torch.float64 if dtype == torch.float32 else None).double()
    stored, g = stored.view(-1, shape[-1]), grad_out.double().view(-1, 11)
    # A sum of T products, in float32 (in bfloat16 for the dense product of bfloat16 operands).
    rounding = torch.finfo(torch.float32 if not name.startswith(("d", "8", "4", "2")) else dtype)
    bound = (g.abs().t() @ stored.abs()) * (g.shape[0] + 2) * rounding.eps + 1e-30
    if dtype == torch.bfloat16 and name.startswith("topk"):  # unpacked to bfloat16 above
        bound = bound + (g.abs().t() @ stored.abs()) * 2**-8
    assert found.dtype == torch.float32
    assert found.shape == (11, shape[-1])
    assert ((found.double() - g.t() @ stored).abs() <= bound).all()


def test_top_k_needs_fewer_bytes_by_bitmap_above_an_eighth():
    shape, dtype = torch.Size((10, 256)), torch.float32
    for keep in (0.03, 0.1, 0.125, 0.13, 0.25, 1.0):
        format = TopK(keep, values="bf16")
        k = max(1, round(keep * 256))
        assert format.nbytes(shape, dtype) == 10 * (2 * k + min(k, 32))


def test_bits_an_element_as_documented():
    elements = torch.Size((64, 768))
    for format, bits in ((TopK(0.1), 1.6875), (TopK(0.03), 0.5625), (Quantized(4), 4.5)):
        assert 8 * format.nbytes(elements, torch.float32) / elements.numel() == bits
    fixed = Quantized(4, range=(0.0, 1.0))
    assert 8 * fixed.nbytes(elements, torch.float32) / elements.numel() == 4
    assert 8 * Bits().nbytes(elements, torch.bool) / elements.numel() == 1


@pytest.mark.parametrize(
    "format",
    [*FORMATS.values(), Bits(), TopK(), Quantized(8, range=(-0.13, 1.13), seed=5)],
    ids=str,
)
def test_json_round_trip(format):
    assert format_from_dict(json.loads(json.dumps(format.to_dict()))) == format
    assert hash(format) == hash(dataclasses.replace(format))
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.kind = "other"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "kind must be one of .* got None"),
        ({"kind": "zip"}, "kind must be one of .* got 'zip'"),
        ({"kind": "topk", "kep": 0.1}, r"'topk' has no field \['kep'\]"),
        ({"kind": "topk", "keep": 2}, r"keep must be in \(0, 1\], got 2"),
        ({"kind": "quantized", "bits": 5}, "bits must be one of .* got 5"),
    ],
)
def test_bad_descriptions(data, message):
    with pytest.raises(ValueError, match=message):
        format_from_dict(data)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, r"keep must be in \(0, 1\], got 0"),
        (lambda: TopK(1.01), ValueError, r"got 1.01"),
        (lambda: TopK(-0.1), ValueError, r"got -0.1"),
        (lambda: TopK(float("nan")), ValueError, "got nan"),
        (lambda: TopK(True), TypeError, "got bool"),
        (lambda: TopK("0.1"), TypeError, "got str"),
        (lambda: TopK(0.1, scope="row"), ValueError, "scope must be one of"),
        (lambda: TopK(0.1, values="int4"), ValueError, "values must be one of"),
        (lambda: Quantized(3), ValueError, "bits must be one of"),
        (lambda: Quantized(4, range=(1.0, 0.0)), ValueError, "lo < hi"),
        (lambda: Dense("int8"), ValueError, "dtype must be None or one of"),
        (lambda: TopK().pack(torch.randn(2, 3)), ValueError, "keep is not set"),
    ],
)
def test_bad_formats(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_everything_kept_in_float32_is_exact():
    x = torch.randn(5, 300)
    assert torch.equal(pack(x, TopK(1.0, values="fp32")).unpack(), x)
    assert torch.equal(pack(x, TopK(1.0, values="fp32", scope="sample")).unpack(), x)


def test_a_mask_comes_back_as_it_was():
    mask = torch.rand(3, 37) < 0.3
    packed = pack(mask, Bits())
    assert torch.equal(packed.unpack(), mask)
    assert packed.nbytes == 14


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_never_reads_back_as_a_plausible_number(name, value):
    x = torch.randn(4, 256)
    x[1, 100] = value
    back = pack(x, FORMATS[name]).unpack()
    found = back[1, 100].item()
    if FORMATS[name].kind == "quantized":  # the whole group says so
        assert back[1, 64:128].isnan().all()
        assert back[1, :64].isfinite().all()
    else:
        assert found == value or (found != found and value != value)
        assert back[0].isfinite().all()
