"""One system in a process of its own: loads a model, then answers requests on standard input.

    PYTHON bench/worker.py SYSTEM CHECKPOINT [WORK_DIRECTORY]

Runs in the environment of the system and imports nothing of this project but for `ours-*`. Requests are
lines of JSON: {"texts": [...], "batch": 32, "save": "vectors.npy"}; answers are lines of JSON: seconds of
each call, from list of texts to array of unit vectors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Encode = Callable[[list, int], object]


def ours(precision: str, checkpoint: str, work: Path) -> Encode:
    """onnxsim-embed, from the artifact that `work` names."""
    from onnxsim_embed import Embedder

    model = Embedder.from_pretrained(work, precision=precision)
    # Its batches are its own affair; a lone text goes the way of a query.
    return lambda texts, batch: model.encode(texts[0] if len(texts) == 1 else texts)


def sentence_transformers(backend: str, checkpoint: str, work: Path) -> Encode:
    """sentence-transformers on PyTorch, or on a file that its own functions exported."""
    from sentence_transformers import SentenceTransformer

    if backend == "torch":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = SentenceTransformer(checkpoint, device="cpu")
    else:
        kind, _, variant = backend.partition("-")
        file = _exported(kind, variant, checkpoint, work)
        model = SentenceTransformer(
            str(work / kind), device="cpu", backend=kind, model_kwargs={"file_name": file}
        )
    return lambda texts, batch: model.encode(
        texts, batch_size=batch, show_progress_bar=False, normalize_embeddings=True
    )


def _exported(kind: str, variant: str, checkpoint: str, work: Path) -> str:
    """Export once with sentence-transformers' own functions and documented settings."""
    from sentence_transformers import (
        SentenceTransformer,
        export_dynamic_quantized_onnx_model,
        export_optimized_onnx_model,
        export_static_quantized_openvino_model,
    )

    directory = work / kind
    if not directory.exists():
        SentenceTransformer(checkpoint, device="cpu", backend=kind).save_pretrained(str(directory))
    folder = directory / kind
    if not variant:
        return f"{'model.onnx' if kind == 'onnx' else 'openvino_model.xml'}"
    pattern = {
        "qint8": "*qint8*.onnx",
        "O3": "*O3*.onnx",
        "static": "*qint8*.xml",
    }[variant]
    if not list(folder.glob(pattern)):
        model = SentenceTransformer(str(directory), device="cpu", backend=kind)
        if variant == "qint8":
            export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(directory))
        elif variant == "O3":
            export_optimized_onnx_model(model, "O3", str(directory))
        else:
            export_static_quantized_openvino_model(
                model, None, str(directory), dataset_name=str(work / "calibration"),
                dataset_config_name="default", dataset_split="train", column_name="text",
            )  # fmt: skip
    return sorted(folder.glob(pattern))[0].name


def fastembed(checkpoint: str, work: Path) -> Encode:
    """Fastembed on the fp32 ONNX file that sentence-transformers exported."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    _exported("onnx", "", checkpoint, work)
    name = "bench/minilm"
    TextEmbedding.add_custom_model(
        model=name, pooling=PoolingType.MEAN, normalization=True, dim=384,
        sources=ModelSource(hf=name), model_file="onnx/model.onnx",
    )  # fmt: skip
    model = TextEmbedding(
        name, specific_model_path=str(work / "onnx"), threads=len(os.sched_getaffinity(0))
    )
    import numpy

    return lambda texts, batch: numpy.stack(list(model.embed(texts, batch_size=batch)))


def load(system: str, checkpoint: str, work: Path) -> Encode:
    """Return the function that encodes."""
    family, _, variant = system.partition("-")
    if family == "ours":
        return ours(variant, checkpoint, work)
    if family == "st":
        return sentence_transformers(variant, checkpoint, work)
    return fastembed(checkpoint, work)


def main() -> None:
    """Load, say so, then answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    started = time.perf_counter()
    encode = load(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    encode(["a first text"], 1)
    print(json.dumps({"load": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = []
        for texts in request["calls"]:
            started = time.perf_counter()
            vectors = encode(texts, request["batch"])
            seconds.append(time.perf_counter() - started)
        if request.get("save"):
            import numpy

            numpy.save(request["save"], numpy.asarray(vectors))
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
