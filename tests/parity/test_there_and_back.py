"""A model as the peers save it -> `saccade convert` -> a folder that they load strictly, with the same bits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.models.embedder import Embedder
from saccade.weights.convert import recognise
from saccade.weights.export import convert
from saccade.weights.load import load_network
from saccade.weights.model_file import load_model_file
from saccade.weights.source import RawWeights

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

LETTERS = tuple("abcde")
TOLERANCE = 1e-5  # of logits; measured at most 4.2e-7
AGAIN = 1e-5  # sums and means come back as they are (class token and position, two heads); measured 1.2e-7


def from_timm(name: str, **arguments: Any) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model = stirred(timm.create_model(name, num_classes=5, **arguments))
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
        model = stirred(getattr(transformers, f"{kind}ForImageClassification")(config))
        model.save_pretrained(folder)
        return model

    return make


def stirred(model: Any) -> Any:
    """With noise on every parameter, because some begin at zero and would hide all that comes before them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


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
    "timm levit": (from_timm("levit_128s"), 224),
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
    assert_equal_files(tmp_path / "ours.safetensors", tmp_path / "again.safetensors")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = logits(theirs, images)
        gaps = [(ours(images).logits - expected).abs().max(), (logits(again, images) - expected).abs().max()]
    print(f"ours {gaps[0]:.1e}, theirs again {gaps[1]:.1e}, of {expected.std():.1e}")
    assert expected.std() > 1e-2
    assert gaps[0] <= TOLERANCE and gaps[1] <= AGAIN


VISION = {**SMALL, "image_size": 56, "patch_size": 14}
HEADLESS: dict[str, dict[str, Any]] = {
    "Dinov2": VISION,
    "Dinov2WithRegisters": VISION,
    "DINOv3ViT": {**VISION, "num_register_tokens": 4},
    "SiglipVision": VISION,
    "CLIPVision": {**VISION, "projection_dim": 32},
    "ViT": VISION,
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_features_there_and_back(tmp_path: Path, kind: str) -> None:
    """A model without a head; a token that only training without labels uses comes back as zeros."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**HEADLESS[kind])
    options = {"add_pooling_layer": False} if kind == "ViT" else {}
    theirs = stirred(getattr(transformers, f"{kind}Model")(config, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    result = convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert result.classes == 0
    convert(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    again, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True, **options)
    assert not any(report.values()), report
    assert all((tensor == 0).all() for name, tensor in again.state_dict().items() if "mask_token" in name)
    convert(tmp_path / "back", tmp_path / "again.safetensors")
    assert_equal_files(tmp_path / "ours.safetensors", tmp_path / "again.safetensors")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        gap = (again.eval()(images).last_hidden_state - theirs(images).last_hidden_state).abs().max()
    assert gap <= AGAIN


def test_checkpoint_of_dino(tmp_path: Path) -> None:
    """Teacher and student behind their wrappers, with heads of training, settings and half precision; no config."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    plain = {name: tensor.half() for name, tensor in model.state_dict().items()}
    head = {"head.mlp.0.weight": torch.randn(4, 4), "head.last_layer.weight_g": torch.ones(3, 1)}
    teacher = {f"backbone.{name}": tensor for name, tensor in plain.items()} | head
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    checkpoint = {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3}
    torch.save(checkpoint, tmp_path / "dino.pth")
    result = convert(tmp_path / "dino.pth", tmp_path / "ours.safetensors")
    assert result.classes == 0 and (result.family, result.image_size) == ("vit", 224)
    notes = "; ".join(result.notes)
    for part in ("'teacher' is taken", "head.mlp, head.last_layer", "float16", "no config.json"):
        assert part in notes
    ours, _ = load_network(tmp_path / "ours.safetensors")
    images = torch.randn(1, 3, 224, 224)
    model.load_state_dict({name: tensor.float() for name, tensor in plain.items()})
    with torch.no_grad():
        assert isinstance(ours, Embedder)
        assert (ours.backbone(images).summary - model.eval()(images)).abs().max() <= TOLERANCE
    assert convert(tmp_path / "dino.pth", tmp_path / "zeros.safetensors", branch="student").notes[0] != result.notes[0]


def test_projection_of_clip_is_timms_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=24)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "for_timm", to="timm")
    ours, _ = load_network(tmp_path / "theirs")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert isinstance(ours, Embedder)
        expected = ours.backbone(images).summary
        assert expected.shape == (2, 24)
        assert (load_strictly("timm", tmp_path / "for_timm")(images) - expected).abs().max() <= TOLERANCE


def test_file_of_torchvision(tmp_path: Path) -> None:
    import torchvision

    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18-f37072fd.pth", _use_new_zipfile_serialization=False)
    result = convert(tmp_path / "resnet18-f37072fd.pth", tmp_path / "ours.safetensors")
    assert (result.model, result.read_as, result.classes) == ("resnet18", "torchvision resnet", 1000)
    ours, card = load_network(tmp_path / "ours.safetensors")
    assert card.class_names[0] == "tench" and isinstance(ours, Classifier)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert (ours(images).logits - model(images)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("convnext_atto", "an unknown family (stem.0.weight"),
        ("resnext50_32x4d", "most like torchvision resnet"),
        ("swinv2_cr_tiny_224", "unknown family"),
        ("efficientvit_l1", "most like timm efficientvit"),
    ],
)
def test_other_families_are_refused(name: str, like: str) -> None:
    """Whatever they look like, weights of other models never become one of ours."""
    with torch.device("meta"):
        tensors = timm.create_model(name, pretrained=False).state_dict()
    with pytest.raises(UserError) as caught:
        recognise(RawWeights(f"{name}.pth", tensors))
    assert like in str(caught.value)


def assert_equal_files(one: Path, other: Path) -> None:
    first, second = load_model_file(one)[0], load_model_file(other)[0]
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


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
