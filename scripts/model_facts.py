"""Count parameters and FLOPs of every model anew and write them to saccade/facts.json: python -m scripts.model_facts"""

from __future__ import annotations

from saccade.catalog import write_facts

if __name__ == "__main__":
    write_facts()
