"""What is tracked: a licence, a changelog, and nothing that ties the project to one machine or one registry."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 16 * 2**20

# written in parts, so that this file does not hold what it looks for
HOSTS = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js", "npm" + "js.com", "anaconda" + ".org",
         "download." + "pytorch.org", "archive." + "ubuntu.com", "deb." + "debian.org", "crates" + ".io"]  # fmt: skip
HOST = re.compile("|".join(map(re.escape, HOSTS)), re.IGNORECASE)
FOLDERS = ["home", "Users", "root", "work", "tmp", "opt", "mnt", "srv"]
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}/*-])/(?:{'|'.join(FOLDERS)})/\w|\b[A-Z]:\\\\?Users\b|file:/{{2,3}}\w")


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout of the repository")
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode("utf-8")


@pytest.mark.parametrize(("what", "pattern"), [("registry host", HOST), ("path of a machine", MACHINE_PATH)])
def test_no_tracked_file_names(what: str, pattern: re.Pattern[str]) -> None:
    faults = []
    for path in tracked():
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if match := pattern.search(line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: {what} {match.group()!r}")
    assert not faults, "\n" + "\n".join(faults)


def test_patterns_find_what_they_are_for() -> None:
    slash = "/"
    assert HOST.search("https:" + slash * 2 + "files." + HOSTS[1])
    assert MACHINE_PATH.search(f"see {slash}home{slash}someone")
    assert MACHINE_PATH.search(f"'{slash}tmp{slash}x'")
    assert not MACHINE_PATH.search("https://example.org/home/page, ~/projects/x, data/tmp/x and $ROOT/opt/x")


def test_no_large_file() -> None:
    large = [f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes" for path in tracked()]
    assert [line for line in large if int(line.split()[-2]) > LARGEST] == []


def test_licence() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"


def test_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_constraints_pin_and_hash_everything() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins, hashes = lines[::2], lines[1::2]
    assert all(re.fullmatch(r"[a-z0-9.-]+==\S+ \\", line) for line in pins)
    assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}", line) for line in hashes)
    assert len(pins) == len(hashes)
    pinned = {line.partition("==")[0] for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in wanted} - {project["name"]}
    assert names <= pinned, f"{sorted(names - pinned)}: run scripts/lock.py"
