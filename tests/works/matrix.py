"""The columns of docs/works.md: each method on a small model, and the same model without memtl.

A row is a test ``@on(...)`` the columns that it names. It is given a :class:`Case`, trains both of
its models in the same surroundings, and compares the two: what is exact bit for bit, what is lossy
by its loss curve.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memtl
from memtl.memory import saved_bytes

CLASSES = 5
LOSSY = {
    "fast": memtl.BackRazorConfig(),
    "small": memtl.BackRazorConfig.preset("small"),
    "low-bit": memtl.LowBitConfig(),
    "checkpoint": memtl.CheckpointConfig(target_modules=r"(.*\.)?(blocks|layer)\.\d+"),
}
EXACT = ("frozen", "bitfit")
"""What memtl keeps gives the very gradients that PyTorch's own layers give."""
COLUMNS = (*LOSSY, *EXACT, "vqt", "rep-net")


def on(*columns: str) -> pytest.MarkDecorator:
    """Parametrises a row by the columns that it holds for."""
    assert set(columns) <= set(COLUMNS)
    return pytest.mark.parametrize("column", columns)


def vit(depth: int = 2) -> nn.Module:
    """17 tokens of 64 features."""
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=depth, num_heads=4)
    return timm.models.VisionTransformer(num_classes=CLASSES, **sizes)


class Gate(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


def cnn() -> nn.Module:
    """What MobileNets do: in place, depthwise, strided, squeezed, pooled."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.Hardswish(inplace=True),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(inplace=True),
        Gate(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def mobilenet() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("mobilenetv2_035", num_classes=CLASSES)


class Bert(nn.Module):
    """A classifier of token sequences, which gives logits as the others do."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=32, num_labels=CLASSES,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.inside = transformers.BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inside(tokens).logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "one block": functools.partial(vit, depth=1),
    "cnn": cnn,
    "bert": Bert,
    "mobilenet": mobilenet,
}


@dataclasses.dataclass
class Case:
    """One cell: a model with a method, the same without memtl, and what both are trained on."""

    column: str
    stock: nn.Module
    ours: nn.Module
    x: Tensor
    labels: Tensor

    @property
    def exact(self) -> bool:
        return self.column in EXACT

    def loss(self, model: Callable[[Tensor], Tensor], part: slice = slice(None)) -> Tensor:
        return F.cross_entropy(model(self.x[part]).float(), self.labels[part])


def build(column: str, network: str | None = None) -> Case:
    """The case of a method; on a vision transformer unless the method wants another network."""
    network = network or ("mobilenet" if column == "rep-net" else "vit")
    stock = NETWORKS[network]().train()
    if column in LOSSY:
        ours = copy.deepcopy(stock)
        memtl.apply(ours, LOSSY[column])
    elif column == "frozen":
        add_lora(stock, network)
        ours = copy.deepcopy(stock)
        memtl.apply(ours, memtl.FrozenConfig())
    elif column == "vqt":  # whose way to keep is its only choice
        ours = copy.deepcopy(stock)
        memtl.apply(ours, memtl.VQTConfig(dropout=0, keep="kv"))
        stock = copy.deepcopy(ours)
        ours.head.reader.keep = "jacobian"
    else:
        config = {"bitfit": memtl.BitFitConfig, "rep-net": memtl.RepNetConfig}[column]
        ours = copy.deepcopy(stock)
        memtl.apply(stock, config(convert=False))
        memtl.apply(ours, config())
        ours.load_state_dict(stock.state_dict())
    count = 8 if network == "mobilenet" else 16
    labels = torch.arange(count) % CLASSES
    if network == "bert":
        x = torch.randint(99, (count, 12))
    else:
        x = torch.randn(count, 3, 32, 32) + 2 * torch.randn(CLASSES, 3, 32, 32)[labels]
    return Case(column, stock.train(), ours.train(), x, labels)


def add_lora(model: nn.Module, network: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {"bert": ["query", "value"], "cnn": ["4"]}.get(network, ["qkv"])
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "head" in name or "classifier" in name)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    fast = isinstance(model, nn.Sequential) or hasattr(getattr(model, "head", None), "queries")
    return torch.optim.AdamW(trained(model).values(), 1e-2 if fast else 3e-3)


Step = Callable[[Case, nn.Module, torch.optim.Optimizer], Tensor]


def calling(call: Callable[[nn.Module, Tensor], Tensor]) -> Step:
    """A step whose forward is ``call(model, x)``."""

    def step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = case.loss(functools.partial(call, model))
        loss.backward()
        optimizer.step()
        return loss

    return step


plain_step = calling(lambda model, x: model(x))
"""The loop everybody writes."""


def train(
    case: Case,
    model: nn.Module,
    step: Step = plain_step,
    *,
    steps: int | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
) -> list[float]:
    """The losses of some steps: enough for curves to part, or for bits to differ."""
    steps = steps or (8 if case.column in LOSSY else 4)
    made = optimizer(model)
    return [step(case, model, made).item() for _ in range(steps)]


def assert_follows(ours: list[float], stock: list[float], column: str) -> None:
    """The loss falls as stock's does: nowhere further from it than a part of the way that stock's
    went. Gradients from a tenth of an input are shorter than the exact ones, so such a model falls
    behind, by half at most; one whose gradients are zero, or point elsewhere, by all of it."""
    bound = 0.65 if column in ("fast", "small") else 0.35
    way = stock[0] - min(stock)
    assert way > 0.04 * stock[0], f"stock does not learn: {stock}"
    worst = max(abs(a - b) for a, b in zip(ours, stock, strict=True))
    assert worst <= bound * way, f"{worst / way:.2f} of the way of stock\n{ours}\n{stock}"


def assert_trains(case: Case, step: Step = plain_step, **options) -> None:
    """Both models of a case, trained alike, end alike."""
    before = {n: p.detach().clone() for n, p in trained(case.ours).items()}
    stock = train(case, case.stock, step, **options)
    ours = train(case, case.ours, step, **options)
    for name, p in trained(case.ours).items():
        assert not torch.equal(p, before[name]), f"{name} did not move"
    if not case.exact:
        assert_follows(ours, stock, case.column)
        return
    assert ours == stock
    for (name, a), b in zip(
        case.ours.state_dict().items(), case.stock.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def assert_saves(
    case: Case,
    ours: Callable | None = None,
    stock: Callable | None = None,
    ratio: float = 5,
) -> None:
    """That of the two models, called in the same way, ours keeps so many times fewer bytes."""
    kept, before = (saved_bytes(call, case.x) for call in (ours or case.ours, stock or case.stock))
    if case.column in LOSSY:
        assert 0 < ratio * kept <= before, f"{before} / {kept} = {before / kept:.2f}"
    elif case.exact:
        assert 0 < kept < before
