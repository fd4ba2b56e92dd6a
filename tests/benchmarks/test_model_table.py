"""The check of whole models: that it passes what works, and sees every fault it is there for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import memtl
from benchmarks.models import table, zoo
from benchmarks.models.check import Check, back_razor, check
from memtl.nn.swap import swap

ROOT = Path(__file__).parents[2]


class Tower(nn.Module):
    """Layers that memtl converts, a buffer that the forward changes, dropout, an unused weight."""

    def __init__(self):
        super().__init__()
        layers = []
        for _ in range(3):
            layers += [nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1)]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 64))
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


@pytest.fixture
def tower():
    return Tower().train(), {"x": torch.randn(8, 32, 64)}


def faulty(fault):
    """The conversion, and then ``fault(model)``."""

    def convert(model, keep):
        report = back_razor(model, keep)
        fault(model)
        return report

    return convert


def breaking(forward):
    """The conversion, with the last linear layer's forward replaced."""

    class Broken(memtl.nn.layers.Layer):
        pass

    Broken.forward = forward

    def fault(model):
        layer = model.layers[-1]
        memtl.nn.swap.unswap(layer)
        swap(layer, Broken)

    return faulty(fault)


class Backward(torch.autograd.Function):
    """The identity, with another backward."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def gradient_through(change):
    def forward(self, x):
        weight = Backward.apply(self.weight, change)
        return nn.functional.linear(x, weight, self.bias)

    return breaking(forward)


def messages(model, inputs, convert):
    return "; ".join(check(model, inputs, convert).failures())


# -------------------------------------------------------------------------------------- all is well


def test_a_model_that_works(tower):
    model, inputs = tower
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = check(model, inputs)
    assert found.failures() == [] and found.repeats and found.worst_meet()
    assert found.pruned.weights.compared == 4 and found.pruned.vectors.compared == 10
    # The biases in front of a normalisation have gradients, the unused weight has none.
    assert found.pruned.weights.negligible == 0
    assert 0.5 < found.pruned.weights.worst_cosine <= found.pruned.weights.mean_cosine < 1
    assert found.unpruned.weights.mean_slope == pytest.approx(1, abs=0.05)
    assert found.kept_bytes == sum(layer.bytes for layer in found.remaining)
    kinds = {(layer.layer, layer.kind, layer.status) for layer in found.remaining}
    assert ("layers.*", "Linear", "converted: linear") in kinds
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050", "Bert"])
def test_models_of_the_list(name):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    entry = next(entry for entry in zoo.MODELS if entry.name == name)
    model, inputs = entry.build()
    found = check(model, inputs)
    assert not found.error
    assert found.same_forward and found.same_buffers and found.same_keys
    assert not found.pruned.missing and not found.pruned.not_finite
    assert found.classes_back and found.forward_back


def test_gradients_that_are_rounding_noise_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    found = check(model.train(), {"input": torch.randn(16, 3, 8, 8)})
    assert found.pruned.vectors.negligible == 1  # the bias of the convolution
    assert found.pruned.vectors.compared == 3


# ------------------------------------------------------------------------------------------- faults


def test_a_forward_that_is_off_by_a_roundoff(tower):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * (1 + 2**-23)

    convert = breaking(forward)
    assert "the forward differs" in messages(*tower, convert)


def test_a_forward_that_draws_random_numbers_of_its_own(tower):
    def forward(self, x):
        torch.rand(1)
        return nn.functional.dropout(nn.functional.linear(x, self.weight, self.bias), 0.1)

    assert "the forward differs" in messages(*tower, breaking(forward))


def test_buffers_that_are_updated_twice(tower):
    def fault(model):
        model.register_forward_hook(count_again)

    def count_again(module, *_):
        module.calls += 1

    failures = messages(*tower, faulty(fault))
    assert "buffers differ after the forward" in failures
    assert "unconvert leaves" not in failures  # a hook is no attribute...
    assert "the forward differs after unconvert" in failures  # ...and shows here


def test_a_changed_key(tower):
    def fault(model):
        if not hasattr(model, "more"):
            model.register_buffer("more", torch.zeros(3))

    assert "keys of the state_dict" in messages(*tower, faulty(fault))


def test_a_gradient_in_another_direction(tower):
    model, inputs = tower
    found = check(model, inputs, gradient_through(lambda grad: grad.flip(0)))
    for gradients in (found.pruned, found.unpruned):
        assert gradients.weights.worst == "layers.12.weight"
        assert abs(gradients.weights.worst_cosine) < 0.3
    assert "keep 1: mean cosine of the weights" in "; ".join(found.failures())
    assert not found.worst_meet()


def test_a_gradient_of_the_wrong_size(tower):
    found = check(*tower, gradient_through(lambda grad: 2 * grad))
    assert "keep 1: mean slope" in "; ".join(found.failures())


def test_a_gradient_of_zeros(tower):
    found = check(*tower, gradient_through(torch.zeros_like))
    assert found.pruned.weights.worst_cosine == 0


def test_a_missing_gradient(tower):
    found = check(*tower, breaking(lambda self, x: x @ self.weight.detach().T + self.bias))
    assert found.pruned.missing == ("layers.12.weight",)
    assert "1 gradients missing (layers.12.weight)" in "; ".join(found.failures())


def test_a_gradient_that_is_not_finite(tower):
    def spoil(grad):
        grad = grad.clone()
        grad[0, 0] = torch.nan
        return grad

    found = check(*tower, gradient_through(spoil))
    assert found.unpruned.not_finite == ("layers.12.weight",)
    failures = "; ".join(found.failures())
    assert "1 gradients not finite (layers.12.weight)" in failures
    assert "mean cosine of the weights nan" in failures


def test_bytes_that_are_still_kept(tower):
    def fault(model):
        for module in list(model.modules()):
            if type(module).__name__ != "Tower" and hasattr(type(module), "memtl_original"):
                if not isinstance(module, nn.LayerNorm):
                    memtl.nn.swap.unswap(module)

    model, inputs = tower
    found = check(model, inputs, faulty(fault))
    assert found.ratio < 4
    assert f"{found.ratio:.2f}x fewer bytes" in found.failures()


def test_what_unconvert_does_not_undo(tower):
    def fault(model):
        model.layers[0].left_behind = True

    assert "unconvert leaves classes or attributes behind" in messages(*tower, faulty(fault))


def test_an_exception_is_a_result(tower):
    def forward(self, x):
        raise RuntimeError("not today\nand more")

    found = check(*tower, breaking(forward))
    assert found.failures() == ["training step at keep 0.1: RuntimeError: not today"]
    assert found.same_keys and found.same_forward is None


def test_a_conversion_that_refuses_is_a_result(tower):
    def refuse(model, keep):
        raise ValueError("nothing to convert")

    assert check(*tower, refuse).error == "convert at keep 0.1: ValueError: nothing to convert"


def test_a_model_that_does_not_repeat_itself():
    class Counting(nn.Linear):
        runs = 0

        def forward(self, x):
            Counting.runs += 1
            return super().forward(x) * Counting.runs

    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), Counting(64, 64))
    found = check(model, {"input": torch.randn(8, 64)})
    assert found.repeats is False
    assert any("as they do from run to run" in text for text in found.failures())


def test_a_model_without_gradients(tower):
    model, inputs = tower
    assert "needs a gradient" in check(model.requires_grad_(False), inputs).error


def test_nothing_was_reached():
    assert "the forward differs" in Check().failures()


# -------------------------------------------------------------------------------------- the list


def test_the_list():
    names = [entry.name for entry in zoo.MODELS]
    assert len(set(names)) == len(names)
    assert set(zoo.QUICK) <= set(names)
    timm = pytest.importorskip("timm")
    known = set(timm.list_models())
    assert {entry.name for entry in zoo.TIMM} <= known
    assert len(zoo.TIMM) >= 34 and len({entry.family for entry in zoo.TIMM}) >= 22
    assert len(zoo.TRANSFORMERS) >= 12


def test_what_starts_at_zero_is_drawn_again():
    model = nn.Module()
    model.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))
    model.bias = nn.Parameter(torch.zeros(64))
    model.weight = nn.Parameter(torch.ones(3))
    model.gain = nn.Parameter(torch.zeros(()))
    model.empty = nn.Parameter(torch.zeros(0))
    zoo.wake(model)
    assert ((model.gamma >= 0.1) & (model.gamma <= 0.5)).all()
    assert 0 < model.bias.std() < 0.1 and model.gain >= 0.1
    assert torch.equal(model.weight, torch.ones(3))


# ------------------------------------------------------------------------------------- the program


def run(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/models/table.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_program(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    output, document = tmp_path / "models.json", tmp_path / "models.md"
    done = run("--quick", "--only=Bert|mobilenet", f"--output={output}", f"--document={document}")
    record = json.loads(output.read_text())
    assert [row["name"] for row in record["rows"]] == ["mobilenetv3_small_050", "Bert"]
    assert done.returncode == any(row["failures"] for row in record["rows"]), done.stderr
    assert record["seed"] == 0 and record["transformers"] and record["threads"] == 1
    for row in record["rows"]:
        assert row["name"] in done.stdout and f"`{row['name']}`" in document.read_text()
        assert row["ratio"] == pytest.approx(row["stock_bytes"] / row["kept_bytes"])
        assert row["pruned"]["weights"]["worst"]
        shares = [layer["bytes"] / row["kept_bytes"] for layer in row["remaining"]]
        assert shares == sorted(shares, reverse=True) and min(shares) >= 0.01
    assert record["command"] in document.read_text()
    assert str(ROOT) not in document.read_text()


def test_program_shows_what_fails(tmp_path, monkeypatch, capsys):
    class Impossible(zoo.Timm):
        def build(self):
            raise ImportError("no such library")

    entries = (Impossible("impossible", "none", 1, note="on purpose"), *zoo.MODELS[:1])
    monkeypatch.setattr(table, "MODELS", entries)
    output, document = tmp_path / "models.json", tmp_path / "models.md"
    arguments = ["--only=impossible", f"--output={output}", f"--document={document}"]
    monkeypatch.setattr(sys, "argv", ["table.py", *arguments])
    assert table.main() == 1
    assert "build: ImportError: no such library (on purpose)" in capsys.readouterr().out
    row = json.loads(output.read_text(), parse_constant=pytest.fail)["rows"][0]
    assert row["failures"] == ["build: ImportError: no such library"] and row["ratio"] is None
    assert "no such library" in document.read_text()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--only=nothing of that name", "matches no model"),
        ("--only=(", "is no regular expression"),
        ("--threads=0", "must be at least 1, got 0"),
    ],
)
def test_program_refuses_what_it_cannot_do(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", argument])
    with pytest.raises(SystemExit):
        table.main()
    assert message in capsys.readouterr().err
