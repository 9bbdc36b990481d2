"""Texts to unit vectors, by ours and by others; see `worker`. Imports nothing that its system does not need.

The systems are those of `onnxsim-embed bench`. Beside them: the stages of our run path, more tokens than
a model is set to, and "dynamic", onnxruntime's dynamic int8 of sentence-transformers' export in our run path.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def load(name: str, settings: Settings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load a system and let it encode a first text.

    :param name: as in `onnxsim-embed bench`, or ours-dynamic.
    :param settings: as there, and `systems`, the file that defines them.
    :returns: a function of requests with `calls` (lists of texts), `batch`, `tokens` (most of a text), and
        perhaps `save`, a file for the vectors of the last call.
    """
    if name.startswith("ours"):
        encode, limit, report = ours(name.partition("-")[2], settings)
    else:
        encode, limit = runpy.run_path(settings["systems"])["load"](name, settings)
        report = lambda: None  # noqa: E731
    encode(["a first text"], 1)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        seconds, stages, vectors = [], [], None
        limit(request["tokens"])
        for texts in request["calls"]:
            started = time.perf_counter()
            vectors = encode(texts, request["batch"])
            seconds.append(time.perf_counter() - started)
            stages.append(report())
        if request.get("save"):
            numpy = import_module("numpy")
            numpy.save(request["save"], numpy.asarray(vectors, numpy.float32))
        return {"seconds": seconds, "stages": stages}

    return answer


def ours(variant: str, settings: Settings) -> tuple[Any, Any, Any]:
    """Return how to encode, how to set the most tokens of a text, and how to report the stages."""
    embedder = import_module("onnxsim_embed.runtime.embedder")
    precision, _, engine = variant.partition("-")
    dynamic = precision == "dynamic"
    model = embedder.Embedder(
        settings["artifact"],
        precision="int8" if dynamic else precision,
        engine=engine or "auto",
        threads=settings["threads"],
    )
    if dynamic:
        session = import_module("onnxsim_embed.runtime.session").Session
        model._pipeline.engine = session(dynamic_file(Path(settings["work"])), "cpu")

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        # A lone text goes the way of a query.
        return model.encode(texts[0] if len(texts) == 1 else texts, normalize_embeddings=True)

    def limit(tokens: int) -> None:
        # The model itself takes lower values alone; its positions go further.
        model._pipeline.tokenizer.max_seq_length = tokens

    def report() -> dict[str, float]:
        last = model.last_report
        run, pool = last.seconds_run / last.threads, last.seconds_pool / last.threads
        if last.texts == 1:
            run, pool = last.seconds_run, last.seconds_pool
        return {"tokenize": last.seconds_tokenize, "run": run, "pool": pool, "all": last.seconds}

    return encode, limit, report


def dynamic_file(work: Path) -> Path:
    """Return the ONNX file that sentence-transformers exports, quantized once by `quantize_dynamic`.

    :raises FileNotFoundError: if no st-onnx system ran before.
    """
    source, file = work / "onnx/onnx/model.onnx", work / "onnx/onnx/model_dynamic.onnx"
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: st-onnx exports it; add it to the systems")
    if not file.exists():
        quantization = import_module("onnxruntime.quantization")
        part, kind = file.with_suffix(".part.onnx"), quantization.QuantType.QInt8
        quantization.quantize_dynamic(source, part, weight_type=kind, per_channel=True)
        part.rename(file)
    return file
