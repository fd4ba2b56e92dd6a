"""Measuring how close gradients are: what is exact is found exact, what is wrong as wrong as it is,
and the model is left as it was."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import fidelity, memory
from memtl.fidelity import Thresholds, measure
from memtl.fidelity.compare import NEGLIGIBLE, agreement, sort
from memtl.storage import Dense, Quantized, TopK


@dataclasses.dataclass(frozen=True)
class Off(Dense):
    """Reads back as a multiple of what was kept, or not at all."""

    factor: float | None = 2.0

    def unpack(self, packed, shape, dtype):
        if self.factor is None:
            raise RuntimeError("cannot be read")
        return super().unpack(packed, shape, dtype) * self.factor

    def __str__(self):
        return "off"


class Net(nn.Module):
    """Two convolutions with a batch norm, dropout, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * 64, 32), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def step():
    x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
    return lambda model: F.cross_entropy(model(x), y)


def one(model, step, format, **options):
    """The rows of a single format, by role."""
    result = measure(model, step, formats={"it": format}, configurations={}, **options)
    return {row.role: row for row in result.roles}, result


def test_exact_formats_are_found_exact(model, step):
    rows, result = one(model, step, Dense(), batch_size=4)
    assert list(rows) == ["linear", "convolution", "norm", "activation"]
    assert result.absent == ("attention",)
    for role, row in rows.items():
        assert row.error == ""
        if role in ("linear", "convolution"):
            assert row.bits == 32
            # The same products, of the same numbers; how a library orders a sum is its own affair
            # (a convolution's bias, on some machines).
            assert max(row.weights.mean_error, row.vectors.mean_error) < 1e-6
        for group in (row.weights, row.vectors):
            assert group.worst_cosine == pytest.approx(1, abs=1e-6)
            assert group.largest_error < 1e-3
        assert all(c == pytest.approx(1, abs=1e-6) for c in row.depths.values())


def test_stock_bytes_are_those_that_memory_counts(model, step):
    _, result = one(model, step, Dense(), batch_size=4)
    assert result.stock_bytes * 4 == memory.saved_bytes(step, model)


def test_a_known_factor_is_measured_as_such(model, step):
    rows, _ = one(model, step, Off(factor=3.0))
    row = rows["linear"]
    assert row.weights.compared == 4 and row.weights.largest_error == pytest.approx(2, rel=1e-5)
    assert row.weights.farthest in ("body.6.weight", "head.weight")
    assert row.weights.mean_error == pytest.approx(1, rel=1e-5)  # two of the four weights
    assert row.weights.worst_cosine == pytest.approx(1)  # a cosine does not see a factor
    assert row.vectors.largest_error == 0  # biases need nothing that was kept
    rows, _ = one(model, step, Off(factor=-1.0))
    assert rows["linear"].weights.worst_cosine == pytest.approx(-1)


def test_an_error_is_a_row_that_says_so(model, step):
    rows, result = one(model, step, Off(factor=None))
    assert rows["linear"].error == "RuntimeError: cannot be read"
    assert math.isnan(rows["linear"].bytes) and not rows["linear"].depths
    assert "linear it: RuntimeError: cannot be read" in str(result)
    assert all(choice.row is None for choice in result.choices)


def test_bits_are_what_the_format_takes(model, step):
    rows, _ = one(model, step, Quantized(4))
    assert rows["linear"].bits == rows["convolution"].bits == 4.5
    assert rows["activation"].bits < 4  # the derivative in a fixed range, a mask for the ReLU
    rows, _ = one(model, step, TopK(0.25, values="fp16"))
    assert rows["linear"].bits == pytest.approx(0.25 * 16 + 1)  # whole blocks and a bitmap


def test_depths_go_from_the_output_to_the_input(model, step):
    rows, _ = one(model, step, Quantized(2))
    assert list(rows["norm"].depths) == ["head", "body.6", "body.3", "body.1", "body.0"]
    cosines = list(rows["norm"].depths.values())
    assert cosines[:3] == pytest.approx([1] * 3, abs=1e-6)  # from the norm's input on it is off
    assert max(cosines[3:]) < 0.9999 and cosines[4] == rows["norm"].input_cosine
    assert all(c == pytest.approx(1, abs=1e-6) for c in rows["linear"].depths.values())


