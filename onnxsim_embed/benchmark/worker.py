"""One system that encodes texts, measured in a process and an environment of its own.

    PYTHON worker.py NAME SETTINGS < REQUEST > ANSWER

Only the standard library is imported at module level. Settings, request and answer are JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

Encode = Callable[[list[str], int], Any]  # texts, in batches of a size, to an array of unit vectors
System = tuple[Encode, Callable[[int], object]]  # the second sets the maximum tokens of a text
Settings = dict[str, Any]

BATCH_SAMPLE = 64  # texts on which the batch size of a peer is chosen
CALL_TEXTS = 60  # of all calls of one size


def load(name: str, settings: Settings) -> System:
    """Load ours-PRECISION[-ENGINE], torch, st-BACKEND[-VARIANT], fastembed, ctranslate2 or chroma, and encode a first text."""
    family, _, variant = name.partition("-")
    makers = {"ours": ours, "torch": transformers, "st": sentence_transformers, "fastembed": fastembed,
              "ctranslate2": ctranslate2, "chroma": chroma}  # fmt: skip
    encode, limit = makers[family](variant, settings)
    limit(settings["max_seq_length"])
    encode(["a first text"], 1)
    return encode, limit


def measure(encode: Encode, request: dict[str, Any]) -> dict[str, Any]:
    """Time all cases of a request once; see `run` in measure.py."""
    texts, save = request["texts"], import_module("numpy").save

    def seconds(chosen: list[str], batch: int) -> float:
        started = time.perf_counter()
        encode(chosen, batch)
        return time.perf_counter() - started

    sample = texts[:: max(1, len(texts) // BATCH_SAMPLE)]
    batch = min(request["batches"], key=lambda size: min(seconds(sample, size) for _ in range(2)))
    save(f"{request['save']}.npy", encode(texts, batch))  # also warms up
    answer = {"batch": batch, "seconds": seconds(texts, batch), "peak_mb": memory_mb("VmHWM")}
    calls = {size: range(0, max(1, CALL_TEXTS // size)) for size in request["sizes"]}
    answer["calls"] = {
        size: [seconds((texts * 2)[n % len(texts) :][:size], batch) for n in numbers]
        for size, numbers in calls.items()
    }
    if request["pairs"]:
        save(f"{request['save']}-pairs.npy", encode(request["pairs"], batch))
    return answer


def ours(variant: str, settings: Settings) -> System:
    """Return onnxsim-embed, which chooses its own batches and has the model's maximum of tokens."""
    precision, _, engine = variant.partition("-")
    model = import_module("onnxsim_embed").Embedder(
        settings["artifact"],
        precision=precision,
        engine=engine or "auto",
        threads=settings["threads"],
    )

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        return model.encode(texts[0] if len(texts) == 1 else texts, normalize_embeddings=True)

    return encode, lambda tokens: None


def transformers(_: str, settings: Settings) -> System:
    """Return PyTorch through transformers: pooling by hand, batches in order of arrival."""
    torch, library = import_module("torch"), import_module("transformers")
    torch.set_num_threads(settings["threads"])
    tokenizer = library.AutoTokenizer.from_pretrained(settings["checkpoint"])
    model = library.AutoModel.from_pretrained(settings["checkpoint"]).eval()
    if settings["pooling"] not in (["mean"], ["cls"]):
        raise ValueError(f"the torch peer pools by mean or cls, not by {settings['pooling']}")

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        vectors = []
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
                pooled = hidden[:, 0] if settings["pooling"] == ["cls"] else mean
                vectors.append(torch.nn.functional.normalize(pooled, dim=1))
        return torch.cat(vectors).numpy()

    return encode, lambda tokens: setattr(tokenizer, "model_max_length", tokens)


def sentence_transformers(backend: str, settings: Settings) -> System:
    """Return sentence-transformers on PyTorch, or on a file that its own functions exported."""
    library, threads = import_module("sentence_transformers"), settings["threads"]
    import_module("torch").set_num_threads(threads)
    kind, _, variant = backend.partition("-")
    source: str = settings["checkpoint"]
    options: dict[str, Any] = {}
    if kind != "torch":
        source, options["file_name"] = export_by_peer(library, kind, variant, settings)
    if kind == "onnx":
        session = import_module("onnxruntime").SessionOptions()
        session.intra_op_num_threads = threads
        options |= {"session_options": session, "provider": "CPUExecutionProvider"}
    elif kind == "openvino":
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        options["ov_config"] = hints
    model = library.SentenceTransformer(source, device="cpu", backend=kind, model_kwargs=options)

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        return model.encode(
            texts, batch_size=batch, show_progress_bar=False, normalize_embeddings=True
        )

    return encode, lambda tokens: setattr(model, "max_seq_length", tokens)


