"""Write constraints.txt: the exact versions and hashes of all that `pip install '.[test]'` brings on this platform.

    python scripts/lock.py

Nothing is installed. What builds saccade itself is pinned too, so that an installation needs nothing that is not in
the file. CONTRIBUTING.md says how to install from it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

HEADER = """\
# Made by scripts/lock.py with Python {python} on {system} {machine}; other platforms have other files, hence hashes.
#     pip install --require-hashes -r constraints.txt && pip install --no-deps --no-build-isolation .
"""


def resolve(requirements: list[str]) -> list[dict[str, Any]]:
    """What pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *requirements], cwd=ROOT, check=True)
        return json.loads(report.read_text())["install"]


def pin(item: dict[str, Any]) -> str:
    name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
    return f"{name}=={version} \\\n    --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}\n"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
    wanted = project["build-system"]["requires"] + project["project"]["dependencies"] + extras
    # the project itself: `test` brings the other extras by naming it
    wanted = [requirement for requirement in wanted if not requirement.startswith(project["project"]["name"] + "[")]
    pins = sorted(pin(item) for item in resolve(wanted))
    header = HEADER.format(python=platform.python_version(), system=platform.system(), machine=platform.machine())
    (ROOT / "constraints.txt").write_text(header + "".join(pins))
    print(f"constraints.txt: {len(pins)} packages")


if __name__ == "__main__":
    main()
