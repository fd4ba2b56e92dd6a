"""Layers that somebody changed: parametrised, normalised, pruned, quantised."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import memtl
from tests.works.matrix import LOSSY, assert_saves, assert_trains, build, on

CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
CONFIGS = {**LOSSY, "frozen": memtl.FrozenConfig()}


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
@on("fast", "low-bit", "frozen")
def test_weights_that_are_computed(column, name, when):
    """Converted before a layer's weight is parametrised, or after."""
    case = build(column)
    if when == "after":
        memtl.unconvert(case.ours)
    for model in (case.stock, case.ours):
        torch.manual_seed(0)
        for block in model.blocks:
            CHANGES[name](block.mlp.fc1)
    if when == "after":
        report = memtl.apply(case.ours, CONFIGS[column])
        assert "blocks.0.mlp.fc1" in {row.name for row in report.converted}
    assert_saves(case)
    assert_trains(case, steps=5)


@on("fast", "low-bit", "frozen")
def test_quantised_layers_are_left_alone(column):
    """Integer weights are not memtl's: such a layer is reported, and the others are converted."""

    class Rounded(nn.Linear):
        """Weights of 8 bits, as quantising libraries have them: integers in a parameter."""

        def __init__(self, layer: nn.Linear):
            super().__init__(layer.in_features, layer.out_features)
            self.scale = layer.weight.abs().max().item() / 127
            codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(codes, requires_grad=False)

    class Computing(Rounded):
        def forward(self, input):
            return input @ (self.weight.to(input.dtype) * self.scale).t() + self.bias

    case = build(column)
    memtl.unconvert(case.ours)
    for model in (case.stock, case.ours):
        torch.manual_seed(0)
        model.blocks[0].mlp.fc1 = Computing(model.blocks[0].mlp.fc1)
        model.blocks[1].mlp.unused = Rounded(nn.Linear(3, 3))
        model.blocks[0].mlp.fc1.bias.requires_grad_(column != "frozen")
        model.blocks[1].mlp.unused.requires_grad_(False)
    report = memtl.apply(case.ours, CONFIGS[column])
    reasons = {row.name: row.reason for row in report.skipped}
    assert "int8" in reasons["blocks.0.mlp.fc1"] and "int8" in reasons["blocks.1.mlp.unused"]
    assert case.ours.blocks[0].mlp.fc1.weight.dtype == torch.int8
    assert_saves(case, ratio=3)
    assert_trains(case, steps=5)
