"""A few queries that read frozen keys and values; the gradient in closed form."""

import torch
from torch import Tensor


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, jacobian: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v, and its Jacobian: scale times the covariance of k and v."""
    wide_k, wide_v = _wide(k), _wide(v)
    p = _probabilities(q, k, mask, scale)
    out = p @ wide_v
    if jacobian is None:
        return out.to(q.dtype), q.new_empty((0,))
    centered = wide_v[:, :, None] - out[:, :, :, None]  # [B, H, T, N, e]
    j = torch.einsum("bhtn,bhnd,bhtne->bhtde", p * scale, wide_k, centered)
    return out.to(q.dtype).contiguous(), j.to(jacobian).contiguous()


def query_attention_grad(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The softmax again, and its backward."""
    p = _probabilities(q, k, mask, scale)
    dp = _wide(grad_out) @ _wide(v).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return (scale * ds @ _wide(k)).to(q.dtype).contiguous()


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, T, N]; 0 in a row that no key takes part in."""
    scores = _wide(q) @ _wide(k).mT * scale
    if mask is not None:
        scores = scores + mask.to(scores.dtype)[:, :, None]
    return torch.where(scores.isneginf().all(-1, keepdim=True), 0.0, scores.softmax(-1))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
