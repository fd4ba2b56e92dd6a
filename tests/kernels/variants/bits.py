"""Of bits_pack, bits_pack_between and bits_apply."""

from memtl.kernels import bits

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def variants():
    signature = {"mask_ptr": "*u8", "bits_ptr": "*u8", "numel": "i64"}
    yield bits._bits_pack_kernel, "u8", signature, {"BLOCK": bits._block(1)}
    for dtype, itemsize in ITEMSIZE.items():
        x = f"*{dtype}"
        signature = {"x_ptr": x, "bits_ptr": "*u8", "y_ptr": x, "scale": "fp64", "numel": "i64"}
        block = bits._block(itemsize)
        between = {"x_ptr": x, "bits_ptr": "*u8", "lo": "fp64", "hi": "fp64", "numel": "i64"}
        yield bits._bits_pack_between_kernel, f"{dtype} read", between, {"BLOCK": block}
        yield bits._bits_apply_kernel, dtype, signature, {"BLOCK": block}
