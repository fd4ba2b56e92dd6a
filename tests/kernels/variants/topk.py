"""Of the topk family: 16 and 32 bits, positions and bitmaps, with int8 values and without."""

import torch

from memtl.kernels import topk

SIZES = {"n": "i32", "blocks": "i32"}
QUOTA = {"kept": "i32", "k": "i32", "k_tail": "i32"}


def variants():
    yield from packing(torch.bfloat16, "bf16", "i8", False)
    yield from packing(torch.float32, "fp32", "bf16", True)
    yield next(packing(torch.float64, "fp64", "i8", True))
    found = {"found_ptr": "*i64", "counts_ptr": "*i64"}
    digit = {"BITS": topk.DIGIT, "BINS": 2**topk.DIGIT} | topk.WARP
    yield topk._topk_choose_kernel, "i64", found, digit
    for x, values, bitmap in (("bf16", "i8", False), ("bf16", "i8", True), ("fp32", "bf16", False)):
        yield unpacking(x, values, bitmap)


def packing(dtype, x, values, bitmap):
    """topk_pack's kernel, and those of topk_pack_sample."""
    name = "bf16" if values == "bf16" else f"{x} in"
    x_ptr, found = {"x_ptr": f"*{x}"}, {"found_ptr": "*i64"}
    packed = {"values_ptr": f"*{values}", "positions_ptr": "*u8", "scale_ptr": "*i16"}
    constants = {"INFINITE": topk.INFINITE[dtype], "BITMAP": bitmap} | topk.WARP
    if values != "i8":
        constants["scale_ptr"] = None
    signature = x_ptr | packed | SIZES | QUOTA
    yield topk._topk_pack_kernel, name, signature, constants | {"NEAR": topk.NEAR[dtype]}
    sums = {"above_ptr": "*i64", "equal_ptr": "*i64"}
    yield topk._topk_count_kernel, f"{x} in", x_ptr | found | sums | SIZES, topk.WARP
    signature = x_ptr | found | sums | packed | {"counts_ptr": "*i16"} | SIZES | {"k": "i32"}
    yield topk._topk_sample_kernel, name, signature, constants
    counts = {"counts_ptr": "*i64", "n": "i32", "parts": "i32"}
    (shift, width), *_ = topk._digits(dtype)
    digit = {"SHIFT": shift, "BITS": width, "BINS": 2**topk.DIGIT}
    tiles = {"TILE": topk.TILE, "TILES": topk.TILES}
    yield topk._topk_digit_kernel, f"{x} in", x_ptr | found | counts, digit | tiles


def unpacking(x, values, bitmap):
    """Of samples with a bitmap, of blocks without."""
    tensors = {"values_ptr": f"*{values}", "positions_ptr": "*u8", "scale_ptr": "*bf16"}
    tensors |= {"counts_ptr": "*i16", "ends_ptr": "*i64", "x_ptr": f"*{x}"}
    absent = {} if values == "i8" else {"scale_ptr": None}
    if not bitmap:
        absent |= {"counts_ptr": None, "ends_ptr": None}
    constants = {"BITMAP": bitmap, "ENTRIES": topk.ENTRIES}
    return topk._topk_unpack_kernel, x, tensors | SIZES | QUOTA, constants | absent | topk.WARP
