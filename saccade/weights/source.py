"""Weights as others publish them: a name on the hub, a folder in the hub's layout, or a file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from saccade.config import closest
from saccade.errors import UserError
from saccade.weights.hub import TOKENIZER, fetch, hub_name, weight_files
from saccade.weights.published import PUBLISHED
from saccade.weights.readers import SUFFIXES, read_file
from saccade.weights.recognition import matching
from saccade.weights.unwrap import shortened, unwrap

LARGEST_TEXT = 64 * 2**20  # bytes of a JSON file; an index of a very large model has a few MB
UNKNOWN_LICENCE = "unknown; ask its publisher"


@dataclass(frozen=True)
class RawWeights:
    """Weights under the names of whoever made them."""

    where: str  # what the user named it, for messages
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # config.json, {} where there is none
    preprocessor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json, likewise
    origin: str = ""  # for the provenance of what is made of them
    licence: str = UNKNOWN_LICENCE
    training_data: str = ""
    notes: tuple[str, ...] = ()  # what was chosen, changed and left aside on the way
    tokenizer: dict[str, bytes] = field(default_factory=dict)  # its files by name, where there are any


def open_weights(source: str | Path, *, branch: str | None = None) -> RawWeights:
    """Read weights from a hub name, a folder or a file, whichever `source` is; what exists on disk comes first.

    `branch` chooses among the parts of a checkpoint, such as `student`, where the usual choice is not wanted.
    """
    where, path = str(source), Path(source)
    if path.is_dir():
        return _open_folder(path, where, f"the folder {path.resolve().name}", branch)
    if path.exists():
        return _open_file(path, branch)
    name = hub_name(where)
    beside = path.parent != Path() and path.parent.is_dir()  # so a path is meant, though it looks like a name
    if name is None or path.suffix in SUFFIXES or beside:
        also = f"; if it is a name on the hub, write hf-hub:{where}" if name and beside else ""
        raise UserError(_not_there(where).removesuffix("?" if also else "") + also)
    folder, notes = fetch(*name)
    return _open_folder(folder, where, f"huggingface.co/{name[0]}", branch, notes=notes)


def _not_there(source: str) -> str:
    if source in PUBLISHED:
        names = " or ".join(each.name for each in PUBLISHED[source])
        return f"{source}: a model of saccade, not weights; published weights for it: {names}"
    if re.fullmatch(r"\w+\.[\w.]+", source) and not source.endswith(SUFFIXES):
        return f"{source}: no such file or folder; a model of timm's is named timm/{source} on the hub"
    folder = Path(source).parent
    near = closest(source, [str(folder / each.name) for each in folder.iterdir()] if folder.is_dir() else [])
    kinds = "a file, a folder in the hub's layout, or a name on the hub such as facebook/dinov2-small"
    return f"{source}: no such file or folder{near}{'' if near else f'; weights are {kinds}'}"


# --- files and folders -----------------------------------------------------------------------------------------------


def _open_file(path: Path, branch: str | None) -> RawWeights:
    # these names belong to the config.json beside them; any other file may lie anywhere
    if path.name in ("model.safetensors", "pytorch_model.bin") and (path.parent / "config.json").is_file():
        return _open_folder(path.parent, str(path), f"the file {path.name}", branch, file=path.name)
    values, metadata = read_file(path)
    return _build(values, metadata, [path], str(path), f"the file {path.name}", branch)


def _open_folder(
    folder: Path, where: str, origin: str, branch: str | None, *, notes: list[str] | None = None, file: str = ""
) -> RawWeights:
    names = [each.name for each in folder.iterdir()]
    files = [file] if file else weight_files(names)
    if not files:
        raise UserError(_no_weights(where, names))
    if files[0].endswith(".index.json"):
        paths, values, found = _read_shards(folder, files[0], files[1:])
        notes, metadata = [*(notes or []), *found], {}
    else:
        paths = [folder / files[0]]
        values, metadata = read_file(paths[0])
    return _build(values, metadata, paths, where, origin, branch, folder=folder, notes=notes)


def _build(
    values: Any,
    metadata: dict[str, str],
    paths: list[Path],
    where: str,
    origin: str,
    branch: str | None,
    *,
    folder: Path | None = None,
    notes: list[str] | None = None,
) -> RawWeights:
    if "saccade" in metadata:
        raise UserError(f"{where}: a model of saccade's own, not of another library; it is used as it is")
    config = read_json(folder / "config.json") if folder else {}
    tensors, found = unwrap(values, where, branch, lambda shapes: bool(matching(shapes, config)))
    preprocessor = read_json(folder / "preprocessor_config.json") if folder else {}
    readme = _front_matter(folder / "README.md") if folder else ""
    return RawWeights(
        where,
        tensors,
        config,
        preprocessor,
        f"{origin}, {_identity(paths)}",
        _licence(readme, config),
        ", ".join(_entries(readme, "datasets")),
        (*(notes or []), *found),
        _read_files(folder, TOKENIZER) if folder else {},
    )


def _read_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Those that are there."""
    found = {}
    for path in (folder / name for name in names):
        try:
            if path.is_file():
                if path.stat().st_size > LARGEST_TEXT:
                    raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a tokenizer")
                found[path.name] = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return found


