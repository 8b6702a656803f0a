"""A model as the peers save it -> `saccade convert` -> a folder that they load strictly, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saccade.models.classifier import Classifier
from saccade.weights.export import convert
from saccade.weights.load import load_network
from saccade.weights.model_file import load_model_file

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

LETTERS = tuple("abcde")
TOLERANCE = 1e-4
AGAIN = 1e-6  # two heads that are averaged come back as one and the same; all else is equal to the bit


def from_timm(name: str, **arguments: Any) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model = timm.create_model(name, num_classes=5, **arguments).eval()
        timm.models.save_for_hf(
            model, str(folder), model_config={"label_names": list(LETTERS)}, safe_serialization=True
        )
        return model

    return make


def from_transformers(kind: str, **arguments: Any) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        names = dict(enumerate(LETTERS))
        label2id = {name: k for k, name in names.items()}
        config = getattr(transformers, f"{kind}Config")(id2label=names, label2id=label2id, **arguments)
        model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
        model.save_pretrained(folder)
        return model

    return make


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
SWIN: dict[str, Any] = {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 7}

# how theirs is made, and the size of the pictures
MODELS: dict[str, tuple[Callable[[Path], nn.Module], int]] = {
    "timm resnet": (from_timm("resnet18"), 64),
    "timm vit": (from_timm("vit_tiny_patch16_224", depth=2), 224),
    "timm swin": (from_timm("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), 224),
    "timm efficientvit": (from_timm("efficientvit_b0"), 64),
    "timm efficientformer": (from_timm("efficientformer_l1", depths=(1, 1, 1, 2)), 224),
    "huggingface resnet": (from_transformers("ResNet", layer_type="basic", **RESNET), 64),
    "huggingface vit": (from_transformers("ViT", image_size=64, **SMALL), 64),
    "huggingface dinov2": (from_transformers("Dinov2", image_size=56, patch_size=14, **SMALL), 56),
    "huggingface swin": (from_transformers("Swin", **SWIN), 224),
    "huggingface swinv2": (from_transformers("Swinv2", image_size=256, **SWIN), 224),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    make, size = MODELS[name]
    library = name.split()[0]
    torch.manual_seed(0)
    theirs = make(tmp_path / "theirs")
    result = convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert result.classes == 5 and result.read_as.startswith(library)
    ours, card = load_network(tmp_path / "ours.safetensors")
    assert card.class_names == LETTERS and isinstance(ours, Classifier)
    convert(tmp_path / "ours.safetensors", tmp_path / "back", to="timm" if library == "timm" else "hf")
    again = load_strictly(library, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again.safetensors")
    first, second = (load_model_file(tmp_path / f"{each}.safetensors")[0] for each in ("ours", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = logits(theirs, images)
        gaps = [(ours(images).logits - expected).abs().max(), (logits(again, images) - expected).abs().max()]
    print(f"ours {gaps[0]:.1e}, theirs again {gaps[1]:.1e}")
    assert gaps[0] <= TOLERANCE and gaps[1] <= AGAIN


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    outputs = model(images)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def load_strictly(library: str, folder: Path) -> nn.Module:
    """As their guides say; a key too much or too little is an error."""
    if library == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model, report = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.id2label == dict(enumerate(LETTERS))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert len(processor.image_mean) == 3
    return model.eval()
