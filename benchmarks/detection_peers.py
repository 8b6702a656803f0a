"""transformers' detectors as they begin when nothing is loaded, and what is done with them in training and afterwards.

Their classes are meant to be filled with published weights. Made from a configuration alone they would start with
frozen normalisation, the first layers without a gradient (DETR), weights and scales of normalisation near zero
(RT-DETR, D-FINE: normal, 0.01) and a prior of 1 / (classes + 1), from which they hardly learn. Here they begin as the
code of their papers does (https://github.com/facebookresearch/detr, https://github.com/lyuwenyu/RT-DETR,
https://github.com/Peterande/D-FINE), whose sizes they have, and their batch normalisation learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.detector import BoxTargets

PLAIN = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)
PRIOR = 0.01  # of a score before anything is learnt


def of_transformers(name: str, *arguments: Any, **settings: Any) -> Any:
    """An object of the class of that name. Imported here, because the import takes seconds."""
    import transformers

    return getattr(transformers, name)(*arguments, **settings)


@dataclass(frozen=True)
class Peer:
    about: str
    build: Callable[[int], nn.Module]  # number of classes -> network with random weights
    processor_name: str  # of transformers, which holds the published post-processing
    lr: float  # what is published, for all weights alike: none of them are trained already

    @cached_property
    def processor(self) -> Any:
        return of_transformers(self.processor_name)

    def loss(self, network: nn.Module, images: Tensor, targets: BoxTargets) -> Tensor:
        """Of normalised pictures (B, 3, H, W), with all weights and auxiliary parts that are published."""
        here = [targets.picture == b for b in range(len(images))]
        labels = [{"class_labels": targets.labels[own], "boxes": targets.boxes[own]} for own in here]
        return network(pixel_values=images, labels=labels).loss

    def find(self, outputs: Any, shown: Tensor) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each picture, however unsure; `shown` (B, 2) is the height and width it had."""
        return self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=shown)


def build_detr(classes: int) -> nn.Module:
    """DETR, https://arxiv.org/abs/2005.12872, on a ResNet-50."""
    import timm

    config = of_transformers("DetrConfig", num_labels=classes, auxiliary_loss=True)
    network = of_transformers("DetrForObjectDetection", config)
    start_anew(network, keep="model.backbone.")
    for block in (network.model.encoder, network.model.decoder):
        for parameter in block.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    # timm's own start (the last normalisation of a block at zero) in the place of frozen normalisation
    network.model.backbone.model = timm.create_model(
        "resnet50", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    )
    return network


def build_rtdetr(classes: int) -> nn.Module:
    """RT-DETR, https://arxiv.org/abs/2304.08069, on a ResNet-18, which begins as transformers' does."""
    backbone = of_transformers(
        "RTDetrResNetConfig",
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = of_transformers(
        "RTDetrConfig",
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_labels=classes,
    )
    network = of_transformers("RTDetrForObjectDetection", config)
    start_anew(network, keep="model.backbone.")
    start_heads(network.model)
    return network


def build_dfine(classes: int) -> nn.Module:
    """D-FINE-S, https://arxiv.org/abs/2410.13842, on an HGNetV2-B0."""
    backbone = of_transformers(
        "HGNetV2Config",
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        hidden_sizes=[64, 256, 512, 1024],
        use_learnable_affine_block=True,
        out_indices=[2, 3, 4],
    )
    config = of_transformers(
        "DFineConfig",
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[256, 512, 1024],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        num_labels=classes,
    )
    network = of_transformers("DFineForObjectDetection", config)
    start_anew(network)
    start_heads(network.model)
    zero(network.model.decoder.pre_bbox_head.layers[-1])
    return network


PEERS = {
    "detr": Peer("DETR, ResNet-50", build_detr, "DetrImageProcessor", 1e-4),
    "rtdetr": Peer("RT-DETR, ResNet-18", build_rtdetr, "RTDetrImageProcessor", 1e-4),
    "dfine": Peer("D-FINE-S, HGNetV2-B0", build_dfine, "RTDetrImageProcessor", 1e-4),
}


@torch.no_grad()
def start_anew(network: Any, keep: str = "") -> None:
    """Plain layers as PyTorch begins them, then the special beginnings of the family on top; `keep`: names left out."""
    modules = [(name, module) for name, module in network.named_modules() if not keep or not name.startswith(keep)]
    for _, module in modules:
        if isinstance(module, PLAIN):
            module.reset_parameters()
    for _, module in modules:
        if not isinstance(module, PLAIN):
            network._init_weights(module)


def start_heads(model: Any) -> None:
    """What RT-DETR and D-FINE share: scores that begin low, proposals that begin where their places are."""
    for head in (model.enc_score_head, *model.decoder.class_embed):
        head.reset_parameters()
        nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    for layer in (model.enc_output[0], *model.decoder.query_pos_head.layers):
        nn.init.xavier_uniform_(layer.weight)
    zero(model.enc_bbox_head.layers[-1])


def zero(layer: nn.Linear) -> None:
    """Of a refinement: it begins with no change."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
