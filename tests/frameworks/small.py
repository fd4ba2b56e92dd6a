"""What the tests of frameworks share: a small network and its data, and what has to hold of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping

import peft
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memtl
from memtl.memory import SavedTensors

ROUNDING = 2e-6
"""How far parameters may be apart that two orders of the same sums gave."""

FEW = {"Back Razor": memtl.BackRazorConfig(keep=0.1), "LowBit": memtl.LowBitConfig(4)}
"""What has to save at least five times less than stock."""


def vit() -> nn.Module:
    """Always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.models.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=10
        )


def lora(model: nn.Module) -> nn.Module:
    """peft's LoRA in the attention, in which both matrices have a gradient from the start."""
    config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return adapted


def images(count: int = 4) -> tuple[Tensor, Tensor]:
    """Always the same ones, and their classes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (count,), generator=generator)


def loss_of(model: Callable, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), y)


def whole(t: Tensor) -> Tensor:
    """A DTensor's parts from all processes; any other tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_gradients(model: nn.Module) -> None:
    """Whatever trains has a gradient, which is finite and not zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            grad = whole(parameter.grad)
            assert grad.isfinite().all() and grad.abs().sum() > 0, name


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 2, rate: float = 0.1) -> int:
    """A few steps; the bytes that the last of them kept for backward."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, 0.9)
    for _ in range(steps):
        with SavedTensors(model) as saved:
            loss = loss_of(model, x, y)
        loss.backward()
        assert_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return saved.bytes


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, by its name without the prefixes of wrappers."""
    named = model.named_parameters()
    return {n.removeprefix("module."): whole(p.detach()).clone() for n, p in named}


def assert_as(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float = 0) -> None:
    """The same parameters, no further apart than ``bound``."""
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert (found[name] - t).abs().max() <= bound, name


@contextlib.contextmanager
def one_folder() -> Iterator[str]:
    """The same new folder in every process."""
    import torch.distributed as dist

    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    yield str(names[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(str(names[0]))


def run_checks(module: Mapping[str, object]) -> None:
    """What a script under processes/ does: every check_... of its own, in each process; the first
    process prints the name of each that passed."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, check in module.items():
        if not name.startswith("check_"):
            continue
        try:
            check()  # type: ignore[operator]
        except BaseException:
            traceback.print_exc()
            print(f"{name} failed in process {dist.get_rank()}", flush=True)
            os._exit(1)  # torchrun ends the other one, which may wait for this
        dist.barrier()
        if dist.get_rank() == 0:
            print("passed", name, flush=True)
    dist.destroy_process_group()
    # At the interpreter's end a thread of gloo's that still runs would abort the process, now and
    # then.
    os._exit(0)
