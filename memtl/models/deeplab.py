"""Dense prediction with a convolutional classifier: DeepLab's head on its feature maps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training import evaluating


class Segmenter(nn.Module):
    """A convolutional network of timm's without its classifier, and the head of DeepLabV3.

    The head (atrous convolutions of several rates beside each other, then two more) reads the last
    feature map, before any expansion to the classifier's features; its logits are enlarged
    bilinearly to the size of the images. In training mode a batch has at least two images: the
    head normalises a mean over whole images by the statistics of the batch.

    Attributes:
        num_classes: Classes of a pixel.
        backbone: The network, whose ``forward_features`` gives the last feature map.
        classifier: The head.
        feature_info: timm's description of the feature maps (``module``, ``num_chs``,
            ``reduction``), with the modules' names in the segmenter.
        pretrained_cfg, default_cfg: Those of ``backbone``, if it has them.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        width: int = 256,
        atrous_rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
    ) -> None:
        """Copy ``backbone``, without what follows its last feature map, and draw a fresh head.

        Args:
            backbone: A classifier of timm's. Its strides are those of the segmenter: build it with
                ``output_stride``.
            num_classes: Classes of a pixel.
            width: Channels of the head.
            atrous_rates: Dilations of its 3 x 3 convolutions; none should be much larger than the
                feature map.
            dropout: Of its features.

        Raises:
            TypeError: If ``backbone`` is not a classifier of timm's, or ``num_classes`` or
                ``width`` not an int.
            ValueError: If ``backbone`` has no feature maps ``[n, channels, height, width]``, as a
                vision transformer; if a number is out of range.
            ImportError: If torchvision is not installed.
        """
        super().__init__()
        for name, value in (("num_classes", num_classes), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(atrous_rates, (tuple, list)):
            raise TypeError(f"atrous_rates must be a list of ints, got {atrous_rates!r}")
        if not atrous_rates or min(atrous_rates) < 1:
            raise ValueError(f"atrous_rates must be at least 1 each, got {atrous_rates}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        try:
            from torchvision.models.segmentation.deeplabv3 import ASPP
        except ImportError as error:
            raise ImportError("a segmenter needs torchvision: pip install memtl[demo]") from error
        for part in ("feature_info", "forward_features", "prune_intermediate_layers"):
            if not hasattr(backbone, part):
                raise TypeError(
                    f"backbone must be a classifier of timm's, but a {type(backbone).__name__} has "
                    f"no {part}"
                )
        backbone = copy.deepcopy(backbone)
        backbone.prune_intermediate_layers(1)  # the last map is kept, what follows it is not
        info = getattr(backbone.feature_info, "info", backbone.feature_info)
        _check_maps(backbone, info[-1]["num_chs"])
        pyramid = ASPP(info[-1]["num_chs"], atrous_rates, width)
        pyramid.project[-1].p = dropout
        self.num_classes = num_classes
        self.backbone = backbone
        # torchvision's DeepLabHead, which has 256 channels and no other number.
        self.classifier = nn.Sequential(
            pyramid,
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, num_classes, 1),
        )
        self.feature_info = [i | {"module": f"backbone.{i['module']}"} for i in info]
        for config in ("pretrained_cfg", "default_cfg"):
            if hasattr(backbone, config):
                setattr(self, config, getattr(backbone, config))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, num_classes, height, width]`` of images ``[n, channels, height, width]``."""
        logits = self.classifier(self.backbone.forward_features(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")

    def get_classifier(self) -> nn.Module:
        """The head, as timm's models return their classifier."""
        return self.classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether ``backbone`` computes its blocks again in backward instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)


@torch.no_grad()
def _check_maps(backbone: Any, channels: int) -> None:
    """Raise unless ``forward_features`` returns maps of so many channels; asked of an image, since
    timm describes the tokens of a transformer as maps too."""
    kind = type(backbone).__name__
    convolution = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise ValueError(f"backbone must be a convolutional network, but a {kind} has none")
    config = getattr(backbone, "pretrained_cfg", None) or {}
    side = config.get("input_size", (64,))[-1]
    image = convolution.weight.new_zeros(1, convolution.in_channels, side, side)
    try:
        with evaluating(backbone):
            found = backbone.forward_features(image)
    except (AssertionError, RuntimeError) as error:  # a transformer of another size, say
        raise ValueError(f"this {kind} takes no images {[*image.shape]}: {error}") from error
    shape = [*found.shape] if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[1] != channels:
        raise ValueError(
            f"backbone must give feature maps [n, {channels}, height, width], but forward_features "
            f"of this {kind} gives {shape}"
        )
