"""Lets the tests of this folder say `from small_translators import ...`."""

from __future__ import annotations

import sys
from pathlib import Path

if (here := str(Path(__file__).parent)) not in sys.path:
    sys.path.insert(0, here)
