"""Our own Embedder on another device, and its speed beside the CPU provider's, taking turns."""

import json
import statistics
import sys
import time

from onnxsim_embed import Embedder

with open(sys.argv[1], encoding="utf-8") as stream:
    job = json.load(stream)
model = Embedder(job["directory"], device=job["device"])
model.encode(job["texts"]).tofile(job["output"])
cpu = Embedder(job["directory"], device="cpu", precision=model.precision)
ratios = []
for _ in range(5):
    seconds = []
    for embedder in (cpu, model):
        start = time.perf_counter()
        embedder.encode(job["texts"])
        seconds.append(time.perf_counter() - start)
    ratios.append(seconds[0] / seconds[1])
facts = {
    "provider": model.provider,
    "precision": model.precision,
    "ratio": statistics.median(ratios),
}
print(json.dumps(facts))
