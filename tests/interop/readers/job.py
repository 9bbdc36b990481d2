"""The job of a reader: argv[1] names its file; vectors go to a file, facts to standard output."""

import json
import sys
from pathlib import Path

import numpy as np

job = json.loads(Path(sys.argv[1]).read_text("utf-8"))


def finish(vectors, **facts):
    np.asarray(vectors, "<f4").tofile(job["output"])
    print(json.dumps(facts))
