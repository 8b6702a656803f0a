"""Which published weights fit which of our models, and on what terms, as their publishers state them. Plain data.

`saccade models NAME` prints it, and `saccade train --weights`, `convert` and `verify` take the names. The list is no
limit: weights of any form that the dialects cover can be read.
"""

from __future__ import annotations

from dataclasses import dataclass

IN1K = "ImageNet-1k"
IN21K = "ImageNet-21k"
IN21K_1K = "ImageNet-21k, then ImageNet-1k"
IN22K = "ImageNet-22k"
IN22K_1K = "ImageNet-22k, then ImageNet-1k"
LVD142M = "LVD-142M, without labels (its pictures are not published)"
LVD1689M = "LVD-1689M, without labels (its pictures are not published)"
WEBLI = "WebLI, pictures with texts (not published)"
COCO = "COCO 2017"
OBJECTS365 = "Objects365"
OBJECTS365_COCO = "Objects365, then COCO 2017"
WIT = "400 million pictures with texts (not published)"
OPUS = "OPUS, texts of many sources (https://opus.nlpl.eu)"
TATOEBA = "OPUS as selected by the Tatoeba Challenge (https://github.com/Helsinki-NLP/Tatoeba-Challenge)"
OPENAI = "mit (of the code; the page of the weights states none)"


@dataclass(frozen=True)
class Published:
    """Weights that others give away, and their terms as they state them."""

    name: str  # on the hub
    dialect: str
    licence: str
    training_data: str


def _timm(name: str, training_data: str, licence: str = "apache-2.0") -> Published:
    return Published(f"timm/{name}", "timm", licence, training_data)


def _hf(name: str, training_data: str, licence: str = "apache-2.0") -> Published:
    return Published(name, "huggingface", licence, training_data)


def _augreg(form: str, *data: str) -> tuple[Published, ...]:
    tags = {IN1K: "augreg_in1k", IN21K: "augreg_in21k", IN21K_1K: "augreg_in21k_ft_in1k"}
    return tuple(_timm(f"vit_{form}_224.{tags[each]}", each) for each in data)


def _deit(size: str) -> tuple[Published, ...]:
    return (
        _timm(f"deit_{size}_distilled_patch16_224.fb_in1k", IN1K),
        _hf(f"facebook/deit-{size}-distilled-patch16-224", IN1K),
    )


def _deit3(form: str) -> tuple[Published, ...]:
    return _timm(f"deit3_{form}_224.fb_in22k_ft_in1k", IN22K_1K), _timm(f"deit3_{form}_224.fb_in1k", IN1K)


def _dino(size: str, patch: int) -> tuple[Published, ...]:
    return _timm(f"vit_{size}_patch{patch}_224.dino", IN1K), _hf(f"facebook/dino-vit{size[0]}{patch}", IN1K)


def _dinov2(size: str, registers: bool) -> tuple[Published, ...]:
    middle, prefix = ("_reg4", "with-registers-") if registers else ("", "")
    return (
        _hf(f"facebook/dinov2-{prefix}{size}", LVD142M),
        _timm(f"vit_{size}_patch14{middle}_dinov2.lvd142m", LVD142M),
    )


def _dinov3(short: str) -> tuple[Published, ...]:
    """The hub gives them to those who accept the licence. timm's have no biases, or pool otherwise: another form."""
    return (_hf(f"facebook/dinov3-vit{short}-pretrain-lvd1689m", LVD1689M, "dinov3-license"),)


def _swin(size: str, window: str, *data: str) -> tuple[Published, ...]:
    tags = {IN1K: "ms_in1k", IN22K: "ms_in22k", IN22K_1K: "ms_in22k_ft_in1k"}
    return tuple(_timm(f"swin_{size}_patch4_{window}.{tags[each]}", each, "mit") for each in data)


def _swinv2(form: str, training_data: str) -> tuple[Published, ...]:
    tags = {IN1K: "ms_in1k", IN22K: "ms_in22k", IN22K_1K: "ms_in22k_ft_in1k"}
    return (_timm(f"swinv2_{form}.{tags[training_data]}", training_data, "mit"),)


def _lw_detr(size: str, *data: str) -> tuple[Published, ...]:
    tags = {OBJECTS365_COCO: "60e_coco", OBJECTS365: "30e_objects365"}
    return tuple(_hf(f"AnnaZhang/lwdetr_{size}_{tags[each]}", each) for each in data)


def _opus_mt(licence: str, *pairs: str) -> tuple[Published, ...]:
    return tuple(_hf(f"Helsinki-NLP/opus-mt-{pair}", OPUS, licence) for pair in pairs)


