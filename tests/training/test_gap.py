"""The distance of Gaussians: closed forms, the textbook formula, and what a network reads."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from memtl.models import Normalized, timm_model
from memtl.tasks import ImageFiles, Split
from memtl.training import domain_gap, frechet_distance


def by_the_formula(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(np.atleast_2d(s @ t) if s.ndim else np.atleast_2d(s * t))
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.atleast_2d(s + t))
    return distance - 2 * np.trace(root).real


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "features"), [(50, 41, 6), (30, 200, 17), (40, 40, 1)])
def test_as_the_formula(dtype, n, m, features):
    a = torch.randn(n, features).to(dtype)
    b = (torch.randn(m, features) @ torch.randn(features, features) + 1).to(dtype)
    assert frechet_distance(a, b) == pytest.approx(by_the_formula(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "features"), [(30, 5), (9, 40), (2, 3), (64, 64)])
def test_equal_samples_are_at_no_distance(n, features):
    x = 100 * torch.randn(features, n).T
    order = torch.randperm(n)
    assert frechet_distance(x, x[order]) == pytest.approx(0, abs=1e-9 * x.square().sum().item())
    # A shift alone is its own square.
    moved = x.double() + 3
    assert frechet_distance(x.double(), moved) == pytest.approx(9 * features, rel=1e-6)


def test_gaussians_on_a_line():
    # Samples with exactly the mean and deviation asked for.
    def line(mean, deviation):
        x = torch.randn(70, dtype=torch.float64)
        return ((x - x.mean()) / x.std() * deviation + mean)[:, None]

    found = frechet_distance(line(1.0, 2.0), line(-2.5, 0.5))
    assert found == pytest.approx(3.5**2 + 1.5**2)


def test_diagonal_gaussians():
    # Orthogonal columns: the covariance is diagonal, with what was put there.
    def diagonal(mean, deviations):
        x = torch.randn(60, len(deviations) + 1, dtype=torch.float64)
        x[:, 0] = 1
        q = torch.linalg.qr(x).Q[:, 1:]  # each column has mean 0 and length 1
        return q * 59**0.5 * torch.tensor(deviations) + mean

    s, t = [3.0, 1e-3, 0.0, 50.0], [1.0, 2e-3, 2.0, 40.0]
    wanted = 4 * 0.25 + sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
    assert frechet_distance(diagonal(0.5, s), diagonal(0.0, t)) == pytest.approx(wanted)


def test_fewer_samples_than_features():
    # Two planes in 30 dimensions that have nothing in common: the square root is zero.
    a, b = (torch.zeros(8, 30, dtype=torch.float64) for _ in range(2))
    a[:, :2], b[:, 2:4] = torch.randn(8, 2), torch.randn(8, 2)
    wanted = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted.item())
    # And what they share, with half the deviation.
    b = torch.zeros_like(a)
    b[:, :2] = a[:, :2] / 2
    wanted = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() / 4
    assert frechet_distance(a, b) == pytest.approx(wanted.item())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm_model("resnet18", num_classes=4, in_chans=1).train()


def test_of_a_network(model):
    source = Split(torch.rand(12, 1, 32, 32), torch.zeros(12).long())
    target = Split(torch.rand(9, 1, 32, 32) ** 3, torch.zeros(9).long())
    other = Split(torch.cat([source.images[:8], target.images[8:]]), target.labels)
    gap = domain_gap(model, source, target, batch_size=5)
    assert model.training and gap > 0
    assert gap == domain_gap(model, source, target, samples=100)
    assert gap != domain_gap(model, source, target, seed=1)  # which 9 of the 12
    assert domain_gap(model, source, source, samples=12) == pytest.approx(0, abs=1e-9 * gap)
    assert domain_gap(model, source, other) < gap
    # Nine of nine are all of them.
    head = model.get_classifier()
    read = []
    hook = head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model.eval()
    with torch.no_grad():
        model(source.images[:9]), model(target.images)
    hook.remove()
    model.train()
    exact = domain_gap(model, Split(source.images[:9], target.labels), target)
    assert exact == pytest.approx(frechet_distance(*read), rel=1e-4)
    inside = Normalized(model, 0.0, 1.0)
    assert domain_gap(inside, source, target) == pytest.approx(gap, rel=1e-4)


def test_images_that_are_read_when_asked_for(model, tmp_path):
    from PIL import Image

    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    files = ImageFiles(sorted(tmp_path.glob("*.png")), 32, "none")
    wide = timm_model("resnet18", num_classes=2)
    lazy = Split(files, torch.zeros(6).long())
    held = Split(files[:], lazy.labels)
    assert domain_gap(wide, lazy, held, samples=6) == pytest.approx(0, abs=1e-6)
    assert domain_gap(wide, lazy, held, samples=4) == domain_gap(wide, held, lazy, samples=4)


def test_what_is_refused(model):
    good = torch.randn(5, 3)
    for a, b, error, message in (
        (good[:1], good, ValueError, r"a must be .* two samples .* got \[1, 3\]"),
        (good, good[:, :0], ValueError, r"b must be .* one feature, got \[5, 0\]"),
        (good, good[0], ValueError, r"b must be \[n, D\]"),
        (good, good[:, :2], ValueError, r"as many features, got \[5, 3\], \[5, 2\]"),
        (good, good * math.nan, FloatingPointError, "b must be finite"),
        (good.int(), good, TypeError, "a must be a tensor in floating point, got torch.int32"),
    ):
        with pytest.raises(error, match=message):
            frechet_distance(a, b)
    split = Split(torch.rand(4, 1, 32, 32), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"samples must be at least 2, got \[4, 4, 1\]"):
        domain_gap(model, split, split, samples=1)
    with pytest.raises(ValueError, match="has no classifier"):
        domain_gap(nn.Conv2d(1, 1, 1), split, split)
