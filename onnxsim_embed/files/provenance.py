"""Provenance metadata of vectors: in a file beside a .npy, and in the metadata of a .parquet.

`vectors.npy.json` lies beside `vectors.npy`. It also holds the file's shape, size and a digest of its
two ends, so that it is never applied to another file that replaced it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from onnxsim_embed.files.atomic import write_json

FORMAT_VERSION = 1
METADATA_KEY = b"onnxsim_embed"  # of a parquet file's schema

# A sidecar has about 700 bytes, with a prompt perhaps some thousand.
MAX_SIDECAR_BYTES = 1 << 20

# Bytes at both ends of a file that enter its digest: vectors of other texts or of another model differ
# there, and a file of any size is read in a millisecond.
END_BYTES = 1 << 16


@dataclass(frozen=True)
class Provenance:
    """What vectors depend on, apart from the texts.

    :param model_digest: digest of float32 weights, tokenizer, pooling and postprocessing: the same
        for all precisions of an artifact.
    :param weights_digest: digest of the files of the precision that ran.
    :param pooling: pooling modes, joined by "+".
    :param normalize: whether vectors were scaled to L2 norm 1, by the model or on request.
    :param truncate_dim: dimension that they were truncated to.
    :param dtype: output dtype in the words of `Embedder.encode`.
    :param ranges: digest of the quantization ranges of int8 and uint8.
    :param long_texts: how texts beyond `max_seq_length` were encoded; None if they were truncated.
    """

    model: str
    model_digest: str
    weights_digest: str
    precision: str
    pooling: str
    normalize: bool
    prompt: str | None
    max_seq_length: int
    dim: int
    truncate_dim: int | None
    dtype: str
    ranges: str | None
    provider: str
    onnxsim_embed: str
    onnxruntime: str
    long_texts: str | None = None

    def to_table(self, **others: Any) -> dict[str, Any]:  # noqa: ANN401 - what JSON holds
        """Return its JSON representation, with other entries beside it."""
        origin = asdict(self)
        if self.long_texts is None:  # readable by earlier versions
            del origin["long_texts"]
        return {"format_version": FORMAT_VERSION, "origin": origin, **others}


# The types that JSON may hold for each field.
FIELD_TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Provenance).items()}


def differences(one: Provenance, other: Provenance) -> list[str]:
    """Return why vectors must not be compared with each other; an empty list if they may be.

    Precisions of a model agree, and queries and documents may differ in prompt and length. A model's
    name means nothing: equal digests are equal models.
    """
    names = ("model", "model_digest", "pooling") if one.model_digest != other.model_digest else ()
    different = [
        f"{name.replace('_', ' ')} {getattr(one, name)}, not {getattr(other, name)}"
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]
    dims = [entry.truncate_dim or entry.dim for entry in (one, other)]
    return different + [f"dimension {dims[0]}, not {dims[1]}"] * (dims[0] != dims[1])


def sidecar(path: Path) -> Path:
    """Return the file that holds the provenance of a .npy file."""
    return path.with_name(path.name + ".json")


def check_sidecar(path: Path, force: bool) -> None:
    """Raise if another file has the name of the sidecar to be written."""
    if path.suffix != ".npy" or force or not os.path.lexists(sidecar(path)):
        return
    try:
        read_sidecar(path)
    except (OSError, ValueError, RecursionError):
        raise FileExistsError(
            f"{sidecar(path)} exists and is not the provenance of {path.name}; replace it with "
            "force=True, or choose another name"
        ) from None


def write_sidecar(path: Path, finished: Path, table: Mapping[str, Any] | None) -> None:
    """Write the sidecar of a .npy file that is about to be renamed; without provenance, delete it."""
    if path.suffix == ".npy" and table is not None:
        file = fingerprint(finished, np.load(finished, mmap_mode="r", allow_pickle=False))
        write_json(sidecar(path), {**table, "file": file})
    elif path.suffix == ".npy":
        sidecar(path).unlink(missing_ok=True)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the record of a .npy file: provenance and the fingerprint of the file it was written for."""
    file = sidecar(path)
    if file.is_symlink() and file.resolve().parent != file.parent.resolve():
        raise ValueError(f"{file.name} is a link out of its directory")
    if not file.is_file() or file.stat().st_size > MAX_SIDECAR_BYTES:
        raise ValueError(f"{file.name} is not a regular file of at most {MAX_SIDECAR_BYTES} bytes")
    return parse_record(file.read_bytes())


def parse_record(content: bytes) -> dict[str, Any]:
    """Return a record that holds provenance."""
    table: dict[str, Any] = json.loads(content)
    parse_provenance(table)
    return table


def parse_provenance(table: Any) -> Provenance:  # noqa: ANN401 - from JSON
    """Return provenance from its JSON representation."""
    if not isinstance(table, dict) or table.get("format_version") != FORMAT_VERSION:
        raise ValueError("it is not a provenance record, or one of another version")
    values = table.get("origin")
    if not isinstance(values, dict) or {"long_texts", *values} != set(FIELD_TYPES):
        raise ValueError(f"it must have the fields {', '.join(FIELD_TYPES)}")
    for name, value in values.items():
        if type(value) not in FIELD_TYPES[name]:
            raise ValueError(f"{name} cannot be {value!r:.60}")
    return Provenance(**values)


def fingerprint(path: Path, vectors: npt.NDArray[Any]) -> dict[str, Any]:
    """Return what identifies a .npy file: shape, dtype, size and a digest of its ends."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        ends = stream.read(END_BYTES)
        stream.seek(max(len(ends), size - END_BYTES))
        ends += stream.read(END_BYTES)
    rows, width = vectors.shape
    digest = hashlib.sha256(ends).hexdigest()[:32]
    return {"rows": rows, "width": width, "dtype": str(vectors.dtype), "size": size, "ends": digest}
