from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import saccade
from saccade.backbones import backbone_row
from saccade.backbones.base import Backbone
from saccade.cli import main
from saccade.config import NetworkConfig, PreprocessingConfig
from saccade.data.buckets import assign, bucket_shapes
from saccade.data.decode import RESAMPLE, Picture
from saccade.data.transforms import central_box, to_tensor
from saccade.engine import embed as engine
from saccade.engine.embed import embed_to_file
from saccade.engine.predict import Model
from saccade.errors import UserError
from saccade.weights.export import convert
from saccade.weights.load import described_network
from saccade.weights.model_file import ModelCard, save_model

SIZES = [(40, 40), (30, 60), (64, 32), (20, 20), (33, 35), (31, 62), (60, 30), (25, 25), (50, 24), (44, 44)]  # (h, w)
CARD = ModelCard(
    task="classify",
    model="vit_micro",
    architecture=backbone_row("vit_micro").changed(NetworkConfig(patch_size=8), 32).to_dict(),
    class_names=("ant", "bee"),
    preprocessing=PreprocessingConfig(image_size=32, stride=8),
)


def write_model(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    network = described_network(CARD)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # so that every picture has a vector of its own
    save_model(path, network.state_dict(), CARD)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return saccade.load(str(model_file), device="cpu", precision="float32")


def photo(h: int, w: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, (h, w) in enumerate(SIZES):
        photo(h, w, i).save((folder if i % 2 else folder / "more") / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def a_part_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PART_SECONDS", 0.0)


def read_parquet(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    names, heights, widths = (table[name].to_pylist() for name in ("path", "height", "width"))
    vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<")
    return names, np.array([heights, widths]).T, vectors, json.loads(table.schema.metadata[b"saccade"])


# --- what the vectors are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["summary", "map-mean"])
def test_vectors_are_the_backbones(model: Model, what: str) -> None:
    """By hand: each picture alone, in the shape of its bucket."""
    shapes = bucket_shapes(CARD.preprocessing)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CARD.preprocessing.mean, CARD.preprocessing.std))
    expected, backbone = [], model.network.backbone
    assert isinstance(backbone, Backbone)
    for i, size in enumerate(SIZES):
        shape = shapes[int(assign(np.array([size]), shapes)[0])]
        pixels = to_tensor(
            Picture.from_image(photo(*size, i)).crop(central_box(size, shape), shape, RESAMPLE["bicubic"])
        )
        with torch.inference_mode():
            features = backbone(((pixels / 255 - mean) / std)[None])
        vector = features.summary if what == "summary" else features.maps[-1].mean(dim=(2, 3))
        expected.append(vector[0].numpy())
    found = saccade.embed(model, [photo(*size, i) for i, size in enumerate(SIZES)], what=what)
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(SIZES), 128)
    assert np.abs(found.vectors - np.stack(expected)).max() <= 1e-5  # measured 3.6e-6
    assert np.std(found.vectors, axis=0).min() > 1e-3, "all pictures alike would prove nothing"
    assert [tuple(size) for size in found.sizes] == SIZES


def test_mates_and_order_do_not_matter(model: Model) -> None:
    images = [photo(*size, i) for i, size in enumerate(SIZES)]
    whole = saccade.embed(model, images).vectors
    order = np.random.default_rng(0).permutation(len(images))
    for batch_size in (1, 3):
        shuffled = saccade.embed(model, [images[i] for i in order], batch_size=batch_size).vectors
        assert np.abs(shuffled - whole[order]).max() <= 1e-5  # measured 3.6e-6


def test_files_pixels_and_workers_give_the_same(model: Model, photos: Path) -> None:
    found = saccade.embed(model, photos)
    assert [Path(path).name for path in found.paths[:3]] == ["1.png", "3.png", "5.png"]
    images = [Image.open(path) for path in found.paths]
    assert np.array_equal(saccade.embed(model, images).vectors, found.vectors)
    assert np.array_equal(saccade.embed(model, photos, workers=2).vectors, found.vectors)
    mixed = saccade.embed(model, [found.paths[0], np.asarray(images[1])])
    assert np.abs(mixed.vectors - found.vectors[:2]).max() <= 1e-5 and mixed.paths[1] == "image 2"


def test_another_resolution(model: Model, photos: Path) -> None:
    small, large = (saccade.embed(model, photos, image_size=side) for side in (32, 48))
    assert small.vectors.shape == large.vectors.shape and np.abs(small.vectors - large.vectors).max() > 1e-3
    assert large.metadata["preprocessing"]["image_size"] == 48
    with pytest.raises(UserError, match="--image-size"):
        saccade.embed(model, photos, image_size=2)
    with pytest.raises(UserError, match="--what everything"):
        saccade.embed(model, photos, what="everything")


# --- files -----------------------------------------------------------------------------------------------------------


def test_parquet(model: Model, model_file: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "vectors.parquet"
    result = embed_to_file(model_file, [photos], out, device="cpu", batch_size=4)
    expected = saccade.embed(model, photos)
    names, sizes, vectors, metadata = read_parquet(out)
    assert names == list(expected.paths) and np.array_equal(sizes, expected.sizes)
    assert np.abs(vectors - expected.vectors).max() <= 1e-5
    assert metadata["model"] == "vit_micro" and len(metadata["weights_sha256"]) == 64
    assert (result.count, result.channels, result.unreadable, result.finished_before) == (10, 128, (), False)
    assert [path.name for path in out.parent.iterdir()] == ["vectors.parquet"], "nothing is left lying about"


def test_the_same_weights_with_merging_are_another_job(model_file: Path, photos: Path, tmp_path: Path) -> None:
    merging, out = tmp_path / "merging.safetensors", tmp_path / "vectors.parquet"
    convert(model_file, merging, merge_tokens=5)
    embed_to_file(model_file, [photos], out, device="cpu", batch_size=4)
    with pytest.raises(UserError, match=r"vectors of another job \(other settings of the network"):
        embed_to_file(merging, [photos], out, device="cpu", batch_size=4)
    vectors = read_parquet(out)[2]
    embed_to_file(merging, [photos], tmp_path / "merged.parquet", device="cpu", batch_size=4)
    assert np.abs(read_parquet(tmp_path / "merged.parquet")[2] - vectors).max() > 1e-6


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".jsonl"])
def test_other_formats_keep_every_bit(model: Model, photos: Path, tmp_path: Path, suffix: str) -> None:
    expected = saccade.embed(model, photos)
    out = expected.save(tmp_path / f"vectors{suffix}")
    if suffix == ".npz":
        with np.load(out) as values:
            names, vectors, metadata = values["path"].tolist(), values["vector"], json.loads(str(values["metadata"]))
            assert np.array_equal(np.stack([values["height"], values["width"]], axis=1), expected.sizes)
    else:
        with open(out, newline="", encoding="utf-8") as file:
            if suffix == ".csv":
                rows = list(csv.reader(file))
                assert rows[0][:4] == ["path", "height", "width", "v0"] and rows[0][-1] == "v127"
                table = [(row[0], [int(side) for side in row[1:3]], row[3:]) for row in rows[1:]]
            else:
                lines = [json.loads(line) for line in file]
                table = [(row["path"], [row["height"], row["width"]], row["vector"]) for row in lines]
        names, vectors = [row[0] for row in table], np.array([row[2] for row in table], dtype=np.float32)
        assert [row[1] for row in table] == expected.sizes.tolist()
        metadata = json.loads((tmp_path / f"vectors{suffix}.json").read_text())
    assert names == list(expected.paths) and np.array_equal(vectors, expected.vectors)
    assert metadata["rows"] == 10 and metadata["weights_sha256"] == expected.metadata["weights_sha256"]


