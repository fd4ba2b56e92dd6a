"""``memtl estimate --analytic``."""

import pytest
import torch

from memtl.cli import main
from memtl.estimate import papers as module

pytest.importorskip("timm")


def rows(text):
    """Method -> its numbers."""
    lines = [line.split() for line in text.splitlines()]
    return {
        line[0]: [float(cell.replace(",", "")) for cell in line[1:]]
        for line in lines
        if line and line[0] in module.METHODS
    }


def test_the_papers_network(capsys):
    assert main(["estimate", "proxylessnas_mobile", "--analytic"]) == 0
    text = capsys.readouterr().out
    assert "analytic (TinyTL's definition): not what PyTorch needs" in text
    assert "total, batch 8" in text
    found = rows(text)
    assert list(found) == list(module.METHODS)
    assert found["last"][0] == 102 * 1281
    totals = {method: numbers[3] for method, numbers in found.items()}
    assert totals["last"] == pytest.approx(29.0, abs=0.06)
    assert totals["norm+last"] == pytest.approx(183.0, abs=0.06)
    assert totals["full"] == pytest.approx(367.0, abs=0.06)
    assert totals["rep-net"] == pytest.approx(32.8, abs=0.06)
    assert totals["rep-net+bias"] == pytest.approx(32.8, abs=0.06)
    assert found["rep-net"][2] == pytest.approx(3.47, abs=0.006)
    assert found["rep-net"][4] > 40 and found["rep-net"][5] < 2
    assert found["rep-net+bias"][4] > 60 and found["rep-net+bias"][5] < 2
    stock, frozen = found["bias+last"][4:]
    assert stock > 50 * frozen > 0  # PyTorch keeps what frozen layers read
    stock, frozen = found["norm+last"][4:]
    assert stock > 2 * frozen


def test_a_vision_transformer_of_another_size(capsys):
    arguments = ["vit_tiny_patch16_224", "--analytic", "--size", "32", "--num-classes", "7"]
    assert main(["estimate", *arguments, "--batch-size", "3", "--methods", "last", "full"]) == 0
    text = capsys.readouterr().out
    assert "7 classes, 32 x 32 pixels" in text
    assert "total, batch 3" in text
    found = rows(text)
    assert list(found) == ["last", "full"]
    for _, parameters, activations, total, *_ in found.values():
        assert total == pytest.approx(parameters + 3 * activations, abs=0.03)


def test_methods_that_a_network_is_not_made_for(capsys):
    arguments = ["vit_tiny_patch16_224", "--analytic", "--size", "32"]
    assert main(["estimate", *arguments]) == 0
    text = capsys.readouterr().out
    assert list(rows(text)) == ["last", "norm+last", "bias+last", "full"]
    assert "rep-net: this VisionTransformer has no stages" in text
    assert main(["estimate", *arguments, "--methods", "rep-net"]) == 2
    assert "has no stages" in capsys.readouterr().err


def test_what_trains():
    names = {}
    for method in module.METHODS:
        torch.manual_seed(0)
        model = module.models.timm_model("resnet18").train()
        module.prepare(model, method, 5, 64)
        names[method] = {n for n, p in model.named_parameters() if p.requires_grad}
        assert model.get_classifier().out_features == 5
        assert model.bn1.training == (method == "full")
    last = {"fc.weight", "fc.bias"}
    assert names["last"] == last
    assert names["full"] > names["norm+last"] > names["bias+last"] > last
    assert {n.rpartition(".")[2] for n in names["bias+last"] - last} == {"bias"}
    assert {"bn1.weight", "layer1.0.bn2.bias"} < names["norm+last"]
    assert not any("conv" in name for name in names["norm+last"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope", "--analytic"], "timm has no model 'nope'"),
        (["hf:bert", "--analytic"], "image classifiers of timm's, not hf:bert"),
        (
            ["resnet18", "--analytic", "--methods", "nope"],
            "--methods nope: unknown, known",
        ),
        (["vit_tiny_patch16_224", "--analytic", "--size", "5"], "takes no images of 5 x 5 pixels"),
        (["deit_tiny_distilled_patch16_224", "--analytic"], "has 2 classifiers"),
    ],
)
def test_it_says_what_is_wrong(arguments, said, capsys):
    assert main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("memtl estimate: ")
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("option", ["--size", "--num-classes", "--batch-size"])
def test_numbers_from_1_on(option, capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "resnet18", "--analytic", option, "0"])
    assert f"{option}: must be at least 1, got 0" in capsys.readouterr().err
