"""Count parameters and FLOPs of models anew and write them to saccade/facts.json.

python -m scripts.model_facts                      all of them, which takes minutes
python -m scripts.model_facts lstm marian_base     these, and those that the file does not hold yet
"""

from __future__ import annotations

import sys

from saccade.catalog import write_facts

if __name__ == "__main__":
    write_facts(sys.argv[1:])
