"""What is trained, and how: models with their batches, and what is done to save memory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import memtl
from memtl.estimate.ways import checkpoint, lora
from memtl.methods import Config
from memtl.methods.tickets import CompactOptimizer, parameter_masks

from .released_vqt import apply_released_vqt

CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Workload:
    """A classifier and the batch it is trained on: images of 224 pixels, or texts.

    ``model`` is a name of timm, or ``hf:`` and a type of transformers, whose default configuration
    is taken: ``hf:bert`` is BERT base. ``options`` change it. Weights and inputs are random, of
    torch's global generator; with ``channels_last`` they lie so in memory.
    """

    model: str
    batch: int
    tokens: int = 128  # of a text
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channels_last: bool = False

    @property
    def title(self) -> str:
        """What results call it."""
        return f"{self.model}, channels last" if self.channels_last else self.model

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.preserve_format

    @property
    def is_text(self) -> bool:
        """Whether the model is one of transformers."""
        return self.model.startswith("hf:")

    def build(self) -> nn.Module:
        """The model, in training mode."""
        if not self.is_text:
            import timm

            model = timm.create_model(self.model, num_classes=CLASSES, **self.options).train()
            return model.to(memory_format=self._layout)
        import transformers

        options = {"num_labels": CLASSES, "use_cache": False, **self.options}
        config = transformers.AutoConfig.for_model(self.model[3:], **options)
        return transformers.AutoModelForSequenceClassification.from_config(config).train()

    def batch_of(self, model: Any, device: str) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        labels = torch.randint(CLASSES, (self.batch,), device=device)
        if not self.is_text:
            images = torch.randn(self.batch, 3, 224, 224, device=device)
            return images.to(memory_format=self._layout), labels
        words = model.config.vocab_size
        return torch.randint(words, (self.batch, self.tokens), device=device), labels


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to train: stock, with the library's own checkpointing, or by a method, what ``change``
    does coming first; or just a forward pass, in evaluation mode and without gradients. With
    ``compact`` the optimizer's state is of surviving weights alone."""

    name: str
    checkpointing: bool = False
    config: Config | None = None
    change: Callable[[nn.Module], object] | None = None
    forward_only: bool = False
    compact: bool = False

    def prepare(self, model: Any) -> None:
        """Change ``model`` in place."""
        if self.checkpointing:
            checkpoint(model)
        if self.change is not None:
            self.change(model)
        if self.config is not None:
            memtl.apply(model, self.config)
        if self.forward_only:
            model.eval()

    def optimizer(self, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        if self.compact:
            masks = parameter_masks(model)
            return CompactOptimizer(parameters, masks, torch.optim.AdamW, lr=1e-4)
        return torch.optim.AdamW(parameters, lr=1e-4)


STOCK = Mode("stock")
CHECKPOINTING = Mode("checkpointing", checkpointing=True)


def apply_fast(model: nn.Module) -> None:
    """Back Razor in the layers, before something else comes on top."""
    memtl.apply(model, memtl.BackRazorConfig(keep=0.1))


MODES = (
    STOCK,
    CHECKPOINTING,
    Mode("fast, keep 0.1", config=memtl.BackRazorConfig(keep=0.1)),
    Mode("fast, keep 0.03", config=memtl.BackRazorConfig(keep=0.03)),
    Mode("small, keep 0.1", config=memtl.BackRazorConfig.preset("small", keep=0.1)),
    Mode("4 bits, once", config=memtl.LowBitConfig(bits=4)),
    Mode("blocks in 8 bits", config=memtl.CheckpointConfig()),
    Mode("blocks, fast 0.1", change=apply_fast, config=memtl.CheckpointConfig()),
    Mode("paper, keep 0.1", config=memtl.BackRazorConfig.preset("paper", keep=0.1)),
)

FORWARD = Mode("frozen forward", forward_only=True)

FROZEN_MODES = (
    FORWARD,
    Mode("VQT, 1 query", config=memtl.VQTConfig(num_queries=1)),
    Mode("VQT, 10 queries", config=memtl.VQTConfig(num_queries=10)),
    Mode("VQT as released", change=apply_released_vqt),
    Mode("full fine-tuning"),
)
"""Steps beside a forward pass of the frozen backbone, which is what a step cannot do without."""


LORA = Mode("LoRA", change=lora)
FEW_BITS = memtl.FrozenConfig(linear=8, attention=8, norm=8, activation=4)

LORA_MODES = (
    LORA,
    Mode("LoRA, checkpointing", checkpointing=True, change=lora),
    Mode("LoRA, frozen", change=lora, config=memtl.FrozenConfig()),
    Mode("LoRA, frozen, 4-8 bits", change=lora, config=FEW_BITS),
    Mode("full fine-tuning"),
)
"""A frozen network with small updates in it: what its layers keep by PyTorch, and by memtl."""

SIDE_MODES = (
    Mode("Rep-Net by PyTorch", config=memtl.RepNetConfig(convert=False)),
    Mode("Rep-Net", config=memtl.RepNetConfig()),
    Mode("Rep-Net + biases", config=memtl.RepNetConfig(bias=True)),
    Mode("lite residual + biases", config=memtl.LiteResidualConfig()),
    Mode("biases + last layer", config=memtl.BitFitConfig()),
    Mode("norms + last layer", config=memtl.NormTuningConfig()),
    Mode("last layer", config=memtl.LinearProbeConfig()),
    Mode("full fine-tuning"),
)
"""Parts of a frozen convolutional network."""


def ticket(sparsity: float, sparse: bool | None = None) -> Callable[[nn.Module], object]:
    """The smallest weights of the encoder pruned, all layers together."""

    def prune(model: nn.Module) -> None:
        drawn = memtl.draw_ticket(model, memtl.TicketConfig(sparsity=sparsity))
        drawn.apply(model, sparse)

    return prune


TICKET_MODES = (
    STOCK,
    Mode("ticket 90 %, dense", change=ticket(0.9, sparse=False)),
    Mode("ticket 70 %", change=ticket(0.7)),
    Mode("ticket 90 %", change=ticket(0.9)),
    Mode("ticket 90 %, compact", change=ticket(0.9), compact=True),
    Mode("ticket 95 %", change=ticket(0.95)),
    Mode("ticket 90 %, fast 0.1", change=ticket(0.9), config=memtl.BackRazorConfig(keep=0.1)),
)
"""A pruned network: products that are dense, or over the survivors; and what else goes with it."""

WORKLOADS = (
    Workload("vit_base_patch16_224", 4),
    Workload("resnet50", 8),
    Workload("resnet50", 8, channels_last=True),
    Workload("mobilenetv2_100", 8),
    Workload("mobilenetv2_100", 8, channels_last=True),
    Workload("hf:bert", 4),
)

FROZEN_PAIRS = (
    (Workload("vit_base_patch16_224", 8), FROZEN_MODES),
    (Workload("vit_base_patch16_224", 4), LORA_MODES),
    (Workload("mobilenetv2_100", 8), SIDE_MODES),
)

TICKET_PAIRS = ((Workload("hf:bert", 12), TICKET_MODES),)

QUICK = (
    Workload("vit_tiny_patch16_224", 1, options={"depth": 2}),
    Workload("hf:bert", 2, tokens=32, options={"num_hidden_layers": 2, "vocab_size": 100}),
)

GPU_MODES = (
    STOCK,
    CHECKPOINTING,
    Mode("Back Razor 0.1", config=memtl.BackRazorConfig(keep=0.1)),
    Mode("Back Razor 0.1, small", config=memtl.BackRazorConfig.preset("small", keep=0.1)),
    Mode("4 bits, once", config=memtl.LowBitConfig(bits=4)),
)
GPU_TRANSFORMER = (*GPU_MODES, LORA)
GPU_VIT = (*GPU_TRANSFORMER, Mode("VQT, 1 query", config=memtl.VQTConfig(num_queries=1)))
GPU_CNN = (*GPU_MODES, Mode("Rep-Net", config=memtl.RepNetConfig()))
GPU_PAIRS = (
    (Workload("vit_base_patch16_224", 64), GPU_VIT),
    (Workload("resnet50", 64, channels_last=True), GPU_CNN),
    (Workload("hf:bert", 64), GPU_TRANSFORMER),
)
GPU_QUICK_PAIRS = (
    (QUICK[0], GPU_VIT),
    (Workload("resnet18", 2), GPU_CNN),
    (QUICK[1], GPU_TRANSFORMER),
)
"""What `make gpu` trains, and small ones to try its code out."""

PAIRS = (*((w, MODES) for w in WORKLOADS), *FROZEN_PAIRS, *TICKET_PAIRS)
QUICK_PAIRS = (
    *((w, MODES) for w in QUICK),
    (QUICK[0], FROZEN_MODES),
    (QUICK[0], LORA_MODES),
    (Workload("mobilenetv2_035", 2), SIDE_MODES),
    (QUICK[1], TICKET_MODES),
)
"""What is measured: a model, and the ways to train it, the first of which is the baseline."""
