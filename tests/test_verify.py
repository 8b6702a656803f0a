"""The verdict is only worth something if it can be a bad one: every test here spoils something."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import saccade
import saccade.verification as verification
from saccade.backbones import backbone_row, build_backbone
from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.cli import main
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.verification import Subject, Verification
from saccade.verification.certificate import Digest
from saccade.verification.compare import pattern, tensor_gap
from saccade.verification.pictures import choose_pictures, read_shape
from saccade.weights.formats.table import Format, Peer, Rule, Stage, read_state, same

ROW = ViTConfig(dim=32, depth=3, heads=2, hidden=64, patch_size=8, image_size=32, drop_path=0.1)
CLASSES = 7
Spoil = Callable[[nn.Module], None]


class Reference(nn.Module):
    """Stands for another library: the same mathematics under other names."""

    def __init__(self, row: Row, classes: int):
        super().__init__()
        self.trunk = build_backbone(row)
        self.classifier = nn.Linear(self.trunk.summary_channels, classes) if classes else nn.Identity()
        self.register_buffer("index", torch.arange(4))  # carries nothing to learn

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.trunk(images).summary)


def rules(row: Row, classes: int) -> list[Rule]:
    inner = [same(f"backbone.{name}", f"trunk.{name}") for name in build_backbone(row).state_dict()]
    head = [same(f"head.{name}", f"classifier.{name}") for name in ("weight", "bias")]
    return inner + (head if classes else [])


def stages(row: Row) -> list[Stage]:
    return [
        Stage("patches", "backbone.patches", "trunk.patches"),
        *(Stage(f"block {i}", f"backbone.blocks.{i}", f"trunk.blocks.{i}") for i in range(3)),
        Stage("norm", "backbone.norm", "trunk.norm"),
    ]


def make_format(spoil: Spoil | None = None, spoil_ours: Spoil | None = None) -> Format:
    def build(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
        model = Reference(row, classes)
        if spoil is not None:
            model.load_state_dict = after(model.load_state_dict, lambda: spoil(model))  # type: ignore[method-assign]
        return model

    return Format(
        dialect="test",
        family="vit",
        recognises=lambda shapes, config: True,
        row=lambda shapes, config: ROW,
        classes=lambda shapes, config: CLASSES,
        rules=rules,
        stages=stages,
        write_config=lambda row, classes: {},
        ignored=("index",),
        peer=Peer("numpy", build, lambda model, images: model(images)),  # any package that has a version
    )


def after(function: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    """The function, followed by `then`."""

    def both(*values: Any, **options: Any) -> Any:
        answer = function(*values, **options)
        then()
        return answer

    return both


def make_subject(format: Format, classes: int = CLASSES) -> Subject:
    torch.manual_seed(0)
    model = Reference(ROW, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = model.state_dict()
    ours = read_state(theirs, rules(ROW, classes), ("index",), "test")
    preprocessing = PreprocessingConfig(image_size=32, stride=8)
    return Subject("somewhere/tiny", format, ROW, classes, {}, ours, theirs, preprocessing)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets `verify` find these weights, whatever the source."""

    def give(spoil: Spoil | None = None, classes: int = CLASSES, subject: Subject | None = None) -> None:
        found = subject or make_subject(make_format(spoil), classes)
        monkeypatch.setattr(verification, "open_subject", lambda source, *_: found)

    return give


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def first(result: Verification) -> str:
    assert result.first_departure is not None
    return result.first_departure[1].name


# --- what agrees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [CLASSES, 0])
@pytest.mark.parametrize("image_size", [None, "48x24"])
def test_the_same_mathematics_agrees(given: Callable[..., None], classes: int, image_size: str | None) -> None:
    given(classes=classes)
    result = verification.verify("tiny", image_size=image_size)
    assert result.agrees and result.first_departure is None and result.worst_gradient is None
    assert "agrees with numpy" in result.verdict
    names = ["patches", "block 0", "block 1", "block 2", "norm", "logits", "logits of predict", "loss"]
    for dtype, limit in (("float32", 1e-4), ("float64", 1e-9)):
        each = result.comparisons[dtype]
        assert [gap.name for gap in each.forward] == names
        assert max(gap.relative for gap in each.forward) <= limit / 10
        count = len(list(build_backbone(ROW).parameters())) + (2 if classes else 0)
        assert len(each.gradients) == count and all(gap.agrees for gap in each.gradients)
    pictures = result.facts["pictures"]
    assert (pictures["height"], pictures["width"]) == ((48, 24) if image_size else (32, 32))


