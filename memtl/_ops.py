"""Every operator of memtl: its schema, and beside it the fake that gives shapes and dtypes.

This file imports torch alone. Who computes an operator is decided once, in :mod:`memtl.backends`;
what it computes is written readably in :mod:`memtl.reference`.

Families and the layouts they share
-----------------------------------
``topk``   A row of ``n`` elements is cut into blocks of 256 (the last one may be shorter). The kept
           entries of a block stand in order of position. Two ways to say how many a block keeps:
           a fixed quota (``k`` in a full block, ``k_tail`` in the last, short one; ``counts`` is
           empty), or ``k`` a row (``counts[r, b]`` entries in block ``b``).
           ``values`` [R, K] float32, bfloat16, float16 or int8. ``scale`` [R, blocks] bfloat16 for
           int8 values, else empty. int8 codes: -126..126 times the block's scale, 127 and -127 for
           the infinities, -128 for NaN. ``positions`` uint8: [R, K], the position in the block,
           or, with ``bitmap``, [R, ceil(n / 8)], one bit an element, least significant bit first.
``quant``  The flat tensor is cut into groups of 64; the last one is padded with its own last
           element. ``codes`` uint8 [groups, 8 * bits]: byte ``i`` holds elements ``i``,
           ``i + 8 * bits``, ... from its low bits up. 3 bits: 16 bytes hold the low two as 2 bits
           would, 8 more the third, one bit an element, least significant bit first.
           ``params`` [groups, 2] bfloat16: scale and offset. Rounding is stochastic; the dither is
           a pure function of the seed and the data (see :func:`memtl.reference.quant.dither`), so
           no random-number state is read.
``bits``   One bit an element of the flat tensor, least significant bit first.
``threshold``  The k largest magnitudes of many tensors at once. NaN is larger than any number, and
           one NaN as large as another. A threshold is the k-th largest magnitude and, for every
           tensor, how many of the elements that equal it are among the k: the first ones.
``masked`` A linear layer whose weight [O, I] counts only where a bit of its mask is set, the mask
           being ``bits`` of it. What stands elsewhere in the weight is not read.
``query_attention``  A few queries read keys and values that do not train. With the output comes,
           on request, its Jacobian, after which keys and values are not needed again.
"""

import torch
from torch import Tensor

BLOCK = 256
"""Elements in a top-k block."""
GROUP = 64
"""Elements in a quantisation group."""

