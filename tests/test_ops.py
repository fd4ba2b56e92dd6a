"""Every operator: schema, fake and real agree; the loaded kernels agree with the reference."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import memtl.reference
from memtl import _ops
from memtl.backends import owner
from tests.helpers import assert_derivative_codes, assert_same, assert_within, gamma, unit

OPS = torch.ops.memtl
SHAPES = [(3, 600), (1, 1), (4, 256), (2, 7), (5, 257), (0, 300), (3, 0)]
QUOTAS = ((26, 9), (128, 100))
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EMPTY_SCALE = torch.empty(0, dtype=torch.bfloat16)
MASK = torch.zeros(3, dtype=torch.uint8)  # of a weight [4, 5]
ONES = torch.ones(2, 5)
EMPTY_COUNTS = torch.empty(0, dtype=torch.int16)


def _quotas(n, k):
    tail = n % 256
    return k, min(tail, max(1, tail * k // 256)) if tail else 0


def _packed():
    """Packed tensors with all that reading them takes: scope, tensors, n, k, k_tail, bitmap."""
    for shape in SHAPES:
        x, n = torch.randn(shape), shape[1]
        for i, value_dtype in enumerate(VALUES):
            bitmap = i % 2 == 1
            k, k_tail = _quotas(n, 26 if i < 2 else 100)
            packed = OPS.topk_pack(x, k, k_tail, value_dtype, bitmap)
            yield (*packed, EMPTY_COUNTS, n, k, k_tail, bitmap)
        kept = min(n, 20)
        packed = OPS.topk_pack_sample(x, kept, torch.int8, False)
        yield (*packed, n, kept, 0, False)


def topk_pack():
    for shape in SHAPES:
        for i, dtype in enumerate(FLOATING):
            k, k_tail = _quotas(shape[1], 26)
            yield torch.randn(shape).to(dtype), k, k_tail, VALUES[i], i % 2 == 0
    yield torch.randn(300, 4).T, 26, 4, torch.int8, False


def topk_pack_sample():
    for shape in SHAPES:
        for i, dtype in enumerate(FLOATING):
            yield torch.randn(shape).to(dtype), min(shape[1], 20), VALUES[i], i % 2 == 0


def topk_unpack():
    for i, (*tensors, n, k, k_tail, bitmap) in enumerate(_packed()):
        yield *tensors, n, k, k_tail, bitmap, FLOATING[i % 4]


def topk_weight_grad():
    for i, (*tensors, n, k, k_tail, bitmap) in enumerate(_packed()):
        g = torch.randn(tensors[0].shape[0], 5).to(FLOATING[i % 4])
        yield *tensors, g, n, n, k, k_tail, bitmap
    x = torch.randn(2, 600)  # samples of 6 tokens of 100 features
    packed = OPS.topk_pack_sample(x, 60, torch.float16, True)
    yield *packed, torch.randn(12, 5), 600, 100, 60, 0, True


def topk_conv_weight_grad():
    geometries = (
        ((3, 10, 20), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 10, 20), (3, 4), (2, 3), (0, 2), (2, 1)),
        ((100, 6), (2,), (1,), (0,), (1,)),
        ((6, 100), (1,), (3,), (0,), (1,)),
        ((5, 4, 5, 6), (3, 1, 2), (2, 1, 1), (1, 0, 1), (1, 1, 2)),
    )
    for i, (size, kernel, *geometry) in enumerate(geometries):
        for rows in (3, 0):
            channels_last, bitmap = i % 2 == 1, i % 3 == 2
            x = torch.randn(rows, 600)
            if rows and i < 2:
                packed, k, k_tail = OPS.topk_pack_sample(x, 50, torch.int8, bitmap), 50, 0
            else:
                packed = *OPS.topk_pack(x, 26, 9, VALUES[i % 4], bitmap), EMPTY_COUNTS
                k, k_tail = 26, 9
            dilated = zip(size[1:], kernel, *geometry, strict=True)
            shape = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dilated]
            g = torch.randn(rows, 7, *shape).to(FLOATING[i % 4])
            options = (list(size), list(kernel), *map(list, geometry))
            yield *packed, g, *options, channels_last, k, k_tail, bitmap


def quant_pack():
    for shape in ((600,), (3, 70), (2, 3, 64), (1,), (0, 5)):
        for bits, dtype in zip((8, 4, 3, 2), FLOATING, strict=True):
            yield torch.randn(shape).to(dtype), bits, 3
    yield torch.randn(30, 4).T, 4, -1


def quant_pack_normalized():
    for i, (x, bits, seed) in enumerate(quant_pack()):
        rows, n = x.numel() // x.shape[-1], x.shape[-1]
        mean, rstd = torch.randn(rows).to(FLOATING[i % 4]), torch.rand(rows) + 0.5
        yield x, mean, rstd, bits, n, seed
        yield x, torch.randn(n), torch.rand(n).to(FLOATING[i % 4]), bits, 1, seed


def quant_unpack():
    for i, (x, bits, seed) in enumerate(quant_pack()):
        yield *OPS.quant_pack(x, bits, seed), bits, list(x.shape), FLOATING[i % 4]


def quant_pack_range():
    for x, bits, seed in quant_pack():
        yield x, bits, -0.13, 1.13, seed


def quant_unpack_range():
    for i, (x, bits, lo, hi, seed) in enumerate(quant_pack_range()):
        codes = OPS.quant_pack_range(x, bits, lo, hi, seed)
        yield codes, bits, lo, hi, list(x.shape), FLOATING[i % 4]


def quant_unpack_affine():
    for i, (codes, params, bits, size, dtype) in enumerate(quant_unpack()):
        channels = size[-1]
        w, b = (torch.randn(channels).to(FLOATING[j % 4]) for j in (i, i // 4))
        mask = OPS.bits_pack(torch.rand(size) < 0.5)
        yield codes, params, bits, w, b, None, 1, size, dtype
        if len(size) == 2:
            column = torch.randn(size[0])
            yield codes, params, bits, column, None, mask, channels or 1, size, dtype, 0.0, 6.0
        yield codes, params, bits, None, b, mask, 1, size, dtype


def quant_unpack_activation():
    for i, (codes, params, bits, size, dtype) in enumerate(quant_unpack()):
        yield codes, params, bits, _ops.ACTIVATIONS[i % 6], size, dtype


def quant_activation_grad():
    for *packed, activation, size, dtype in quant_unpack_activation():
        yield torch.randn(size).to(dtype), *packed, activation
    codes, params = OPS.quant_pack(torch.randn(4, 30), 4, 0)
    yield torch.randn(30, 4).T, codes, params, 4, "silu"


def quant_pack_derivative():
    for i, (x, bits, lo, hi, seed) in enumerate(quant_pack_range()):
        yield x, bits, _ops.ACTIVATIONS[i % 6], lo, hi, seed


def quant_apply_range():
    for codes, bits, lo, hi, size, dtype in quant_unpack_range():
        yield torch.randn(size).to(dtype), codes, bits, lo, hi
    codes = OPS.quant_pack_range(torch.randn(4, 30), 3, 0.0, 1.0, 0)
    yield torch.randn(30, 4).T, codes, 3, 0.0, 1.0


def quant_norm_grad():
    for i, (x, bits, seed) in enumerate(quant_pack()):
        if x.dim() < 2:
            continue
        g, packed, n = torch.randn(x.shape).to(x.dtype), OPS.quant_pack(x, bits, seed), x.shape[-1]
        rstd, weight = torch.rand(x.shape[:-1]), torch.randn(n).to(FLOATING[i % 4])
        yield g, *packed, bits, rstd, weight, n, True
        yield g, *packed, bits, rstd, None, n, False


def quant_channel_norm_grad():
    for i, (x, bits, seed) in enumerate(quant_pack()):
        if x.dim() < 2:
            continue
        g, packed, channels = torch.randn(x.shape), OPS.quant_pack(x, bits, seed), x.shape[1]
        rstd, weight = torch.rand(channels), torch.randn(channels).to(FLOATING[i % 4])
        yield g.to(x.dtype), *packed, bits, rstd, weight, x.shape[2:].numel()
        yield g, *packed, bits, rstd, None, x.shape[2:].numel()


def bits_pack():
    for shape in ((600,), (3, 7), (1,), (0, 5), ()):
        yield (torch.rand(shape) < 0.5,)
    yield ((torch.rand(30, 4) < 0.5).T,)


def bits_pack_between():
    for i, (mask,) in enumerate(bits_pack()):
        lo, hi = ((-0.5, None), (None, 0.7), (-0.3, 0.1))[i % 3]
        yield torch.randn(mask.shape).to(FLOATING[i % 4]), lo, hi
    yield torch.randn(30, 4).T, 0.0, None


def bits_apply():
    for i, (mask,) in enumerate(bits_pack()):
        yield torch.randn(mask.shape).to(FLOATING[i % 4]), OPS.bits_pack(mask), 1.25
    yield torch.randn(30, 4).T, OPS.bits_pack(torch.rand(120) < 0.5), 0.5


def bits_select():
    for i, (mask,) in enumerate(bits_pack()):
        x, count = torch.randn(mask.shape).to(FLOATING[i % 4]), int(mask.sum())
        yield x, OPS.bits_pack(mask), count


def bits_expand():
    for x, bits, count in bits_select():
        yield torch.randn(2 * count).to(x.dtype)[::2], bits, list(x.shape)


def threshold_magnitude():
    for i, dtype in enumerate(FLOATING):
        xs = [torch.randn(s).to(dtype) for s in ((600,), (3, 7), (0, 5), (), (30, 4))]
        xs.append(torch.randn(30, 4).to(dtype).T)
        masks = [OPS.bits_pack(torch.rand(x.shape) < 0.7) for x in xs]
        for k in (1, 100, 400):
            yield xs, masks if (i + k) % 2 else [], k


def threshold_mask():
    for xs, masks, k in threshold_magnitude():
        value, ties = OPS.threshold_magnitude(xs, masks, k)
        for i, x in enumerate(xs):
            yield x, masks[i] if masks else None, value, ties[i]


def _masked():
    """tokens, outputs, inputs, bits: odd sizes; all, some and none of the weights."""
    sizes = ((5, 7, 9), (130, 70, 200), (67, 33, 64), (1, 1, 1), (0, 5, 3), (3, 0, 4), (2, 4, 0))
    for tokens, outputs, inputs in sizes:
        for kept in (0.1, 0.0, 0.8, 1.0) if tokens == 67 else (0.15,):
            yield tokens, outputs, inputs, OPS.bits_pack(torch.rand(outputs, inputs) < kept)


def masked_linear():
    for i, (tokens, outputs, inputs, mask) in enumerate(_masked()):
        for j, dtype in enumerate(FLOATING):
            x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs)
            bias = torch.randn(outputs).to(FLOATING[i % 4]) if j % 2 else None
            yield x, weight.to(FLOATING[(i + j) % 4]), mask, bias
    mask = OPS.bits_pack(torch.rand(8, 30) < 0.3)
    yield torch.randn(30, 6).T, torch.randn(30, 8).T, mask, torch.randn(16)[::2]


def masked_linear_input_grad():
    for x, weight, mask, _ in masked_linear():
        yield torch.randn(weight.shape[0], x.shape[0]).to(x.dtype).T, weight, mask


def masked_linear_weight_grad():
    for x, weight, mask, _ in masked_linear():
        yield torch.randn(x.shape[0], weight.shape[0]).to(x.dtype), x, mask


def attention_grad():
    def operands(*shape):
        return torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.randn(shape)

    plain = operands(2, 3, 7, 8)
    yield *plain, None, 0.0, None, False, None, False, False
    yield *operands(3, 7, 8), None, 0.0, None, True, 0.3, False, False
    yield *plain, torch.randn(7, 7), 0.0, None, False, None, False, True
    yield *plain, torch.rand(2, 1, 7, 7) < 0.8, 0.0, None, False, None, False, False
    yield *plain, None, 0.4, torch.get_rng_state(), False, None, False, False
    g, q = torch.randn(2, 6, 7, 8), torch.randn(2, 6, 7, 8)
    k, v = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    yield g, q, k, v, None, 0.0, None, True, None, True, False
    strided = [t.transpose(1, 2) for t in plain]
    yield *strided, None, 0.0, None, False, None, False, False


def query_attention():
    """The arguments of both operators but grad_out: shapes, dtypes, views of a qkv projection."""
    shapes = ((2, 3, 1, 197, 64, 64), (1, 2, 3, 7, 5, 9), (3, 1, 2, 1, 4, 4), (2, 2, 2, 0, 4, 3))
    for i, (batch, heads, t, n, d, e) in enumerate(
        (*shapes, (2, 1, 0, 5, 4, 4), (0, 2, 1, 5, 4, 4))
    ):
        for j, dtype in enumerate(FLOATING):
            q, k, v = (torch.randn(batch, heads, *s).to(dtype) for s in ((t, d), (n, d), (n, e)))
            mask = torch.randn(1, heads, n).to(FLOATING[i % 4])
            mask[:, :1, ::2] = -math.inf
            yield q[:1] if i % 2 else q, k, v, mask if j % 2 else None, 0.3, FLOATING[(i + j) % 4]
    _, k, v = torch.randn(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
    yield torch.randn(1, 4, 2, 16), k, v, torch.zeros(2, 1, 9), 0.25, None
    yield torch.randn(2, 4, 2, 16).transpose(2, 3).contiguous().mT, k, v, None, 1.0, None


def query_attention_grad():
    for q, k, v, mask, scale, _ in query_attention():
        grad_out = torch.randn(*v.shape[:2], v.shape[3], q.shape[2]).to(q.dtype)
        yield grad_out.mT, q, k, v, mask, scale


SAMPLES = {
    fn.__name__: fn
    for fn in (
        topk_pack,
        topk_pack_sample,
        topk_unpack,
        topk_weight_grad,
        topk_conv_weight_grad,
        quant_pack,
        quant_pack_normalized,
        quant_unpack,
        quant_pack_range,
        quant_unpack_range,
        quant_unpack_affine,
        quant_unpack_activation,
        quant_activation_grad,
        quant_pack_derivative,
        quant_apply_range,
        quant_norm_grad,
        quant_channel_norm_grad,
        bits_pack,
        bits_pack_between,
        bits_apply,
        bits_select,
        bits_expand,
        threshold_magnitude,
        threshold_mask,
        masked_linear,
        masked_linear_input_grad,
        masked_linear_weight_grad,
        attention_grad,
        query_attention,
        query_attention_grad,
    )
}
EVERY_OP = pytest.mark.parametrize("name", _ops.NAMES)


def tuple_of(result):
    return result if isinstance(result, (tuple, list)) else (result,)


def test_every_operator_is_sampled_here():
    assert list(SAMPLES) == _ops.NAMES
    assert list(memtl.reference.OPS) == _ops.NAMES


@EVERY_OP
def test_the_definition_takes_what_the_schema_says(name):
    schema = getattr(OPS, name).default._schema
    parameters = list(inspect.signature(memtl.reference.OPS[name]).parameters)
    assert parameters == [argument.name for argument in schema.arguments]
    assert torch.Tag.pt2_compliant_tag in getattr(OPS, name).default.tags


@EVERY_OP
def test_opcheck(name):
    samples = list(SAMPLES[name]())
    assert samples
    for sample in samples[:: max(1, len(samples) // 6)]:
        plain = tree_map_only(
            torch.Tensor,
            lambda t: t if t.numel() else torch.empty(t.shape, dtype=t.dtype),
            sample,
        )  # opcheck cannot copy an empty tensor of unusual strides
        torch.library.opcheck(getattr(OPS, name).default, plain)


@EVERY_OP
def test_fakes_have_the_shapes_and_dtypes_of_the_real_results(name):
    op = getattr(OPS, name)
    for sample in SAMPLES[name]():
        real = tuple_of(op(*sample))
        with FakeTensorMode() as mode:
            given = tree_map_only(torch.Tensor, mode.from_tensor, sample)
            fake = tuple_of(op(*given))
        assert len(real) == len(fake)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.is_contiguous() and b.is_contiguous()


@EVERY_OP
def test_results_are_new_and_inputs_unchanged(name):
    for sample in SAMPLES[name]():
        tensors = [a for a in tree_leaves(sample) if isinstance(a, torch.Tensor)]
        before = [t.clone() for t in tensors]
        results = tuple_of(getattr(OPS, name)(*sample))
        for t, copy in zip(tensors, before, strict=True):
            assert_same(t, copy)
        own = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        assert not own & {r.untyped_storage().data_ptr() for r in results if r.numel()}


@EVERY_OP
def test_loaded_kernels_agree_with_the_reference(name):
    """Bit for bit; a product up to the order of its sum, an activation up to what both may be off
    (tests/csrc/test_quant_fused.py), with a rounding to the dtype."""
    if owner(name, "cpu") == "reference":
        pytest.skip("no kernel is loaded for it")
    for sample in SAMPLES[name]():
        got = tuple_of(getattr(OPS, name)(*sample))
        expected = tuple_of(memtl.reference.OPS[name](*sample))
        for a, b in zip(got, expected, strict=True):
            if name == "topk_weight_grad":
                g = sample[4].double()
                dense = memtl.reference.topk_unpack(
                    *sample[:4], sample[5], *sample[7:], torch.float32
                )
                dense = dense.double().view(len(g), sample[6])
                assert_within(a, b, 2 * gamma(len(g) + 3) * (g.T.abs() @ dense.abs()))
            elif name == "topk_conv_weight_grad":
                values, *rest, g = sample[:5]
                bound = memtl.reference.OPS[name](values.abs(), *rest, g.abs(), *sample[5:])
                terms = g.numel() // max(1, g.shape[1])
                assert_within(a, b, 2 * gamma(terms + 4) * bound.double())
            elif name.startswith("masked"):
                # Sums of some 200 terms at most, of a few units; the exact bound: tests/csrc.
                fine = 1e-12 if b.dtype == torch.float64 else 2e-4
                assert a.dtype == b.dtype
                assert_within(a, b, fine + 2 * unit(a.dtype) * b.double().abs())
            elif name in ("quant_norm_grad", "quant_channel_norm_grad"):
                # Sums of 70 terms at most, of a few units, and a rounding to the dtype.
                assert_within(a, b, 2e-4 + 2 * unit(a.dtype) * b.double().abs())
            elif name == "quant_pack_derivative":
                assert_derivative_codes(a, *sample, 5e-7)
                assert_derivative_codes(b, *sample, 2e-6)  # of torch's float32
            elif name in ("quant_unpack_activation", "quant_activation_grad"):
                factor = sample[0].double().abs() if "grad" in name else b.double().abs() + 1
                assert a.dtype == b.dtype
                assert_within(a, b, 2e-6 * factor + 2 * unit(a.dtype) * b.double().abs() + 1e-7)
            elif name.startswith("query_attention"):
                # Sums of 200 terms at most, of a few units; see tests/csrc/test_query_attention.py.
                fine = 1e-13 if sample[1].dtype == torch.float64 else 2e-4
                assert a.dtype == b.dtype
                assert_within(a, b, fine + 2 * unit(a.dtype) * b.double().abs())
            else:
                assert_same(a, b)


@EVERY_OP
def test_nothing_is_left_unwritten(name, poison):
    """With new memory poisoned, two calls on the same arguments still agree in every bit."""
    for arguments in SAMPLES[name]():
        first, second = (tuple_of(getattr(OPS, name)(*arguments)) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
            assert not a.is_floating_point() or a.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.bits_pack(torch.randn(3)), "bool"),
        (lambda: OPS.bits_apply(torch.randn(9), torch.zeros(1, dtype=torch.uint8), 1.0), "2 bytes"),
        (lambda: OPS.bits_select(torch.randn(9), torch.zeros(1).byte(), 0), "2 bytes"),
        (lambda: OPS.bits_expand(torch.randn(9), torch.zeros(1).byte(), [9]), "2 bytes"),
        (lambda: OPS.threshold_magnitude([], [], 0), "one tensor"),
        (lambda: OPS.threshold_magnitude([torch.randn(3)], [], 4), "from 0 to 3"),
        (lambda: OPS.threshold_magnitude([torch.ones(3).long()], [], 1), "float"),
        (lambda: OPS.threshold_magnitude([torch.ones(3)], [torch.ones(2).byte()], 1), "1 byte"),
        (lambda: OPS.threshold_mask(torch.ones(3), None, torch.ones(()), torch.ones(())), "int64"),
        (lambda: OPS.quant_pack(torch.randn(3), 5, 0), "8, 4, 3 or 2"),
        (lambda: OPS.quant_pack(torch.arange(3), 4, 0), "float"),
        (lambda: OPS.quant_pack_range(torch.randn(3), 4, 1.0, 1.0, 0), "lo < hi|below"),
        (lambda: OPS.topk_pack(torch.randn(3), 1, 1, torch.int8, False), "R, n|2-d|dim"),
        (lambda: OPS.topk_pack(torch.ones(3, 4).long(), 1, 1, torch.int8, False), "float"),
        (lambda: OPS.topk_pack_sample(torch.ones(3, 4).bool(), 1, torch.int8, False), "float"),
        (lambda: OPS.quant_pack_range(torch.ones(4).cfloat(), 4, 0.0, 1.0, 0), "float"),
        (lambda: OPS.quant_apply_range(torch.ones(4), torch.ones(1, 32), 4, 1.0, 0.0), "lo < hi"),
        (lambda: OPS.masked_linear(torch.ones(2, 3), torch.ones(4, 5), MASK, None), "T, 5"),
        (lambda: OPS.masked_linear(torch.ones(2, 5), torch.ones(4), MASK, None), "O, I"),
        (lambda: OPS.masked_linear(torch.ones(2, 5), torch.ones(4, 5), MASK[:2], None), "3 bytes"),
        (lambda: OPS.masked_linear(torch.ones(2, 5), torch.ones(4, 5), MASK.int(), None), "uint8"),
        (lambda: OPS.masked_linear(torch.ones(2, 5), torch.ones(4, 5), MASK, torch.ones(5)), "4"),
        (lambda: OPS.masked_linear(torch.ones(2, 5).int(), torch.ones(4, 5), MASK, None), "float"),
        (lambda: OPS.masked_linear_input_grad(torch.ones(2, 5), torch.ones(4, 5), MASK), "T, 4"),
        (lambda: OPS.masked_linear_weight_grad(torch.ones(2, 4), torch.ones(3, 5), MASK), "T, O"),
        (lambda: OPS.masked_linear_weight_grad(torch.ones(2, 4), torch.ones(2, 7), MASK), "bytes"),
        (lambda: OPS.masked_linear_weight_grad(torch.ones(2, 4), ONES.half(), MASK), "one dtype"),
        (lambda: OPS.quant_activation_grad(*[torch.ones(0)] * 3, 4, "relu"), "gelu"),
        (lambda: OPS.quant_pack_derivative(torch.ones(3), 4, "relu", 0.0, 1.0, 0), "gelu"),
        (lambda: OPS.quant_pack_derivative(torch.ones(3), 4, "gelu", 1.0, 0.0, 0), "lo < hi"),
        (lambda: OPS.quant_pack_derivative(torch.ones(3), 1, "gelu", 0.0, 1.0, 0), "8, 4, 3"),
        (lambda: OPS.quant_pack_derivative(torch.ones(3).long(), 4, "gelu", 0, 1, 0), "float"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_are_refused_by_kernels_and_fakes(call, message, device):
    if device == "cpu" and owner("quant_pack", "cpu") == "reference":
        pytest.skip("the definitions check nothing: kernels, fakes and memtl.functional do")
    with torch.device(device), pytest.raises((RuntimeError, TypeError, ValueError)) as error:
        call()
    assert str(error.value)
    if device == "meta":
        assert (
            "expected" in str(error.value)
            or "must be" in str(error.value)
            or "need" in str(error.value)
        )


def test_attention_s_gradient_under_a_dispatch_mode():
    """Profilers and selective checkpoints run backward under one; autograd is excluded there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    arguments = next(attention_grad())
    expected = OPS.attention_grad(*arguments)
    with Watch():
        found = OPS.attention_grad(*arguments)
    assert OPS.attention_grad.default in seen
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
