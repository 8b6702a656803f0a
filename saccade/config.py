"""Every setting, in one tree of frozen models. Importing this never imports torch, so the command answers at once.

A field is documented here and nowhere else: the command's `--help` and the docs are made from these descriptions.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saccade.errors import UserError
from saccade.words import either


class Config(BaseModel):
    """Frozen, keyword-only, and strict about names: an unknown field is an error that suggests the closest one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class PreprocessingConfig(Config):
    """From a picture of any size to the model's pixels. Stored in the model file."""

    image_size: int = Field(
        default=224, ge=4, le=4096, description="pictures get about image_size^2 pixels, in their own shape"
    )
    stride: int = Field(default=16, ge=1, le=256, description="height and width are multiples of this many pixels")
    max_aspect: float = Field(
        default=2.0, ge=1, le=8, description="wider or taller pictures are cropped to this aspect ratio"
    )
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="per channel, of values in 0..1"
    )
    std: tuple[float, float, float] = Field(default=(0.229, 0.224, 0.225), description="per channel, of values in 0..1")
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = Field(default="bicubic", description="for every resize")
    crop: float = Field(
        default=1.0, gt=0.1, le=1, description="the central share of each side that is kept in evaluation"
    )


class DataConfig(Config):
    """Where samples come from and how they are read."""

    val_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="held out where the data has no val split (stratified)"
    )
    split_seed: int = Field(default=0, ge=0, description="seed of that automatic split")
    max_pixels: int = Field(
        default=178_956_970, ge=1, description="pictures of more pixels are refused before decoding"
    )
    cache: Literal["auto", "off"] = Field(
        default="auto", description="keep decoded pictures in memory where all of them fit"
    )
    cache_bytes: int = Field(default=2**30, ge=0, description="how much memory that cache may take in each process")


Zoom = Annotated[float, Field(ge=0.05, le=20)]


class AugmentConfig(Config):
    """Random changes of a training picture; each is drawn from the sample's own seed."""

    train_share: float = Field(
        default=1.0, gt=0.1, le=1, description="image_size in training, as a share of the one in evaluation"
    )
    crop_scale: tuple[float, float] = Field(
        default=(0.35, 1.0), description="classification: share of the area that a random crop keeps"
    )
    crop_aspect: tuple[float, float] = Field(
        default=(0.75, 1.3333), description="aspect of the crop relative to the picture's"
    )
    zoom: tuple[Zoom, Zoom] = Field(
        default=(0.6, 1.7), description="detection: size of things relative to evaluation; below 1 with padding around"
    )
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a left-right flip")
    vflip: float = Field(default=0.0, ge=0, le=1, description="probability of a top-bottom flip")
    policy: Literal["none", "trivial", "rand"] = Field(
        default="trivial", description="TrivialAugment, RandAugment or neither; detection takes their colours only"
    )
    magnitude: int = Field(default=7, ge=0, le=30, description="strength of RandAugment")
    color_jitter: float = Field(
        default=0.0, ge=0, le=1, description="strength of random brightness, contrast and saturation"
    )
    erase: float = Field(
        default=0.0, ge=0, le=1, description="classification: probability that a random rectangle is erased"
    )
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup's Beta distribution; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, description="classification: alpha of cutmix's Beta distribution, or 0")
    mix_prob: float = Field(
        default=1.0, ge=0, le=1, description="probability that a sample is mixed, where either is on"
    )
    mosaic: float = Field(
        default=0.0, ge=0, le=1, description="detection: probability that a picture is put together from four"
    )
    copy_paste: float = Field(
        default=0.0, ge=0, le=1, description="detection: probability that things from another picture are pasted in"
    )
    strong_until: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="detection: share of the run after which mosaic, copy_paste, mixup and policy are off",
    )


