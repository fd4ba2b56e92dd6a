"""What is timed: every operator on the tensors of a ViT-B/16, convolutions of a
ResNet-50, beside what one would do without it.

Inputs are normal random numbers of torch's global generator: seed it first.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from memtl.storage.convolution import ConvGeometry, library_weight_grad
from memtl.storage.topk import TopK, quota

OPS = torch.ops.memtl
TOKENS = 197
WIDTHS = (768, 3072)
HEADS = 12
SCALE = 1 / 0.9

Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator on one shape.

    ``make()`` gives calls without arguments: under ``"memtl"`` a :func:`functools.partial` of the
    operator, then its baselines by name. Every ``make()`` draws tensors of its own. ``flops``: of a
    product, a multiplication and an addition counted as two; 0 of what is bound by memory alone.
    """

    op: str
    what: str
    shape: str
    elements: int
    make: Callable[[], Calls]
    flops: int = 0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.what, self.shape)))


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in a tensor, or in a tuple or list of anything."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, (tuple, list)) else 0


def moved_bytes(call: partial) -> int:
    """What an operator cannot avoid moving: its arguments once, its results once."""
    return tensor_bytes(call.args) + tensor_bytes(call())


# ---------------------------------------------------------------------------------------- baselines


def packbits(mask: Tensor) -> Tensor:
    """One bit an element; numpy's on a CPU, where torch has nothing as fast."""
    if not mask.is_cuda:
        return torch.from_numpy(numpy.packbits(mask.numpy().reshape(-1), bitorder="little"))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.view(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpackbits(bits: Tensor) -> Tensor:
    """The inverse of :func:`packbits`, flat."""
    if not bits.is_cuda:
        return torch.from_numpy(numpy.unpackbits(bits.numpy(), bitorder="little").view(bool))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & weights).ne(0).flatten()


def released_pack(x: Tensor, samples: int, keep: float) -> tuple[Tensor, Tensor]:
    """Back Razor as released: x [samples * N, D] -> the values kept, and a bitmap."""
    flat = x.view(samples, -1)
    magnitude = flat.abs()
    pruned = int(flat.shape[1] * (1 - keep))
    mask = magnitude >= torch.kthvalue(magnitude, pruned, dim=1, keepdim=True).values
    return flat[mask], packbits(mask)


