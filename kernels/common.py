"""What every launcher asks of its arguments."""

import torch
from torch import Tensor

from memtl._ops import FLOATING


def check_devices(name: str, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors given, by the names of their arguments, are on one device: a
    kernel would read what is no address of its own."""
    given = {argument: t for argument, t in tensors.items() if t is not None}
    torch._check_value(
        len({t.device for t in given.values()}) < 2,
        lambda: (
            f"{name}: expected all tensors on one device, got "
            f"{', '.join(f'{argument} on {t.device}' for argument, t in given.items())}"
        ),
    )


def check_floating(name: str, **tensors: Tensor | None) -> None:
    """TypeError unless every tensor given is of a dtype that operators take."""
    for argument, t in tensors.items():
        if t is not None and t.dtype not in FLOATING:
            raise TypeError(
                f"{name}: expected {argument} in float32, float64, bfloat16 or float16, "
                f"got {t.dtype}"
            )
