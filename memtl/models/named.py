"""Models by name for the commands, with random weights: timm's, our own, transformers'."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .proxyless import proxylessnas_mobile

NAMES = (
    "a timm name (vit_base_patch16_224), proxylessnas_mobile, hf:TYPE (hf:bert, hf:gpt2: the "
    "default configuration of that type) or hf:PATH (a folder with a config.json); weights are "
    "random"
)
"""What :func:`build` takes, for a command's help."""

OWN: dict[str, Callable[..., Any]] = {"proxylessnas_mobile": proxylessnas_mobile}
"""Networks that timm has the parts of, but not by name."""


def build(
    name: str, *, batch_size: int = 1, tokens: int = 128, device: torch.device | str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments of one forward.

    Args:
        name: as :data:`NAMES` says.
        batch_size: samples of that forward.
        tokens: their length, where the model takes token ids.
        device: where model and arguments are.

    Raises:
        ImportError: timm or transformers is not installed.
        ValueError: neither knows the name, or ``batch_size`` or ``tokens`` is less than 1.
    """
    for option, value in (("--batch-size", batch_size), ("--tokens", tokens)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    model: Any
    if name.startswith("hf:"):
        model = _transformers_model(name[3:]).to(device)
        config = model.config
        if hasattr(config, "vocab_size"):
            ids = torch.randint(config.vocab_size, (batch_size, tokens), device=device)
            return model, {"input_ids": ids}
        size = config.image_size
        pixels = torch.randn(batch_size, config.num_channels, size, size, device=device)
        return model, {"pixel_values": pixels}
    model = timm_model(name).to(device)
    shape = model.default_cfg["input_size"]
    return model, {"x": torch.randn(batch_size, *shape, device=device)}


def timm_model(name: str, *, size: int | None = None, **options: Any) -> Any:
    """A model of timm's, or one of :data:`OWN`, for images of that size if it is one that must be
    told, and with those options of ``timm.create_model``.

    Raises:
        ImportError: timm is not installed.
        ValueError: it does not know the name.
    """
    if name in OWN:
        return OWN[name](**options)
    try:
        import timm
    except ModuleNotFoundError:
        raise ImportError("timm is not installed: pip install memtl[models]") from None
    if size is not None and timm.is_model(name) and _is_told_the_size(name):
        options["img_size"] = size
    try:
        return timm.create_model(name, **options)
    except RuntimeError as error:
        near = difflib.get_close_matches(name, () if timm.is_model(name) else timm.list_models())
        hint = f"; do you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"timm has no model {name!r}: {error}{hint}") from None


def _is_told_the_size(name: str) -> bool:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size


def input_size(name: str) -> tuple[int, int]:
    """Channels of the images that a model of :func:`timm_model` takes, and pixels of their side.

    Raises:
        ImportError, ValueError: as :func:`timm_model`.
    """
    with torch.device("meta"):
        channels, *sides = timm_model(name).default_cfg["input_size"]
    return channels, sides[0]


def transformers_config(
    name: str, hub: bool = True, options: Mapping[str, Any] | None = None
) -> Any:
    """A configuration of transformers: of a folder, of a type ("bert": its defaults), or, with
    ``hub``, of a name there; with those options.

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: there is nothing of that name.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ModuleNotFoundError:
        raise ImportError("transformers is not installed: pip install memtl[models]") from None
    local = Path(name).exists()
    if local or (hub and name not in CONFIG_MAPPING):
        config = AutoConfig.from_pretrained(name, local_files_only=local, **(options or {}))
    else:
        config = AutoConfig.for_model(name, **(options or {}))
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def _transformers_model(name: str) -> Any:
    config = transformers_config(name, hub=False)
    from transformers import AutoModel

    return AutoModel.from_config(config)


def text_model(config: Any, language: bool = False) -> Any:
    """Of that configuration, a model that classifies texts, or, with ``language``, predicts each
    token from those before.

    Raises:
        ValueError: transformers has none of that type.
    """
    import transformers

    if getattr(config, "pad_token_id", None) is None and hasattr(config, "vocab_size"):
        config.pad_token_id = 0  # texts in a batch end where padding begins
    kind = (
        transformers.AutoModelForCausalLM
        if language
        else transformers.AutoModelForSequenceClassification
    )
    return kind.from_config(config)