class OptimizerConfig(Config):
    """How the weights move."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: hidden matrices by Muon, the rest by AdamW"
    )
    weight_decay: float = Field(
        default=0.05, ge=0, description="decoupled; not for biases, norms, tokens, positions and scales"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second moment")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's momentum (Nesterov)")
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="lr of a block is this times that of the block after it"
    )
    backbone_lr: float = Field(
        default=1.0, gt=0, le=10, description="detection: lr of the backbone is this times that of what follows it"
    )
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="largest norm of all gradients together; none: no clipping"
    )
    accumulate: int = Field(default=1, ge=1, description="batches whose gradients are added up before one step")


class ScheduleConfig(Config):
    """Learning rate over the run: linear warm-up, then down by a cosine or with the root of the steps."""

    shape: Literal["cosine", "inverse_sqrt"] = Field(
        default="cosine", description="inverse_sqrt: with the root of the steps, as the Transformer was published"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of all steps in which the learning rate rises")
    final: float = Field(
        default=0.0, ge=0, le=1, description="share of the learning rate that is left at the end of a cosine"
    )


class NetworkConfig(Config):
    """Changes of the named architecture; `none` keeps what its row of the table says."""

    drop_path: float | None = Field(
        default=None, ge=0, lt=1, description="stochastic depth: largest rate, at the last block"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="dropout after each feed-forward layer; of a translator after every part"
    )
    patch_size: int | None = Field(default=None, ge=1, le=64, description="pixels per token side")
    pool: Literal["token", "distilled", "token_mean", "mean", "sequence", "attention"] | None = Field(
        default=None, description="how tokens become one vector"
    )
    position: Literal["learned", "sinusoidal", "rotary", "none"] | None = Field(
        default=None, description="position encoding"
    )
    registers: int | None = Field(default=None, ge=0, le=64, description="extra tokens without a picture patch")
    layer_scale: float | None = Field(default=None, gt=0, description="initial value of LayerScale")
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu", "relu", "silu"] | None = Field(
        default=None,
        description="kind of feed-forward network: of a ViT the first four, of a translator gelu, relu or silu",
    )
    attention: (
        Literal["full", "linear", "performer", "linformer", "nystrom", "lsh", "spatial_reduction", "window"] | None
    ) = Field(default=None, description="form of attention of a ViT; docs/attention-cost.md compares them")
    frozen_norm: bool | None = Field(
        default=None, description="batch normalisation of a ResNet keeps its statistics and weights, as detectors need"
    )
    norm_first: bool | None = Field(
        default=None, description="a translating Transformer normalises before each layer, not after it as published"
    )
    merge_tokens: int | None = Field(
        default=None, ge=0, le=256, description="tokens of a ViT that join others in each block: faster (ToMe)"
    )
    merge_schedule: Literal["constant", "decreasing"] | None = Field(
        default=None, description="decreasing: as many join others in all, most in the first blocks; faster still"
    )


FEWEST = 64  # tokens that a vocabulary may be bounded by
SHORTEST, LONGEST = 4, 4096  # of the bound of a text's length, in tokens


class TextConfig(Config):
    """Texts and their translations, where the task is to translate."""

    source: str | None = Field(default=None, description="language that is translated, as files and columns name it")
    target: str | None = Field(default=None, description="language that is translated into")
    vocabulary: int = Field(
        default=6000, ge=FEWEST, le=1_000_000, description="most tokens of the vocabulary that both languages share"
    )
    tokenizer: Literal["bpe", "unigram"] = Field(
        default="bpe", description="how subwords are learnt; unigram is not the same in every run"
    )
    max_length: int = Field(
        default=128,
        ge=SHORTEST,
        le=LONGEST,
        description="longer texts, in tokens, are not learnt from and are cut otherwise",
    )
    batch_tokens: int = Field(default=4096, ge=16, description="tokens of either language in a batch, with padding")


class DecodingConfig(Config):
    """How translations are searched for in evaluation."""

    beams: int = Field(default=1, ge=1, le=64, description="attempts side by side; 1: the likeliest token each time")
    length_penalty: float = Field(
        default=1.0, ge=0, le=10, description="a translation's logarithm is divided by its length to this power"
    )


class LossConfig(Config):
    """What is minimised."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="share of the target spread over all classes")


class EmaConfig(Config):
    """A moving average of the weights, which is what is evaluated and kept."""

    decay: float | None = Field(
        default=0.998, gt=0, lt=1, description="per step, warmed up; none: keep the last weights"
    )


class DistributedConfig(Config):
    """Only under torchrun."""

    strategy: Literal["ddp", "fsdp"] = Field(default="ddp", description="replicate the model, or shard it (FSDP2)")


