"""Saving what a method owns and nothing else: configurations as JSON, tensors as safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...nn.report import plain_name
from ...nn.weights import compressed
from . import card, folder
from .applied import apply, check_local
from .config import Config, config_from_dict
from .record import applied, unwrapped
from .transfer import Trained, TransferConfig, check_flag, check_module, owned


def save(model: nn.Module, directory: str | os.PathLike[str], weights: bool = True) -> Path:
    """Write what was applied to ``model`` and what trains in it to ``directory``: ``memtl.json``,
    the file of weights that it names, and a model card, ``README.md``, unless there is one by
    others.

    Weights are the parameters that require a gradient, all that the methods made, and buffers (see
    :func:`memtl.methods.base.transfer.owned`), by their names in the model, without the prefixes of
    torch.compile and of parallel wrappers; a tensor of several names is written once. So of a model
    that was only converted and trained as a whole it is the whole model: a conversion owns nothing
    itself.

    A save that is interrupted leaves the save that was there before; what another save of memtl
    left in ``directory`` is deleted. Several processes may save to one folder: the last one counts.

    Where ``torch.distributed`` is initialised **every** process has to call this: sharded
    parameters are gathered, the first process writes, and all return when it has.

    Args:
        model: what :func:`memtl.apply` was given, wrapped or not.
        directory: made where it is missing.
        weights: False for the configuration alone, where the weights are saved otherwise (by
            ``state_dict()``, ``save_pretrained()``, a trainer).

    Returns:
        The directory.

    Raises:
        TypeError: ``model`` is no module, or ``weights`` no bool.
        ValueError: no method was applied to ``model``; or nothing in it trains, or a part of it
            cannot be gathered, and weights are to be saved.
        RuntimeError: the first process could not write.
        ImportError: safetensors is not installed.
    """
    check_module(model)
    check_flag("weights", weights)
    model = unwrapped(model)
    configs = applied(model)
    kind = type(model).__name__
    if not configs:
        inside = next((n for n, m in model.named_modules() if n and applied(m)), None)
        hint = "memtl.apply first" if inside is None else f"save its {plain_name(inside)!r}"
        raise ValueError(f"no method was applied to this {kind}: {hint}")
    about: dict[str, Any] = {"methods": [config.to_dict() for config in configs]}
    tensors = None
    if weights:
        _check_whole(model)
        own = owned(model)
        if not own:
            raise ValueError(
                f"nothing in this {kind} trains: there is nothing to save but the configuration "
                "(weights=False)"
            )
        about["tied"] = _tied(own)
        tensors = _gathered({n: t for n, t in own.items() if n not in about["tied"]})
    directory, trained = Path(directory), Trained.of(model)

    def write() -> None:
        folder.write(
            directory, about, tensors, lambda size: card.text(model, configs, trained, size)
        )

    _on_first(write)
    return directory


def load(model: nn.Module, directory: str | os.PathLike[str]) -> Trained:
    """Apply to ``model`` what was applied to the saved one, and give it the saved weights, if any,
    in the dtypes that it has. Where the weights do not fit, the methods stay applied, and no weight
    is changed.

    Args:
        model: the pre-trained model, as it was before any method was applied; or one to which
            exactly the saved methods were, wrapped and sharded or not. LoRA of peft has to be there
            already if it was.
        directory: what :func:`save` wrote.

    Returns:
        What trains in the model now.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: there is no save in ``directory``, or its weights are missing.
        ValueError: the files are damaged, or are not those of one save; other methods were applied
            to ``model``; entries, which are named, are missing, unknown, of another shape than the
            model's, or of another dtype (one floating-point type may stand for another).
        ImportError: safetensors is not installed.
    """
    check_module(model)
    directory = Path(directory)
    record, tensors = folder.read(directory)
    configs = _configs(record, directory)
    if not applied(model):
        if any(isinstance(config, TransferConfig) for config in configs):
            check_local(model)
        model = unwrapped(model)
        for config in configs:
            apply(model, config)
    elif applied(model) != configs:
        names = [[c.method for c in either] for either in (applied(model), configs)]
        raise ValueError(
            f"other methods, or with other options, were applied to this model ({names[0]}) than "
            f"to the saved one ({names[1]}): load into the pre-trained model"
        )
    model = unwrapped(model)
    if tensors is not None:
        _check_whole(model)
        own = owned(model)
        tensors |= {alias: tensors[n] for alias, n in record["tied"].items() if n in tensors}
        if wrong := _misfits(own, tensors):
            kind = type(model).__name__
            raise ValueError(f"{directory} does not fit this {kind}: {'; '.join(wrong)}")
        _copy(model, own, tensors)
    return Trained.of(model)


def _configs(record: dict[str, Any], directory: Path) -> tuple[Config, ...]:
    try:
        return tuple(map(config_from_dict, record["methods"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / folder.RECORD}: {error}") from error


def _check_whole(model: nn.Module) -> None:
    """Raise where a parameter is a part of one, without saying so as a DTensor does."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("FullyShardedDataParallel flattens parameters; fully_shard keeps them")
    if any(hasattr(p, "ds_numel") for p in model.parameters()):
        raise ValueError("DeepSpeed's ZeRO-3 has taken the parameters apart; gather them first")


