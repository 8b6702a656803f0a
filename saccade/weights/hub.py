"""Weights from the Hugging Face hub, through its own client: its cache, its token, its offline mode."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from saccade.errors import UserError

NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
PREFIXES = ("https://huggingface.co/", "hf-hub:", "hf://")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")  # of other trainers
TOKENIZER = ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json")  # files of a model of texts
BESIDE = ("config.json", "preprocessor_config.json", "README.md", *TOKENIZER)
WAIT = 10.0  # seconds for the hub's first answer


def hub_name(source: str) -> tuple[str, str | None] | None:
    """`owner/name` or `owner/name@revision` as (name, revision); None where the text is no such thing."""
    for prefix in PREFIXES:
        source = source.removeprefix(prefix)
    match = NAME.fullmatch(source.rstrip("/"))
    return (match["name"], match["revision"]) if match else None


def weight_files(names: Iterable[str]) -> list[str]:
    """Of a repository's or folder's files, those that hold the weights; the safest form where there are several.

    Shards come with their index first. Nothing where there are no weights, or several that nothing tells apart.
    """
    top = sorted(name for name in names if "/" not in name and not NO_WEIGHTS.fullmatch(name))
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}" in top:
            return [f"{stem}.{suffix}"]
        shards = [name for name in top if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)]
        index = f"{stem}.{suffix}.index.json"
        if index in top or shards:
            return [index, *shards]
    for suffixes in ((".safetensors",), (".bin", ".pth", ".pt"), (".npz",)):
        found = [name for name in top if name.endswith(suffixes)]
        if found:
            return found if len(found) == 1 else []
    return []


def fetch(name: str, revision: str | None = None) -> tuple[Path, list[str]]:
    """The folder of a repository's snapshot in the hub's cache, and what there is to say of how it came."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{name}: not a possible name on the hub, whose names are owner/name of letters without accents, digits, "
            "'-', '_' and '.', of 96 characters at most, without '--' and '..' and with neither '-', '.' nor '.git' at "
            "the end; check the spelling"
        ) from None
    if constants.HF_HUB_OFFLINE:
        return _cached(name, revision, "offline mode is on (HF_HUB_OFFLINE)"), []
    try:
        info = HfApi().model_info(name, revision=revision, timeout=WAIT)
        present = [each.rfilename for each in info.siblings or []]
        wanted = [*weight_files(present), *(each for each in BESIDE if each in present)]
        if not weight_files(present):
            _refuse_content(name, present)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted)), []
    except GatedRepoError:
        raise UserError(
            f"{name}: its authors give it only to people who accept their terms. Accept them at "
            f"{constants.ENDPOINT}/{name}, then log in here with `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: has no revision {revision!r}; leave @{revision} out for the latest") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such repository on {constants.ENDPOINT}, or a private one; check the spelling, "
            "or log in with `hf auth login`"
        ) from None
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(f"{name}: {constants.ENDPOINT} refuses the token; renew it with `hf auth login`") from None
        reason = f"{constants.ENDPOINT} answers with an error ({status})"
    except Exception as error:  # the client changed the library that raises its network errors twice
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(f"{name}: cannot be stored in the hub's cache {constants.HF_HUB_CACHE} ({error})") from None
        reason = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return _cached(name, revision, reason), [f"{reason}; the copy in the hub's cache is used"]


def _cached(name: str, revision: str | None, reason: str) -> Path:
    """The snapshot that was downloaded earlier, or advice how to bring the files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:  # with files that we never asked for missing, it still names the folder
        folder = Path(getattr(error, "snapshot_path", None) or "/nowhere")
    if folder.is_dir() and weight_files(each.name for each in folder.iterdir()):
        return folder
    at = f" --revision {revision}" if revision else ""
    target = name.rpartition("/")[2]
    raise UserError(
        f"{name}: {reason}, and it is not in the hub's cache. To bring it, run where there is a network:\n"
        f"  hf download {name}{at} --local-dir {target}\n"
        f"then copy the folder {target} here, and give its path instead of the name"
    )


def _refuse_content(name: str, present: list[str]) -> NoReturn:
    candidates = [each for each in sorted(present) if each.endswith((".safetensors", ".bin", ".pth", ".pt", ".npz"))]
    if candidates:
        shown = ", ".join(candidates[:8])
        raise UserError(
            f"{name}: holds several files of weights ({shown}); download the one you mean "
            f"(`hf download {name} {candidates[0]}`), and give its path"
        )
    foreign = [each for each in present if each.endswith((".h5", ".msgpack", ".onnx", ".gguf"))]
    has = f"only {', '.join(foreign[:4])}" if foreign else "no file of weights"
    raise UserError(f"{name}: holds {has}; .safetensors, .bin, .pth and .npz can be read")