def _no_weights(where: str, names: list[str]) -> str:
    several = sorted(name for name in names if name.endswith(SUFFIXES))
    if several:
        return f"{where}: holds several files of weights ({shortened(several)}); give the path of the one you mean"
    if ".cache" in names:
        return f"{where}: holds no weights yet; its download was interrupted. The same `hf download` continues it"
    return f"{where}: holds no weights; those are model.safetensors, pytorch_model.bin, or one .pth or .npz"


def _identity(paths: list[Path]) -> str:
    """The hub's commit where the files come from its cache, else what they hash to."""
    if re.fullmatch(r"[0-9a-f]{40}", paths[0].parent.name):
        return f"revision {paths[0].parent.name}"
    hashes = []
    for path in paths:
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "sha256 " + ", ".join(hashes)


# --- shards ----------------------------------------------------------------------------------------------------------


def _read_shards(folder: Path, index: str, present: list[str]) -> tuple[list[Path], dict[str, Any], list[str]]:
    """Files, tensors and notes of weights in several files. All that is absent or damaged is listed at once."""
    placed = _weight_map(folder / index) if (folder / index).is_file() else None
    needed = sorted(set(placed.values())) if placed is not None else _series(folder, present)
    faults: list[str] = []
    contents: dict[str, dict[str, Any]] = {}
    for name in needed:
        path = folder / name
        if not path.is_file():
            faults.append(f"absent: {name}")
            continue
        try:
            values, _ = read_file(path)
        except UserError as error:
            faults.append(str(error).removeprefix(f"{folder}/"))
            continue
        contents[name] = values if isinstance(values, dict) else {}
    if placed is not None:
        faults += [
            f"{shard}: lacks {key}, which the index says it holds"
            for key, shard in placed.items()
            if shard in contents and key not in contents[shard]
        ]
    if faults:
        raise UserError(
            f"{folder}: incomplete ({len(faults)} faults); download it again, which continues where it stopped:"
            + "".join(f"\n  {fault}" for fault in faults[:40])
            + (f"\n  and {len(faults) - 40} more" if len(faults) > 40 else "")
        )
    paths = [folder / name for name in needed]
    if placed is None:
        return paths, {key: value for values in contents.values() for key, value in values.items()}, []
    extra = [key for name, values in contents.items() for key in values if placed.get(key) != name]
    notes = [f"left aside, being in a shard but not in the index: {shortened(extra)}"] if extra else []
    return paths, {key: contents[shard][key] for key, shard in placed.items()}, notes


def _weight_map(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{path}: an index without a weight_map; get it anew")
    for key, shard in placed.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in (".", ".."):
            raise UserError(f"{path}: says that {key} lies in {shard!r}, which is no file of its folder; refused")
    return cast(dict[str, str], placed)


def _series(folder: Path, present: list[str]) -> list[str]:
    """All shards of a series, by the names of those that are there."""
    match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.\w+)", present[0])
    assert match is not None
    stem, _, of, count, suffix = match.groups()
    if int(count) > 10_000:
        raise UserError(f"{folder}: {present[0]} claims to be one of {count} shards; damaged")
    return [f"{stem}{k:0{len(count)}d}{of}{count}{suffix}" for k in range(1, int(count) + 1)]


# --- what lies beside the weights ------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table; {} where there is none."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a description")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: truncated or not valid JSON ({error}); get it anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a table; get it anew")
    return cast(dict[str, Any], values)


def _front_matter(path: Path) -> str:
    """The head of a README between its `---` lines, where the hub keeps licence and data sets."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:100_000] if path.is_file() else ""
    except OSError:
        return ""
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return match[1] if match else ""


def _entries(front_matter: str, name: str) -> list[str]:
    """`name: value`, `name: [a, b]`, or a list of lines below; no more of YAML is needed, so no more is read."""
    match = re.search(rf"^{name}:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", front_matter, re.MULTILINE)
    if match is None:
        return []
    parts = re.split(r"\n[ \t]*-[ \t]|,", match[1].strip("[] "))
    return [cleaned for part in parts if (cleaned := part.strip("[]'\" \t-"))]


def _licence(readme: str, config: dict[str, Any]) -> str:
    """As the publisher states it: in the README's head, else in timm's description."""
    stated = _entries(readme, "license")
    if stated and stated[0] not in ("other", "unknown"):
        return ", ".join(stated)
    named = [*_entries(readme, "license_name"), *_entries(readme, "license_link")]
    if named:
        return " ".join(named)
    described = config.get("pretrained_cfg", config)
    licence = described.get("license") if isinstance(described, dict) else None
    return licence if isinstance(licence, str) and licence else "other" if stated else UNKNOWN_LICENCE
