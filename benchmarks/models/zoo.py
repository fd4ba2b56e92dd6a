"""The models that are checked: of timm, and architectures of transformers made small.

Weights are random, from torch's global generator: seed it first. A size is that of the images in
pixels, or that of a text in tokens.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
VOCABULARY = 1000

Built = tuple[nn.Module, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Timm:
    """A model of timm by its name; ``options`` go to ``timm.create_model``.

    ``note`` is shown beside what fails: why, where that is known.
    """

    name: str
    family: str
    size: int
    batch: int = 4
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    library = "timm"

    def build(self) -> Built:
        """The model in training mode, and the arguments of one forward."""
        import timm

        model = timm.create_model(self.name, num_classes=CLASSES, **self.options)
        wake(model)
        return model.train(), {"x": torch.randn(self.batch, 3, self.size, self.size)}


@dataclasses.dataclass(frozen=True)
class Transformers:
    """An architecture of transformers: ``options`` go to its configuration.

    ``takes`` says what it reads: "text", "text to text", "images" or "spectrograms".
    """

    name: str  # of the model's class, without "Model"
    family: str
    size: int = 32
    batch: int = 4
    takes: str = "text"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    library = "transformers"

    def build(self) -> Built:
        """The model in training mode, and the arguments of one forward."""
        import transformers

        transformers.logging.set_verbosity_error()  # token ids beyond the small vocabulary
        cls = getattr(transformers, f"{self.name}Model")
        config = cls.config_class(**self.options)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        model = cls(config)
        wake(model)
        return model.train(), self._inputs(config)

    def _inputs(self, config: Any) -> dict[str, Tensor]:
        def ids() -> Tensor:
            return torch.randint(VOCABULARY, (self.batch, self.size))

        if self.takes == "images":
            return {"pixel_values": torch.randn(self.batch, 3, self.size, self.size)}
        if self.takes == "spectrograms":
            mels = torch.randn(self.batch, config.num_mel_bins, 2 * config.max_source_positions)
            return {"input_features": mels, "decoder_input_ids": ids()}
        if self.takes == "text to text":
            return {"input_ids": ids(), "decoder_input_ids": ids()}
        return {"input_ids": ids()}


Entry = Timm | Transformers


def wake(model: nn.Module) -> None:
    """Draw again every parameter that starts at or near zero.

    In a fresh model, layer scales of 1e-6 and last norms of residual branches at zero cut the rest
    of their branch off from the gradient; in a pre-trained one they do not, nor do they reach 1,
    which would have gradients explode in deep models.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or parameter.abs().max() >= 1e-2:
            continue
        last = name.rsplit(".", 1)[-1]
        one_axis = parameter.numel() == max(parameter.shape, default=1)
        with torch.no_grad():
            if one_axis and re.search("weight|gamma|scale|gain|lambda", last):
                parameter.uniform_(0.1, 0.5)
            else:
                parameter.normal_(std=0.02)


DROP_PATH = {"drop_path_rate": 0.1}