def released_unpack(values: Tensor, bits: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`released_pack` kept, dense again."""
    dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
    dense[unpackbits(bits).view(shape)] = values
    return dense


def dense_product(grad_out: Tensor, x: Tensor) -> Tensor:
    """The weight gradient of a linear layer that kept its input."""
    return grad_out.t() @ x


def plain_quant_pack(x: Tensor, bits: int, lo: float | None = None, hi: float | None = None):
    """Stochastic rounding in groups of 64, on their own range or a fixed one."""
    levels = 2**bits - 1
    groups = x.view(-1, 64).float()
    low = groups.amin(1, keepdim=True) if lo is None else groups.new_tensor(lo)
    high = groups.amax(1, keepdim=True) if hi is None else groups.new_tensor(hi)
    scale = (high - low) / levels
    codes = ((groups - low) / scale + torch.rand_like(groups)).floor().clamp(0, levels)
    return plain_codes_pack(codes.to(torch.uint8), bits), scale, low


def plain_codes_pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [G, 64] as uint8 [G, 8 * bits]: of 3 bits two as shifts, the third as a mask."""
    if bits == 3:
        third = packbits(codes > 3).view(-1, 8)
        return torch.cat((plain_codes_pack(codes & 3, 2), third), 1)
    planes = codes.view(-1, 8 // bits, 8 * bits)
    packed = planes[:, 0].clone()
    for i in range(1, 8 // bits):
        packed |= planes[:, i] << (i * bits)
    return packed


def plain_codes_unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`plain_codes_pack`."""
    if bits == 3:
        third = unpackbits(packed[:, 16:].contiguous()).view(-1, 64)
        return plain_codes_unpack(packed[:, :16], 2) | third.to(torch.uint8) << 2
    planes = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(planes, 1)


def plain_quant_unpack(packed: Tensor, scale: Tensor, low: Tensor, bits: int, shape, dtype):
    """The inverse of :func:`plain_quant_pack`."""
    return (plain_codes_unpack(packed, bits) * scale + low).to(dtype).view(shape)


# -------------------------------------------------------------------------------------------- cases


def topk_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Packing by block and by sample, unpacking, and the weight gradient.

    The widths are multiples of 256, so that every block is whole; at 10 % and less a position takes
    a byte.
    """
    tokens = batch * TOKENS

    def draw(width: int) -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=dtype)

    def packed(x: Tensor, keep: float) -> tuple[tuple[Tensor, ...], tuple[int, int, bool]]:
        """The four tensors that unpacking takes, and k, k_tail, bitmap."""
        k = quota(256, keep)
        counts = torch.empty(0, device=device, dtype=torch.int16)
        return (*OPS.topk_pack(x, k, 0, torch.int8, False), counts), (k, 0, False)

    def pack(width: int, keep: float) -> Calls:
        x = draw(width)
        return {
            "memtl": partial(OPS.topk_pack, x, quota(256, keep), 0, torch.int8, False),
            "as released: kthvalue, mask, x[mask], bitmap": partial(released_pack, x, batch, keep),
        }

    def pack_sample(width: int, keep: float) -> Calls:
        x = draw(width)
        n = TOKENS * width
        kept = n - int(n * (1 - keep)) + 1
        return {
            "memtl": partial(OPS.topk_pack_sample, x.view(batch, n), kept, torch.float16, False),
            "as released: kthvalue, mask, x[mask], bitmap": partial(released_pack, x, batch, keep),
        }

    def unpack(width: int, keep: float) -> Calls:
        x = draw(width)
        tensors, layout = packed(x, keep)
        released = released_pack(x, batch, keep)
        return {
            "memtl": partial(OPS.topk_unpack, *tensors, width, *layout, dtype),
            "as released: dense[mask] = values": partial(released_unpack, *released, x.shape),
        }

    def weight_grad(width: int, keep: float) -> Calls:
        x, grad_out = draw(width), draw(other(width))
        tensors, layout = packed(x, keep)

        def rebuilt() -> Tensor:
            return dense_product(grad_out, OPS.topk_unpack(*tensors, width, *layout, dtype))

        return {
            "memtl": partial(OPS.topk_weight_grad, *tensors, grad_out, width, width, *layout),
            "dense: grad_out.t() @ x": partial(dense_product, grad_out, x),
            "topk_unpack, then the dense product": rebuilt,
        }

    def other(width: int) -> int:
        return WIDTHS[1] if width == WIDTHS[0] else WIDTHS[0]

    for width in WIDTHS:
        shape, elements = f"{tokens}x{width}", tokens * width
        for keep in (0.1, 0.03):
            int8, fp16 = f"keep {keep:g} int8", f"keep {keep:g} fp16"
            yield Case("topk_pack", int8, shape, elements, partial(pack, width, keep))
            yield Case("topk_pack_sample", fp16, shape, elements, partial(pack_sample, width, keep))
            yield Case("topk_unpack", int8, shape, elements, partial(unpack, width, keep))
            product, flops = f"{shape}->{other(width)}", 2 * elements * other(width)
            make = partial(weight_grad, width, keep)
            yield Case("topk_weight_grad", int8, product, elements, make, flops)


CONVOLUTIONS = ((64, 64, 3, 56), (512, 512, 3, 7), (64, 256, 1, 56), (1024, 256, 1, 14))
"""Of a ResNet-50: channels, outputs, kernel, side of the image."""


def conv_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The weight gradient of convolutions, from packed rows [B, C H W]."""

    def weight_grad(channels: int, outputs: int, kernel: int, side: int, keep: float) -> Calls:
        x = torch.randn(batch, channels * side * side, device=device, dtype=dtype)
        grad_out = torch.randn(batch, outputs, side, side, device=device, dtype=dtype)
        format, size = TopK(keep), (channels, side, side)
        packed, weight_size = format.pack(x), (outputs, channels, kernel, kernel)
        geometry = ConvGeometry((1, 1), (kernel // 2,) * 2, (1, 1), 1, False, (0, 0))
        counts = torch.empty(0, device=device, dtype=torch.int16)
        options = (
            list(size),
            [kernel] * 2,
            *map(list, geometry[:3]),
            False,
            quota(256, keep),
            0,
            False,
        )

        def library(x: Tensor) -> Tensor:
            return library_weight_grad(x, grad_out, size, weight_size, geometry, False)

        return {
            "memtl": partial(OPS.topk_conv_weight_grad, *packed, counts, grad_out, *options),
            "dense: torch's own": partial(library, x),
            "a few samples unpacked at a time, then torch's own": lambda: (
                format.library_conv_weight_grad(
                    packed, x.shape, grad_out, size, weight_size, geometry, False
                )
            ),
        }

    for channels, outputs, kernel, side in CONVOLUTIONS:
        shape = f"{batch}x{channels}x{side}x{side}->{outputs}, {kernel}x{kernel}"
        elements = batch * channels * side * side
        for keep in (0.1, 0.03):
            make = partial(weight_grad, channels, outputs, kernel, side, keep)
            flops = 2 * elements * outputs * kernel**2
            yield Case("topk_conv_weight_grad", f"keep {keep:g} int8", shape, elements, make, flops)


def quant_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Groups of 64 in 8, 4, 3 and 2 bits; 4 and 3 bits on the range of GELU's derivative."""
    shape = (batch * TOKENS, WIDTHS[1])
    fixed = (-0.13, 1.13)

    def pack(bits: int, *limits: float) -> Calls:
        x = torch.randn(shape, device=device, dtype=dtype)
        op = OPS.quant_pack_range if limits else OPS.quant_pack
        name = "rand_like, floor, shifts" if limits else "amin, amax, rand_like, floor, shifts"
        return {
            "memtl": partial(op, x, bits, *limits, 1),
            f"plain PyTorch: {name}": partial(plain_quant_pack, x, bits, *limits),
        }

    def unpack(bits: int, *limits: float) -> Calls:
        x = torch.randn(shape, device=device, dtype=dtype)
        plain = plain_quant_pack(x, bits, *limits)
        if limits:
            codes = OPS.quant_pack_range(x, bits, *limits, 1)
            op = partial(OPS.quant_unpack_range, codes, bits, *limits, shape, dtype)
        else:
            op = partial(OPS.quant_unpack, *OPS.quant_pack(x, bits, 1), bits, shape, dtype)
        return {
            "memtl": op,
            "plain PyTorch: shifts, cat, x * scale + low": partial(
                plain_quant_unpack, *plain, bits, shape, dtype
            ),
        }

    def case(op: str, make: Callable[..., Calls], bits: int, *limits: float) -> Case:
        elements = shape[0] * shape[1]
        return Case(
            op, f"{bits} bits", f"{shape[0]}x{shape[1]}", elements, partial(make, bits, *limits)
        )

    for bits in (8, 4, 3, 2):
        yield case("quant_pack", pack, bits)
        yield case("quant_unpack", unpack, bits)
    for bits in (4, 3):
        yield case("quant_pack_range", pack, bits, *fixed)
        yield case("quant_unpack_range", unpack, bits, *fixed)


def fused_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """quant decoded and used, or computed and packed, at once, beside one after the other: rows of
    LayerNorm, maps of a ResNet's BatchNorm and ReLU, GELU."""
    rows, maps, fixed = (batch * TOKENS, WIDTHS[1]), (batch, 256, 56, 56), (-0.13, 1.13)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def affine(bits: int) -> Calls:
        packed, (w, b) = OPS.quant_pack(draw(*rows), bits, 1), draw(2, rows[1])

        def plain() -> Tensor:
            return torch.addcmul(b, OPS.quant_unpack(*packed, bits, rows, dtype), w)

        return {
            "memtl": partial(OPS.quant_unpack_affine, *packed, bits, w, b, None, 1, rows, dtype),
            "quant_unpack, addcmul": plain,
        }

    def affine_relu(bits: int) -> Calls:
        packed, (w, b) = OPS.quant_pack(draw(*maps), bits, 1), draw(2, maps[1])
        mask = OPS.bits_pack(draw(*maps) > 0)
        laid, place = (w.view(-1, 1, 1), b.view(-1, 1, 1)), (maps[2] * maps[3], maps, dtype)

        def plain() -> Tensor:
            x = OPS.quant_unpack(*packed, bits, maps, dtype)
            return OPS.bits_apply(torch.addcmul(laid[1], x, laid[0]), mask, 1.0)

        return {
            "memtl": partial(OPS.quant_unpack_affine, *packed, bits, w, b, mask, *place),
            "quant_unpack, addcmul, bits_apply": plain,
        }

    def values(bits: int) -> Calls:
        packed = OPS.quant_pack(draw(*rows), bits, 1)
        return {
            "memtl": partial(OPS.quant_unpack_activation, *packed, bits, "gelu", rows, dtype),
            "quant_unpack, gelu": lambda: F.gelu(OPS.quant_unpack(*packed, bits, rows, dtype)),
        }

    def slopes(bits: int) -> Calls:
        packed, grad_out = OPS.quant_pack(draw(*rows), bits, 1), draw(*rows)

        def plain() -> Tensor:
            x = OPS.quant_unpack(*packed, bits, rows, dtype)
            return torch.ops.aten.gelu_backward(grad_out, x)

        return {
            "memtl": partial(OPS.quant_activation_grad, grad_out, *packed, bits, "gelu"),
            "quant_unpack, gelu_backward": plain,
        }

    def pack_slopes(bits: int) -> Calls:
        x = draw(*rows)

        def plain() -> Tensor:
            slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
            return OPS.quant_pack_range(slope, bits, *fixed, 1)

        return {
            "memtl": partial(OPS.quant_pack_derivative, x, bits, "gelu", *fixed, 1),
            "gelu_backward of ones, quant_pack_range": plain,
        }

    def apply_range(bits: int) -> Calls:
        codes, grad_out = OPS.quant_pack_range(draw(*rows), bits, *fixed, 1), draw(*rows)

        def plain() -> Tensor:
            return OPS.quant_unpack_range(codes, bits, *fixed, rows, dtype).mul_(grad_out)

        return {
            "memtl": partial(OPS.quant_apply_range, grad_out, codes, bits, *fixed),
            "quant_unpack_range, mul_": plain,
        }

    def pack_rows(bits: int) -> Calls:
        x = draw(batch * TOKENS, WIDTHS[0])
        mean, rstd = draw(len(x), 1).float(), torch.rand_like(x[:, :1]).float() + 0.5
        return {
            "memtl": partial(OPS.quant_pack_normalized, x, mean, rstd, bits, WIDTHS[0], 1),
            "(x - mean).mul_(rstd), quant_pack": lambda: OPS.quant_pack(
                (x.float() - mean).mul_(rstd), bits, 1
            ),
        }

    def pack_maps(bits: int) -> Calls:
        x, (mean, rstd) = draw(*maps), draw(2, maps[1]).float()
        laid, inner = (mean.view(-1, 1, 1), rstd.view(-1, 1, 1)), maps[2] * maps[3]
        return {
            "memtl": partial(OPS.quant_pack_normalized, x, mean, rstd, bits, inner, 1),
            "(x - mean).mul_(rstd), quant_pack": lambda: OPS.quant_pack(
                (x.float() - laid[0]).mul_(laid[1]), bits, 1
            ),
        }

    def norm_grad(bits: int) -> Calls:
        n = WIDTHS[0]
        packed, grad_out = OPS.quant_pack(draw(batch * TOKENS, n), bits, 1), draw(batch * TOKENS, n)
        rstd, weight = torch.rand_like(grad_out[:, :1]).float() + 0.5, draw(n)
        plain_weight = weight if weight.is_cuda else weight.float()  # as torch's kernels want it

        def plain() -> tuple[Tensor, ...]:
            x_hat = OPS.quant_unpack(*packed, bits, grad_out.shape, dtype)
            unit = torch.ones_like(rstd)
            grad_x, _, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_out, x_hat, [n], unit - 1, unit, *(plain_weight,) * 2, [True, False, True]
            )
            return grad_x.mul_(rstd), (grad_out * x_hat).sum(0), grad_bias

        arguments = (grad_out, *packed, bits, rstd, weight, n, True)
        return {
            "memtl": partial(OPS.quant_norm_grad, *arguments),
            "quant_unpack, native_layer_norm_backward": plain,
        }

    def channel_norm_grad(bits: int) -> Calls:
        packed, grad_out = OPS.quant_pack(draw(*maps), bits, 1), draw(*maps)
        rstd, weight = torch.rand_like(grad_out[0, :, 0, 0]).float() + 0.5, draw(maps[1])

        def plain() -> tuple[Tensor, ...]:
            x_hat = OPS.quant_unpack(*packed, bits, maps, dtype)
            zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
            return torch.ops.aten.native_batch_norm_backward(
                grad_out, x_hat, rstd * weight, zeros, ones, zeros, ones, True, 0.0, [True] * 3
            )

        arguments = (grad_out, *packed, bits, rstd, weight, maps[2] * maps[3])
        return {
            "memtl": partial(OPS.quant_channel_norm_grad, *arguments),
            "quant_unpack, native_batch_norm_backward": plain,
        }

    def case(op: str, what: str, size: tuple[int, ...], make: Callable[..., Calls], bits: int):
        words = "x".join(map(str, size))
        return Case(op, f"{bits} bits{what}", words, math.prod(size), partial(make, bits))

    for bits in (8, 4, 3):
        yield case("quant_unpack_affine", "", rows, affine, bits)
        yield case("quant_unpack_affine", " relu", maps, affine_relu, bits)
        yield case("quant_unpack_activation", "", rows, values, bits)
        yield case("quant_activation_grad", "", rows, slopes, bits)
        yield case("quant_pack_derivative", "", rows, pack_slopes, bits)
        yield case("quant_apply_range", "", rows, apply_range, bits)
        yield case("quant_pack_normalized", "", (rows[0], WIDTHS[0]), pack_rows, bits)
        yield case("quant_pack_normalized", " maps", maps, pack_maps, bits)
        yield case("quant_norm_grad", "", (rows[0], WIDTHS[0]), norm_grad, bits)
        yield case("quant_channel_norm_grad", "", maps, channel_norm_grad, bits)


def bits_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """A mask to bits, and a gradient through them."""
    shape = (batch * TOKENS, WIDTHS[1])

    def draw(density: float = 0.9) -> Tensor:
        return torch.rand(shape, device=device) < density

    def pack() -> Calls:
        mask = draw()
        name = "torch: multiply, sum" if mask.is_cuda else "numpy.packbits"
        return {
            "memtl": partial(OPS.bits_pack, mask),
            name: partial(packbits, mask),
            "mask.clone(), a byte an element": mask.clone,
        }

    def pack_between() -> Calls:
        x = torch.randn(shape, device=device, dtype=dtype)
        return {
            "memtl": partial(OPS.bits_pack_between, x, 0.0, None),
            "bits_pack(~(x <= 0))": lambda: OPS.bits_pack(~(x <= 0)),
        }

    def apply() -> Calls:
        x, mask = torch.randn(shape, device=device, dtype=dtype), draw()
        masked = torch.ops.aten.native_dropout_backward
        return {
            "memtl": partial(OPS.bits_apply, x, OPS.bits_pack(mask), SCALE),
            "native_dropout_backward, a byte an element": partial(masked, x, mask, SCALE),
            "torch.where(mask, x * scale, 0)": lambda: torch.where(mask, x * SCALE, 0.0),
        }

    def select(density: float) -> Calls:
        x, mask = torch.randn(shape, device=device, dtype=dtype), draw(density)
        count = int(mask.sum())
        return {
            "memtl": partial(OPS.bits_select, x, OPS.bits_pack(mask), count),
            "x[mask], a byte an element": lambda: x[mask],
        }

    def expand(density: float) -> Calls:
        mask = draw(density)
        values = torch.randn(int(mask.sum()), device=device, dtype=dtype)

        def scattered() -> Tensor:
            dense = torch.zeros(shape, device=device, dtype=dtype)
            dense[mask] = values
            return dense

        return {
            "memtl": partial(OPS.bits_expand, values, OPS.bits_pack(mask), shape),
            "zeros, dense[mask] = values": scattered,
        }

    words, elements = f"{shape[0]}x{shape[1]}", shape[0] * shape[1]
    yield Case("bits_pack", "", words, elements, pack)
    yield Case("bits_pack_between", "", words, elements, pack_between)
    yield Case("bits_apply", "", words, elements, apply)
    for density in (0.5, 0.1):
        what = f"density {density:g}"
        yield Case("bits_select", what, words, elements, partial(select, density))
        yield Case("bits_expand", what, words, elements, partial(expand, density))


def threshold_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Pruning the weights of transformer blocks by one threshold; a block for each of ``batch``, 12
    at most. Weights are float32 where products are not."""
    width, wide = WIDTHS
    shapes = ((width, width),) * 4 + ((wide, width), (width, wide))
    batch, dtype = min(batch, 12), torch.float32

    def draw() -> list[Tensor]:
        return [
            torch.randn(shape, device=device, dtype=dtype) * (1 + i / 10)
            for i, shape in enumerate(shapes * batch)
        ]

    def joined_threshold(xs: list[Tensor], k: int) -> Tensor:
        magnitudes = torch.cat([x.abs().flatten() for x in xs])
        return torch.kthvalue(magnitudes, len(magnitudes) - k + 1).values

    def magnitude(keep: float) -> Calls:
        xs = draw()
        k = int(keep * sum(x.numel() for x in xs))
        return {
            "memtl": partial(OPS.threshold_magnitude, xs, [], k),
            "cat of magnitudes, kthvalue": partial(joined_threshold, xs, k),
        }

    def mask() -> Calls:
        x = torch.randn(wide, width * batch, device=device, dtype=dtype)
        value, ties = OPS.threshold_magnitude([x], [], x.numel() // 5)
        return {
            "memtl": partial(OPS.threshold_mask, x, None, value, ties),
            "packbits(x.abs() >= value)": lambda: packbits(x.abs() >= value),
        }

    elements, blocks = sum(map(math.prod, shapes)) * batch, f"{batch} blocks of {width}"
    for keep in (0.5, 0.2):
        make = partial(magnitude, keep)
        yield Case("threshold_magnitude", f"keep {keep:g}", blocks, elements, make)
    words, elements = f"{wide}x{width * batch}", wide * width * batch
    yield Case("threshold_mask", "keep 0.2", words, elements, mask)


def masked_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The three products of a linear layer whose weight a random mask leaves in part."""
    tokens = batch * TOKENS

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def mask_of(weight: Tensor, density: float) -> Tensor:
        return OPS.bits_pack(torch.rand(weight.shape, device=device) < density)

    def forward(inputs: int, outputs: int, density: float) -> Calls:
        x, weight = draw(tokens, inputs), draw(outputs, inputs)
        mask = mask_of(weight, density)
        return {
            "memtl": partial(OPS.masked_linear, x, weight, mask, None),
            "dense: F.linear(x, weight)": partial(F.linear, x, weight),
            "bits_apply, F.linear": lambda: F.linear(x, OPS.bits_apply(weight, mask, 1.0)),
        }

    def input_grad(inputs: int, outputs: int, density: float) -> Calls:
        grad_out, weight = draw(tokens, outputs), draw(outputs, inputs)
        mask = mask_of(weight, density)
        return {
            "memtl": partial(OPS.masked_linear_input_grad, grad_out, weight, mask),
            "dense: grad_out @ weight": partial(torch.matmul, grad_out, weight),
            "bits_apply, grad_out @": lambda: grad_out @ OPS.bits_apply(weight, mask, 1.0),
        }

    def weight_grad(inputs: int, outputs: int, density: float) -> Calls:
        grad_out, x = draw(tokens, outputs), draw(tokens, inputs)
        mask = mask_of(x.new_empty(outputs, inputs), density)
        return {
            "memtl": partial(OPS.masked_linear_weight_grad, grad_out, x, mask),
            "dense: grad_out.t() @ x": partial(dense_product, grad_out, x),
            "grad_out.t() @ x, bits_apply": lambda: OPS.bits_apply(
                dense_product(grad_out, x), mask, 1.0
            ),
        }

    for inputs, outputs in (WIDTHS, WIDTHS[::-1]):
        shape, elements = f"{tokens}x{inputs}->{outputs}", tokens * inputs
        for density in (0.1, 0.05):
            what, size = f"density {density:g}", (inputs, outputs, density)
            for op, make in (
                ("masked_linear", forward),
                ("masked_linear_input_grad", input_grad),
                ("masked_linear_weight_grad", weight_grad),
            ):
                flops = 2 * elements * outputs
                yield Case(op, what, shape, elements, partial(make, *size), flops)


def attention_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The gradients of attention from its operands alone: of a ViT's 197 tokens, of causal text."""

    def make(shape: tuple[int, ...], is_causal: bool) -> Calls:
        grad_out, *operands = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
        leaves = [t.detach().requires_grad_() for t in operands]
        out = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
        backward = partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)
        arguments = (grad_out, *operands, None, 0.0, None, is_causal, None, False, False)
        return {
            "memtl": partial(OPS.attention_grad, *arguments),
            "backward alone, from all that autograd keeps": backward,
        }

    for what, tokens, is_causal in (("", TOKENS, False), ("causal", 1024, True)):
        shape = (max(1, batch * TOKENS // tokens), HEADS, tokens, 64)
        elements = math.prod(shape)
        # Scores, and the products of dP, dq, dk, dv: what no way of computing them avoids.
        flops = 5 * 2 * elements * tokens // (2 if is_causal else 1)
        words, build = "x".join(map(str, shape)), partial(make, shape, is_causal)
        yield Case("attention_grad", what, words, elements, build, flops)


def query_cases(batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """A few trained queries that read frozen keys and values, views of a projection: J beside the
    output, after which backward is one product, and the gradient without it."""

    def draw(queries: int) -> tuple[Tensor, ...]:
        qkv = torch.randn(batch, TOKENS, 3, HEADS, 64, device=device, dtype=dtype)
        k, v = qkv.permute(2, 0, 3, 1, 4)[1:]
        size = (batch, HEADS, queries, 64)
        q, grad_out = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
        return grad_out, q.requires_grad_(), k, v

    def jacobian(queries: int) -> Calls:
        grad_out, q, k, v = draw(queries)

        def stock() -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v)
            return torch.autograd.grad(out, q, grad_out)[0]

        arguments = (q.detach(), k, v, None, 1 / 8, torch.float32)
        return {
            "memtl": partial(OPS.query_attention, *arguments),
            "scaled_dot_product_attention, and its backward": stock,
        }

    def grad(queries: int) -> Calls:
        grad_out, q, k, v = draw(queries)
        out = F.scaled_dot_product_attention(q, k, v)

        def backward() -> Tensor:
            return torch.autograd.grad(out, q, grad_out, retain_graph=True)[0]

        return {
            "memtl": partial(OPS.query_attention_grad, grad_out, q.detach(), k, v, None, 1 / 8),
            "backward alone, from all that autograd keeps": backward,
        }

    elements = batch * HEADS * TOKENS * 64
    for queries in (1, 10, 20):
        shape = f"{batch}x{HEADS}x{queries}<-{TOKENS}x64"
        what = f"{queries} queries"
        yield Case("query_attention", f"{what} J", shape, elements, partial(jacobian, queries))
        yield Case("query_attention_grad", what, shape, elements, partial(grad, queries))


FAMILIES = {
    "topk": topk_cases,
    "conv": conv_cases,
    "quant": quant_cases,
    "fused": fused_cases,
    "bits": bits_cases,
    "threshold": threshold_cases,
    "masked": masked_cases,
    "attention": attention_cases,
    "query": query_cases,
}


def all_cases(batch: int, device: str, dtype: torch.dtype) -> list[Case]:
    """Every family's cases on ``batch`` images of 197 tokens."""
    return [case for family in FAMILIES.values() for case in family(batch, device, dtype)]
