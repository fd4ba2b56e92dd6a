"""Small pre-trained networks that ship with the package, so that demos need no download.

``vit_glyphs`` is a vision transformer, ``cnn_glyphs`` a MobileNetV2. Each one is a pair of files:
``NAME.safetensors`` holds the weights (float16; buffers as they are) and ``NAME.json`` says what
the architecture is, how the weights were made, and what their sha256 is. The file ``pretrain.py``
made them and can make them again. ``bert_docstrings`` is a small BERT, a folder that
``transformers`` loads (:func:`encoder`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from memtl.models import Segmenter
from memtl.models.bert import Classifier, MaskedLM, Regressor, SpanFinder
from memtl.tasks.glyphs import SIZE

__all__ = [
    "encoder",
    "load",
    "load_encoder",
    "load_segmenter",
    "load_tokenizer",
    "metadata",
    "names",
    "quiet",
    "sha256",
]

ATROUS_RATES, DROPOUT = (2, 4, 6), 0.1
"""Of a segmenter's head, whose feature maps are small, and its training short."""

_HERE = Path(__file__).parent


def names(directory: str | PathLike[str] = _HERE) -> list[str]:
    """Names that :func:`load` knows in ``directory`` (default: those of the package), sorted."""
    return sorted(path.stem for path in Path(directory).glob("*.json"))


def metadata(name: str = "vit_glyphs", directory: str | PathLike[str] = _HERE) -> dict:
    """Return what is recorded about a network: architecture, origin, accuracy, sha256.

    Args:
        name: One of :func:`names`.
        directory: Where the files are.

    Raises:
        ValueError: If ``name`` is unknown, or its JSON file is damaged.
    """
    if name not in names(directory):
        raise ValueError(f"unknown network {name!r}: {directory} has {names(directory)}")
    path = Path(directory, f"{name}.json")
    try:
        record = json.loads(path.read_bytes())
        record["architecture"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return record


def sha256(name: str) -> str:
    """The sha256 of the weights' file of a network, or encoder, that ships with the package.

    Raises:
        ValueError: If ``name`` is unknown.
    """
    path = _HERE / f"{name}.safetensors"
    path = path if name in names() else encoder(name) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(architecture: dict[str, Any]) -> nn.Module:
    """Build an untrained network from what a record says of its architecture.

    Args:
        architecture: ``kind`` is ``"vit"`` (the rest are keyword arguments of
            ``timm.models.VisionTransformer``) or ``"mobilenet_v2"`` (``stem_stride``, ``stages``
            in timm's notation, a string each, and keyword arguments of
            ``timm.models.EfficientNet``, timm's class for that family; ``output_stride`` is in
            pixels of the image).

    Returns:
        The network; its ``pretrained_cfg``, and ``default_cfg``, have the ``input_size``.

    Raises:
        ValueError: If the kind is missing or unknown.
        ImportError: If timm is not installed.
    """
    options = dict(architecture)
    kind = options.pop("kind", None)
    if kind not in _BUILDERS:
        raise ValueError(f"unknown kind of architecture {kind!r}: known are {sorted(_BUILDERS)}")
    try:
        import timm.models  # noqa: F401
    except ImportError as error:
        raise ImportError("memtl.assets needs timm: pip install memtl[demo]") from error
    model: Any = _BUILDERS[kind](**options)
    side = architecture.get("img_size", SIZE)
    model.pretrained_cfg = {"input_size": (architecture.get("in_chans", 3), side, side)}
    model.default_cfg = model.pretrained_cfg
    return model


def _vit(**options: Any) -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(**options)


def _mobilenet_v2(
    stages: Sequence[str], stem_stride: int, output_stride: int | None = None, **options: Any
) -> nn.Module:
    from timm.models.efficientnet import EfficientNet, decode_arch_def

    if output_stride is not None:
        options["output_stride"] = output_stride * 2 // stem_stride  # see below
    arguments = decode_arch_def([[stage] for stage in stages])
    model = EfficientNet(arguments, act_layer=nn.ReLU6, fix_stem=True, **options)
    # timm's stem always has stride 2, which leaves too little of a 32x32 image; its padding of 1
    # is right for either stride.
    model.conv_stem.stride = (stem_stride, stem_stride)
    # Where a stride has become a dilation, timm dilates the convolution that had the stride too; it
    # must not be for the maps to be those of the strided network, and the places between.
    blocks: Any = model.blocks
    for stage, following in itertools.pairwise(blocks):
        convolution = following[0].conv_dw
        convolution.dilation = stage[-1].conv_dw.dilation
        convolution.padding = tuple(
            d * (k - 1) // 2
            for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)
        )
    for info in model.feature_info:
        info["reduction"] = info["reduction"] * stem_stride // 2
    return model