def export_by_peer(library: Any, kind: str, variant: str, settings: Settings) -> tuple[str, str]:  # noqa: ANN401
    """Export once with sentence-transformers' functions; return the directory and the model file's name."""
    directory, partial = (Path(settings["work"]) / name for name in (kind, f"{kind}.part"))
    if not directory.exists():
        model = library.SentenceTransformer(settings["checkpoint"], device="cpu", backend=kind)
        model.save_pretrained(str(partial))
        partial.rename(directory)
    pattern = {
        "onnx": "model.onnx", "onnx-qint8": "*qint8*.onnx", "onnx-O3": "*O3*.onnx",
        "openvino": "openvino_model.xml", "openvino-static": "*qint8*.xml",
    }[f"{kind}-{variant}".rstrip("-")]  # fmt: skip
    if not list((directory / kind).glob(pattern)):
        model = library.SentenceTransformer(str(directory), device="cpu", backend=kind)
        if variant == "qint8":
            kernels = settings["int8_kernels"]
            library.export_dynamic_quantized_onnx_model(model, kernels, str(directory))
        elif variant == "O3":
            library.export_optimized_onnx_model(model, "O3", str(directory))
        else:
            library.export_static_quantized_openvino_model(
                model, None, str(directory), dataset_name=settings["calibration"],
                dataset_config_name="default", dataset_split="train", column_name="text",
            )  # fmt: skip
    return str(directory), sorted((directory / kind).glob(pattern))[0].name


def fastembed(_: str, settings: Settings) -> System:
    """Return fastembed on the file that sentence-transformers exported, or else on our fp32 file."""
    library, numpy = import_module("fastembed"), import_module("numpy")
    description = import_module("fastembed.common.model_description")
    directory = Path(settings["work"]) / "onnx"
    if not (directory / "onnx/model.onnx").exists():
        directory = settings["artifact"]
    library.TextEmbedding.add_custom_model(
        model="bench/model", normalization=True, dim=settings["dim"], model_file="onnx/model.onnx",
        pooling=getattr(description.PoolingType, settings["pooling"][0].upper()),
        sources=description.ModelSource(hf="bench/model"),
    )  # fmt: skip
    model = library.TextEmbedding(
        "bench/model", specific_model_path=str(directory), threads=settings["threads"]
    )
    return (
        lambda texts, batch: numpy.stack(list(model.embed(texts, batch_size=batch))),
        lambda tokens: model.model.tokenizer.enable_truncation(max_length=tokens),
    )


def ctranslate2(_: str, settings: Settings) -> System:
    """Return CTranslate2 in int8: batches of like lengths, as many callers as threads."""
    library, numpy = import_module("ctranslate2"), import_module("numpy")
    checkpoint, threads = Path(settings["checkpoint"]), settings["threads"]
    directory = Path(settings["work"]) / "ctranslate2"
    if not directory.exists():
        converters = import_module("ctranslate2.converters")
        converters.TransformersConverter(str(checkpoint)).convert(
            str(directory), quantization="int8"
        )
    encoder = library.Encoder(
        str(directory), compute_type="int8", inter_threads=threads, intra_threads=1
    )
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_padding()
    pool = import_module("concurrent.futures").ThreadPoolExecutor(threads)
    if settings["pooling"] not in (["mean"], ["cls"]):
        raise ValueError(f"the ctranslate2 peer pools by mean or cls, not by {settings['pooling']}")

    def run(ids: list[list[int]]) -> Any:  # noqa: ANN401 - an array
        hidden = numpy.array(encoder.forward_batch(ids).last_hidden_state)
        kept = [1 if settings["pooling"] == ["cls"] else len(row) for row in ids]
        pooled = numpy.stack([row[:n].mean(0) for row, n in zip(hidden, kept)])  # noqa: B905
        return pooled / numpy.linalg.norm(pooled, axis=1, keepdims=True)

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        parts = [order[start : start + batch] for start in range(0, len(order), batch)]
        found = numpy.concatenate(
            list(pool.map(run, [[ids[row] for row in part] for part in parts]))
        )
        vectors = numpy.empty_like(found)
        vectors[order] = found
        return vectors

    return encode, lambda tokens: tokenizer.enable_truncation(max_length=tokens)


def chroma(_: str, settings: Settings) -> System:
    """Return Chroma's default, all-MiniLM-L6-v2 from a file of its own, padded to 256 tokens."""
    functions = import_module("chromadb.utils.embedding_functions")
    if settings["dim"] != 384:
        raise ValueError("Chroma's default is all-MiniLM-L6-v2, not the model that is measured")
    function = functions.ONNXMiniLM_L6_V2(preferred_providers=["CPUExecutionProvider"])
    numpy = import_module("numpy")
    return lambda texts, batch: numpy.array(function(texts)), lambda tokens: None


def memory_mb(field: str) -> float:
    """Return a field of /proc/self/status in 1e6 bytes (VmHWM: the peak); 0 without /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith(field)), 0.0)


def main() -> None:
    """Load a system, measure it, and print the answer."""
    del sys.path[0]  # this file's directory, whose modules must not hide others
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard error
    request = json.load(sys.stdin)
    encode, _ = load(sys.argv[1], json.loads(sys.argv[2]))
    ready = time.time()
    versions = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    json.dump({"ready": ready, "versions": versions, **measure(encode, request)}, answers)


if __name__ == "__main__":
    main()
