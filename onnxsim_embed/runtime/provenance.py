"""What vectors of a loaded model depend on: their provenance, and the settings of an encode run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import Manifest
from onnxsim_embed.files.provenance import Provenance
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import EncodeOptions
from onnxsim_embed.system.onnx_session import RUNTIME_VERSION


def provenance_of(embedder: Embedder, options: EncodeOptions | None = None) -> Provenance:
    """Return the provenance of the vectors that a model makes with some options of `Embedder.encode`."""
    options = options or EncodeOptions()
    manifest = embedder.artifact.manifest
    reference = "fp32" if "fp32" in manifest.precisions else embedder.precision
    model = [_head_digests(manifest), _weight_digests(manifest, reference)]
    kept = options.truncate_dim
    truncated = None if kept is None or kept >= manifest.dim else int(kept)
    return Provenance(
        model=manifest.name,
        model_digest=_digest(model),
        weights_digest=_digest(_weight_digests(manifest, embedder.precision)),
        precision=embedder.precision,
        pooling="+".join(manifest.pooling),
        normalize=bool(options.normalize_embeddings) or (manifest.normalize and truncated is None),
        prompt=embedder.prompt_text(options.prompt_name, options.prompt) or None,
        max_seq_length=int(embedder.max_seq_length),
        dim=manifest.dim,
        truncate_dim=truncated,
        dtype=options.precision,
        ranges=_ranges_digest(options),
        provider=embedder.provider,
        onnxsim_embed=__version__,
        onnxruntime=RUNTIME_VERSION,
        long_texts=_long_texts(options),
    )


def model_settings(embedder: Embedder) -> dict[str, str]:
    """Return the precision, and digests of all files and settings of a model that vectors depend on."""
    manifest = embedder.artifact.manifest
    return {
        "precision": embedder.precision,
        "model": f"{manifest.name} {_digest(_head_digests(manifest))}",
        "weights": _digest(_weight_digests(manifest, embedder.precision)),
    }


def encode_settings(embedder: Embedder, options: EncodeOptions) -> dict[str, Any]:
    """Return all that the vectors in an embedding file depend on, apart from the texts."""
    return {
        **model_settings(embedder),
        "prompt": repr(embedder.prompt_text(options.prompt_name, options.prompt)),
        "max_seq_length": embedder.max_seq_length,
        "dtype": options.precision,
        "ranges": _ranges_digest(options),
        "normalize": bool(options.normalize_embeddings),
        "truncate_dim": options.truncate_dim,
        "long_texts": _long_texts(options),
        "dim": embedder.embedding_dimension,
        "provider": embedder.provider,
        "onnxsim_embed": __version__,
        "onnxruntime": RUNTIME_VERSION,
    }


def _head_digests(manifest: Manifest) -> list[Any]:
    """Return digests and settings of the tokenizer and of the modules after the encoder."""
    files = ["tokenizer.json"]
    for path in manifest.dense:
        files += [f"{path}/config.json", f"{path}/model.safetensors"]
    return [
        [manifest.files[name].sha256 for name in files],
        manifest.pooling,
        manifest.normalize,
        manifest.do_lower_case,
        *([] if manifest.include_prompt else ["the prompt is not pooled"]),
    ]


def _weight_digests(manifest: Manifest, precision: str) -> list[str]:
    """Return the digests of the ONNX files of a precision."""
    entry = manifest.entry(precision)
    names = (entry.encoder, entry.file, *entry.data)
    return [manifest.files[name].sha256 for name in names if name is not None]


def _long_texts(options: EncodeOptions) -> str | None:
    """Return how long texts are encoded, None if they are truncated."""
    return None if options.long_texts == "truncate" else f"mean, stride {options.stride}"


def _ranges_digest(options: EncodeOptions) -> str | None:
    if options.ranges is None:
        return None
    return hashlib.sha256(options.ranges.tobytes()).hexdigest()[:16]  # type: ignore[union-attr]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