NAMES: list[str] = []
"""Every operator, in the order of definition."""

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What an operator takes as input; float64 is rounded to float32 before it is packed."""
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)

_library = torch.library.Library("memtl", "DEF")


def _define(name: str, schema: str):
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    NAMES.append(name)

    def register(fake):
        torch.library.register_fake(f"memtl::{name}", fake, lib=_library)
        return fake

    return register


def ceil_div(a, b):
    """ceil(a / b) for non-negative integers."""
    return (a + b - 1) // b


def _check_floating(name: str, x: Tensor) -> None:
    torch._check_type(
        x.dtype in FLOATING,
        lambda: f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}",
    )


def _check_bits(name: str, bits: int) -> None:
    torch._check_value(
        bits in (8, 4, 3, 2), lambda: f"{name}: bits must be 8, 4, 3 or 2, got {bits}"
    )


# ------------------------------------------------------------------------------------------- topk


@_define(
    "topk_pack",
    "(Tensor x, int k, int k_tail, ScalarType value_dtype, bool bitmap) "
    "-> (Tensor, Tensor, Tensor)",
)
def _(x, k, k_tail, value_dtype, bitmap):
    """x [R, n] -> values [R, K], positions, scale: the ``k`` largest magnitudes of every block."""
    _check_floating("topk_pack", x)
    torch._check(x.dim() == 2, lambda: f"topk_pack: expected x [R, n], got {tuple(x.shape)}")
    rows, n = x.shape
    kept = (n // BLOCK) * k + (k_tail if n % BLOCK else 0)
    return (
        x.new_empty((rows, kept), dtype=value_dtype),
        x.new_empty((rows, ceil_div(n, 8) if bitmap else kept), dtype=torch.uint8),
        _new_scale(x, rows, n, value_dtype),
    )


@_define(
    "topk_pack_sample",
    "(Tensor x, int k, ScalarType value_dtype, bool bitmap) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _(x, k, value_dtype, bitmap):
    """x [R, n] -> values [R, k], positions, scale, counts [R, blocks] int16: k a row."""
    _check_floating("topk_pack_sample", x)
    torch._check(x.dim() == 2, lambda: f"topk_pack_sample: expected x [R, n], got {tuple(x.shape)}")
    rows, n = x.shape
    return (
        x.new_empty((rows, k), dtype=value_dtype),
        x.new_empty((rows, ceil_div(n, 8) if bitmap else k), dtype=torch.uint8),
        _new_scale(x, rows, n, value_dtype),
        x.new_empty((rows, ceil_div(n, BLOCK)), dtype=torch.int16),
    )


def _new_scale(x, rows, n, value_dtype):
    shape = (rows, ceil_div(n, BLOCK)) if value_dtype == torch.int8 else (0,)
    return x.new_empty(shape, dtype=torch.bfloat16)


@_define(
    "topk_unpack",
    "(Tensor values, Tensor positions, Tensor scale, Tensor counts, SymInt n, int k, int k_tail, "
    "bool bitmap, ScalarType dtype) -> Tensor",
)
def _(values, positions, scale, counts, n, k, k_tail, bitmap, dtype):
    """The dense [R, n] tensor, zero where nothing was kept."""
    return values.new_empty((values.shape[0], n), dtype=dtype)


@_define(
    "topk_weight_grad",
    "(Tensor values, Tensor positions, Tensor scale, Tensor counts, Tensor grad_out, SymInt n, "
    "SymInt features, int k, int k_tail, bool bitmap) -> Tensor",
)
def _(values, positions, scale, counts, grad_out, n, features, k, k_tail, bitmap):
    """grad_out [T, O] -> grad_out^T x [O, D] in float32; x [T, D] is what was packed: a row of n
    elements holds n / D tokens, D being ``features``. x is never rebuilt. On a GPU it is rounded to
    the dtype of a grad_out of 16 bits, where it was computed with; products are exact, sums in
    float32."""
    _check_floating("topk_weight_grad", grad_out)
    torch._check(
        grad_out.dim() == 2,
        lambda: f"topk_weight_grad: expected grad_out [T, O], got {tuple(grad_out.shape)}",
    )
    tokens, outputs = grad_out.shape
    torch._check(
        tokens * features == values.shape[0] * n,
        lambda: (
            f"topk_weight_grad: {values.shape[0]} rows of {n} are not {tokens} tokens of "
            f"{features} features"
        ),
    )
    return grad_out.new_empty((outputs, features), dtype=torch.float32)


@_define(
    "topk_conv_weight_grad",
    "(Tensor values, Tensor positions, Tensor scale, Tensor counts, Tensor grad_out, "
    "SymInt[] input_size, SymInt[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "bool channels_last, int k, int k_tail, bool bitmap) -> Tensor",
)
def _(
    values,
    positions,
    scale,
    counts,
    grad_out,
    input_size,
    kernel_size,
    stride,
    padding,
    dilation,
    channels_last,
    k,
    k_tail,
    bitmap,
):
    """grad_out [B, O, ...] -> the weight gradient [O, C, *kernel_size] in float32 of a convolution
    of one group and 1 to 3 spatial dimensions, one number of ``stride``, ``padding`` and
    ``dilation`` for each; x is what was packed: a row is a sample of ``input_size`` (C, ...), in
    the order (..., C) with ``channels_last``. x is never rebuilt."""
    _check_floating("topk_conv_weight_grad", grad_out)
    torch._check(
        grad_out.dim() == len(kernel_size) + 2,
        lambda: (
            f"topk_conv_weight_grad: expected grad_out [B, O, ...] for a kernel of "
            f"{len(kernel_size)} dimensions, got {tuple(grad_out.shape)}"
        ),
    )
    shape = (grad_out.shape[1], input_size[0], *kernel_size)
    return grad_out.new_empty(shape, dtype=torch.float32)


# ------------------------------------------------------------------------------------------ quant


@_define("quant_pack", "(Tensor x, int bits, int seed) -> (Tensor, Tensor)")
def _(x, bits, seed):
    """x, any shape -> codes uint8 [groups, 8 * bits], params bfloat16 [groups, 2]."""
    _check_floating("quant_pack", x)
    _check_bits("quant_pack", bits)
    groups = ceil_div(x.numel(), GROUP)
    return (
        x.new_empty((groups, 8 * bits), dtype=torch.uint8),
        x.new_empty((groups, 2), dtype=torch.bfloat16),
    )


@_define(
    "quant_pack_normalized",
    "(Tensor x, Tensor mean, Tensor rstd, int bits, SymInt inner, int seed) -> (Tensor, Tensor)",
)
def _(x, mean, rstd, bits, inner, seed):
    """What quant_pack gives of (x - mean[c]) * rstd[c], float32, flat element i being of channel
    c = (i // inner) % C (a whole number of C * inner)."""
    name = "quant_pack_normalized"
    for t in (x, mean, rstd):
        _check_floating(name, t)
    _check_bits(name, bits)
    torch._check_value(inner > 0, lambda: f"{name}: expected inner > 0, got {inner}")
    groups = ceil_div(x.numel(), GROUP)
    return (
        x.new_empty((groups, 8 * bits), dtype=torch.uint8),
        x.new_empty((groups, 2), dtype=torch.bfloat16),
    )


@_define(
    "quant_unpack",
    "(Tensor codes, Tensor params, int bits, SymInt[] size, ScalarType dtype) -> Tensor",
)
def _(codes, params, bits, size, dtype):
    """The tensor of shape ``size``: offset + code * scale."""
    _check_bits("quant_unpack", bits)
    return codes.new_empty(size, dtype=dtype)


@_define("quant_pack_range", "(Tensor x, int bits, float lo, float hi, int seed) -> Tensor")
def _(x, bits, lo, hi, seed):
    """x, any shape, clamped to [lo, hi] -> codes uint8 [groups, 8 * bits] on 2**bits - 1 even
    levels from lo to hi; the last code stands for NaN."""
    _check_floating("quant_pack_range", x)
    _check_bits("quant_pack_range", bits)
    torch._check_value(lo < hi, lambda: f"quant_pack_range: expected lo < hi, got {lo} and {hi}")
    return x.new_empty((ceil_div(x.numel(), GROUP), 8 * bits), dtype=torch.uint8)


@_define(
    "quant_unpack_range",
    "(Tensor codes, int bits, float lo, float hi, SymInt[] size, ScalarType dtype) -> Tensor",
)
def _(codes, bits, lo, hi, size, dtype):
    """The tensor of shape ``size``: lo + code * (hi - lo) / (2**bits - 2)."""
    _check_bits("quant_unpack_range", bits)
    return codes.new_empty(size, dtype=dtype)


# What is decoded and used, or computed and packed, in one pass over memory; the arithmetic is in
# float32.

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish", "mish")
"""What quant_unpack_activation, quant_activation_grad and quant_pack_derivative know."""


def _check_activation(name: str, activation: str) -> None:
    torch._check_value(
        activation in ACTIVATIONS,
        lambda: f"{name}: activation must be one of {ACTIVATIONS}, got {activation!r}",
    )


@_define(
    "quant_unpack_affine",
    "(Tensor codes, Tensor params, int bits, Tensor? weight, Tensor? bias, Tensor? mask, "
    "SymInt inner, SymInt[] size, ScalarType dtype, float lo=0., float? hi=None) -> Tensor",
)
def _(codes, params, bits, weight, bias, mask, inner, size, dtype, lo=0.0, hi=None):
    """The tensor of shape ``size``: what quant_unpack gives, * weight[c] + bias[c], flat element i
    being of channel c = (i // inner) % C (a whole number of C * inner). Where a bit of ``mask`` is
    clear it is ``lo`` or, where the value is nearer to it, ``hi``."""
    _check_bits("quant_unpack_affine", bits)
    torch._check_value(inner > 0, lambda: f"quant_unpack_affine: expected inner > 0, got {inner}")
    _check_ends("quant_unpack_affine", lo, hi)
    for t in (weight, bias):
        if t is not None:
            _check_floating("quant_unpack_affine", t)
    return codes.new_empty(size, dtype=dtype)


def _check_ends(name: str, lo: float, hi: float | None) -> None:
    torch._check_value(
        hi is None or lo < hi, lambda: f"{name}: expected lo < hi, got lo {lo} and hi {hi}"
    )


@_define(
    "quant_unpack_activation",
    "(Tensor codes, Tensor params, int bits, str activation, SymInt[] size, ScalarType dtype) "
    "-> Tensor",
)
def _(codes, params, bits, activation, size, dtype):
    """The tensor of shape ``size``: f of what quant_unpack gives."""
    _check_bits("quant_unpack_activation", bits)
    _check_activation("quant_unpack_activation", activation)
    return codes.new_empty(size, dtype=dtype)


@_define(
    "quant_activation_grad",
    "(Tensor grad_out, Tensor codes, Tensor params, int bits, str activation) -> Tensor",
)
def _(grad_out, codes, params, bits, activation):
    """grad_out * f'(what quant_unpack gives); the result contiguous."""
    _check_floating("quant_activation_grad", grad_out)
    _check_bits("quant_activation_grad", bits)
    _check_activation("quant_activation_grad", activation)
    return torch.empty_like(grad_out, memory_format=torch.contiguous_format)


@_define(
    "quant_pack_derivative",
    "(Tensor x, int bits, str activation, float lo, float hi, int seed) -> Tensor",
)
def _(x, bits, activation, lo, hi, seed):
    """x, any shape -> what quant_pack_range gives of f'(x), but for the dither, which is that of x:
    codes uint8 [groups, 8 * bits] on 2**bits - 1 even levels from lo to hi; the last code stands
    for NaN, which f' is at the infinities too, except hardswish's."""
    _check_floating("quant_pack_derivative", x)
    _check_bits("quant_pack_derivative", bits)
    _check_activation("quant_pack_derivative", activation)
    torch._check_value(
        lo < hi, lambda: f"quant_pack_derivative: expected lo < hi, got {lo} and {hi}"
    )
    return x.new_empty((ceil_div(x.numel(), GROUP), 8 * bits), dtype=torch.uint8)


@_define(
    "quant_apply_range", "(Tensor grad_out, Tensor codes, int bits, float lo, float hi) -> Tensor"
)
def _(grad_out, codes, bits, lo, hi):
    """grad_out * what quant_unpack_range gives; the result contiguous."""
    _check_floating("quant_apply_range", grad_out)
    _check_bits("quant_apply_range", bits)
    torch._check_value(lo < hi, lambda: f"quant_apply_range: expected lo < hi, got {lo} and {hi}")
    return torch.empty_like(grad_out, memory_format=torch.contiguous_format)


@_define(
    "quant_norm_grad",
    "(Tensor grad_out, Tensor codes, Tensor params, int bits, Tensor rstd, Tensor? weight, "
    "SymInt features, bool centered) -> (Tensor, Tensor, Tensor)",
)
def _(grad_out, codes, params, bits, rstd, weight, features, centered):
    """Rows of ``features`` that were normalised to x-hat, packed; ``centered``: their mean was
    subtracted. The gradients of x, contiguous, and of weight and bias [features] in float32."""
    _check_floating("quant_norm_grad", grad_out)
    _check_bits("quant_norm_grad", bits)
    sums = (grad_out.new_empty((features,), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(grad_out, memory_format=torch.contiguous_format), *sums


@_define(
    "quant_channel_norm_grad",
    "(Tensor grad_out, Tensor codes, Tensor params, int bits, Tensor rstd, Tensor? weight, "
    "SymInt inner) -> (Tensor, Tensor, Tensor)",
)
def _(grad_out, codes, params, bits, rstd, weight, inner):
    """Batch norm in training, [B, C, inner] normalised by channel to x-hat, packed. The gradients
    of x, contiguous, and of weight and bias [C] in float32; ``rstd`` [C]."""
    _check_floating("quant_channel_norm_grad", grad_out)
    _check_bits("quant_channel_norm_grad", bits)
    sums = (grad_out.new_empty((rstd.numel(),), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(grad_out, memory_format=torch.contiguous_format), *sums


# ------------------------------------------------------------------------------------------- bits


@_define("bits_pack", "(Tensor mask) -> Tensor")
def _(mask):
    """mask, bool, any shape -> uint8 [ceil(numel / 8)]."""
    torch._check_type(
        mask.dtype == torch.bool, lambda: f"bits_pack: expected a bool tensor, got {mask.dtype}"
    )
    return mask.new_empty((ceil_div(mask.numel(), 8),), dtype=torch.uint8)


@_define("bits_pack_between", "(Tensor x, float? lo, float? hi) -> Tensor")
def _(x, lo, hi):
    """x, any shape -> uint8 [ceil(numel / 8)]: set unless x <= lo or x >= hi, so where x is NaN."""
    _check_floating("bits_pack_between", x)
    return x.new_empty((ceil_div(x.numel(), 8),), dtype=torch.uint8)


@_define("bits_apply", "(Tensor x, Tensor bits, float scale) -> Tensor")
def _(x, bits, scale):
    """x * scale where the bit is set, else 0; x any shape, the result contiguous."""
    _check_floating("bits_apply", x)
    _check_bits_of("bits_apply", x.numel(), bits)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_define("bits_select", "(Tensor x, Tensor bits, SymInt count) -> Tensor")
def _(x, bits, count):
    """The elements of x, any shape, whose bit is set, in order: [count]; so many bits are set."""
    _check_floating("bits_select", x)
    _check_bits_of("bits_select", x.numel(), bits)
    torch._check_value(count >= 0, lambda: f"bits_select: expected count >= 0, got {count}")
    return x.new_empty((count,))


@_define("bits_expand", "(Tensor values, Tensor bits, SymInt[] size) -> Tensor")
def _(values, bits, size):
    """The inverse: values [count], in order, where a bit is set, 0 elsewhere; of shape ``size``."""
    _check_floating("bits_expand", values)
    torch._check(
        values.dim() == 1,
        lambda: f"bits_expand: expected values [count], got {tuple(values.shape)}",
    )
    result = values.new_empty(size)
    _check_bits_of("bits_expand", result.numel(), bits)
    return result


def _check_bits_of(name: str, numel: int, bits: Tensor) -> None:
    torch._check_type(
        bits.dtype == torch.uint8, lambda: f"{name}: expected uint8 bits, got {bits.dtype}"
    )
    torch._check(
        bits.numel() == ceil_div(numel, 8),
        lambda: (
            f"{name}: {numel} elements need {ceil_div(numel, 8)} bytes of bits, got {bits.numel()}"
        ),
    )


# -------------------------------------------------------------------------------------- threshold


@_define("threshold_magnitude", "(Tensor[] xs, Tensor[] masks, int k) -> (Tensor, Tensor)")
def _(xs, masks, k):
    """The k-th largest |x| of all elements of xs (tensors of any shape and one dtype) whose bit is
    set in ``masks`` (bits for each of xs; none: all elements), 0-dim, and for each of xs how many
    elements of just that magnitude are among the k, int64 [len(xs)]: the first ones, in the order
    of the list and then of elements. k = 0: inf, and no ties."""
    name = "threshold_magnitude"
    torch._check(len(xs) > 0, lambda: f"{name}: expected one tensor or more, got none")
    for x in xs:
        _check_floating(name, x)
        torch._check_type(
            x.dtype == xs[0].dtype,
            lambda: f"{name}: expected tensors of one dtype, got {[x.dtype for x in xs]}",
        )
    torch._check(
        len(masks) in (0, len(xs)),
        lambda: f"{name}: expected no masks, or {len(xs)} as there are tensors, got {len(masks)}",
    )
    for x, mask in zip(xs, masks, strict=False):
        _check_bits_of(name, x.numel(), mask)
    numel = sum(x.numel() for x in xs)
    torch._check_value(
        0 <= k <= numel,
        lambda: f"{name}: expected k from 0 to {numel}, as there are elements, got {k}",
    )
    return xs[0].new_empty(()), xs[0].new_empty((len(xs),), dtype=torch.int64)


@_define("threshold_mask", "(Tensor x, Tensor? mask, Tensor value, Tensor ties) -> Tensor")
def _(x, mask, value, ties):
    """x, any shape -> bits: set where |x| > value, and for the first ``ties`` elements (int64, one
    number) where |x| == value; of those alone whose bit is set in ``mask``, if it is given."""
    name = "threshold_mask"
    _check_floating(name, x)
    if mask is not None:
        _check_bits_of(name, x.numel(), mask)
    torch._check_type(
        value.dtype == x.dtype and ties.dtype == torch.int64,
        lambda: (
            f"{name}: expected value in {x.dtype}, as x, and ties in torch.int64, got "
            f"{value.dtype} and {ties.dtype}"
        ),
    )
    torch._check(
        value.numel() == 1 and ties.numel() == 1,
        lambda: (
            f"{name}: expected one value and one number of ties, got {tuple(value.shape)} and "
            f"{tuple(ties.shape)}"
        ),
    )
    return x.new_empty((ceil_div(x.numel(), 8),), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------- masked


def _check_rows(name: str, argument: str, t: Tensor, columns) -> None:
    _check_floating(name, t)
    torch._check(
        t.dim() == 2 and t.shape[1] == columns,
        lambda: f"{name}: expected {argument} [T, {columns}], got {tuple(t.shape)}",
    )


def _check_mask(name: str, mask: Tensor, outputs, inputs) -> None:
    torch._check_type(
        mask.dtype == torch.uint8, lambda: f"{name}: expected a uint8 mask, got {mask.dtype}"
    )
    torch._check(
        mask.numel() == ceil_div(outputs * inputs, 8),
        lambda: (
            f"{name}: a weight [{outputs}, {inputs}] needs {ceil_div(outputs * inputs, 8)} bytes "
            f"of mask, got {mask.numel()}"
        ),
    )


def _check_masked_weight(name: str, weight: Tensor, mask: Tensor) -> None:
    _check_floating(name, weight)
    torch._check(
        weight.dim() == 2, lambda: f"{name}: expected weight [O, I], got {tuple(weight.shape)}"
    )
    _check_mask(name, mask, *weight.shape)


def _check_masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
    name = "masked_linear"
    _check_masked_weight(name, weight, mask)
    outputs, inputs = weight.shape
    _check_rows(name, "x", x, inputs)
    if bias is not None:
        _check_floating(name, bias)
        torch._check(
            bias.shape == (outputs,),
            lambda: f"{name}: expected bias [{outputs}], got {tuple(bias.shape)}",
        )


def _check_masked_input_grad(grad_out: Tensor, weight: Tensor, mask: Tensor) -> None:
    name = "masked_linear_input_grad"
    _check_masked_weight(name, weight, mask)
    _check_rows(name, "grad_out", grad_out, weight.shape[0])


def _check_masked_weight_grad(grad_out: Tensor, x: Tensor, mask: Tensor) -> None:
    name = "masked_linear_weight_grad"
    torch._check(
        x.dim() == 2 and grad_out.dim() == 2 and x.shape[0] == grad_out.shape[0],
        lambda: (
            f"{name}: expected grad_out [T, O] and x [T, I], got {tuple(grad_out.shape)} and "
            f"{tuple(x.shape)}"
        ),
    )
    torch._check_type(
        x.dtype == grad_out.dtype,
        lambda: f"{name}: expected grad_out and x of one dtype, got {grad_out.dtype} and {x.dtype}",
    )
    _check_floating(name, x)
    _check_mask(name, mask, grad_out.shape[1], x.shape[1])


@_define("masked_linear", "(Tensor x, Tensor weight, Tensor mask, Tensor? bias) -> Tensor")
def _(x, weight, mask, bias):
    """x [T, I], weight [O, I] -> x (weight * mask)^T + bias, [T, O] in the dtype of x; accumulated
    in float32 (float64 for float64)."""
    _check_masked_linear(x, weight, mask, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


@_define("masked_linear_input_grad", "(Tensor grad_out, Tensor weight, Tensor mask) -> Tensor")
def _(grad_out, weight, mask):
    """grad_out [T, O], weight [O, I] -> grad_out (weight * mask), [T, I] in the dtype of grad_out;
    accumulated as for masked_linear."""
    _check_masked_input_grad(grad_out, weight, mask)
    return grad_out.new_empty((grad_out.shape[0], weight.shape[1]))


@_define("masked_linear_weight_grad", "(Tensor grad_out, Tensor x, Tensor mask) -> Tensor")
def _(grad_out, x, mask):
    """grad_out [T, O], x [T, I] of the same dtype -> grad_out^T x where a bit of the mask is set,
    0 elsewhere, [O, I] in float32 (float64 for float64)."""
    _check_masked_weight_grad(grad_out, x, mask)
    size = grad_out.shape[1], x.shape[1]
    return x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------------- attention


@_define(
    "attention_grad",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, float dropout_p, "
    "Tensor? rng_state, bool is_causal, float? scale, bool enable_gqa, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _(grad_out, q, k, v, mask, dropout_p, rng_state, is_causal, scale, enable_gqa, mask_grad):
    """Gradients of scaled_dot_product_attention(q [B, H, N, d], ...) in q, k, v and, when
    ``mask_grad``, the mask (else empty), from operands alone: the forward is run again.
    ``rng_state`` is the generator's state before the first forward when ``dropout_p`` > 0."""
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=contiguous),
        torch.empty_like(k, memory_format=contiguous),
        torch.empty_like(v, memory_format=contiguous),
        torch.empty_like(mask, memory_format=contiguous) if mask_grad else q.new_empty((0,)),
    )


@_define(
    "query_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, ScalarType? jacobian) "
    "-> (Tensor, Tensor)",
)
def _(q, k, v, mask, scale, jacobian):
    """q [B or 1, H, T, d], k [B, H, N, d], v [B, H, N, e] of one dtype; ``mask``, added to the
    scores, [B or 1, H or 1, N], -inf leaving a key out.

    p = softmax(scale q k^T + mask) by row, in float32 (float64 for float64); a row without keys has
    p = 0. -> out [B, H, T, e] = p v, and d out / d q, [B, H, T, d, e] in the dtype ``jacobian``:
    J[i, j] = scale * (sum_n p_n k_ni v_nj - out_j sum_n p_n k_ni). Empty [0] for None. Both are
    contiguous."""
    _check_query_attention("query_attention", q, k, v, mask)
    if jacobian is not None:
        torch._check_type(
            jacobian in FLOATING,
            lambda: f"query_attention: jacobian must be floating point, got {jacobian}",
        )
    batch, heads, _, width = k.shape
    out = q.new_empty((batch, heads, q.shape[2], v.shape[3]))
    shape = (0,) if jacobian is None else (*out.shape[:3], width, v.shape[3])
    return out, q.new_empty(shape, dtype=jacobian or q.dtype)


@_define(
    "query_attention_grad",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
)
def _(grad_out, q, k, v, mask, scale):
    """The gradient of query_attention's q, one for each sample, [B, H, T, d], contiguous, in the
    dtype of q: scale * sum_n p_n (grad_out . (v_n - out)) k_n; p and out are computed again."""
    _check_query_attention("query_attention_grad", q, k, v, mask)
    batch, heads, _, width = k.shape
    wanted = (batch, heads, q.shape[2], v.shape[3])
    torch._check(
        tuple(grad_out.shape) == wanted and grad_out.dtype == q.dtype,
        lambda: (
            f"query_attention_grad: expected grad_out {wanted} {q.dtype}, got "
            f"{tuple(grad_out.shape)} {grad_out.dtype}"
        ),
    )
    return q.new_empty((*wanted[:3], width))


def _check_query_attention(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    _check_floating(name, q)
    torch._check_type(
        q.dtype == k.dtype == v.dtype,
        lambda: f"{name}: expected q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}",
    )
    torch._check(
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[0] in (1, k.shape[0])
        and q.shape[1] == k.shape[1]
        and q.shape[3] == k.shape[3]
        and k.shape[:3] == v.shape[:3],
        lambda: (
            f"{name}: expected q [B or 1, H, T, d], k [B, H, N, d], v [B, H, N, e], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        ),
    )
    if mask is not None:
        _check_floating(name, mask)
        torch._check(
            mask.dim() == 3
            and mask.shape[0] in (1, k.shape[0])
            and mask.shape[1] in (1, k.shape[1])
            and mask.shape[2] == k.shape[2],
            lambda: (
                f"{name}: expected mask [B or 1, H or 1, N] for k {tuple(k.shape)}, got "
                f"{tuple(mask.shape)}"
            ),
        )
