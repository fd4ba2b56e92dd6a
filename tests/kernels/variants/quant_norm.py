"""Of the gradients of normalisations."""

import torch
import triton.language as tl

from memtl.kernels import quant_norm
from memtl.kernels.quant_groups import options

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def variants():
    """Rows of 768 in bfloat16 and the widest in float32; maps of 3136 and of 196."""
    for dtype, bits, features, inner in (("bf16", 4, 768, 3136), ("fp32", 3, 4096, 196)):
        x, sums = f"*{dtype}", {"sums_ptr": "*fp32"}
        read = {"grad_out_ptr": x, "codes_ptr": "*u8", "params_ptr": "*i32"}
        scales = {"rstd_ptr": "*fp32", "weight_ptr": "*fp32"}
        constants = quant_norm._norm_options(features) | {"BITS": bits}
        made = {"grad_ptr": x, "partial_ptr": "*fp32", "rows": "i32", "features": "i32"}
        whole = {"sums_ptr": None, "CENTERED": True}
        signature = read | scales | sums | made
        yield quant_norm._norm_grad_kernel, dtype, signature, constants | whole
        constants = quant_norm._sums_options(256, inner) | {"BITS": bits}
        sizes = dict.fromkeys(("batch", "channels", "inner", "parts"), "i32")
        signature = read | {"partial_ptr": "*fp32"} | sizes
        yield quant_norm._channel_sums_kernel, f"{dtype} read", signature, constants
        constants = options(torch.empty(0, dtype=DTYPES[dtype])) | {"BITS": bits}
        constants = constants | {"NARROW": dtype == "fp32", "INDEX": tl.int32}
        sizes = {"scale": "fp32", **dict.fromkeys(("numel", "channels", "inner"), "i32")}
        signature = read | {"products_ptr": "*fp32"} | sums | scales | {"grad_ptr": x} | sizes
        yield quant_norm._channel_grad_kernel, dtype, signature, constants
    constants = quant_norm._row_options(100_032) | {"BITS": bits}
    signature = read | {"weight_ptr": "*fp32"} | sums | {"features": "i32"}
    yield quant_norm._row_sums_kernel, f"{dtype} read", signature, constants
