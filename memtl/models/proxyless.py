"""ProxylessNAS-Mobile (Cai, Zhu, Han: "ProxylessNAS: Direct Neural Architecture Search on Target
Task and Hardware", ICLR 2019), the network on which TinyTL and Rep-Net are measured."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

# In timm's notation: one list a stage, one string a block (r repeats, k kernel, s stride of the
# first, e expansion, c channels). Blocks that the search made identities are left out.
STAGES = (
    ("ds_r1_k3_s1_c16",),
    ("ir_r1_k5_s2_e3_c32", "ir_r1_k3_s1_e3_c32"),
    ("ir_r1_k7_s2_e3_c40", "ir_r1_k3_s1_e3_c40", "ir_r2_k5_s1_e3_c40"),
    ("ir_r1_k7_s2_e6_c80", "ir_r3_k5_s1_e3_c80"),
    ("ir_r1_k5_s1_e6_c96", "ir_r3_k5_s1_e3_c96"),
    ("ir_r1_k7_s2_e6_c192", "ir_r1_k7_s1_e6_c192", "ir_r2_k7_s1_e3_c192"),
    ("ir_r1_k7_s1_e6_c320",),
)


def proxylessnas_mobile(
    num_classes: int = 1000, *, pretrained: bool = False, **options: Any
) -> Any:
    """ProxylessNAS-Mobile with random weights, as timm's ``EfficientNet``: 4.08 M parameters at
    1000 classes. Takes images [B, 3, H, W], 224 pixels high and wide as a rule, and returns logits
    [B, num_classes].

    Args:
        num_classes: of the classifier; 0 for none.
        pretrained: as timm's constructors have it.
        options: other keyword arguments of timm's ``EfficientNet`` (``in_chans``, ``drop_rate``).

    Raises:
        ImportError: timm is not installed.
        ValueError: ``pretrained``: there are no weights for it.
    """
    try:
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.models.efficientnet import EfficientNet, decode_arch_def
    except ModuleNotFoundError:
        raise ImportError("timm is not installed: pip install memtl[models]") from None
    if pretrained:
        raise ValueError("there are no pre-trained weights of proxylessnas_mobile")
    model: Any = EfficientNet(
        decode_arch_def([list(stage) for stage in STAGES]),
        num_classes=num_classes,
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        **options,
    )
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "proxylessnas_mobile",
        "input_size": (model.in_chans, 224, 224),
        "pool_size": (7, 7),
        "num_classes": num_classes,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "fixed_input_size": False,
    }
    return model