def test_inputs_that_need_no_gradient_are_followed_to_the_first_layer_that_trains(model, step):
    model.body.requires_grad_(False)
    rows, _ = one(model, step, Quantized(2))
    assert list(rows["linear"].depths) == ["head"]
    assert rows["linear"].weights.compared == 1


def state(model):
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [set(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "needs": [p.requires_grad for p in model.parameters()],
        "gradients": [id(p.grad) for p in model.parameters()],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, step, fails):
    model.body[5].eval()
    step(model).backward()
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    calls = []

    def sometimes(model):
        calls.append(1)
        if fails and len(calls) > 3:  # not in the stock runs
            raise KeyboardInterrupt
        return step(model)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure(model, sometimes, formats=["q4"])
    else:
        measure(model, sometimes, formats=["q4"])
    assert state(model) == before
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
    assert torch.equal(torch.get_rng_state(), random)


def test_measuring_twice_gives_the_same(model, step):
    first, second = (measure(model, step, formats=["q3", "topk10"]) for _ in range(2))
    assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
    assert all(row.error == "" for row in (*first.configurations, *first.roles))
    labels = [row.label for row in first.configurations]
    assert labels[:10] == list(fidelity.configurations())


def test_rounding_noise_is_left_out_and_counted():
    exact = {"a": torch.tensor([[3.0, 4.0], [0, 0]]), "b": torch.tensor([4.0 * NEGLIGIBLE, 0])}
    groups = sort(exact)
    assert list(groups.weights) == ["a"] and groups.negligible == ("b",)
    assert sort({**exact, "c": torch.ones(2, 1, 1)}).vectors.keys() == {"c"}


def test_what_is_missing_is_worse_than_anything():
    exact = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    found = agreement({"a": -torch.ones(2, 2)}, exact)
    assert found.worst == "b" and math.isnan(found.worst_cosine)
    assert found.farthest == "b" and found.compared == 2


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m.requires_grad_(False), ValueError, "no parameter of this Net requires"),
        (lambda m: m.half(), ValueError, "is torch.float16: measure model.float"),
        (lambda m: memtl.apply(m, memtl.LowBitConfig()), ValueError, "already converted"),
    ],
)
def test_models_that_cannot_be_measured(model, step, change, error, said):
    change(model)
    with pytest.raises(error, match=said):
        measure(model, step, formats=["q4"])


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        (lambda m: m(torch.randn(4, 3, 8, 8)), ValueError, "must be a scalar, got the shape .4, 5"),
        (lambda m: m(torch.randn(4, 3, 8, 8)).sum().item(), TypeError, "a tensor, got float"),
        (lambda m: torch.ones(()), ValueError, "depends on no parameter"),
        (lambda m: m.head.bias.sum() * math.inf, ValueError, "the loss is"),
        (lambda m: m.head.bias.sum() * 0, ValueError, "every exact gradient is zero"),
        ("step", TypeError, "step must be callable"),
    ],
)
def test_losses_that_cannot_be_measured(model, step, error, said):
    with pytest.raises(error, match=said):
        measure(model, step, formats=["q4"])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"formats": ["q5"]}, ValueError, "format 'q5': bits must be one of"),
        ({"formats": ["topk0"]}, ValueError, "format 'topk0': keep must be in"),
        ({"formats": ["zip"]}, ValueError, "unknown format 'zip': known are q8"),
        ({"formats": [TopK()]}, ValueError, "leaves `keep` open"),
        ({"formats": [4]}, TypeError, "must be memtl.storage.Format or their short names, got 4"),
        ({"formats": "q4"}, TypeError, "got the string 'q4'"),
        ({"formats": []}, ValueError, "at least one format"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_options_that_are_wrong(model, step, options, error, said):
    with pytest.raises(error, match=said):
        measure(model, step, **options)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_thresholds_out_of_range(value):
    with pytest.raises(ValueError, match="worst must be in"):
        Thresholds(worst=value)
    with pytest.raises(ValueError, match="mean must be in"):
        Thresholds(mean=value)
