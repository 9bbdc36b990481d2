"""Texts to unit vectors, by ours and by others; see `worker`. Imports nothing that its system does not need.

Settings: `artifact` (ours), `checkpoint` (theirs), `work` (where peers' own exports are kept), `threads`,
`pooling`, `dim`. A request has `calls`, lists of texts that are encoded one after the other, `batch`
(theirs; our batches are our own affair), `tokens`, how many of a text are kept at most, and perhaps
`save`, a file for the vectors of the last call.
The clock runs from a list of texts to an array of unit vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Encode = Callable[[list[str], int], Any]
Limit = Callable[[int], object]
System = tuple[Encode, Limit, Callable[[], Any]]
Settings = dict[str, Any]


def load(name: str, settings: Settings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load a system and let it encode a first text.

    :param name: ours-int8, ours-fp32, ours-dynamic, torch, st-torch, st-onnx[-O3|-qint8],
        st-openvino[-static] or fastembed.
    """
    family, _, variant = name.partition("-")
    makers = {"ours": ours, "torch": transformers, "st": sentence_transformers}
    encode, limit, report = makers.get(family, fastembed)(variant, settings)
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


def nothing() -> None:
    """Report no stages."""


def ours(precision: str, settings: Settings) -> System:
    """Return onnxsim-embed; "dynamic" puts onnxruntime's dynamic int8 of their export into our run path."""
    embedder = import_module("onnxsim_embed.runtime.embedder")
    dynamic = precision == "dynamic"
    model = embedder.Embedder(
        settings["artifact"],
        precision="int8" if dynamic else precision,
        threads=settings["threads"],
    )
    if dynamic:
        session = import_module("onnxsim_embed.runtime.session").Session
        model._pipeline.session = session(dynamic_file(Path(settings["work"])), "cpu")

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
        raise FileNotFoundError(f"{source} is not there: st-onnx exports it; add it to the systems")
    if not file.exists():
        quantization = import_module("onnxruntime.quantization")
        part, kind = file.with_suffix(".part.onnx"), quantization.QuantType.QInt8
        quantization.quantize_dynamic(source, part, weight_type=kind, per_channel=True)
        part.rename(file)
    return file


def transformers(_: str, settings: Settings) -> System:
    """Return PyTorch through transformers, with pooling by hand and batches in order of arrival."""
    torch, library = import_module("torch"), import_module("transformers")
    torch.set_num_threads(settings["threads"])
    tokenizer = library.AutoTokenizer.from_pretrained(settings["checkpoint"])
    model = library.AutoModel.from_pretrained(settings["checkpoint"]).eval()
    pooling, longest = settings["pooling"], [int(settings["max_seq_length"])]
    if pooling not in (["mean"], ["cls"]):
        raise ValueError(f"pooling by hand is written for mean and cls, not for {pooling}")

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        vectors = []
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            inputs = tokenizer(
                part, padding=True, truncation=True, max_length=longest[0], return_tensors="pt"
            )
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state
                if pooling == ["cls"]:
                    pooled = hidden[:, 0]
                else:
                    mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
                    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
                vectors.append(torch.nn.functional.normalize(pooled, dim=1))
        return torch.cat(vectors).numpy()

    def limit(tokens: int) -> None:
        longest[0] = tokens

    return encode, limit, nothing


def sentence_transformers(backend: str, settings: Settings) -> System:
    """Return sentence-transformers on PyTorch, or on a file that its own functions exported."""
    library, threads = import_module("sentence_transformers"), settings["threads"]
    import_module("torch").set_num_threads(threads)
    kind, _, variant = backend.partition("-")
    if kind == "torch":
        model = library.SentenceTransformer(settings["checkpoint"], device="cpu")
    else:
        options: dict[str, Any] = {"file_name": export_by_peer(library, kind, variant, settings)}
        if kind == "onnx":
            session = import_module("onnxruntime").SessionOptions()
            session.intra_op_num_threads = threads
            options |= {"session_options": session, "provider": "CPUExecutionProvider"}
        else:
            options["ov_config"] = {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
            }
        directory = str(Path(settings["work"]) / kind)
        model = library.SentenceTransformer(
            directory, device="cpu", backend=kind, model_kwargs=options
        )

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        return model.encode(
            texts, batch_size=batch, show_progress_bar=False, normalize_embeddings=True
        )

    def limit(tokens: int) -> None:
        model.max_seq_length = tokens

    return encode, limit, nothing


def export_by_peer(library: Any, kind: str, variant: str, settings: Settings) -> str:  # noqa: ANN401
    """Export once with sentence-transformers' own functions and documented settings; return the file."""
    work = Path(settings["work"])
    directory, checkpoint = work / kind, settings["checkpoint"]
    if not directory.exists():
        part = work / f"{kind}.part"
        model = library.SentenceTransformer(checkpoint, device="cpu", backend=kind)
        model.save_pretrained(str(part))
        part.rename(directory)
    if not variant:
        return "model.onnx" if kind == "onnx" else "openvino_model.xml"
    pattern = {"qint8": "*qint8*.onnx", "O3": "*O3*.onnx", "static": "*qint8*.xml"}[variant]
    if not list((directory / kind).glob(pattern)):
        model = library.SentenceTransformer(str(directory), device="cpu", backend=kind)
        if variant == "qint8":
            kernels = settings["int8_kernels"]
            library.export_dynamic_quantized_onnx_model(model, kernels, str(directory))
        elif variant == "O3":
            library.export_optimized_onnx_model(model, "O3", str(directory))
        else:
            library.export_static_quantized_openvino_model(
                model, None, str(directory), dataset_name=str(work / "calibration"),
                dataset_config_name="default", dataset_split="train", column_name="text",
            )  # fmt: skip
    return sorted((directory / kind).glob(pattern))[0].name


def fastembed(_: str, settings: Settings) -> System:
    """Return fastembed on the file that sentence-transformers exported, or else on our fp32 file."""
    library = import_module("fastembed")
    description = import_module("fastembed.common.model_description")
    numpy = import_module("numpy")
    work = Path(settings["work"])
    directory = work / "onnx" if (work / "onnx/onnx/model.onnx").exists() else settings["artifact"]
    pooling = getattr(description.PoolingType, settings["pooling"][0].upper())
    library.TextEmbedding.add_custom_model(
        model="bench/model", pooling=pooling, normalization=True, dim=settings["dim"],
        sources=description.ModelSource(hf="bench/model"), model_file="onnx/model.onnx",
    )  # fmt: skip
    model = library.TextEmbedding(
        "bench/model", specific_model_path=str(directory), threads=settings["threads"]
    )

    def encode(texts: list[str], batch: int) -> Any:  # noqa: ANN401 - an array
        return numpy.stack(list(model.embed(texts, batch_size=batch)))

    def limit(tokens: int) -> None:
        # By itself it takes the lower of two lengths in tokenizer_config.json: less work than others do.
        model.model.tokenizer.enable_truncation(max_length=tokens)

    return encode, limit, nothing