def test_gradients_are_compared_at_all(given: Callable[..., None]) -> None:
    given()
    subject = verification.open_subject("tiny")
    pictures = choose_pictures(None, (32, 32), subject.preprocessing)
    outcome = verification._ours(subject, pictures, "float64")
    assert all(float(gradient.abs().max()) > 0 for name, gradient in outcome.gradients.items() if "drop" not in name)


def test_float64_is_not_rounded_on_the_way(given: Callable[..., None]) -> None:
    """A rule that adds up two tensors rounds in float32; the mathematics is the same, and float64 must show that."""
    good = make_subject(make_format())

    def summed(row: Row, classes: int) -> list[Rule]:
        both = ("classifier.bias", "classifier.weight")
        bias = Rule("head.bias", both, lambda b, w: b + w[:, 0], lambda whole: (whole, whole), lambda b, w: b)
        return [rule for rule in rules(row, classes) if rule.ours != "head.bias"] + [bias]

    def shift(model: nn.Module) -> None:
        inner: Any = model.forward
        weight = model.get_parameter("classifier.weight")
        model.forward = lambda images: inner(images) + weight[:, 0].detach()  # type: ignore[method-assign]

    form = replace(make_format(shift), rules=summed)
    ours = {**good.ours, "head.bias": good.ours["head.bias"] + good.ours["head.weight"][:, 0]}
    given(subject=replace(good, format=form, ours=ours))
    assert verification.verify("tiny").agrees
    ours["head.bias"][2] += 1e-5  # but what is not that rounding stays a fault
    assert first(verification.verify("tiny", dtype="float64")) == "logits"


# --- what departs ----------------------------------------------------------------------------------------------------


def weight_of(path: str, amount: float = 0.05) -> Spoil:
    """A single number of one tensor."""

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(path).view(-1)[3] += amount

    return spoil


def eps_of(path: str) -> Spoil:
    def spoil(model: nn.Module) -> None:
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.LayerNorm)
        norm.eps = 10 * norm.eps

    return spoil


def without_block(index: int) -> Spoil:
    """Its parameters stay, and have no gradients."""

    def spoil(model: nn.Module) -> None:
        block: Any = model.get_submodule(f"trunk.blocks.{index}")
        block.forward = lambda x, *_, **__: x

    return spoil


def names_within(block: int) -> list[str]:
    return [name for name, _ in build_backbone(ROW).named_parameters() if name.startswith(f"blocks.{block}.")]


def norms_within(block: int) -> list[str]:
    modules = build_backbone(ROW).get_submodule(f"blocks.{block}").named_modules()
    return [f"trunk.blocks.{block}.{name}" for name, module in modules if isinstance(module, nn.LayerNorm)]


@pytest.mark.parametrize(
    ("spoil", "stage"),
    [
        (weight_of("trunk.patches.projection.weight"), "patches"),
        (weight_of("trunk." + names_within(1)[2]), "block 1"),
        (weight_of("trunk." + names_within(2)[-1]), "block 2"),
        (eps_of(norms_within(1)[0]), "block 1"),
        (eps_of("trunk.norm"), "norm"),
        (without_block(0), "block 0"),
        (without_block(2), "block 2"),
        (weight_of("trunk.norm.bias"), "norm"),
        (weight_of("classifier.weight"), "logits"),
        (weight_of("classifier.bias", 1e-6), "logits"),  # far below float32's tolerance
    ],
    ids=["patches", "weight 1", "weight 2", "eps 1", "eps norm", "no 0", "no 2", "norm", "head", "head, a little"],
)  # fmt: skip
def test_the_first_stage_that_departs_is_named(given: Callable[..., None], spoil: Spoil, stage: str) -> None:
    given(spoil)
    result = verification.verify("tiny")
    assert not result.agrees and first(result) == stage
    assert f"the first stage to depart is {stage} (" in result.verdict and "DEPARTS from numpy" in result.verdict
    assert not result.comparisons["float64"].agrees
    before = list(result.comparisons["float64"].forward)
    assert all(gap.agrees for gap in before[: [gap.name for gap in before].index(stage)])