_BUILDERS: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": _mobilenet_v2, "vit": _vit}


def _checked(output_stride: int, name: str, architecture: dict[str, Any]) -> int:
    """``output_stride`` if the network can have it: its own, or that of an earlier feature map."""
    if architecture["kind"] != "mobilenet_v2":
        raise ValueError(f"output_stride is for convolutional networks, which {name} is not")
    if not isinstance(output_stride, int) or isinstance(output_stride, bool):
        raise TypeError(f"output_stride must be an int, got {type(output_stride).__name__}")
    network: Any = build(architecture)
    reductions = sorted({info["reduction"] for info in network.feature_info})
    if output_stride not in reductions:
        raise ValueError(f"output_stride of {name} must be in {reductions}, got {output_stride}")
    return output_stride


def load(
    name: str = "vit_glyphs",
    num_classes: int | None = None,
    directory: str | PathLike[str] = _HERE,
    *,
    output_stride: int | None = None,
) -> nn.Module:
    """Return a pre-trained network, in float32 on the CPU, in training mode.

    It takes images ``[n, 1, 32, 32]`` normalised as those of :mod:`memtl.tasks` and returns logits
    ``[n, num_classes]``.

    Args:
        name: One of :func:`names`.
        num_classes: Replace the head by a fresh one of so many classes; ``None`` keeps the head
            of the source task.
        directory: Where the files are; default, those that ship with the package.
        output_stride: Pixels of the image to one of the last feature map, of a convolutional
            network: later strides become dilations, with the same weights. ``None`` for its own.

    Raises:
        TypeError: If ``num_classes`` or ``output_stride`` is neither ``None`` nor an int.
        ValueError: If ``name`` is unknown, ``num_classes`` less than 1, ``output_stride`` none that
            the network can have, or a file damaged, truncated or altered.
        FileNotFoundError: If the weights of a known name are missing.
        ImportError: If timm or safetensors is not installed.
    """
    if num_classes is not None:
        if not isinstance(num_classes, int) or isinstance(num_classes, bool):
            raise TypeError(f"num_classes must be an int, got {type(num_classes).__name__}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("memtl.assets needs safetensors: pip install memtl[demo]") from error

    record = metadata(name, directory)
    path = Path(directory, f"{name}.safetensors")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise ValueError(
            f"{path} is damaged, truncated or altered: its {len(content)} bytes have the sha256 "
            f"{found}, but {name}.json records {record['sha256']}"
        )
    architecture = record["architecture"]
    if output_stride is not None:
        architecture = architecture | {"output_stride": _checked(output_stride, name, architecture)}
    model = build(architecture)
    try:
        model.load_state_dict(safetensors.torch.load(content))  # copies float16 into float32
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {error}") from error
    if num_classes is not None:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def load_segmenter(
    name: str = "cnn_glyphs",
    num_classes: int = 11,
    directory: str | PathLike[str] = _HERE,
    *,
    output_stride: int = 4,
    width: int = 64,
) -> Segmenter:
    """Return a pre-trained network with a fresh head that classifies every pixel.

    It takes images ``[n, 1, height, width]`` normalised as those of :mod:`memtl.tasks` and returns
    logits ``[n, num_classes, height, width]``. The head is drawn from torch's global generator.

    Args:
        name: A convolutional network, one of :func:`names`.
        num_classes: Classes of a pixel; the default is that of
            :func:`memtl.tasks.load_digits_segmentation`.
        directory, output_stride: As for :func:`load`.
        width: Channels of the head.

    Raises:
        TypeError, ValueError, FileNotFoundError: As :func:`load` and
            :class:`memtl.models.Segmenter` raise them.
        ImportError: If timm, safetensors or torchvision is not installed.
    """
    backbone = load(name, directory=directory, output_stride=output_stride)
    return Segmenter(backbone, num_classes, width=width, atrous_rates=ATROUS_RATES, dropout=DROPOUT)


def encoder(name: str = "bert_docstrings") -> Path:
    """The folder of an encoder that ships with the package, which ``transformers`` loads::

        AutoModelForSequenceClassification.from_pretrained(memtl.assets.encoder(), num_labels=4)
        AutoTokenizer.from_pretrained(memtl.assets.encoder())

    ``bert_docstrings`` is a BERT of 4 layers, 128 wide, pre-trained by masked-language modelling on
    the docstrings of Python's standard library; parameters in float16, loaded as float32. The file
    ``pretrain_bert.py`` made it and can make it again; ``memtl.json`` in the folder says how.

    Raises:
        ValueError: If there is none of that name.
    """
    known = sorted(path.parent.name for path in _HERE.glob("*/config.json"))
    if name not in known:
        raise ValueError(f"unknown encoder {name!r}: there is {', '.join(known) or 'none'}")
    return _HERE / name


_HEADS = {
    "classifier": ("AutoModelForSequenceClassification", Classifier),
    "mlm": ("AutoModelForMaskedLM", MaskedLM),
    "regressor": ("AutoModelForSequenceClassification", Regressor),
    "spans": ("AutoModelForQuestionAnswering", SpanFinder),
}


def load_encoder(
    head: str = "classifier", num_classes: int = 2, source: str | PathLike[str] | None = None
) -> Any:
    """A pre-trained encoder of ``transformers`` with a head on it, in training mode.

    It takes token identifiers ``[n, length]``; what it gives is said in :mod:`memtl.models.bert`. A
    head that the checkpoint does not have is drawn from torch's global generator. Where the head
    does not use the pooler the encoder has it all the same, so that a lottery ticket is about the
    same weights under every head.

    Args:
        head: ``"classifier"``, ``"regressor"`` (of one number), ``"spans"`` (questions about a
            text) or ``"mlm"`` (masked words: no fresh head).
        num_classes: of a classifier.
        source: what ``from_pretrained`` takes, a folder or a name; None for the shipped encoder.

    Raises:
        ValueError: If ``head`` is unknown or ``num_classes`` less than 1; or masked words are asked
            of an encoder without BERT's head for them.
        OSError: If transformers finds no such ``source``.
        ImportError: If transformers is not installed.
    """
    if head not in _HEADS:
        raise ValueError(f"head must be one of {', '.join(_HEADS)}, got {head!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    transformers = _transformers()
    source = encoder() if source is None else source
    name, wrapper = _HEADS[head]
    labels = {"classifier": {"num_labels": num_classes}, "regressor": {"num_labels": 1}}
    with quiet(transformers):  # what of the checkpoint is of another head
        model = getattr(transformers, name).from_pretrained(source, **labels.get(head, {}))
        base = model.base_model
        if head in ("mlm", "spans") and getattr(base, "pooler", base) is None:
            whole = transformers.AutoModelForSequenceClassification.from_pretrained(source)
            base.pooler = whole.base_model.pooler
    return wrapper(model.train(), load_tokenizer(source))


def load_tokenizer(source: str | PathLike[str] | None = None) -> Any:
    """The tokenizer of a pre-trained encoder of ``transformers``.

    Args:
        source: as in :func:`load_encoder`.

    Raises:
        ImportError: If transformers is not installed.
    """
    return _transformers().AutoTokenizer.from_pretrained(encoder() if source is None else source)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("encoders need transformers: pip install memtl[models]") from error
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Loads without a bar and without the list of what the new head does not take over."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