def test_formats_that_cannot_be_written(
    model_file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"vectors.xlsx: the name must end in .parquet, .npz, .csv, .jsonl"):
        embed_to_file(model_file, [photos], tmp_path / "vectors.xlsx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pyarrow \(pip install pyarrow"):
        embed_to_file(model_file, [photos], tmp_path / "vectors.parquet")


# --- interrupted and continued ---------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killer(after: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise Killed

    return progress


@pytest.mark.parametrize("after", [1, 4, 7])
def test_goes_on_to_the_same_bits(model: Model, photos: Path, tmp_path: Path, after: int) -> None:
    (photos / "9.png").write_bytes(b"words")
    whole, out = tmp_path / "whole.npz", tmp_path / "vectors.npz"
    embed_to_file(model, [photos], whole, batch_size=2)
    with pytest.raises(Killed):
        embed_to_file(model, [photos], out, batch_size=2, progress=killer(after))
    assert not out.exists() and (tmp_path / ".vectors.npz.parts" / "job.json").exists()
    said: list[str] = []
    steps: list[tuple[int, int]] = []
    result = embed_to_file(model, [photos], out, batch_size=2, progress=lambda *s: steps.append(s), say=said.append)
    done = int(said[0].split()[0])
    assert "of 10 pictures are done already" in said[0] and done >= after
    assert steps[-1] == (10 - done, 10 - done), "only the rest is done"
    assert not (tmp_path / ".vectors.npz.parts").exists()
    assert result.count == 9 and len(result.unreadable) == 1 and "9.png" in result.unreadable[0]
    with np.load(whole) as a, np.load(out) as b:
        assert np.array_equal(a["vector"], b["vector"]) and np.array_equal(a["path"], b["path"])


