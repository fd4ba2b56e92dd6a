"""Networks by name: whose weights they have, what they take, and what cannot be had."""

import logging

import pytest
import torch

from memtl import BitFitConfig, Ticket, TicketConfig, VQTConfig, apply, assets, draw_ticket
from memtl.models.bert import Classifier
from memtl.models.vision import ImageClassifier
from memtl.runs.networks import SHIPPED, Wants, create, wants
from memtl.tasks.digits import MEAN, STD
from memtl.tasks.pictures import IMAGENET_MEAN, IMAGENET_STD

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No download is tried, which would take its time to fail."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT for 7 classes as transformers saves one, and its weights."""
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=8, num_labels=7,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, '
        '"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    return path, model.state_dict()


def same(found, wanted, but=()) -> bool:
    found = {n: x for n, x in found.items() if not n.startswith(but)}
    wanted = {n: x for n, x in wanted.items() if not n.startswith(but)}
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)


@pytest.mark.parametrize("name", ["vit", "cnn", "cnn_glyphs_pgd"])
def test_shipped(name):
    model = create(name, num_classes=3)
    own = assets.load(SHIPPED.get(name, name))
    assert same(model.state_dict(), own.state_dict(), but=("head.", "classifier."))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert model.training
    expected = Wants(channels=1, size=32, mean=(MEAN,), std=(STD,), crop=1.0)
    assert wants(model) == wants(name) == expected
    other = create(name, num_classes=3, pretrained=False)
    assert not same(other.state_dict(), own.state_dict(), but=("head.", "classifier."))


def test_shipped_at_another_size():
    model = create("cnn", num_classes=3, size=48)
    assert wants(model).size == 48
    assert model(torch.randn(2, 1, 48, 48)).shape == (2, 3)
    with pytest.raises(ValueError, match="vit takes images of 32 x 32 pixels, not of 48"):
        create("vit", num_classes=3, size=48)


def test_the_shipped_encoder():
    model = create("bert", num_classes=3)
    assert isinstance(model, Classifier) and model.training
    assert model.get_classifier().weight.shape == (3, 128)
    torch.manual_seed(0)
    inside = assets.load_encoder("classifier", 3).model
    assert same(model.model.bert.state_dict(), inside.bert.state_dict(), but=("pooler.",))
    found = wants("bert")
    assert found.kind == wants(model).kind == "text"
    ids = torch.tensor([found.tokenizer("A text.")["input_ids"]])
    assert model(ids).shape == (1, 3)
    other = create("bert", num_classes=3, pretrained=False)
    assert not same(model.model.bert.state_dict(), other.model.bert.state_dict())


def test_of_timm():
    model = create("vit_tiny_patch16_224", num_classes=3, pretrained=False, size=32)
    found = wants(model)
    assert (found.size, found.channels) == (32, 3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    by_name = wants("vit_tiny_patch16_224")
    assert by_name == Wants(
        size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9, interpolation="bicubic"
    )
    assert wants("vit_tiny_patch16_224", 32) == found
    resnet = wants("resnet18")
    assert (resnet.mean, resnet.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert wants("proxylessnas_mobile").size == 224


def test_of_any_module():
    convolution = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten())
    found = wants(convolution)
    assert (found.channels, found.size, len(found.mean)) == (1, 224, 1)
    assert wants(convolution, 40).size == 40


def test_the_classifier_of_a_file(tmp_path, caplog):
    path = tmp_path / "c.pth"
    torch.manual_seed(0)
    own = create("resnet18", num_classes=5, pretrained=False)
    torch.save({"state_dict": own.state_dict()}, path)
    assert same(create("resnet18", num_classes=5, pretrained=path).state_dict(), own.state_dict())
    assert not caplog.records
    other = create("resnet18", num_classes=3, pretrained=str(path))
    assert same(other.state_dict(), own.state_dict(), but="fc.")
    assert other.fc.weight.shape == (3, 512)
    [said] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said == f"{path}: of other classes, so these start anew: fc.bias, fc.weight"


def test_a_file_of_another_network(tmp_path):
    path = tmp_path / "c.pth"
    weights = create("resnet18", num_classes=5, pretrained=False).state_dict()
    torch.save(weights, path)
    with pytest.raises(ValueError, match="the weights of mobilenetv2_035: missing: .* unexpected"):
        create("mobilenetv2_035", num_classes=5, pretrained=path)
    compiled = {f"module._orig_mod.{name}": x for name, x in weights.items()}
    torch.save(compiled, path)
    assert same(create("resnet18", num_classes=5, pretrained=path).state_dict(), weights)
    with pytest.raises(FileNotFoundError, match="there is no file /nope.pth"):
        create("resnet18", num_classes=5, pretrained="/nope.pth")


def test_of_transformers(folder, caplog):
    path, weights = folder
    model = create(f"hf:{path}", num_classes=7)
    assert isinstance(model, ImageClassifier)
    assert same(model.model.state_dict(), weights)
    assert not caplog.records
    expected = Wants(size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop=1.0)
    assert wants(model) == wants(f"hf:{path}") == expected
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), model.model(pixel_values=images).logits)
    fewer = create(f"hf:{path}", num_classes=3)
    assert same(fewer.model.state_dict(), weights, but="classifier.")
    assert fewer(images).shape == (2, 3)
    assert "these start anew: classifier.bias, classifier.weight" in caplog.text
    with pytest.raises(ValueError, match="takes images of 16 x 16 pixels, not of 32"):
        create(f"hf:{path}", num_classes=3, size=32)
    larger = create(f"hf:{path}", num_classes=3, size=32, pretrained=False)
    assert larger(torch.randn(1, 3, 32, 32)).shape == (1, 3) and wants(larger).size == 32


def test_a_checkpoint_of_another_width(folder, tmp_path):
    path, weights = folder
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"intermediate_size": 64', '"intermediate_size": 48')
    )
    with pytest.raises(ValueError, match="does not hold the weights of its own config.json: vit"):
        create(f"hf:{tmp_path}", num_classes=3)


def test_methods_apply_to_what_is_wrapped(folder):
    path, _ = folder
    model = create(f"hf:{path}", num_classes=3)
    apply(model, VQTConfig())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all(n.startswith("model.classifier.") for n in trained)
    apply(create("bert", num_classes=3), BitFitConfig())


def test_a_ticket_of_what_is_wrapped_is_of_its_backbone():
    model = create("bert", num_classes=3)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.5))
    assert ticket == draw_ticket(model.model, TicketConfig(sparsity=0.5))
    assert all(name.startswith(("encoder.", "pooler.")) for name in ticket.masks)
    ticket.apply(model)
    assert Ticket.of(model) == ticket


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["resnet81"], ValueError, "no model 'resnet81': .*; do you mean resnet"),
        (["resnet18"], OSError, "resnet18 cannot be had .*--pretrained false"),
        (["proxylessnas_mobile"], ValueError, "no weights of proxylessnas_mobile: --pretrained f"),
        (["hf:no/such"], OSError, "hf:no/such cannot be had .*hf:PATH"),
        (["hf:clap"], ValueError, r"\(clap\) classifies neither images nor texts"),
        (["resnet18", 0], ValueError, "num_classes must be at least 1, got 0"),
        (["resnet18", 2.0], TypeError, "num_classes must be an int, got 2.0"),
    ],
)
def test_what_cannot_be_had(arguments, error, said, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    name, classes = (*arguments, 3)[:2]
    with pytest.raises(error, match=said):
        create(name, num_classes=classes)
