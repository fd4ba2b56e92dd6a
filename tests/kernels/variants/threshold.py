"""Of the threshold family."""

import torch

from memtl.kernels import threshold


def variants():
    """float64 without a mask, the others with one; of digits the first. They read integers."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        integer, infinite = threshold.INTEGERS[dtype]
        name = f"i{8 * integer.itemsize}"
        no_mask = {"mask_ptr": None} if dtype == torch.float64 else {}
        first = {"x_ptr": f"*{name}", "mask_ptr": "*u8"}
        numel, constants = {"numel": "i64"}, {"INFINITE": infinite} | no_mask
        shift, bits = threshold._digits(dtype)[0]
        bins = {"BITS": bits, "BINS": 2**threshold.DIGIT}
        tiles = {"TILE": threshold.TILE, "TILES": threshold.TILES}
        found = {"found_ptr": "*i64", "counts_ptr": "*i64"}
        digit = constants | bins | tiles | {"SHIFT": shift}
        yield threshold._digit_kernel, name, first | found | numel, digit
        constants |= {"BLOCK": threshold.MARKED}
        equal = first | {"key_ptr": "*i64", "counts_ptr": "*i64"} | numel
        yield threshold._equal_kernel, name, equal, constants
        marked = dict.fromkeys(("key_ptr", "ties_ptr", "ends_ptr"), "*i64") | {"bits_ptr": "*u8"}
        yield threshold._mark_kernel, name, first | marked | numel, constants
    yield threshold._choose_kernel, "i64", found, bins
