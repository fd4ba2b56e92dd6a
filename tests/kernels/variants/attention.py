"""Of attention_grad."""

import importlib

import torch

module = importlib.import_module("memtl.kernels.attention")  # not the launcher

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def variants():
    """Every choice of tiles, by features and keys, but the least; CAUSAL for some."""
    for dtype, width, keys, causal in (
        ("bf16", 64, 128, False),
        ("bf16", 64, 256, True),
        ("bf16", 64, 1024, False),
        ("fp16", 80, 1024, True),
        ("bf16", 256, 1024, False),
        ("fp32", 64, 1024, False),
    ):
        given = (DTYPES[dtype], width, width)
        x, strides = f"*{dtype}", ("i32", "i32", "i32", "constexpr")
        operands = dict.fromkeys(("grad_out_ptr", "q_ptr", "k_ptr", "v_ptr"), x)
        rest = {"logs_ptr": "*fp32", "deltas_ptr": "*fp32", "scale": "fp32"}
        rest |= dict.fromkeys("HMN", "i32")
        rest |= {f"{name}_strides": strides for name in ("grad_out", "q", "k", "v")}
        signature = operands | {"grad_ptr": x} | rest
        options = module._queries_options(*given, keys, causal)
        yield module._queries_kernel, dtype, signature, options | _stride_one(signature)
        if keys == 1024:  # its tiles do not depend on that number
            signature = operands | {"grad_k_ptr": x, "grad_v_ptr": x} | rest
            options = module._keys_options(*given, causal)
            yield module._keys_kernel, dtype, signature, options | _stride_one(signature)


def _stride_one(signature):
    return {(i, 3): 1 for i, types in enumerate(signature.values()) if isinstance(types, tuple)}
