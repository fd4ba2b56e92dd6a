"""Every operator passes torch's own checks: schema, fakes, dispatch, and under ahead-of-time
autograd. What it computes is tested in tests/reference and tests/csrc."""

import pytest
import torch

from memtl import _ops

OPS = torch.ops.memtl
NO_COUNTS = torch.empty(0, dtype=torch.int16)


def rows(*size, dtype=torch.float32):
    return torch.randn(size, dtype=dtype)


def packed(x, k=26, k_tail=3, value=torch.int8, bitmap=False):
    return (*OPS.topk_pack(x, k, k_tail, value, bitmap), NO_COUNTS)


def attention(mask=None, mask_grad=False):
    q, k, v, g = (rows(2, 4, 7, 8) for _ in range(4))
    return (g, q, k, v, mask, 0.0, None, mask is None, None, False, mask_grad)


SAMPLES = {
    "topk_pack": lambda: [
        (rows(3, 300), 26, 4, torch.int8, False),
        (rows(3, 300, dtype=torch.bfloat16), 200, 40, torch.bfloat16, True),
        (rows(0, 300), 26, 4, torch.float32, False),
        (rows(300, 5).t(), 26, 4, torch.float16, False),
    ],
    "topk_pack_sample": lambda: [
        (rows(2, 700), 70, torch.int8, False),
        (rows(2, 700), 300, torch.float32, True),
        (rows(0, 700), 70, torch.float16, False),
    ],
    "topk_unpack": lambda: [
        (*packed(rows(3, 300)), 300, 26, 3, False, torch.float32),
        (*OPS.topk_pack_sample(rows(2, 700), 70, torch.int8, True), 700, 70, 0, True,
         torch.bfloat16),
    ],
    "topk_weight_grad": lambda: [
        (*packed(rows(6, 300)), rows(6, 5), 300, 300, 26, 3, False),
        (*OPS.topk_pack_sample(rows(2, 700), 70, torch.int8, False), rows(14, 3), 700, 100, 70, 0,
         False),
        (*packed(rows(0, 300)), rows(0, 5), 300, 300, 26, 3, False),
    ],
    "quant_pack": lambda: [(rows(3, 65), bits, 7) for bits in (8, 4, 2)]
    + [(rows(0, 4), 4, 0), (rows(9, 8, dtype=torch.float16).t(), 4, 1)],
    "quant_unpack": lambda: [
        (*OPS.quant_pack(rows(3, 65), 4, 0), 4, [3, 65], torch.float32),
        (*OPS.quant_pack(rows(3, 65), 2, 0), 2, [3, 65], torch.bfloat16),
    ],
    "quant_pack_range": lambda: [(rows(3, 65), 4, -1.0, 1.0, 7), (rows(0), 8, 0.0, 1.0, 0)],
    "quant_unpack_range": lambda: [
        (OPS.quant_pack_range(rows(3, 65), 4, -1.0, 1.0, 7), 4, -1.0, 1.0, [3, 65], torch.float32)
    ],
    "bits_pack": lambda: [(rows(3, 7) > 0,), (rows(0) > 0,), ((rows(4, 6) > 0).t(),)],
    "bits_apply": lambda: [
        (rows(3, 7, dtype=dtype), OPS.bits_pack(rows(3, 7) > 0), 1.25)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    ],
    "attention_grad": lambda: [
        attention(),
        attention(rows(7, 7), mask_grad=True),
        attention(rows(2, 1, 7, 7) > -1),
    ],
}  # fmt: skip


def test_no_operator_is_forgotten():
    assert sorted(SAMPLES) == sorted(_ops.NAMES)


@pytest.mark.parametrize("name", _ops.NAMES)
def test_opcheck(name):
    for arguments in SAMPLES[name]():
        result = torch.library.opcheck(getattr(OPS, name).default, arguments)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", _ops.NAMES)
def test_nothing_is_left_unwritten(name, poison):
    """With new memory poisoned, two calls on the same arguments still agree in every bit."""
    for arguments in SAMPLES[name]():
        first, second = (getattr(OPS, name)(*arguments) for _ in range(2))
        for a, b in zip(
            first if isinstance(first, tuple) else (first,),
            second if isinstance(second, tuple) else (second,),
            strict=True,
        ):
            assert torch.equal(a, b)
            assert not a.is_floating_point() or a.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.bits_pack(rows(3)), "bool"),
        (lambda: OPS.bits_apply(rows(9), torch.zeros(1, dtype=torch.uint8), 1.0), "2 bytes"),
        (lambda: OPS.quant_pack(rows(3), 3, 0), "8, 4 or 2"),
        (lambda: OPS.quant_pack(torch.arange(3), 4, 0), "float"),
        (lambda: OPS.quant_pack_range(rows(3), 4, 1.0, 1.0, 0), "lo < hi|below"),
        (lambda: OPS.topk_pack(rows(3), 1, 1, torch.int8, False), "R, n|2-d|dim"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_are_refused_by_kernels_and_fakes(call, message, device):
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

    arguments = attention()
    expected = OPS.attention_grad(*arguments)
    with Watch():
        found = OPS.attention_grad(*arguments)
    assert OPS.attention_grad.default in seen
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
