"""What lies beside the weights, in the words of timm and of Hugging Face: preprocessing and names of classes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from saccade.backbones.base import Row
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models.detector import DetectorRow
from saccade.weights.formats.detr import side_by_edges
from saccade.weights.formats.vit_huggingface import CLIP_MEAN, CLIP_STD, HALF

PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
CODES = {name: code for code, name in PILLOW.items()}
KINDS = ("bilinear", "bicubic", "lanczos")
PIXEL = 1 / 255
NO_NAME = "N/A"  # of a number that a published detector skips; it is never predicted
COCO = 91  # numbers, of which 80 are used
# what transformers' classes take where a file does not say: interpolation, mean, std
CLASSES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "ViT": ("bilinear", HALF, HALF),
    "DeiT": ("bicubic", HALF, HALF),
    "Siglip": ("bicubic", HALF, HALF),
    "CLIP": ("bicubic", CLIP_MEAN, CLIP_STD),
    "Bit": ("bicubic", CLIP_MEAN, CLIP_STD),
    "ConvNext": ("bilinear", HALF, HALF),
}


# --- preprocessing ---------------------------------------------------------------------------------------------------


def read_preprocessing(
    where: str,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    row: Row,
    usual: PreprocessingConfig | None,
) -> tuple[PreprocessingConfig, list[str]]:
    """From preprocessor_config.json, else timm's description, else what is usual for the family; and what to say."""
    notes: list[str] = []
    described = config.get("pretrained_cfg", config)
    values: dict[str, Any] = {"image_size": row.image_size}
    try:
        if preprocessor:
            if isinstance(row, DetectorRow) and usual:  # older files do not say what is usual for their class
                values["interpolation"] = usual.interpolation
            values |= _from_huggingface(preprocessor, notes)
            if isinstance(row, DetectorRow):
                values["image_size"] = _by_edges(preprocessor, values["image_size"], row.stride, notes)
        elif isinstance(described, Mapping) and "mean" in described:
            values |= _from_timm(described, notes)
        else:
            notes.append("nothing beside the weights says how pictures are prepared; the usual way is assumed")
            values = {**(usual.model_dump() if usual else {}), **values}
        return PreprocessingConfig.model_validate({**values, "stride": row.stride}), notes
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        faults = repr(error)
    raise UserError(f"{where}: its description of the preprocessing cannot be used ({faults})")


def _from_timm(described: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "mean": _three(described["mean"]),
        "std": _three(described.get("std", PreprocessingConfig().std)),
        "interpolation": _interpolation(described.get("interpolation", "bicubic"), notes),
    }
    if size := described.get("input_size"):
        values["image_size"] = _side(size[-2], size[-1], notes)
    if share := described.get("crop_pct"):
        values["crop"] = share
    return values


