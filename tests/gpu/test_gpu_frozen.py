"""On an NVIDIA GPU: frozen networks keep less and have the gradients of PyTorch; Rep-Net trains."""

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl import memory
from memtl.nn import compress_weights

timm = pytest.importorskip("timm")

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

NETWORKS = ("mobilenetv2_035", "efficientnet_b0", "resnet18", "convnext_atto", "vit_tiny")


def network(name, training=False):
    """Frozen, but for the biases of its first module that has any: gradients pass through all."""
    options = {"img_size": 64} if name == "vit_tiny" else {}
    name = {"vit_tiny": "vit_tiny_patch16_224"}.get(name, name)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).to(DEVICE).train(training)
    model.requires_grad_(False)
    next(p for n, p in model.named_parameters() if n.endswith("bias")).requires_grad_(True)
    return model


def run(model, x):
    with memory.SavedTensors(model) as saved:
        y = model(x)
    y.square().sum().backward()
    return saved.bytes, next(p.grad for p in model.parameters() if p.grad is not None), y.detach()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_pytorchs(name, training, layout):
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        x = torch.randn(4, 3, 64, 64, device=DEVICE).contiguous(memory_format=layout)
        stock_bytes, expected, y = run(network(name, training), x)
        model = network(name, training)
        memtl.apply(model, memtl.FrozenConfig())
        found_bytes, found, ours = run(model, x)
    torch.testing.assert_close(ours, y, rtol=0, atol=0)
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-4
    assert found_bytes < stock_bytes


def test_few_bits():
    model, x = network("vit_tiny"), torch.randn(4, 3, 64, 64, device=DEVICE)
    stock_bytes, expected, _ = run(network("vit_tiny"), x)
    memtl.apply(model, memtl.FrozenConfig(linear=8, attention=8, norm=8, activation=8))
    found_bytes, found, _ = run(model, x)
    assert found_bytes < stock_bytes / 3
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99


@pytest.mark.parametrize("config", [memtl.RepNetConfig, memtl.LiteResidualConfig])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_side_modules_train(config, autocast):
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=5).to(DEVICE)
    memtl.apply(model, config(image_size=64, weight_bits=8))
    model.train()
    x = torch.randn(8, 3, 64, 64, device=DEVICE)
    labels = torch.arange(8, device=DEVICE) % 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(15):
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_compressed_weights_move():
    model = timm.create_model("resnet18").requires_grad_(False)
    compress_weights(model)
    x = torch.randn(2, 3, 64, 64)
    expected = model.eval()(x)
    torch.testing.assert_close(model.to(DEVICE)(x.to(DEVICE)).cpu(), expected, rtol=1e-3, atol=1e-3)
