"""Pre-trained networks by name, with a classifier for so many classes, and what they take."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import assets, models
from ..methods.base.record import unwrapped
from ..models.bert import Classifier, Wrapped
from ..models.named import OWN, transformers_config
from ..models.vision import ImageClassifier
from ..models.weights import few, put_weights, read_weights
from ..tasks.digits import MEAN, STD
from ..tasks.pictures import IMAGENET_MEAN, IMAGENET_STD

SHIPPED = {"vit": "vit_glyphs", "cnn": "cnn_glyphs", "bert": "bert_docstrings"}
"""Short names of what ships with memtl."""

NAMES = (
    f"{', '.join(SHIPPED)} (shipped with memtl), a timm name (resnet18), or hf:NAME or hf:PATH "
    "(a classifier of images or text for transformers: a name on the hub, or a folder)"
)
"""What :func:`create` takes, for a command's help."""

WITHOUT = "--pretrained false for random weights, --pretrained PATH for those of a file"
"""What to do where weights cannot be had."""
SHOWN = 200
"""Characters of a library's message."""

log = logging.getLogger(__name__)

Source = bool | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Wants:
    """What a network takes. The defaults are those of most networks for ImageNet.

    Attributes:
        kind: "image" or "text".
        channels, size: of images, which are square.
        mean, std: of their channels, with pixels in 0..1.
        crop: in evaluation, the share of an image's shorter side that is cut out of its middle.
        interpolation: how images are resized: "bilinear", "bicubic" or "lanczos".
        tokenizer: of texts.
    """

    kind: str = "image"
    channels: int = 3
    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    interpolation: str = "bilinear"
    tokenizer: Any = None


def create(
    name: str, *, num_classes: int, pretrained: Source = True, size: int | None = None
) -> nn.Module:
    """A network that gives ``num_classes`` logits a sample, in float32, in training mode.

    Its classifier is fresh, from torch's global generator, unless the weights have one of as many
    classes. What it takes is :func:`wants` of it.

    Args:
        name: as :data:`NAMES` says.
        pretrained: True for the weights that belong to the name, which may be downloaded; False
            for random ones; or a file with a state dict (``.safetensors``, or what ``torch.save``
            wrote), which has to be this network's but for its classifier.
        size: height and width of the images, in pixels; None for the network's own.

    Raises:
        TypeError: ``num_classes`` is not an int.
        ValueError: a name, a number or a size is wrong, or the file's weights are not this
            network's: the message names keys.
        OSError: weights, or a file, cannot be had.
        ImportError: timm or transformers is not installed.
    """
    for what, number in (("num_classes", num_classes), ("size", size)):
        if number is None and what == "size":
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{what} must be an int, got {number!r}")
        if number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    own = pretrained is True
    path = None if isinstance(pretrained, bool) else Path(pretrained)
    weights = None if path is None else read_weights(path)[0]  # before anything is built
    model: Any
    if name.startswith("hf:"):
        model = _of_transformers(name, num_classes, own, size)
    elif name == "bert":
        model = _of_transformers(f"hf:{assets.encoder()}", num_classes, own, size)
    elif SHIPPED.get(name, name) in assets.names():
        model = _shipped(name, num_classes, own, size)
    else:
        model = _of_timm(name, num_classes, own, size)
    if weights is not None:
        assert path is not None
        _put(model, weights, path, name)
    return model.train()


def wants(model: nn.Module | str, size: int | None = None) -> Wants:
    """What a network takes, or the network of that name, which is not built.

    Args:
        size: of the images, where it was asked for.

    Raises:
        As :func:`create`.
    """
    found = _of_name(model) if isinstance(model, str) else _of_model(model)
    return found if size is None or found.kind == "text" else dataclasses.replace(found, size=size)


def _of_name(name: str) -> Wants:
    if name.startswith("hf:") or name == "bert":
        config = _config(name)
        if not _is_vision(config, name):
            return Wants("text", tokenizer=_tokenizer(name))
        return _of_config(_pretrained_cfg(name, config))
    if (shipped := SHIPPED.get(name, name)) in assets.names():
        return _of_config(_shipped_config(shipped))
    from timm.models import get_pretrained_cfg, is_model

    if name in OWN or not is_model(name):
        return _of_config(_timm(name).pretrained_cfg)
    config = get_pretrained_cfg(name)
    return _of_config({} if config is None else config.to_dict())


