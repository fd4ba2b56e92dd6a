"""Attention's gradient by torch's own attention: its forward run again, then its backward.

It serves every device: torch's fused kernels, run twice, were faster on an H200 than a kernel that
made no output.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_grad(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run torch's own (fused) attention forward again on q, k, v, then its backward.

    A few percent of a transformer block's work, and neither the N x N map nor the output nor the
    log-sum has to be kept. Dropout is replayed from the generator's saved state, and the present
    state restored.
    """
    leaves = [_aligned(t).requires_grad_() for t in (q, k, v)]
    if mask is not None and mask_grad:
        mask = mask.detach().requires_grad_()
        leaves.append(mask)
    q, k, v = leaves[:3]
    replay = contextlib.nullcontext() if rng_state is None else _replayed(rng_state, q)
    with replay, torch.enable_grad(), _recording():
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    given = list(_grads(out, leaves, _aligned(grad_out)))
    dq, dk, dv, *rest = (given.pop(0).contiguous() for _ in leaves)  # one copy at a time
    return dq, dk, dv, rest[0] if mask_grad else q.new_empty((0,))


def _grads(out: Tensor, leaves: list[Tensor], grad_out: Tensor) -> Sequence[Tensor]:
    """The gradients of ``leaves``. Where all of attention is one step of autograd's, that step is
    taken by itself, which spares a host the engine, started inside a backward."""
    step = out.grad_fn
    assert step is not None
    inputs = [getattr(node, "variable", None) for node, _ in step.next_functions]
    if len(inputs) >= len(leaves) and all(map(operator.is_, inputs, leaves)):
        with torch.no_grad():
            grads = step(grad_out)[: len(leaves)]  # type: ignore[operator]
        if all(grad is not None for grad in grads):
            return grads
    return torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)


@contextlib.contextmanager
def _replayed(state: Tensor, like: Tensor) -> Iterator[None]:
    """Random numbers from the generator's ``state``; after it, as if none had been drawn."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        (torch.cuda.set_rng_state if like.is_cuda else torch.set_rng_state)(state)
        yield


def _aligned(t: Tensor) -> Tensor:
    """t apart from its graph; where torch's kernels on a GPU, which read 16 bytes at once, would
    stumble over where it begins, a copy."""
    return t.clone().detach() if t.is_cuda and t.data_ptr() % 16 else t.detach()


def _recording() -> torch._C._ForceDispatchKeyGuard:
    """Let autograd record inside an operator: under a dispatch mode (a profiler's, a selective
    checkpoint's) the dispatcher has left its keys out by the time an operator runs."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded)