def _from_huggingface(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    usual = PreprocessingConfig()
    kind = next((name for name in CLASSES if _type(given).startswith(name)), None)
    interpolation, mean, std = CLASSES[kind] if kind else (None, usual.mean, usual.std)
    mean, std = _three(given.get("image_mean") or mean), _three(given.get("image_std") or std)
    unsaid = [name for name in ("image_mean", "image_std") if not given.get(name)]
    if unsaid and given.get("do_normalize") is not False:
        of = f"those of {_type(given)}" if kind else "those of ImageNet"
        notes.append(f"preprocessor_config.json does not say {' and '.join(unsaid)}; {of} are assumed")
    if given.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = given.get("rescale_factor", PIXEL) if given.get("do_rescale", True) else 1.0
    if not math.isclose(factor, PIXEL, rel_tol=1e-6):  # ours are from 0 to 1 before they are normalised
        mean, std = tuple(m * PIXEL / factor for m in mean), tuple(s * PIXEL / factor for s in std)
    values: dict[str, Any] = {"mean": mean, "std": std}
    if "resample" not in given and interpolation:
        values["interpolation"] = interpolation
    elif "resample" in given:
        values["interpolation"] = _interpolation(PILLOW.get(given["resample"], str(given["resample"])), notes)
    edge, cropped = _edge(given.get("size"), notes), _edge(given.get("crop_size"), notes)
    if edge and cropped and given.get("do_center_crop", True):
        values |= {"image_size": cropped, "crop": min(1.0, cropped / edge)}
        stated = given.get("crop_pct")
        if stated and round(cropped / stated) == edge:  # `edge` is rounded
            values["crop"] = stated
    elif edge:
        values["image_size"] = edge
        if re.match("ConvNext|Levit", _type(given)) and edge < 384:  # these enlarge, then crop to `size`
            values["crop"] = given.get("crop_pct") or 224 / 256
    return values


def _type(given: Mapping[str, Any]) -> str:
    return str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")


def _edge(size: Any, notes: list[str]) -> int | None:
    """Pixels of a side, in any of the forms that these files have had."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"])
    if isinstance(size, Mapping) and "height" in size:
        return _side(size["height"], size["width"], notes)
    return None


def _by_edges(given: Mapping[str, Any], shortest: int, stride: int, notes: list[str]) -> int:
    size = given.get("size")
    longest = size.get("longest_edge") if isinstance(size, Mapping) else given.get("max_size")
    if longest is None:
        return shortest
    side = side_by_edges(shortest, int(longest), stride)
    notes.append(f"made for {bounds(shortest, int(longest))}; here image_size {side}: as many pixels for one of 4:3")
    return side


def bounds(shortest: int, longest: int) -> str:
    return f"pictures whose shorter side has {shortest} pixels, or less where the longer one would have over {longest}"


def _side(height: Any, width: Any, notes: list[str]) -> int:
    if height == width:
        return int(height)
    side = round(math.sqrt(int(height) * int(width)))
    notes.append(f"made for {height}x{width} pixels; here image_size {side}, the side of a square of as many")
    return side


def _three(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in (values if isinstance(values, Sequence) else [values]))
    return numbers * 3 if len(numbers) == 1 else numbers


def _interpolation(name: str, notes: list[str]) -> str:
    if name in KINDS:
        return name
    notes.append(f"interpolation {name!r} is not known here; bicubic is used")
    return "bicubic"


def write_preprocessor(
    given: PreprocessingConfig, processor: Callable[[PreprocessingConfig], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """preprocessor_config.json, with a format's own words. Where nothing is cropped, the usual class squashes pictures
    to squares.
    """
    side = {"height": given.image_size, "width": given.image_size}
    form: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": side}
    if given.crop < 1:
        form = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": round(given.image_size / given.crop)},
            "crop_size": side,
            "crop_pct": given.crop,
            "do_center_crop": True,
        }
    if processor is not None:
        form = processor(given)
    return {
        **form,
        "do_resize": True,
        "resample": CODES[given.interpolation],
        "do_rescale": True,
        "rescale_factor": PIXEL,
        "do_normalize": True,
        "image_mean": list(given.mean),
        "image_std": list(given.std),
    }


def write_pretrained_cfg(given: PreprocessingConfig, classes: int) -> dict[str, Any]:
    """timm's description of how pictures are prepared."""
    return {
        "input_size": [3, given.image_size, given.image_size],
        "interpolation": given.interpolation,
        "crop_pct": given.crop,
        "mean": list(given.mean),
        "std": list(given.std),
        "num_classes": classes,
    }


# --- names of classes ------------------------------------------------------------------------------------------------


def read_class_names(
    config: Mapping[str, Any], classes: int, imagenet: bool, task: str = "classify"
) -> tuple[tuple[str, ...], list[str]]:
    """A name for each class, none twice but for NO_NAME; numbers where there are none.

    `imagenet`: the source says that it is that. A detector of 91 numbers was made for COCO's.
    """
    if not classes:
        return (), []
    notes: list[str] = []
    names = _from_id2label(config.get("id2label")) or _from_labels(config)
    if names and len(names) != classes:
        notes.append(f"config.json names {len(names)} classes, the head has {classes}; they are numbered instead")
        names = []
    if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        if imagenet and classes == 1000:
            from torchvision.models import ResNet18_Weights  # slow to import, so only where it is needed

            notes.append("names of the classes: taken to be those of ImageNet-1k, in its usual order")
            return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]), notes
        if task == "detect" and classes == COCO:
            from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

            notes.append("names of the classes: taken to be those of COCO, by its numbers")
            return (NO_NAME, *FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]), notes
        return tuple(str(k) for k in range(classes)), notes
    return _distinct([_printable(name) or str(k) for k, name in enumerate(names)], notes), notes


def _from_id2label(labels: Any) -> list[str]:
    if not isinstance(labels, Mapping):
        return []
    numbered = {str(key): str(value) for key, value in labels.items()}
    if numbered.keys() != {str(k) for k in range(len(numbered))}:
        return []
    return [numbered[str(k)] for k in range(len(numbered))]


def _from_labels(config: Mapping[str, Any]) -> list[str]:
    """timm's: a list, or a mapping from numbers; with longer descriptions by name, perhaps."""
    described = config.get("pretrained_cfg")
    places = [config, described if isinstance(described, Mapping) else {}]
    labels = next((place["label_names"] for place in places if place.get("label_names")), None)
    if isinstance(labels, Mapping):
        labels = _from_id2label(labels)
    if not isinstance(labels, list | tuple):
        return []
    names = [str(label) for label in labels]
    longer = next((place["label_descriptions"] for place in places if place.get("label_descriptions")), None)
    if isinstance(longer, Mapping) and all(name in longer for name in names):
        return [str(longer[name]) for name in names]
    return names


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in name).strip()[:200]


def _distinct(names: list[str], notes: list[str]) -> tuple[str, ...]:
    """ImageNet has two cranes: the later one of a pair gets its number."""
    seen: set[str] = set()
    doubled = []
    for k, name in enumerate(names):
        while names[k] in seen and name != NO_NAME:
            names[k] = f"{names[k]} ({k})"
        if names[k] != name:
            doubled.append(name)
        seen.add(names[k])
    if doubled:
        notes.append(f"{len(doubled)} names of classes occur twice, such as {doubled[0]!r}; the later one got a number")
    return tuple(names)
