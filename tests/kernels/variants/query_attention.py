"""Of query_attention and its gradient."""

import importlib
import itertools

import torch

module = importlib.import_module("memtl.kernels.query_attention")  # not the launcher

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def variants():
    for dtype, width in (
        ("fp32", 16),
        ("fp16", 64),
        *itertools.product(("bf16", "fp32", "fp64"), (64, 256)),
    ):
        yield from _of(dtype, width, "*fp32" if width == 64 else f"*{dtype}")


def _of(dtype, width, jacobian):
    """Heads of ``width`` features that lie beside each other; a mask for all but the narrowest."""
    x, strides = f"*{dtype}", ("i32", "i32", "i32", "constexpr")
    tensors = {"q_ptr": x, "k_ptr": x, "v_ptr": x, "mask_ptr": x}
    sizes = {"scale": "fp64", **dict.fromkeys("HTNde", "i32")}
    sizes |= {"q_strides": strides, "k_strides": strides, "v_strides": strides}
    sizes |= {"mask_strides": ("i32", "i32", "i32")}
    given = (DTYPES[dtype], width, width)
    for kernel, signature, constants in (
        (module._out_kernel, tensors | {"out_ptr": x}, module._out_options(*given)),
        (
            module._jacobian_kernel,
            tensors | {"out_ptr": x, "jacobian_ptr": jacobian},
            module._jacobian_options(*given),
        ),
        (
            module._grad_kernel,
            {"grad_out_ptr": x, **tensors, "grad_ptr": x, "grad_out_strides": strides},
            module._grad_options(*given),
        ),
    ):
        signature |= sizes
        stride_one = {(i, 3): 1 for i, types in enumerate(signature.values()) if types == strides}
        no_mask = {"mask_ptr": None} if width < 64 else {}
        yield kernel, dtype, signature, constants | stride_one | no_mask
