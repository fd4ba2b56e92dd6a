"""A backbone that does not train: without gradients, in evaluation mode whatever train() says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ...nn.swap import swap


class FrozenBackbone:
    """In front of the class of a model: :meth:`train` reaches the named modules alone."""

    memtl_trained: tuple[str, ...]

    if TYPE_CHECKING:
        training: bool

        def get_submodule(self, target: str) -> nn.Module: ...

    def train(self, mode: bool = True) -> Any:
        super().train(False)  # type: ignore[misc]
        self.training = mode
        for name in self.memtl_trained:
            self.get_submodule(name).train(mode)
        return self


def freeze(model: nn.Module) -> None:
    """No parameter of ``model`` trains any more.

    Raises:
        ValueError: another method did this, or peft has put adapters in, and what those train would
            be frozen too.
    """
    if isinstance(model, FrozenBackbone):
        raise ValueError(
            f"a method that trains a part of this {type(model).__name__} was applied already; only "
            "VQTConfig(train_backbone=True), once, goes on top of another"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and any(
            p.requires_grad for p in module.parameters()
        ):
            raise ValueError(
                f"peft trains {name or 'this model'}, which this method would freeze; only "
                "VQTConfig(train_backbone=True), FrozenConfig and other conversions go on top of it"
            )
    model.requires_grad_(False)


def evaluate_all_but(model: nn.Module, *names: str) -> None:
    """Keep ``model`` in evaluation mode, but for the modules of these names."""
    training = model.training
    swap(model, FrozenBackbone, memtl_trained=names)
    model.train(training)
