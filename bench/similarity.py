"""All-pairs similarity alone, on vectors of your own: ours and every peer that is there.

    python bench/similarity.py VECTORS.npy [--peer-python PYTHON] [--large 200000] [--out DIRECTORY]

The same as `bench/run.py --only similarity --peers all --vectors VECTORS.npy`; takes its other options.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    vectors, rest = sys.argv[1], sys.argv[2:]
    sys.argv[1:] = ["--only", "similarity", "--peers", "all", "--vectors", vectors, *rest]
    runpy.run_path(str(Path(__file__).with_name("run.py")), run_name="__main__")
