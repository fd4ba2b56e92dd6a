"""Of packing in groups and reading again."""

import torch
import triton.language as tl

from memtl.kernels import quant
from memtl.kernels.quant_groups import options

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def variants():
    codes, params = {"codes_ptr": "*u8"}, {"params_ptr": "*i32"}
    numel, seed = {"numel": "i32"}, {"seed": "i32"}
    levels = {"lo": "fp32", "hi": "fp32", "step": "fp32"}
    for dtype, bits in (("bf16", 4), ("fp32", 3), ("fp64", 2)):
        x = {"x_ptr": f"*{dtype}"}
        constants = options(torch.empty(0, dtype=DTYPES[dtype])) | {"BITS": bits}
        signature = x | codes | params | numel | seed
        yield quant._quant_pack_kernel, f"{dtype} read", signature, constants
        if dtype == "fp64":
            continue
        yield quant._quant_unpack_kernel, dtype, codes | params | x | numel, constants
        signature = x | codes | numel | levels | seed
        yield quant._quant_pack_range_kernel, f"{dtype} read", signature, constants
        signature = codes | x | numel | {"lo": "fp32", "step": "fp32"}
        yield quant._quant_unpack_range_kernel, dtype, signature, constants
        tables = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
        sizes = dict.fromkeys(("numel", "channels", "inner"), "i32")
        signature = x | tables | codes | params | sizes | seed
        narrow = dtype == "fp32"
        constants = constants | {"NARROW": narrow, "INDEX": tl.int64 if narrow else tl.int32}
        yield quant._quant_pack_normalized_kernel, f"{dtype} read", signature, constants