class RunConfig(Config):
    """One run. A recipe fills it from the data; every flag that is given overrides the recipe."""

    data: str = Field(
        description="folder of classes, table (.csv, .jsonl), .tar shards, Hugging Face dataset on disk; boxes (COCO, "
        "Pascal VOC, YOLO), folder or file; folder of parallel texts, or a table of them (.tsv, .jsonl)"
    )
    val: str | None = Field(default=None, description="validation data, where it does not lie beside the training data")
    task: Literal["classify", "detect", "translate"] | None = Field(
        default=None, description="what is learnt; none: from the data"
    )
    recipe: str = Field(
        default="auto",
        description="small_from_scratch, fine_tune, linear_probe, large; detect, detect_fine_tune; translate, "
        "translate_fine_tune; auto: from the data and the weights",
    )
    model: str = Field(default="cct_small", description="a name that `saccade models` lists")
    weights: str | None = Field(
        default=None, description="model file, run folder or name to start from; none: from scratch"
    )
    epochs: float | None = Field(default=None, gt=0, description="length of the run, in passes over the data")
    minutes: float | None = Field(
        default=None, gt=0, description="length of the run; the number of steps is measured and fixed"
    )
    steps: int | None = Field(default=None, ge=1, description="length of the run, in optimizer steps")
    batch_size: int = Field(
        default=64, ge=1, description="pictures per step, over all processes together; of texts see text.batch_tokens"
    )
    lr: float = Field(default=1e-3, gt=0, description="highest learning rate")
    seed: int = Field(default=0, ge=0, description="of weights, order, augmentation and everything else that is random")
    workers: int | None = Field(
        default=None, ge=0, le=256, description="processes that read pictures; changes no result; none: from the device"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of learning; auto: bfloat16 where it is fast"
    )
    compile: bool = Field(default=False, description="use torch.compile")
    activation_checkpointing: bool = Field(
        default=False, description="less memory for about a third more time: compute activations twice"
    )
    train_part: Literal["all", "head"] = Field(default="all", description="head: linear probe on a frozen backbone")
    out: str = Field(default="runs/run", description="the run's folder, which must not hold a run already")
    checkpoint_seconds: float | None = Field(
        default=None,
        ge=0,
        description="between saves of the state; none: 60, or longer where saving would cost over 1 % of the time",
    )
    evaluations: int | None = Field(
        default=None,
        ge=1,
        description="about how often the validation split is evaluated during the run; none: 10 times, or less often "
        "where that would take over a seventh of --minutes",
    )
    max_faults: int = Field(default=5, ge=1, description="steps in a row with a non-finite loss before the run stops")
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    sources: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    text: TextConfig = TextConfig()
    decoding: DecodingConfig = DecodingConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def train_preprocessing(self) -> PreprocessingConfig:
        """As in evaluation, but for the size: after random crops things look larger, https://arxiv.org/abs/1906.06423."""
        size = max(4, round(self.augment.train_share * self.preprocessing.image_size))
        return self.preprocessing.model_copy(update={"image_size": size})


def field_paths(model: type[Config] = RunConfig, prefix: str = "") -> list[str]:
    """All settings as dotted names, such as `optimizer.weight_decay`."""
    paths = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            paths += field_paths(inner, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


SURE = 0.9  # so alike that there is no need to name others


def closest(name: str, names: list[str] | tuple[str, ...], count: int = 3) -> str:
    """`; did you mean a or b?`, or nothing where no name comes near."""
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.6)
    if near and difflib.SequenceMatcher(None, name, near[0]).ratio() > SURE:
        near = near[:1]
    near += [n for n in names if n.endswith("." + name) and n not in near]
    return f"; did you mean {either(near[:count])}?" if near else ""


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, branch by branch."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_config(values: Mapping[str, Any], where: str = "") -> RunConfig:
    """Validate a nested mapping. All faults come in one error, each with its place and the closest right name."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where or 'settings'}: {describe_faults(error)}") from None
    lengths = [name for name in ("epochs", "minutes", "steps") if getattr(config, name) is not None]
    if len(lengths) > 1:
        raise UserError(f"{where or 'settings'}: give one of {', '.join(lengths)}, not several")
    return config


def describe_faults(error: ValidationError) -> str:
    """A line per fault of a pydantic error, in the words of the command line."""
    names, lines = field_paths(), []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown setting {place!r}{closest(place, names)}")
        else:
            lines.append(f"{place}: {fault['msg']}, not {fault['input']!r}")
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def load_config(path: Path) -> RunConfig:
    """Read `config.json` of a run."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this the folder of a run?") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); the run cannot be continued with it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings; the run cannot be continued with it")
    return build_config(values, str(path))
