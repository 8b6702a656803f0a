"""Weights in a folder and on the hub: all of them, or what is missing and how to get it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from saccade import UserError
from saccade.weights.hub import hub_name, weight_files
from saccade.weights.source import UNKNOWN_LICENCE, open_weights


def state(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator) for name in names or ("embed.weight", "blocks.0.weight")}


def refused(source: str | Path, *parts: str, branch: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(source, branch=branch)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    return str(caught.value)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- folders ---------------------------------------------------------------------------------------------------------

README = """---
license: apache-2.0
datasets:
- imagenet-1k
- "imagenet-21k"
---
# A model
license: not this one
"""


def make_folder(folder: Path, shards: int = 0, suffix: str = "safetensors") -> dict[str, Tensor]:
    """A folder in the hub's layout; returns all of its tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    (folder / "README.md").write_text(README)
    tensors = {f"layer.{k}": torch.full((2, 3), float(k)) for k in range(6)}

    def write(part: dict[str, Tensor], name: str) -> None:
        if suffix == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)

    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if not shards:
        write(tensors, f"{stem}.{suffix}")
        return tensors
    placed = {}
    for k in range(shards):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == k}
        placed |= dict.fromkeys(part, file := f"{stem}-{k + 1:05d}-of-{shards:05d}.{suffix}")
        write(part, file)
    index = {"metadata": {"total_size": 144}, "weight_map": placed}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_folder(tmp_path: Path, shards: int, suffix: str) -> None:
    tensors = make_folder(tmp_path / "dinov2", shards, suffix)
    raw = open_weights(str(tmp_path / "dinov2"))
    assert equal(raw.tensors, tensors) and raw.notes == ()
    assert raw.config == {"model_type": "vit"} and raw.preprocessor == {"size": 224}
    assert raw.licence == "apache-2.0" and raw.training_data == "imagenet-1k, imagenet-21k"
    assert "dinov2" in raw.origin and str(tmp_path) not in raw.origin