def test_float32_alone_overlooks_what_float64_sees(given: Callable[..., None]) -> None:
    given(weight_of("classifier.bias", 1e-6))
    assert verification.verify("tiny", dtype="float32").agrees
    assert not verification.verify("tiny", dtype="float64").agrees


def test_a_gradient_alone(given: Callable[..., None]) -> None:
    """The values agree; the way back of one parameter is cut in the reference."""

    def cut(model: nn.Module) -> None:
        norm: Any = model.get_submodule("trunk.norm")
        norm.forward = lambda x: nn.functional.layer_norm(x, x.shape[-1:], norm.weight.detach(), norm.bias, norm.eps)

    given(cut)
    result = verification.verify("tiny")
    assert result.first_departure is None and not result.agrees
    assert result.worst_gradient is not None and result.worst_gradient[1].name == "backbone.norm.weight"
    assert "the worst gradient is that of backbone.norm.weight" in result.verdict
    departing = [gap.name for gap in result.comparisons["float64"].gradients if not gap.agrees]
    assert departing == ["backbone.norm.weight"]


def test_a_model_without_classes(given: Callable[..., None]) -> None:
    given(weight_of("trunk.norm.weight"), classes=0)
    result = verification.verify("tiny")
    assert first(result) == "norm" and [g.name for g in result.comparisons["float64"].forward if not g.agrees] == [
        "norm", "logits", "logits of predict", "loss",
    ]  # fmt: skip