def _tied(own: dict[str, Tensor]) -> dict[str, str]:
    """Of the names of one tensor each but the first, and the first."""
    first: dict[int, str] = {}
    return {n: first[id(t)] for n, t in own.items() if first.setdefault(id(t), n) != n}


def _gathered(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; every process takes part, the first one alone has them."""
    tensors = {}
    for name, tensor in own.items():
        whole: Any = tensor.detach()
        if hasattr(whole, "full_tensor"):  # sharded by FSDP
            whole = whole.full_tensor()
        if _rank() == 0:
            tensors[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _on_first(write: Callable[[], None]) -> None:
    """Let the first process write, and every other one wait for it."""
    if not (dist.is_available() and dist.is_initialized()):
        write()
        return
    error = None
    if _rank() == 0:
        try:
            write()
        except Exception as caught:  # the others wait to hear of it
            error = caught
    said = [error and f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(said)
    if error is not None:
        raise error
    if said[0] is not None:
        raise RuntimeError(f"the first process could not save: {said[0]}")


def _misfits(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """What is wrong with ``tensors`` for a model that has ``own``."""
    wrong = []
    if missing := sorted(own.keys() - tensors.keys()):
        wrong.append(f"the save lacks {_few(map(repr, missing))}")
    if extra := sorted(tensors.keys() - own.keys()):
        wrong.append(f"it has {_few(map(repr, extra))}, which does not train here")
    both = [(name, tensors[name], own[name]) for name in tensors if name in own]
    wrong += _few_of(
        f"{name!r} is {list(t.shape)} {t.dtype}, but the model needs {list(o.shape)} {o.dtype}"
        for name, t, o in both
        if t.shape != o.shape
        or (t.dtype != o.dtype and not (t.is_floating_point() and o.is_floating_point()))
    )
    wrong += _few_of(
        f"{alias!r} and {name!r} are one tensor here, but differ in the save"
        for alias, name in _tied(own).items()
        if alias in tensors and name in tensors and not torch.equal(tensors[alias], tensors[name])
    )
    return wrong


def _few_of(texts: Iterable[str]) -> list[str]:
    return [text] if (text := _few(texts)) else []


def _few(texts: Iterable[str]) -> str:
    """The first three, and how many more."""
    shown = list(texts)
    more = [f"{len(shown) - 3} more"] if len(shown) > 3 else []
    return ", ".join([*shown[:3], *more])


@torch.no_grad()
def _copy(model: nn.Module, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    coded = {plain_name(name): layer for name, layer in compressed(model).items()}
    for name, tensor in tensors.items():
        target: Any = own[name]
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            # Each process has read the file: nothing is sent.
            tensor = distribute_tensor(
                tensor.to(target.device),
                target.device_mesh,
                target.placements,
                src_data_rank=None,
            )
        target.copy_(tensor)
        if name in coded:  # a copy was decoded for us
            coded[name].memtl_encode(target)