TIMM = (
    Timm("vit_tiny_patch16_224", "ViT", 224, 2, DROP_PATH),
    Timm("vit_small_patch14_reg4_dinov2", "DINOv2", 112, 2, {"img_size": 112}),
    Timm("vit_tiny_patch16_dinov3_qkvb", "DINOv3", 128, 2, {"img_size": 128}),
    Timm("vit_xsmall_patch16_clip_224", "CLIP", 112, 2, {"img_size": 112}),
    Timm("vit_base_patch16_siglip_224", "SigLIP", 96, 2, {"img_size": 96}),
    Timm("vit_tiny_r_s16_p8_224", "ViT hybrid", 128, 2, {"img_size": 128}),
    Timm("deit_tiny_distilled_patch16_224", "DeiT", 112, 2, {"img_size": 112}),
    Timm("deit3_small_patch16_224", "DeiT3", 112, 2, {"img_size": 112, **DROP_PATH}),
    Timm("beit_base_patch16_224", "BEiT", 112, 2, {"img_size": 112}),
    Timm("eva02_tiny_patch14_224", "EVA-02", 112, 2, {"img_size": 112}),
    Timm("swin_tiny_patch4_window7_224", "Swin", 112, 2, {"img_size": 112, **DROP_PATH}),
    Timm("swinv2_tiny_window8_256", "Swin v2", 128, 2, {"img_size": 128}),
    Timm("cait_xxs24_224", "CaiT", 112, 2, {"img_size": 112}),
    Timm("xcit_nano_12_p16_224", "XCiT", 128, 4),
    Timm("pit_ti_224", "PiT", 112, 2, {"img_size": 112}),
    Timm("twins_svt_small", "Twins", 128, 2, {"img_size": 128}),
    Timm("twins_pcpvt_small", "Twins", 128, 2, {"img_size": 128}),
    Timm("pvt_v2_b0", "PVT v2", 128, 2),
    Timm("mvitv2_tiny", "MViTv2", 224, 1),
    Timm("hiera_tiny_224", "Hiera", 224, 1),
    Timm("davit_tiny", "DaViT", 112, 2),
    Timm("focalnet_tiny_srf", "FocalNet", 112, 2),
    Timm("levit_128s", "LeViT", 224, 4),
    Timm("maxvit_pico_rw_256", "MaxViT", 128, 2, {"img_size": 128}),
    Timm("coatnet_pico_rw_224", "CoAtNet", 128, 4, {"img_size": 128}),
    Timm("tiny_vit_5m_224", "TinyViT", 128, 4),
    Timm("mobilevit_xxs", "MobileViT", 128, 4),
    Timm("mobilevitv2_050", "MobileViT v2", 128, 4),
    Timm("edgenext_xx_small", "EdgeNeXt", 128, 4),
    Timm("efficientformer_l1", "EfficientFormer", 224, 2),
    Timm("efficientformerv2_s0", "EfficientFormer v2", 224, 4),
    Timm("efficientvit_b0", "EfficientViT", 128, 4),
    Timm(
        "fastvit_t8",
        "FastViT",
        128,
        note="the conv_scale weights, one number a channel in front of a batch normalisation, "
        "hardly change the output: their gradient is a small difference of large sums",
    ),
    Timm("repvit_m0_9", "RepViT", 128, 4),
    Timm("poolformer_s12", "PoolFormer", 128, 2),
    Timm("caformer_s18", "CAFormer", 112, 2),
    Timm("mixer_s16_224", "MLP-Mixer", 112, 2, {"img_size": 112}),
    Timm("resmlp_12_224", "ResMLP", 112, 2, {"img_size": 112}),
    Timm("gmlp_ti16_224", "gMLP", 112, 2, {"img_size": 112}),
    Timm("convnext_atto", "ConvNeXt", 128, 2, DROP_PATH),
    Timm("convnextv2_atto", "ConvNeXt v2", 128, 2),
    Timm("inception_next_atto", "InceptionNeXt", 128, 4),
    Timm("resnet18", "ResNet", 128, 4),
    Timm("resnet50", "ResNet", 128, 4),
    Timm("resnet50_gn", "ResNet", 128, 2),
    Timm("resnext50_32x4d", "ResNeXt", 128, 4),
    Timm("seresnet18", "SE-ResNet", 128, 4),
    Timm("resnetv2_50", "ResNet v2", 128, 4),
    # Standardising a weight keeps as much as the weight: little at usual batches.
    Timm("nfnet_l0", "NFNet", 224, 8),
    Timm("nf_regnet_b0", "NF-RegNet", 224, 8),
    Timm("regnetx_002", "RegNet", 128, 4),
    Timm("regnety_002", "RegNet", 128, 4),
    Timm("repvgg_a0", "RepVGG", 128, 4),
    Timm("densenet121", "DenseNet", 128, 4),
    Timm("vgg11", "VGG", 96, 2),
    Timm("vgg11_bn", "VGG", 96, 2),
    Timm("hrnet_w18_small", "HRNet", 128, 4),
    Timm("inception_v3", "Inception", 139, 4),
    Timm("mobilenetv1_100", "MobileNet v1", 128, 4),
    Timm("mobilenetv2_050", "MobileNet v2", 128, 4),
    Timm("mobilenetv3_small_050", "MobileNet v3", 128, 4),
    Timm("mobilenetv4_conv_small_035", "MobileNet v4", 128, 4),
    Timm("mobilenetv4_hybrid_medium_075", "MobileNet v4", 128, 4),
    Timm("efficientnet_b0", "EfficientNet", 128, 4, DROP_PATH),
    Timm("tf_efficientnet_lite0", "EfficientNet", 128, 4),
    Timm("tf_efficientnetv2_b0", "EfficientNet v2", 128, 4),
    Timm("ghostnet_050", "GhostNet", 128, 4),
)

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 768,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "intermediate_size": 512, "pad_token_id": 0}
TEXT_TO_TEXT = {
    "vocab_size": VOCABULARY,
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
}
IMAGES = {key: value for key, value in BERT.items() if key != "vocab_size"} | {
    "image_size": 96,
    "patch_size": 8,
}