def test_the_way_that_predict_takes_is_checked(given: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = type(build_backbone(ROW))
    whole = backbone.summary
    monkeypatch.setattr(backbone, "summary", lambda self, images: 1.001 * whole(self, images))
    given()
    result = verification.verify("tiny")
    assert not result.agrees and first(result) == "logits of predict"


def test_numbers_that_are_none(given: Callable[..., None], tmp_path: Path) -> None:
    """Both sides give NaN, which is no agreement; and the certificate is still JSON."""
    subject = make_subject(make_format())
    for state in (subject.ours, subject.theirs):
        for name in state:
            if name.endswith("norm.bias"):
                state[name].fill_(float("nan"))
    given(subject=subject)
    result = verification.verify("tiny")
    assert not result.agrees
    result.save(tmp_path / "certificate.json")
    values = json.loads((tmp_path / "certificate.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["agrees"] is False and values["recorded"] == {}


def test_stages_that_do_not_run_or_have_other_shapes(given: Callable[..., None]) -> None:
    good = make_format()
    for stage, note in (
        (Stage("lost", "backbone.patches", "trunk.nowhere"), "did not run in the reference"),
        (Stage("lost", "backbone.nowhere", "trunk.patches"), "did not run here"),
        (Stage("lost", "backbone.patches", "trunk.blocks.0"), "shape"),
    ):
        subject = make_subject(replace(good, stages=lambda row, stage=stage: [stage, *stages(row)]))
        given(subject=subject)
        result = verification.verify("tiny", dtype="float32")
        assert first(result) == "lost" and note in result.verdict


def test_layouts_are_brought_together(given: Callable[..., None]) -> None:
    turned = Stage("turned", "backbone.blocks.0", "trunk.blocks.0", lambda x: x.mT, lambda x: x.transpose(1, 2))
    given(subject=make_subject(replace(make_format(), stages=lambda row: [turned])))
    assert verification.verify("tiny", dtype="float64").agrees


def test_the_reference_refuses_weights(given: Callable[..., None]) -> None:
    for change, words in (
        (lambda theirs: theirs.pop("classifier.bias"), "missing: classifier.bias"),
        (lambda theirs: theirs.update(extra=torch.zeros(2)), "left over: extra"),
        (lambda theirs: theirs.update({"classifier.bias": torch.zeros(3)}), "classifier.bias"),
    ):
        subject = make_subject(make_format())
        theirs = dict(subject.theirs)
        change(theirs)
        given(subject=replace(subject, theirs=theirs))
        with pytest.raises(UserError, match=f"the reference code refuses these weights(.|\n)*{words}"):
            verification.verify("tiny")
    theirs = dict(make_subject(make_format()).theirs)
    del theirs["index"]  # is ignored
    given(subject=replace(make_subject(make_format()), theirs=theirs))
    assert verification.verify("tiny", dtype="float32").agrees


def test_tolerances_are_relative_where_they_should_be() -> None:
    big = torch.full((4,), 1000.0, dtype=torch.float64)
    assert tensor_gap("x", big + 1e-3, big, 1e-4).agrees and not tensor_gap("x", big + 1.0, big, 1e-4).agrees
    small = torch.full((4,), 1e-3, dtype=torch.float64)
    assert not tensor_gap("x", small + 1e-6, small, 1e-4).agrees
    assert tensor_gap("x", small + 1e-6, small, 1e-4, least=1.0).agrees
    nothing = torch.zeros(3)
    assert tensor_gap("x", nothing, nothing, 1e-9).agrees and not tensor_gap("x", nothing + 1e-12, nothing, 1e-9).agrees
    assert not tensor_gap("x", torch.tensor([float("nan")]), torch.tensor([float("nan")]), 1.0).agrees


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(given: Callable[..., None], tmp_path: Path) -> Path:
    given()
    path = tmp_path / "certificate.json"
    verification.verify("tiny").save(path)
    return path


def without_peer(subject: Subject) -> Subject:
    assert subject.format.peer is not None
    peer = replace(subject.format.peer, package="package-that-is-nowhere")
    return replace(subject, format=replace(subject.format, peer=peer))


def test_what_a_certificate_says(certificate: Path) -> None:
    values = json.loads(certificate.read_text())
    assert values["agrees"] is True and values["first_departure"] is None and values["mode"] == "eval"
    assert values["versions"].keys() == {"numpy", "saccade", "torch"}
    assert values["versions"]["torch"] == torch.__version__
    assert len(values["weights"]["sha256"]) == 64 and len(values["pictures"]["sha256"]) == 64
    assert values["architecture"] == ROW.to_dict() and values["tolerances"]["float64"]["logits"] == 1e-9
    assert values["figures"].keys() == values["recorded"].keys() == {"float32", "float64"}
    recorded = values["recorded"]["float64"]
    assert np.array(recorded["logits"]).shape == (2, CLASSES) and list(recorded["stages"])[0] == "patches"
    assert len(recorded["stages"]["block 1"]["projections"]) == 32
    assert certificate.stat().st_size < 200_000


def test_without_the_peer(given: Callable[..., None], certificate: Path) -> None:
    given(subject=without_peer(make_subject(make_format())))
    with pytest.raises(UserError, match="pip install package-that-is-nowhere.*--certificate FILE"):
        verification.verify("tiny")
    result = verification.verify("tiny", certificate=certificate)
    assert result.agrees and "what numpy" in result.verdict and "when certificate.json was written" in result.verdict
    again = certificate.with_name("again.json")
    result.save(again)
    assert verification.verify("tiny", certificate=again).agrees, "its own certificate passes the answers on"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_certificate_finds_what_departs(given: Callable[..., None], certificate: Path, dtype: str) -> None:
    for name, stage in (
        ("backbone." + names_within(1)[2], "block 1"),
        ("backbone.norm.weight", "norm"),
        ("head.bias", "logits"),
    ):
        subject = without_peer(make_subject(make_format()))
        subject.ours[name] = subject.ours[name].clone()
        subject.ours[name].view(-1)[3] += 0.3
        given(subject=subject)
        result = verification.verify("tiny", certificate=certificate, dtype=dtype)
        assert not result.agrees and first(result) == stage


def test_a_certificate_is_of_certain_weights_and_architecture(given: Callable[..., None], certificate: Path) -> None:
    subject = make_subject(make_format())
    theirs = {name: value.clone() for name, value in subject.theirs.items()}
    theirs["classifier.bias"][0] += 1
    given(subject=replace(subject, theirs=theirs))
    result = verification.verify("tiny", certificate=certificate)
    assert not result.agrees and "weights are not what was certified" in result.verdict
    given(subject=replace(subject, row=replace(ROW, drop_path=0.3)))
    assert "architecture is not what was certified" in verification.verify("tiny", certificate=certificate).verdict


def test_a_certificate_is_of_certain_pictures(given: Callable[..., None], certificate: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made with other pictures .*china.jpg.*32 x 32"):
        verification.verify("tiny", certificate=certificate, image_size="48")
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (50, 50), (9, 90, 200)).save(tmp_path / "mine" / "a.png")
    with pytest.raises(UserError, match="made with other pictures"):
        verification.verify("tiny", certificate=certificate, data=tmp_path / "mine")


@pytest.mark.parametrize(
    ("text", "words"),
    [("no", "not valid JSON"), ("[]", "not a certificate"), ("{}", "not a certificate"), ("", "not valid JSON")],
)
def test_what_is_no_certificate(given: Callable[..., None], tmp_path: Path, text: str, words: str) -> None:
    given()
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=words):
        verification.verify("tiny", certificate=tmp_path / "c.json")
    with pytest.raises(UserError, match="cannot be read"):
        verification.verify("tiny", certificate=tmp_path / "absent.json")


def test_a_certificate_of_one_number_format(given: Callable[..., None], tmp_path: Path) -> None:
    given()
    verification.verify("tiny", dtype="float32").save(tmp_path / "c.json")
    assert verification.verify("tiny", dtype="float32", certificate=tmp_path / "c.json").agrees
    with pytest.raises(UserError, match="records nothing in float64"):
        verification.verify("tiny", certificate=tmp_path / "c.json")


def test_a_digest_sees_exchanged_places() -> None:
    values = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = Digest.of(values, 8)
    assert Digest.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    exchanged = values.clone()
    exchanged[3, 4], exchanged[30, 7] = values[30, 7], values[3, 4]
    after = Digest.of(exchanged, 8)
    assert after.mean == pytest.approx(before.mean) and after.projections != pytest.approx(before.projections)
    changed = [a != b for a, b in zip(after.projections, before.projections, strict=True)]
    assert changed == [True, False, False, False, False, False, True, False], "the parts that hold the two places"


def test_the_pattern_looks_random() -> None:
    for count in (2000, 300_000):
        values = pattern(count)
        assert abs(float(values.mean())) <= 0.1 and float(values.std()) == pytest.approx(1.0, abs=0.1)
        for shift in (1, 7, 50, 192, 197, 384, 768):
            assert abs(float(values[shift:] @ values[:-shift]) / count) < 0.1, "a shift must look like other numbers"


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_real_and_always_the_same() -> None:
    preprocessing = PreprocessingConfig()
    pictures = choose_pictures(None, (96, 64), preprocessing)
    assert pictures.pixels.shape == (2, 3, 96, 64) and pictures.pixels.float().std() > 40
    assert pictures.sha256 == choose_pictures(None, (96, 64), preprocessing).sha256
    values = pictures.normalised(preprocessing, torch.float64)
    assert values.dtype == torch.float64 and abs(float(values.mean())) < 1.5


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for i in range(9):
        Image.new("RGB", (40 + i, 50), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    pictures = choose_pictures(tmp_path, (32, 32), PreprocessingConfig())
    assert pictures.pixels[:, 0, 0, 0].tolist() == [0, 40, 80, 120] and pictures.origin == str(tmp_path)
    (tmp_path / "2.png").write_bytes(b"words")
    with pytest.raises(UserError, match="2.png"):
        choose_pictures(tmp_path, (32, 32), PreprocessingConfig())
    with pytest.raises(UserError, match="does not exist"):
        choose_pictures(tmp_path / "nowhere", (32, 32), PreprocessingConfig())


def test_sizes() -> None:
    assert read_shape("224", 16) == (224, 224) and read_shape("224x160", 16) == (224, 160)
    for text in ("", "0", "224x", "1x2x3", "-16", "big", "16.0"):
        with pytest.raises(UserError, match="give one number, or height x width"):
            read_shape(text, 16)
    with pytest.raises(UserError, match="multiples of 16 pixels, such as 224x160"):
        read_shape("225x158", 16)


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(given: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given()
    out = tmp_path / "certificate.json"
    assert main(["verify", "somewhere/tiny", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    words = ("eval mode", "2 pictures of 32 x 32", "block 2", "logits of predict", "gradient of", "float64  relative")
    assert all(each in shown.out for each in words)
    assert f"agrees with numpy {importlib.metadata.version('numpy')}" in shown.out and "DEPARTS" not in shown.out
    given(subject=without_peer(make_subject(make_format())))
    assert main(["verify", "somewhere/tiny", "--certificate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agrees"] is True
    assert main(["verify", "somewhere/tiny"]) == 2
    assert "pip install package-that-is-nowhere" in capsys.readouterr().err


def test_command_that_departs(given: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    given(without_block(1))
    assert main(["verify", "somewhere/tiny", "--dtype=float32", "--image-size=32x48"]) == 1
    shown = capsys.readouterr().out
    assert "the first stage to depart is block 1" in shown and "2 pictures of 32 x 48" in shown
    assert main(["verify", "somewhere/tiny", "--dtype=float32", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["agrees"] is False and facts["first_departure"] == "block 1" and "recorded" not in facts


def test_python(given: Callable[..., None]) -> None:
    given()
    assert saccade.verify("tiny", dtype="float32").agrees
    with pytest.raises(UserError, match="--dtype float16"):
        saccade.verify("tiny", dtype="float16")


def save_reference(path: Path, **more: Any) -> Path:
    """A tiny model of timm in the hub's layout; `more` of model_args."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **small)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": small | more}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_whole_way_with_a_real_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_reference(tmp_path / "tiny")
    result = verification.verify(folder, image_size="32x48")
    assert result.agrees and "agrees with timm" in result.verdict
    assert result.facts["reference_weights"] == "those of the source"
    from timm.layers import Mlp

    whole = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, x: whole(self, x) * (1 + 1e-6))
    result = verification.verify(folder)
    assert result.comparisons["float32"].agrees and first(result) == "block 0"


def test_what_a_description_says_beside_the_form(tmp_path: Path) -> None:
    """timm's own DINOv3 names its classes there, too; what would load weights or make something else is not heard."""
    more = {"num_classes": 7, "in_chans": 3, "pretrained": True, "checkpoint_path": "no.pth", "features_only": True}
    assert verification.verify(save_reference(tmp_path / "more", **more), dtype="float64").agrees
    folder = save_reference(tmp_path / "wrong", rope_style="spiral")
    with pytest.raises(UserError, match=r"config.json: timm cannot build its vit_tiny_patch16_224 .*rope_style"):
        verification.verify(folder)


def test_a_size_that_is_no_multiple_of_the_stride(tmp_path: Path) -> None:
    """As timm says of torchvision's second ResNets, which were trained on crops of 176 pixels."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    folder = tmp_path / "resnet"
    folder.mkdir()
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), folder / "model.safetensors")
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 176, 176]}}
    (folder / "config.json").write_text(json.dumps(config))
    result = verification.verify(folder, dtype="float64")
    assert result.agrees and result.facts["pictures"]["height"] == 192
    with pytest.raises(UserError, match=r"--image-size 176: this model takes multiples of 32 pixels, such as 192x192"):
        verification.verify(folder, image_size="176")


def test_weights_of_a_dialect_without_reference_and_of_our_own(tmp_path: Path) -> None:
    """They are written in a dialect that has one."""
    from saccade.weights.convert import import_weights
    from saccade.weights.model_file import save_model
    from saccade.weights.source import open_weights

    found = import_weights(open_weights(save_reference(tmp_path / "tiny")))
    names = tuple("abcde")
    save_model(tmp_path / "ours.safetensors", found.weights, replace(found.card(), task="classify", class_names=names))
    result = verification.verify(tmp_path / "ours.safetensors", dtype="float64")
    assert result.agrees and result.facts["reference_weights"] == "written from ours"
    merging = replace(found.row, merge_tokens=3)  # which timm has not
    card = replace(found.card(), task="classify", class_names=names, architecture=merging.to_dict())
    save_model(tmp_path / "merging.safetensors", found.weights, card)
    result = verification.verify(tmp_path / "merging.safetensors", dtype="float64")
    assert result.agrees and "without merging" in result.facts["notes"][0]
    row = backbone_row("cct_nano")
    backbone = build_backbone(row)
    card = replace(found.card(), task="embed", model="cct_nano", architecture=row.to_dict(), class_names=())
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    save_model(tmp_path / "cct.safetensors", weights, card)
    with pytest.raises(UserError, match="no reference code is known for such a model"):
        verification.verify(tmp_path / "cct.safetensors")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.safetensors"):
        verification.verify(tmp_path / "nowhere.safetensors")
