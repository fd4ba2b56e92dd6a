"""Triton kernels, installed as ``memtl.kernels``; importing this package needs Triton.

``OPS`` names the operators that Triton brings and their launchers. Every launcher has exactly the
signature of its operator in ``memtl/_ops.py`` and computes what ``memtl.reference`` computes: bit
for bit, but for sums, whose order is its own.
"""

from .bits import bits_apply, bits_pack, bits_pack_between
from .masked import masked_linear, masked_linear_input_grad, masked_linear_weight_grad
from .quant import (
    quant_pack,
    quant_pack_normalized,
    quant_pack_range,
    quant_unpack,
    quant_unpack_range,
)
from .quant_fused import (
    quant_activation_grad,
    quant_apply_range,
    quant_pack_derivative,
    quant_unpack_activation,
    quant_unpack_affine,
)
from .quant_norm import quant_channel_norm_grad, quant_norm_grad
from .query_attention import query_attention, query_attention_grad
from .select import bits_expand, bits_select
from .threshold import threshold_magnitude, threshold_mask
from .topk import topk_pack, topk_pack_sample, topk_unpack
from .topk_grad import topk_conv_weight_grad, topk_weight_grad

OPS = {
    "topk_pack": topk_pack,
    "topk_pack_sample": topk_pack_sample,
    "topk_unpack": topk_unpack,
    "topk_weight_grad": topk_weight_grad,
    "topk_conv_weight_grad": topk_conv_weight_grad,
    "quant_pack": quant_pack,
    "quant_pack_normalized": quant_pack_normalized,
    "quant_unpack": quant_unpack,
    "quant_pack_range": quant_pack_range,
    "quant_unpack_range": quant_unpack_range,
    "quant_unpack_affine": quant_unpack_affine,
    "quant_unpack_activation": quant_unpack_activation,
    "quant_activation_grad": quant_activation_grad,
    "quant_pack_derivative": quant_pack_derivative,
    "quant_apply_range": quant_apply_range,
    "quant_norm_grad": quant_norm_grad,
    "quant_channel_norm_grad": quant_channel_norm_grad,
    "bits_pack": bits_pack,
    "bits_pack_between": bits_pack_between,
    "bits_apply": bits_apply,
    "bits_select": bits_select,
    "bits_expand": bits_expand,
    "threshold_magnitude": threshold_magnitude,
    "threshold_mask": threshold_mask,
    "masked_linear": masked_linear,
    "masked_linear_input_grad": masked_linear_input_grad,
    "masked_linear_weight_grad": masked_linear_weight_grad,
    "query_attention": query_attention,
    "query_attention_grad": query_attention_grad,
}