def test_a_kill_between_the_last_part_and_the_file(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "vectors.npz"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_vectors", lambda *a: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            embed_to_file(model, [photos], out)
    steps: list[tuple[int, int]] = []
    assert embed_to_file(model, [photos], out, progress=lambda *s: steps.append(s)).count == 10
    assert steps == [], "nothing is computed twice"


def test_finished_already(model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vectors.npz", "vectors.csv", "vectors.parquet"):
        out = tmp_path / name
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        embed_to_file(model, [photos], out)
        before = out.stat().st_mtime_ns
        (tmp_path / f".{name}.parts").mkdir()  # as a kill just after the file was written leaves it
        again = embed_to_file(model, [photos], out, batch_size=3)
        assert (again.finished_before, again.count, again.channels) == (True, 10, 128)
        assert out.stat().st_mtime_ns == before and not (tmp_path / f".{name}.parts").exists()


def test_another_job_is_refused(model: Model, photos: Path, tmp_path: Path) -> None:
    other = saccade.load(str(write_model(tmp_path / "other.safetensors", seed=1)), device="cpu", precision="float32")
    out, half = tmp_path / "vectors.npz", tmp_path / "half.npz"
    embed_to_file(model, [photos], out)
    with pytest.raises(Killed):
        embed_to_file(model, [photos], half, batch_size=2, progress=killer(2))
    for path, words in ((out, "holds vectors of another job"), (half, "holds unfinished work of another job")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=rf"{words} \(other weights\)"):
            embed_to_file(other, [photos], path)
        with pytest.raises(UserError, match=rf"{words} \(another --what\)"):
            embed_to_file(model, [photos], path, what="map-mean")
        with pytest.raises(UserError, match=rf"{words} \(another --image-size"):
            embed_to_file(model, [photos], path, image_size=40)
        with pytest.raises(UserError, match="another number of pictures"):
            embed_to_file(model, [photos / "more"], path)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is touched"
    photo(9, 9, 9).save(photos / "1.png")
    for path in (out, half):
        with pytest.raises(UserError, match="other or changed pictures"):
            embed_to_file(model, [photos], path)


def test_other_files_are_never_overwritten(model: Model, photos: Path, tmp_path: Path) -> None:
    for name in ("a.npz", "a.csv", "a.jsonl", "a.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        (tmp_path / name).write_text("my own")
        with pytest.raises(UserError, match="exists and was not written by this command"):
            embed_to_file(model, [photos], tmp_path / name)
        assert (tmp_path / name).read_text() == "my own"


@pytest.mark.parametrize("text", ['{"my": "own"}', "no JSON", "[" * 100_000])
def test_files_beside_are_never_overwritten(model: Model, photos: Path, tmp_path: Path, text: str) -> None:
    """The description of `a.csv` is `a.csv.json`, which may be anybody's."""
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(UserError, match=rf"{name}\.json, which exists and was not written by this command"):
            embed_to_file(model, [photos], tmp_path / name)
        with pytest.raises(UserError, match="choose another --out"):
            saccade.embed(model, photos / "1.png").save(tmp_path / name)
        assert (tmp_path / f"{name}.json").read_text() == text and not (tmp_path / name).exists()
    embed_to_file(model, [photos], tmp_path / "b.csv")
    (tmp_path / "b.csv").unlink()
    assert embed_to_file(model, [photos / "more"], tmp_path / "b.csv").count == 5, "its own is of no use alone"


def test_a_damaged_part_is_named(model: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npz"
    with pytest.raises(Killed):
        embed_to_file(model, [photos], out, batch_size=2, progress=killer(4))
    part = sorted((tmp_path / ".vectors.npz.parts").glob("part-*.npz"))[0]
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"{part.name}: damaged .*remove it"):
        embed_to_file(model, [photos], out, batch_size=2)
    part.unlink()
    assert embed_to_file(model, [photos], out, batch_size=2).count == 10


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_refused_until_it_ends(model: Model, photos: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "vectors.npz", tmp_path / ".vectors.npz.parts"
    with pytest.raises(Killed):
        embed_to_file(model, [photos], out, batch_size=2, progress=killer(4))
    command = [sys.executable, "-c", HOLD, str(parts / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        before = sorted(parts.iterdir())
        with pytest.raises(UserError, match=r"vectors\.npz: another process is writing it.*choose another --out"):
            embed_to_file(model, [photos], out, batch_size=2)
        assert sorted(parts.iterdir()) == before and not out.exists()
        other.kill()
    assert embed_to_file(model, [photos], out, batch_size=2).count == 10
    assert not parts.exists()


def test_another_call_is_refused(model: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npz"

    def again(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            embed_to_file(model, [photos], out)

    assert embed_to_file(model, [photos], out, progress=again).count == 10


def test_rows_that_vanish_are_missed(model: Model, photos: Path, tmp_path: Path) -> None:
    """As where a part was taken for another: nothing is written that lacks pictures."""
    out, lost = tmp_path / "vectors.npz", []

    def lose(done: int, total: int) -> None:
        if not lost:
            lost.extend((tmp_path / ".vectors.npz.parts").glob("part-*.npz"))
            lost[0].unlink()

    with pytest.raises(UserError, match=r"lacks 2 pictures that were done.*does them anew"):
        embed_to_file(model, [photos], out, batch_size=2, progress=lose)
    assert not out.exists()
    assert embed_to_file(model, [photos], out, batch_size=2).count == 10


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from saccade.engine import embed
embed.PART_SECONDS = 0.0
model, photos, out, after = sys.argv[1:]
def progress(done, total):
    if done >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)
embed.embed_to_file(model, [photos], out, device="cpu", batch_size=2, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 7])
def test_kill_9(model_file: Path, photos: Path, tmp_path: Path, after: int) -> None:
    out = tmp_path / "vectors.npz"
    arguments = [sys.executable, "-c", KILLED, str(model_file), str(photos), str(out)]
    root = Path(saccade.__file__).parents[1]
    assert subprocess.run([*arguments, str(after)], cwd=root).returncode == -signal.SIGKILL
    assert not out.exists() and len(list((tmp_path / ".vectors.npz.parts").glob("part-*.npz"))) >= 1
    assert subprocess.run([*arguments, "99"], cwd=root, env={**os.environ}).returncode == 0
    embed_to_file(model_file, [photos], tmp_path / "whole.npz", device="cpu", batch_size=2)
    with np.load(out) as a, np.load(tmp_path / "whole.npz") as b:
        assert np.array_equal(a["vector"], b["vector"]) and np.array_equal(a["path"], b["path"])


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(
    model_file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["embed", str(model_file), "photos", "--out=vectors.npz", "--device=cpu"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "10 pictures, 128 numbers each, in vectors.npz\n"
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["finished_before"] is True and facts["count"] == 10 and facts["path"] == "vectors.npz"
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("finished already: ")


def test_command_goes_on_after_bad_pictures(
    model_file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cut.png").write_bytes((photos / "1.png").read_bytes()[:300])
    (photos / "empty.jpg").write_bytes(b"")
    arguments = ["embed", str(model_file), str(photos), "--out", str(tmp_path / "v.npz"), "--device=cpu"]
    for _ in range(2):  # the second time nothing is done, and the same is said
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "2 pictures could not be read; the others are done" in err and "cut.png" in err and "empty.jpg" in err
    with np.load(tmp_path / "v.npz") as values:
        assert len(values["path"]) == 10 and not any("cut" in path for path in values["path"])
    assert main(["embed", str(model_file), str(photos / "empty.jpg"), "--out", str(tmp_path / "none.npz")]) == 2
    assert "none of the pictures could be read" in capsys.readouterr().err
    assert not (tmp_path / "none.npz").exists() and not (tmp_path / ".none.npz.parts").exists()
