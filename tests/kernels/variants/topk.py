"""Of the topk family: 16 and 32 bits, positions and bitmaps, with int8 values and without."""

import torch

from memtl.kernels import topk

SIZES = {"n": "i32", "blocks": "i32"}
QUOTA = {"kept": "i32", "k": "i32", "k_tail": "i32"}


def variants():
    for dtype, x, values, bitmap in (
        (torch.bfloat16, "bf16", "i8", False),
        (torch.float32, "fp32", "bf16", True),
        (torch.float64, "fp64", "i8", True),
    ):
        yield from packing(dtype, x, values, bitmap)
    for x, values, bitmap in (("bf16", "i8", False), ("bf16", "i8", True), ("fp32", "bf16", False)):
        yield from unpacking(x, values, bitmap)


def packing(dtype, x, values, bitmap):
    options = topk._options(dtype)
    bits = options.pop("KEY_BITS")
    name = values if values == "bf16" else x.replace("bf16", "bf16 in")
    x_ptr, found, whole = {"x_ptr": f"*{x}"}, {"found_ptr": "*i64"}, topk.WARP
    packed = {"values_ptr": f"*{values}", "positions_ptr": "*u8", "scale_ptr": "*i16"}
    constants = options | {"BITMAP": bitmap} | whole
    if values != "i8":
        constants["scale_ptr"] = None
    sums = {"above_ptr": "*i64", "equal_ptr": "*i64"}
    signature = x_ptr | packed | SIZES | QUOTA
    yield topk._pack_kernel, name, signature, constants | {"KEY_BITS": bits}
    yield topk._row_count_kernel, f"{x} in", x_ptr | found | sums | SIZES, whole
    signature = x_ptr | found | sums | packed | {"counts_ptr": "*i16"} | SIZES | {"k": "i32"}
    yield topk._row_pack_kernel, name, signature, constants
    counts = {"counts_ptr": "*i64", "n": "i32", "parts": "i32"}
    (shift, width), *_ = topk._digits(bits)
    digit = {"BITS": width, "BINS": 2**topk.DIGIT}
    tiles = {"SHIFT": shift, "TILE": topk.TILE, "TILES": topk.TILES}
    yield topk._row_digit_kernel, f"{x} in", x_ptr | found | counts, digit | tiles
    yield topk._row_choose_kernel, "i64", found | {"counts_ptr": "*i64"}, digit | whole


def unpacking(x, values, bitmap):
    tensors = {"values_ptr": f"*{values}", "positions_ptr": "*u8", "scale_ptr": "*bf16"}
    tensors |= {"counts_ptr": "*i16", "ends_ptr": "*i64", "x_ptr": f"*{x}"}
    absent = {} if values == "i8" else {"scale_ptr": None}
    if not bitmap:
        absent |= {"counts_ptr": None, "ends_ptr": None}
    constants = {"BITMAP": bitmap, "ENTRIES": topk.ENTRIES}
    yield topk._unpack_kernel, x, tensors | SIZES | QUOTA, constants | absent | topk.WARP