def test_safetensors_before_pickles(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path)
    torch.save({"other": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert equal(open_weights(tmp_path).tensors, tensors)
    raw = open_weights(tmp_path / "pytorch_model.bin")  # but the one that is named is taken
    assert raw.tensors.keys() == {"other"} and raw.config == {"model_type": "vit"}


def test_a_file_of_another_name_does_not_take_the_config_beside_it(tmp_path: Path) -> None:
    make_folder(tmp_path)
    torch.save(state(), tmp_path / "vit.pth")
    assert open_weights(tmp_path / "vit.pth").config == {}


@pytest.mark.parametrize("index", [True, False])
def test_absent_and_half_downloaded_shards_are_all_listed(tmp_path: Path, index: bool) -> None:
    make_folder(tmp_path, 4)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    half = tmp_path / "model-00004-of-00004.safetensors"
    half.write_bytes(half.read_bytes()[:-10])
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    message = refused(
        tmp_path,
        "incomplete (3 faults)",
        "absent: model-00002-of-00004.safetensors",
        "absent: model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors: truncated",
    )
    assert message.count("\n") == 3


def test_shards_without_an_index(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, 3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert equal(open_weights(tmp_path).tensors, tensors)


def test_index_that_names_absent_keys(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["layer.7"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["layer.8"] = "model-00009-of-00009.safetensors"
    path.write_text(json.dumps(index))
    refused(tmp_path, "2 faults", "absent: model-00009", "model-00001-of-00002.safetensors: lacks layer.7")


def test_shard_that_holds_more_than_the_index_says(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, 2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["layer.3"], tensors["layer.3"]
    path.write_text(json.dumps(index))
    raw = open_weights(tmp_path)
    assert equal(raw.tensors, tensors) and "not in the index: layer.3" in raw.notes[0]


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", 5, None])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "hub").mkdir()
    save_file(state("secret"), tmp_path / "outside.safetensors")
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": shard}}))
    refused(tmp_path / "hub", "no file of its folder")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json", "anew")


def test_a_series_of_absurd_length(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model-00001-of-99999.safetensors")
    refused(tmp_path, "one of 99999 shards")


def test_damaged_config(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    refused(tmp_path, "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, "config.json", "not a table")


def test_folders_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "holds no weights")
    (tmp_path / ".cache").mkdir()
    refused(tmp_path, "interrupted", "hf download")
    for name in ("a.pth", "b.pth"):
        torch.save(state(), tmp_path / name)
    refused(tmp_path, "several files of weights (a.pth, b.pth)")
    (tmp_path / "a.pth").rename(tmp_path / "training_args.bin")
    assert equal(open_weights(tmp_path).tensors, state())


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, cc-by-4.0]", "mit, cc-by-4.0"),
        ("license:\n- mit\n- bsd-3-clause\ntags:\n- x", "mit, bsd-3-clause"),
        (
            "license: other\nlicense_name: dinov3-license\nlicense_link: https://x.org/L",
            "dinov3-license https://x.org/L",
        ),
        ("license: other", "other"),
        ("tags:\n- license: mit", UNKNOWN_LICENCE),
        ("", UNKNOWN_LICENCE),
    ],
)
def test_licence_of_the_readme(tmp_path: Path, head: str, licence: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\ntext\n")
    assert open_weights(tmp_path).licence == licence


def test_licence_of_timm(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe no text")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "cc-by-nc-4.0"}}))
    assert open_weights(tmp_path).licence == "cc-by-nc-4.0"


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("facebook/dinov2-small", ("facebook/dinov2-small", None)),
        ("timm/swin_tiny_patch4_window7_224.ms_in1k", ("timm/swin_tiny_patch4_window7_224.ms_in1k", None)),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("https://huggingface.co/a/b/", ("a/b", None)),
        ("hf-hub:a/b", ("a/b", None)),
        ("vit_base", None),
        ("../a", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("", None),
    ],
)
def test_hub_names(text: str, expected: Any) -> None:
    assert hub_name(text) == expected


def test_which_files_are_fetched() -> None:
    beside = ["README.md", "tf_model.h5", "training_args.bin", "onnx/model.safetensors"]
    assert weight_files(["pytorch_model.bin", "model.safetensors", *beside]) == ["model.safetensors"]
    assert weight_files(["pytorch_model.bin", *beside]) == ["pytorch_model.bin"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert weight_files([*shards, index, "pytorch_model.bin"]) == [index, *shards]
    assert weight_files(["w.npz", *beside]) == ["w.npz"]
    assert weight_files(["a.safetensors", "b.safetensors"]) == [] == weight_files(beside)


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes. `repositories` maps a name to a folder, or to a refusal."""

    repositories: dict[str, Path | tuple[int, str]] = {}
    asked: list[str] = []

    def do_HEAD(self) -> None:  # noqa: N802, the base class calls it so
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        api = path.startswith("/api/models/")
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        repository = self.repositories.get(name, (404, "RepoNotFound"))
        if isinstance(repository, tuple) and not (api and repository[1] == "GatedRepo"):
            return self.send(repository[0], b"", {"X-Error-Code": repository[1]})
        if api and "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", SHA, "v1"):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = repository if isinstance(repository, Path) else None
        files = [each.name for each in folder.iterdir()] if folder else ["model.safetensors", "config.json"]
        if api and "/tree/" in path:
            entries = [
                {"type": "file", "path": each, "size": (folder / each).stat().st_size if folder else 1, "oid": "0" * 40}
                for each in files
            ]
            return self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        if api:
            info = {"id": name, "sha": SHA, "siblings": [{"rfilename": each} for each in files]}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if isinstance(repository, tuple):
            return self.send(repository[0], b"", {"X-Error-Code": repository[1]})
        data = (repository / path.rsplit("/", 1)[1]).read_bytes()
        return self.send(200, data, {"ETag": f'"{len(data):040x}"', "X-Repo-Commit": SHA})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A hub on this machine, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "asked", [])
    repository = tmp_path / "repository"
    tensors = make_folder(repository)
    torch.save({"other": torch.zeros(1)}, repository / "pytorch_model.bin")
    monkeypatch.setattr(
        Hub,
        "repositories",
        {
            "owner/model": repository,
            "owner/gated": (403, "GatedRepo"),
            "owner/private": (401, "RepoNotFound"),
            "owner/broken": (500, ""),
        },
    )
    yield SimpleNamespace(tensors=tensors, folder=repository, url=url, stop=server.shutdown, close=server.server_close)
    server.shutdown()
    server.server_close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_network(hub: SimpleNamespace) -> None:
    hub.stop()
    hub.close()


def test_hub_download(hub: SimpleNamespace) -> None:
    raw = open_weights("owner/model")
    assert equal(raw.tensors, hub.tensors) and raw.notes == ()
    assert raw.config == {"model_type": "vit"} and raw.preprocessor == {"size": 224} and raw.licence == "apache-2.0"
    assert raw.origin == f"huggingface.co/owner/model, revision {SHA}"
    assert not any("pytorch_model.bin" in each for each in Hub.asked), "only the files that are needed"
    assert equal(open_weights("owner/model@v1").tensors, hub.tensors)


@pytest.mark.parametrize("how", ["offline mode", "no network", "broken"])
def test_cache_serves_when_the_hub_does_not(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    open_weights("owner/model")
    if how == "offline mode":
        offline(monkeypatch)
    elif how == "no network":
        no_network(hub)
    else:
        monkeypatch.setitem(Hub.repositories, "owner/model", (500, ""))
    raw = open_weights("owner/model")
    assert equal(raw.tensors, hub.tensors) and raw.origin.endswith(SHA)
    assert bool(raw.notes) == (how != "offline mode"), "asked for, offline mode needs no word"


@pytest.mark.parametrize("how", ["offline mode", "no network", "broken"])
def test_advice_how_to_bring_the_files(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    name = "owner/broken" if how == "broken" else "owner/model"
    if how == "offline mode":
        offline(monkeypatch)
    elif how == "no network":
        no_network(hub)
    why = {
        "offline mode": "offline mode is on (HF_HUB_OFFLINE)",
        "no network": f"{hub.url} cannot be reached",
        "broken": "answers with an error (500)",
    }[how]
    message = refused(f"{name}@v1", why, f"hf download {name} --revision v1 --local-dir {name[6:]}", "give its path")
    assert "Traceback" not in message


def test_gated_repository_says_where_to_accept(hub: SimpleNamespace) -> None:
    refused("owner/gated", f"Accept them at {hub.url}/owner/gated", "hf auth login", "HF_TOKEN")


@pytest.mark.parametrize("name", ["owner/modl", "owner/private"])
def test_unknown_or_private_repository(hub: SimpleNamespace, name: str) -> None:
    refused(name, "no such repository", "private", "check the spelling")


def test_unknown_revision(hub: SimpleNamespace) -> None:
    refused("owner/model@nowhere", "no revision 'nowhere'")


def test_repository_without_weights_that_can_be_read(hub: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (hub.folder / name).unlink()
    (hub.folder / "tf_model.h5").write_bytes(b"x")
    refused("owner/model", "holds only tf_model.h5")
    for name in ("a.pth", "b.pth"):
        (hub.folder / name).write_bytes(b"x")
    refused("owner/model", "several files of weights (a.pth, b.pth)", "hf download owner/model a.pth")


def test_folder_on_disk_comes_before_the_hub(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub.folder.parent)
    shutil.copytree(hub.folder, hub.folder.parent / "owner" / "model")
    assert equal(open_weights("owner/model").tensors, hub.tensors) and Hub.asked == []


@pytest.mark.parametrize(
    "name",
    ["owner/model.", "owner/a--b", "owner/a..b", "owner/x.git", f"owner/{'x' * 97}", "owner/modèle", "ownér/model"],
)
@pytest.mark.parametrize("how", ["a hub", "offline mode"])
def test_names_that_the_hub_cannot_have(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    if how == "offline mode":
        offline(monkeypatch)
    refused(name, f"{name}: not a possible name on the hub", "check the spelling")
    refused(f"{name}@v1", "not a possible name")
    assert Hub.asked == []


def test_names_that_are_almost_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("vit_small_patch16_224.augreg_in1k", "timm/vit_small_patch16_224.augreg_in1k")
    (tmp_path / "weights.pth").touch()
    refused("weihgts.pth", "did you mean weights.pth")
