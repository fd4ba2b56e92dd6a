"""How near the gradients are to the exact ones, on the shipped ViT and real digits."""

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl import assets, fidelity
from memtl.tasks import load_digits
from memtl.training import Settings, fit


@pytest.fixture(scope="module")
def gradients():
    """A function config or None -> gradients of the cross-entropy of one batch, by name."""
    torch.manual_seed(0)
    model = assets.load(num_classes=10)
    train = load_digits().train
    images, labels = train.images[:64], train.labels[:64]

    def run(config=None):
        model.zero_grad()
        if config is not None:
            memtl.apply(model, config)
        F.cross_entropy(model(images), labels).backward()
        if config is not None:
            memtl.unconvert(model)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    return run


def cosines(exact, approximate, vectors):
    """By name, for the vectors (biases, norms) or the matrices."""
    return {
        name: F.cosine_similarity(g.flatten(), approximate[name].flatten(), dim=0).item()
        for name, g in exact.items()
        if (g.dim() == 1) == vectors
    }


@pytest.mark.parametrize("keep", [0.1, 0.03])
def test_fast_leaves_biases_and_norms_nearly_exact(gradients, keep):
    found = cosines(gradients(), gradients(memtl.BackRazorConfig(keep=keep)), vectors=True)
    worst = min(found, key=found.get)
    assert len(found) > 50
    assert found[worst] >= 0.98, (worst, found[worst])


def test_pruning_everything_as_the_paper_does_is_further_off(gradients):
    exact = gradients()
    fast = cosines(exact, gradients(memtl.BackRazorConfig(keep=0.1)), vectors=True)
    paper = cosines(exact, gradients(memtl.BackRazorConfig.preset("paper", keep=0.1)), vectors=True)
    assert sum(paper.values()) / len(paper) < 0.98 <= min(fast.values())


def test_keeping_more_brings_weight_gradients_nearer(gradients):
    exact = gradients()
    means = []
    for keep in (0.03, 0.1, 0.5, 1.0):
        found = cosines(exact, gradients(memtl.BackRazorConfig(keep=keep)), vectors=False)
        means.append(sum(found.values()) / len(found))
    assert means == sorted(means)
    assert means[-1] > 0.98


def of_trained(name, config):
    """The shipped network after some steps on the digits, measured on a batch of them."""
    torch.manual_seed(0)
    model = assets.load(name, num_classes=10)
    task = load_digits()
    settings = Settings(steps=20, batch_size=32, learning_rate=2e-3, seed=0)
    fit(model, task.train, task.val, settings, progress=False, description="")
    model.train()
    images, labels = task.train.images[:64], task.train.labels[:64]
    found = fidelity.measure(
        model,
        lambda m: F.cross_entropy(m(images), labels),
        batch_size=64,
        configurations={"it": config},
        formats=["q8"],
        progress=False,
    )
    return next(row for row in found.configurations if row.label == "it")


def test_every_gradient_of_the_vit_is_near_at_four_bits():
    row = of_trained("vit_glyphs", memtl.LowBitConfig(bits=4))
    assert fidelity.Thresholds(worst=0.97, mean=0.99).miss(row) == ""


def test_every_gradient_of_the_cnn_is_near_with_its_norms_in_eight_bits():
    """In four the weights are too, but not the scales that a later batch norm undoes."""
    row = of_trained("cnn_glyphs", memtl.LowBitConfig(bits=4))
    assert row.weights.worst_cosine >= 0.97 and row.weights.mean_cosine >= 0.98
    assert row.input_cosine >= 0.97
    row = of_trained("cnn_glyphs", memtl.LowBitConfig(bits=4, norm=8))
    assert fidelity.Thresholds(worst=0.97, mean=0.99).miss(row) == ""
