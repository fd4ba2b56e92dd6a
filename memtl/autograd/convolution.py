"""The patch convolution: kernel and stride equal, so that every input element is used once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .keep import first_order, keep, kept


class PatchConvolutionFunction(torch.autograd.Function):
    """A 2-d convolution that cuts x [B, C, H, W] into p x q patches: a linear layer on patches.

    Gradients of x and the bias are exact; the weight's is taken from the stored patches, packed as
    a [B, patches, C p q] tensor. Memory: ``format.nbytes`` of it if the weight trains, else none.
    """

    @staticmethod
    def forward(x, weight, bias, format, cast, need_x, need_weight):
        if cast is not None:
            weight = weight.to(cast)
            bias = None if bias is None else bias.to(cast)
        return F.conv2d(x, weight, bias, stride=weight.shape[2:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, format, cast, need_x, need_weight = inputs
        ctx.x_shape, ctx.weight_shape, ctx.weight_dtype = x.shape, weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        patches = cut_patches(x, weight.shape[2:]) if need_weight else None
        keep(ctx, (patches, format), exact=(weight if need_x else None,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (patches,), (weight,) = kept(ctx)
        grad_x = grad_weight = grad_bias = None
        if weight is not None and ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad_out,
                grad_out.new_empty((1,)).expand(ctx.x_shape),  # only its shape is read
                weight.to(grad_out.dtype),
                None,
                ctx.weight_shape[2:],
                [0, 0],
                [1, 1],
                False,
                [0, 0],
                1,
                [True, False, False],
            )[0]
        if patches is not None and ctx.needs_input_grad[1]:
            rows = grad_out.flatten(2).transpose(1, 2)
            grad_weight = patches.weight_grad(rows).view(ctx.weight_shape).to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_out.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def cut_patches(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [B, C, H, W] -> [B, (H // p) (W // q), C p q]; what no patch covers is left out."""
    p, q = size
    channels, h, w = x.shape[1], x.shape[2] // p, x.shape[3] // q
    x = x[:, :, : h * p, : w * q].unflatten(3, (w, q)).unflatten(2, (h, p))  # B C h p w q
    return x.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], h * w, channels * p * q)