def _of_model(model: Any) -> Wants:
    model = unwrapped(model)
    if (tokenizer := getattr(model, "tokenizer", None)) is not None:
        return Wants("text", tokenizer=tokenizer)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    found = _of_config(config)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels == found.channels or isinstance(model, Wrapped):
        return found
    channels = first.in_channels  # what a timm model says is not in_chans
    mean, std = (sum(values) / len(values) for values in (found.mean, found.std))
    return dataclasses.replace(
        found, channels=channels, mean=(mean,) * channels, std=(std,) * channels
    )


def _of_config(config: dict[str, Any]) -> Wants:
    """Of what timm says of a network."""
    known = Wants()
    channels, size = config.get("input_size", (known.channels, known.size))[:2]
    interpolation = config.get("interpolation") or known.interpolation
    return Wants(
        channels=channels,
        size=size,
        mean=tuple(config.get("mean") or known.mean),
        std=tuple(config.get("std") or known.std),
        crop=float(config.get("crop_pct") or known.crop),
        interpolation=interpolation if interpolation in ("bicubic", "lanczos") else "bilinear",
    )


def _put(model: Any, weights: dict[str, Any], path: Path, name: str) -> None:
    """Load a file's weights; a classifier of other classes stays fresh."""
    inner = model.model if isinstance(model, Wrapped) else model
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    classifier = [
        f"{inside}.{key}"
        for inside, module in inner.named_modules()
        if any(module is head for head in heads)
        for key in module.state_dict()
    ]
    origin = f"{path} does not hold the weights of {name}"
    _say_fresh(str(path), put_weights(inner, weights, origin, classifier))


def _say_fresh(origin: str, names: Sequence[str]) -> None:
    if names:
        log.warning("%s: of other classes, so these start anew: %s", origin, few(names))


def _shipped_config(name: str) -> dict[str, Any]:
    architecture = assets.metadata(name)["architecture"]
    side = architecture.get("img_size", 32)
    return {
        "input_size": (architecture.get("in_chans", 3), side, side),
        "mean": (MEAN,),
        "std": (STD,),
        "crop_pct": 1.0,
    }


def _shipped(name: str, num_classes: int, pretrained: bool, size: int | None) -> Any:
    full = SHIPPED.get(name, name)
    config = _shipped_config(full)
    fixed = "img_size" in assets.metadata(full)["architecture"]
    channels, own, _ = config["input_size"]
    if fixed and size not in (None, own):
        raise ValueError(f"{name} takes images of {own} x {own} pixels, not of {size}")
    model: Any
    if pretrained:
        model = assets.load(full, num_classes)
    else:
        model = assets.build(assets.metadata(full)["architecture"])
        model.reset_classifier(num_classes)
    side = size or own
    model.pretrained_cfg = model.default_cfg = {**config, "input_size": (channels, side, side)}
    return model


def _of_timm(name: str, num_classes: int, pretrained: bool, size: int | None) -> Any:
    options: dict[str, Any] = {"num_classes": num_classes}
    if not pretrained:
        model = _timm(name, size=size, **options)
    else:
        model = _with_weights_of_timm(name, size, options)
    if size is not None:
        config = model.pretrained_cfg
        shape = (config["input_size"][0], size, size)
        model.pretrained_cfg = model.default_cfg = {**config, "input_size": shape}
    return model


def _timm(name: str, **options: Any) -> Any:
    try:
        return models.timm_model(name, **options)
    except ValueError as error:
        if near := difflib.get_close_matches(name, SHIPPED, 1):
            raise ValueError(f"{error}; do you mean {near[0]}, which ships with memtl?") from None
        raise


