"""Of bits_select and bits_expand."""

from memtl.kernels import select


def variants():
    block = {"BLOCK": select.BLOCK}
    signature = {"bits_ptr": "*u8", "counts_ptr": "*i64", "numel": "i64"}
    yield select._bits_count_kernel, "u8", signature, block
    for dtype in ("bf16", "fp32"):
        x, sizes = f"*{dtype}", {"numel": "i64", "count": "i64"}
        first = {"x_ptr": x, "bits_ptr": "*u8", "ends_ptr": "*i64", "values_ptr": x}
        yield select._bits_select_kernel, f"{dtype} moved", first | sizes, block
        first = {"values_ptr": x, "bits_ptr": "*u8", "ends_ptr": "*i64", "x_ptr": x}
        yield select._bits_expand_kernel, f"{dtype} moved", first | sizes, block
