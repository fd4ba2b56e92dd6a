"""The readable definition of every operator, in plain PyTorch, on any device.

What an operator computes is what stands here; the kernels are tested against it, and it serves
where no kernel was built. Optimised code never imports this package.
"""

from .attention import attention_grad
from .bits import bits_apply, bits_expand, bits_pack, bits_pack_between, bits_select
from .fused import (
    quant_activation_grad,
    quant_apply_range,
    quant_channel_norm_grad,
    quant_norm_grad,
    quant_pack_derivative,
    quant_unpack_activation,
    quant_unpack_affine,
)
from .masked import masked_linear, masked_linear_input_grad, masked_linear_weight_grad
from .quant import (
    quant_pack,
    quant_pack_normalized,
    quant_pack_range,
    quant_unpack,
    quant_unpack_range,
)
from .query_attention import query_attention, query_attention_grad
from .threshold import threshold_magnitude, threshold_mask
from .topk import (
    topk_conv_weight_grad,
    topk_pack,
    topk_pack_sample,
    topk_unpack,
    topk_weight_grad,
)

OPS = {
    op.__name__: op
    for op in (
        topk_pack,
        topk_pack_sample,
        topk_unpack,
        topk_weight_grad,
        topk_conv_weight_grad,
        quant_pack,
        quant_pack_normalized,
        quant_unpack,
        quant_pack_range,
        quant_unpack_range,
        quant_unpack_affine,
        quant_unpack_activation,
        quant_activation_grad,
        quant_pack_derivative,
        quant_apply_range,
        quant_norm_grad,
        quant_channel_norm_grad,
        bits_pack,
        bits_pack_between,
        bits_apply,
        bits_select,
        bits_expand,
        threshold_magnitude,
        threshold_mask,
        masked_linear,
        masked_linear_input_grad,
        masked_linear_weight_grad,
        attention_grad,
        query_attention,
        query_attention_grad,
    )
}
