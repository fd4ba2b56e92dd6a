"""Of groups that are decoded and used at once."""

import torch
import triton.language as tl

from memtl.kernels import quant_fused
from memtl.kernels.quant_groups import options

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def variants():
    codes, params, numel = {"codes_ptr": "*u8"}, {"params_ptr": "*i32"}, {"numel": "i32"}
    levels = {"lo": "fp32", "step": "fp32"}
    for dtype, bits in (("bf16", 4), ("fp32", 2)):
        given, made = {"grad_out_ptr": f"*{dtype}"}, {"grad_ptr": f"*{dtype}"}
        x, numel = {"x_ptr": f"*{dtype}"}, {"numel": "i32"}
        constants = options(torch.empty(0, dtype=DTYPES[dtype])) | {"BITS": bits}
        signature = given | codes | made | numel | levels
        yield quant_fused._quant_apply_range_kernel, dtype, signature, constants
        tables = {"weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "mask_ptr": "*u8"}
        sizes = dict.fromkeys(("numel", "weights", "biases", "inner"), "i32")
        ends = dict.fromkeys(("lo", "hi", "middle"), "fp32")
        signature = codes | params | tables | x | sizes | ends
        narrow = {"NARROW": dtype == "fp32", "INDEX": tl.int32}
        yield quant_fused._quant_unpack_affine_kernel, dtype, signature, constants | narrow
    for activation in ("gelu", "gelu_tanh", "mish"):  # silu and its kin are less of gelu_tanh
        constants = constants | {"ACTIVATION": activation}
        signature = given | codes | params | made | numel
        yield quant_fused._quant_activation_grad_kernel, dtype, signature, constants
    signature = codes | params | x | numel
    yield quant_fused._quant_unpack_activation_kernel, dtype, signature, constants
    signature = x | codes | numel | {"lo": "fp32", "hi": "fp32", "step": "fp32", "seed": "i32"}
    yield quant_fused._quant_pack_derivative_kernel, dtype, signature, constants
