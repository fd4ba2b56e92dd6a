"""How far two domains are apart in the eyes of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tasks import Split
from ..tasks.subset import Selected


def domain_gap(
    model: nn.Module,
    source: Split,
    target: Split,
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> float:
    """:func:`frechet_distance` between what the classifier of ``model``, in evaluation mode, reads
    of ``source`` and of ``target``.

    Both are cut at random to as many samples, since the distance of few samples is too large: of
    two draws from one Gaussian it is a third of the variance (all features together) with as many
    samples as features, a fiftieth with 16 times as many. Gaps are therefore comparable under one
    network and one ``samples`` alone, and the gap between two halves of the source says what zero
    looks like there.

    This is the distance behind FID, in the features of the network in question; FID is what robust
    tickets were set against (Fu et al., DAC 2023). A kernel's MMD would be unbiased, but its size
    hangs on the kernel, and CKA compares networks on the same samples.

    Args:
        model: has a linear classifier, as :class:`memtl.methods.LinearProbeConfig` finds it.
        source, target: their labels are not looked at.
        samples: of each, at most; None for as many as the smaller one has.
        seed: of which.
        batch_size: images at a time.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no linear classifier, a split or ``samples`` is smaller than 2.
        FloatingPointError: a feature is not finite.

    Memory: the features of both, in float64.
    """
    from ..methods.base.features import collect  # which needs training itself

    sizes = [len(source), len(target), *([] if samples is None else [samples])]
    if (n := min(sizes)) < 2:
        raise ValueError(f"source, target and samples must be at least 2, got {sizes}")
    generator = torch.Generator().manual_seed(seed)

    def features(split: Split) -> Tensor:
        index = torch.randperm(len(split), generator=generator)[:n]
        return collect(model, Selected(split.images, index), batch_size=batch_size)

    return frechet_distance(features(source), features(target))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Frechet (2-Wasserstein) distance between the Gaussians of two sets of features,
    ``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))``, means m and covariances S being those of the
    samples; what FID is (Heusel et al., NeurIPS 2017).

    Neither a covariance nor a matrix square root is formed. With ``S = R^T R`` of the QR
    decomposition of the centred samples, the trace of the square root is the sum of the singular
    values of ``R R'^T``: no condition number is squared, nothing complex can come up, and fewer
    samples than features are no special case.

    Args:
        a, b: ``[n, D]`` and ``[m, D]`` in floating point, of at least two samples.

    Raises:
        TypeError: they are not in floating point.
        ValueError: they have other shapes, or their D differ.
        FloatingPointError: a feature is not finite.

    Memory: copies in float64, and min(n, D) rows of each.
    """
    a, b = (_checked(x, name) for x, name in ((a, "a"), (b, "b")))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have as many features, got {[*a.shape]}, {[*b.shape]}")
    means = [x.mean(0) for x in (a, b)]
    r, s = (
        torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
        for x, mean in zip((a, b), means, strict=True)
    )
    spread = r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum()
    # Rounding alone takes it below zero.
    return ((means[0] - means[1]).square().sum() + spread.clamp_min(0)).item()


def _checked(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor in floating point, got {got}")
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise ValueError(
            f"{name} must be [n, D], of at least two samples and one feature, got {[*x.shape]}"
        )
    if not x.isfinite().all():
        raise FloatingPointError(f"{name} must be finite, but holds NaN or infinities")
    return x.detach().cpu().double()