TRANSFORMERS = (
    Transformers("Bert", "BERT", options=BERT),
    Transformers("Roberta", "RoBERTa", options=BERT),
    Transformers("Electra", "ELECTRA", options={**BERT, "embedding_size": 128}),
    Transformers("Albert", "ALBERT", options={**BERT, "embedding_size": 128}),
    Transformers(
        "DistilBert",
        "DistilBERT",
        options={
            "vocab_size": VOCABULARY,
            "dim": 192,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 768,
        },
    ),
    Transformers(
        "DebertaV2",
        "DeBERTa v2",
        options={
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    Transformers("ModernBert", "ModernBERT", options={**BERT, "pad_token_id": 0}),
    Transformers(
        "GPT2",
        "GPT-2",
        options={"vocab_size": VOCABULARY, "n_embd": 192, "n_layer": 3, "n_head": 4},
    ),
    Transformers("GPTNeoX", "GPT-NeoX", options=BERT),
    Transformers(
        "OPT",
        "OPT",
        options={
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "word_embed_proj_dim": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 768,
        },
    ),
    Transformers(
        "Bloom",
        "BLOOM",
        options={"vocab_size": VOCABULARY, "hidden_size": 192, "n_layer": 3, "n_head": 4},
    ),
    Transformers("Llama", "Llama", options=LLAMA),
    Transformers("Mistral", "Mistral", options=LLAMA),
    Transformers("Qwen2", "Qwen2", options=LLAMA),
    Transformers("Qwen3", "Qwen3", options={**LLAMA, "head_dim": 48}),
    Transformers("Gemma2", "Gemma 2", options={**LLAMA, "head_dim": 48}),
    Transformers("Phi3", "Phi-3", options=LLAMA),
    Transformers(
        "T5",
        "T5",
        takes="text to text",
        options={
            "vocab_size": VOCABULARY,
            "d_model": 192,
            "d_kv": 48,
            "d_ff": 768,
            "num_layers": 2,
            "num_heads": 4,
        },
    ),
    Transformers("Bart", "BART", takes="text to text", options=TEXT_TO_TEXT),
    Transformers(
        "Whisper",
        "Whisper",
        takes="spectrograms",
        options={**TEXT_TO_TEXT, "max_source_positions": 64, "pad_token_id": 0},
    ),
    Transformers("ViT", "ViT", 96, takes="images", options=IMAGES),
    Transformers("Dinov2", "DINOv2", 96, takes="images", options=IMAGES),
    Transformers("CLIPVision", "CLIP", 96, takes="images", options=IMAGES),
    Transformers("SiglipVision", "SigLIP", 96, takes="images", options=IMAGES),
    Transformers(
        "Swin",
        "Swin",
        96,
        takes="images",
        options={
            "image_size": 96,
            "window_size": 6,
            "embed_dim": 48,
            "depths": [2, 2],
            "num_heads": [2, 4],
        },
    ),
    Transformers("Segformer", "SegFormer", 96, takes="images", options={"depths": [1, 1, 1, 1]}),
)

MODELS: tuple[Entry, ...] = (*TIMM, *TRANSFORMERS)

QUICK = ("vit_tiny_patch16_224", "mobilenetv3_small_050", "Bert")