def _with_weights_of_timm(name: str, size: int | None, options: dict[str, Any]) -> Any:
    if name in OWN:
        raise ValueError(f"there are no weights of {name}: {WITHOUT}")
    try:
        return _timm(name, size=size, pretrained=True, **options)
    except (ImportError, ValueError) as error:
        if "No pretrained weights" in str(error):
            raise ValueError(f"timm has no weights of {name}: {WITHOUT}") from error
        raise
    except Exception as error:  # a download can fail in many ways
        raise _unavailable(name, error) from error


def _of_transformers(name: str, num_classes: int, pretrained: bool, size: int | None) -> Any:
    import transformers

    config = _config(name)
    config.num_labels = num_classes
    vision = _is_vision(config, name)
    own = getattr(config, "image_size", None)
    if size is not None and not vision:
        raise ValueError(f"{name} takes texts: size is of images")
    if size is not None and own not in (None, size):
        if pretrained:
            raise ValueError(f"{name} takes images of {own} x {own} pixels, not of {size}")
        config.image_size = size
    kind = "ImageClassification" if vision else "SequenceClassification"
    auto: Any = getattr(transformers, f"AutoModelFor{kind}")
    with assets.quiet(transformers), _fetching(name, WITHOUT):
        if pretrained:
            model, info = auto.from_pretrained(
                name[3:], config=config, ignore_mismatched_sizes=True, output_loading_info=True,
                dtype="float32",
            )  # fmt: skip
            _check_loaded(name, model, info)
        else:
            model = auto.from_config(config)
    if vision:
        found = _pretrained_cfg(name, config)
        if size is not None:
            found["input_size"] = (found["input_size"][0], size, size)
        return ImageClassifier(model, found)
    tokenizer = _tokenizer(name)
    model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model, tokenizer)


def _check_loaded(name: str, model: Any, info: dict[str, Any]) -> None:
    """Raise where a part of the backbone is not the checkpoint's; say where the head is not."""
    prefix = f"{model.base_model_prefix}."
    other = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    lacking = [key for key in info["missing_keys"] if ".pooler." not in key]
    if wrong := [key for key in (*other, *lacking) if key.startswith(prefix)]:
        raise ValueError(f"{name} does not hold the weights of its own config.json: {few(wrong)}")
    _say_fresh(name, other)


def _config(name: str) -> Any:
    with _fetching(name):
        return transformers_config(str(assets.encoder()) if name == "bert" else name[3:])


def _is_vision(config: Any, name: str) -> bool:
    from transformers.models.auto import modeling_auto

    vision = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    text = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if config.model_type not in (*vision, *text):
        raise ValueError(f"{name} ({config.model_type}) classifies neither images nor texts")
    return config.model_type in vision and not hasattr(config, "vocab_size")


def _tokenizer(name: str) -> Any:
    with _fetching(name):
        tokenizer = assets.load_tokenizer(None if name == "bert" else name[3:])
    if tokenizer.pad_token_id is None:  # of those that only go on writing
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_cfg(name: str, config: Any) -> dict[str, Any]:
    """What images a vision model takes, from its preprocessor's file, as timm says it."""
    from transformers.image_processing_utils import BaseImageProcessor

    side = getattr(config, "image_size", None)
    side = max(side) if isinstance(side, (list, tuple)) else side
    try:
        given, _ = BaseImageProcessor.get_image_processor_dict(name[3:])
    except OSError:  # a configuration alone
        given = {}
    size = given.get("crop_size") or given.get("size") or {}
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    channels, side = getattr(config, "num_channels", 3), side or size or 224
    return {
        "input_size": (channels, side, side),
        "mean": tuple(given.get("image_mean") or (0.5,) * channels),
        "std": tuple(given.get("image_std") or (0.5,) * channels),
        "crop_pct": 1.0,
    }


@contextlib.contextmanager
def _fetching(name: str, instead: str = "hf:PATH for a folder on this machine") -> Iterator[None]:
    """What transformers raises where it finds nothing, in one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise _unavailable(name, error, instead) from error


def _unavailable(name: str, error: Exception, instead: str = WITHOUT) -> OSError:
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) < SHOWN else said[:SHOWN] + "..."
    return OSError(f"{name} cannot be had ({said}): {instead}")
