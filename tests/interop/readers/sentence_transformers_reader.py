"""sentence-transformers: an artifact by its ONNX files, or a checkpoint by PyTorch."""

import json
import sys

import numpy as np
from sentence_transformers import SentenceTransformer

with open(sys.argv[1], encoding="utf-8") as stream:
    job = json.load(stream)
files = {"file_name": job["file"], "provider": "CPUExecutionProvider"}
model = SentenceTransformer(
    job["directory"],
    backend=job["backend"],
    device="cpu",
    model_kwargs=files if job["backend"] == "onnx" else None,
)
vectors = model.encode(job["texts"], prompt_name=job["prompt_name"], batch_size=7)
np.asarray(vectors, "<f4").tofile(job["output"])
print(
    json.dumps(
        {"max_seq_length": model.max_seq_length, "modules": [type(m).__name__ for m in model]}
    )
)