def _resnet(depth: int, *tags: str) -> tuple[Published, ...]:
    licences = {"tv_in1k": "bsd-3-clause", "tv2_in1k": "bsd-3-clause"}
    from_timm = (_timm(f"resnet{depth}.{tag}", IN1K, licences.get(tag, "apache-2.0")) for tag in tags)
    return *from_timm, _hf(f"microsoft/resnet-{depth}", IN1K)


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "vit_tiny": _augreg("tiny_patch16", IN21K_1K, IN21K),
    "vit_small": _augreg("small_patch16", IN21K_1K, IN21K, IN1K),
    "vit_base": (
        *_augreg("base_patch16", IN21K_1K, IN21K, IN1K),
        _hf("google/vit-base-patch16-224", IN21K_1K),
        _timm("vit_base_patch16_224.mae", f"{IN1K}, without labels", "cc-by-nc-4.0"),
    ),
    "vit_large": (
        *_augreg("large_patch16", IN21K_1K, IN21K),
        _hf("google/vit-large-patch16-224", IN21K_1K),
        _timm("vit_large_patch16_224.mae", f"{IN1K}, without labels", "cc-by-nc-4.0"),
    ),
    "vit_huge": (
        _timm("vit_huge_patch14_224.orig_in21k", IN21K),
        _timm("vit_huge_patch14_224.mae", f"{IN1K}, without labels", "cc-by-nc-4.0"),
    ),
    "vit_base_8": _augreg("base_patch8", IN21K_1K, IN21K),
    "vit_small_32": _augreg("small_patch32", IN21K_1K, IN21K),
    "vit_base_32": _augreg("base_patch32", IN21K_1K, IN21K, IN1K),
    "vit_large_32": (_timm("vit_large_patch32_224.orig_in21k", IN21K),),
    "deit_tiny": _deit("tiny"),
    "deit_small": _deit("small"),
    "deit_base": _deit("base"),
    "deit3_small": _deit3("small_patch16"),
    "deit3_medium": _deit3("medium_patch16"),
    "deit3_base": _deit3("base_patch16"),
    "deit3_large": _deit3("large_patch16"),
    "deit3_huge": _deit3("huge_patch14"),
    "dino_small": _dino("small", 16),
    "dino_base": _dino("base", 16),
    "dino_small_8": _dino("small", 8),
    "dino_base_8": _dino("base", 8),
    "dinov2_small": _dinov2("small", registers=False),
    "dinov2_base": _dinov2("base", registers=False),
    "dinov2_large": _dinov2("large", registers=False),
    "dinov2_giant": _dinov2("giant", registers=False),
    "dinov2_small_registers": _dinov2("small", registers=True),
    "dinov2_base_registers": _dinov2("base", registers=True),
    "dinov2_large_registers": _dinov2("large", registers=True),
    "dinov2_giant_registers": _dinov2("giant", registers=True),
    "dinov3_small": _dinov3("s16"),
    "dinov3_small_plus": _dinov3("s16plus"),
    "dinov3_base": _dinov3("b16"),
    "dinov3_large": _dinov3("l16"),
    "dinov3_huge_plus": _dinov3("h16plus"),
    "dinov3_7b": _dinov3("7b16"),
    "siglip_base": (_hf("google/siglip-base-patch16-224", WEBLI),),
    "siglip_large": (_hf("google/siglip-large-patch16-256", WEBLI),),
    "siglip_so400m": (_hf("google/siglip-so400m-patch14-384", WEBLI),),
    "clip_base_32": (_hf("openai/clip-vit-base-patch32", WIT, OPENAI),),
    "clip_base_16": (_hf("openai/clip-vit-base-patch16", WIT, OPENAI),),
    "clip_large_14": (_hf("openai/clip-vit-large-patch14", WIT, OPENAI),),
    "swin_tiny": (
        *_swin("tiny", "window7_224", IN1K, IN22K_1K, IN22K),
        _hf("microsoft/swin-tiny-patch4-window7-224", IN1K),
    ),
    "swin_small": (
        *_swin("small", "window7_224", IN1K, IN22K_1K, IN22K),
        _hf("microsoft/swin-small-patch4-window7-224", IN1K),
    ),
    "swin_base": (
        *_swin("base", "window7_224", IN22K_1K, IN1K, IN22K),
        _hf("microsoft/swin-base-patch4-window7-224", IN1K),
    ),
    "swin_large": _swin("large", "window7_224", IN22K_1K, IN22K),
    "swin_base_384": _swin("base", "window12_384", IN22K_1K, IN1K, IN22K),
    "swin_large_384": _swin("large", "window12_384", IN22K_1K, IN22K),
    "swinv2_tiny": (
        *_swinv2("tiny_window8_256", IN1K),
        _hf("microsoft/swinv2-tiny-patch4-window8-256", IN1K),
    ),
    "swinv2_small": _swinv2("small_window8_256", IN1K),
    "swinv2_base": _swinv2("base_window8_256", IN1K),
    "swinv2_tiny_window16": _swinv2("tiny_window16_256", IN1K),
    "swinv2_small_window16": _swinv2("small_window16_256", IN1K),
    "swinv2_base_window16": _swinv2("base_window16_256", IN1K),
    "swinv2_base_window12": _swinv2("base_window12_192", IN22K),
    "swinv2_large_window12": _swinv2("large_window12_192", IN22K),
    "swinv2_base_window12to16": _swinv2("base_window12to16_192to256", IN22K_1K),
    "swinv2_base_window12to24": _swinv2("base_window12to24_192to384", IN22K_1K),
    "swinv2_large_window12to16": _swinv2("large_window12to16_192to256", IN22K_1K),
    "swinv2_large_window12to24": _swinv2("large_window12to24_192to384", IN22K_1K),
    "resnet18": _resnet(18, "a1_in1k", "tv_in1k"),
    "resnet34": _resnet(34, "a1_in1k", "tv_in1k"),
    "resnet50": _resnet(50, "a1_in1k", "tv2_in1k", "tv_in1k"),
    "resnet101": _resnet(101, "a1_in1k", "tv2_in1k", "tv_in1k"),
    "efficientvit_b0": (_timm("efficientvit_b0.r224_in1k", IN1K),),
    "efficientvit_b1": (_timm("efficientvit_b1.r288_in1k", IN1K), _timm("efficientvit_b1.r224_in1k", IN1K)),
    "efficientvit_b2": (_timm("efficientvit_b2.r288_in1k", IN1K), _timm("efficientvit_b2.r224_in1k", IN1K)),
    "efficientvit_b3": (_timm("efficientvit_b3.r288_in1k", IN1K), _timm("efficientvit_b3.r224_in1k", IN1K)),
    "efficientformer_l1": (_timm("efficientformer_l1.snap_dist_in1k", IN1K),),
    "efficientformer_l3": (_timm("efficientformer_l3.snap_dist_in1k", IN1K),),
    "levit_128s": (_timm("levit_128s.fb_dist_in1k", IN1K),),
    "levit_128": (_timm("levit_128.fb_dist_in1k", IN1K),),
    "levit_192": (_timm("levit_192.fb_dist_in1k", IN1K),),
    "levit_256": (_timm("levit_256.fb_dist_in1k", IN1K),),
    "levit_384": (_timm("levit_384.fb_dist_in1k", IN1K),),
    "detr_resnet50": (_hf("facebook/detr-resnet-50", COCO),),
    "detr_resnet50_dc5": (_hf("facebook/detr-resnet-50-dc5", COCO),),
    "detr_resnet101": (_hf("facebook/detr-resnet-101", COCO),),
    "detr_resnet101_dc5": (_hf("facebook/detr-resnet-101-dc5", COCO),),
    "deformable_detr_resnet50": (_hf("SenseTime/deformable-detr", COCO),),
    "deformable_detr_resnet50_refine": (_hf("SenseTime/deformable-detr-with-box-refine", COCO),),
    "deformable_detr_resnet50_two_stage": (_hf("SenseTime/deformable-detr-with-box-refine-two-stage", COCO),),
    "deformable_detr_resnet50_single": (_hf("SenseTime/deformable-detr-single-scale", COCO),),
    "deformable_detr_resnet50_single_dc5": (_hf("SenseTime/deformable-detr-single-scale-dc5", COCO),),
    "lw_detr_tiny": _lw_detr("tiny", OBJECTS365_COCO, OBJECTS365),
    "lw_detr_small": _lw_detr("small", OBJECTS365_COCO, OBJECTS365),
    "lw_detr_medium": _lw_detr("medium", OBJECTS365_COCO),
    "lw_detr_large": _lw_detr("large", OBJECTS365_COCO, OBJECTS365),
    "lw_detr_xlarge": _lw_detr("xlarge", OBJECTS365_COCO),
    # a few of more than a thousand, one for each pair of languages
    "marian_base": (
        *_opus_mt("cc-by-4.0", "en-de", "zh-en"),
        *_opus_mt("apache-2.0", "de-en", "en-fr", "fr-en", "en-es", "es-en"),
    ),
    "marian_big": tuple(
        _hf(f"Helsinki-NLP/opus-mt-tc-big-{pair}", TATOEBA, "cc-by-4.0") for pair in ("en-fr", "fr-en", "en-es")
    ),
    "rf_detr_nano": (_hf("Roboflow/rf-detr-nano", COCO),),
    "rf_detr_small": (_hf("Roboflow/rf-detr-small", COCO),),
    "rf_detr_medium": (_hf("Roboflow/rf-detr-medium", COCO),),
    "rf_detr_base": (_hf("Roboflow/rf-detr-base", COCO), _hf("Roboflow/rf-detr-base-2", COCO)),
    "rf_detr_large": (_hf("Roboflow/rf-detr-large", COCO),),
}
