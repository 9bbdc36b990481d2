"""Provenance metadata of vectors: in a file beside a .npy, and in the metadata of a .parquet.

`vectors.npy.json` lies beside `vectors.npy`. It also holds the file's shape, size and a digest of its
two ends, so that it is never applied to another file that replaced it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from onnxsim_embed.files.atomic import write_json
from onnxsim_embed.files.parquet import open_parquet
from onnxsim_embed.files.uris import is_directory, local_path

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
METADATA_KEY = b"onnxsim_embed"  # of a parquet file's schema
SUFFIX = ".json"

# A sidecar has about 700 bytes, with a prompt perhaps some thousand.
MAX_SIDECAR_BYTES = 1 << 20

# Bytes at the beginning and at the end of a file that enter its digest: vectors of other texts or of
# another model differ there, and a file of any size is read in a millisecond.
END_BYTES = 1 << 16


@dataclass(frozen=True)
class Provenance:
    """What vectors depend on, apart from the texts.

    :param model: name of the model.
    :param model_digest: digest of float32 weights, tokenizer, pooling and postprocessing: the same
        for all precisions of an artifact.
    :param weights_digest: digest of the files of the precision that ran.
    :param pooling: pooling modes, joined by "+".
    :param normalize: whether vectors were scaled to L2 norm 1, by the model or on request.
    :param prompt: text put before each text.
    :param max_seq_length: tokens kept of a text.
    :param dim: dimension of the model's vectors.
    :param truncate_dim: dimension that they were truncated to.
    :param dtype: output dtype in the words of `Embedder.encode`.
    :param ranges: digest of the quantization ranges of int8 and uint8.
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

    def to_table(self) -> dict[str, Any]:
        """Return its JSON representation."""
        return {"format_version": FORMAT_VERSION, "origin": asdict(self)}


# The types that JSON may hold for each field.
FIELD_TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Provenance).items()}


def differences(one: Provenance, other: Provenance) -> list[str]:
    """Return why vectors must not be compared with each other; an empty list if they may be.

    Precisions of one model may be compared: an export is published only if they agree. So may other
    lengths and prompts, in which queries and documents are meant to differ. A model's name means
    nothing: equal digests are equal models.
    """
    different = []
    if one.model_digest != other.model_digest:
        different = [
            f"{name.replace('_', ' ')} {getattr(one, name)}, not {getattr(other, name)}"
            for name in ("model", "model_digest", "pooling")
            if getattr(one, name) != getattr(other, name)
        ]
    dims = [entry.truncate_dim or entry.dim for entry in (one, other)]
    if dims[0] != dims[1]:
        different.append(f"dimension {dims[0]}, not {dims[1]}")
    return different


def vectors_match(one: Provenance, other: Provenance) -> bool:
    """Return whether vectors may be compared with each other; see `differences`."""
    return not differences(one, other)


def sidecar(path: Path) -> Path:
    """Return the file that holds the provenance of a .npy file."""
    return path.with_name(path.name + SUFFIX)


def check_sidecar(path: Path, force: bool) -> None:
    """Raise if another file has the name of the sidecar to be written.

    :raises FileExistsError: if it is not a sidecar, unless `force` is set.
    """
    file = sidecar(path)
    if path.suffix != ".npy" or force or not os.path.lexists(file):
        return
    try:
        _parse(_read_sidecar(file))
    except (OSError, ValueError):
        raise FileExistsError(
            f"{file} exists and is not the provenance of {path.name}; replace it with force=True, or "
            "choose another name"
        ) from None


def write_sidecar(path: Path, finished: Path, provenance: Provenance | None) -> None:
    """Write the sidecar of a .npy file that is about to be renamed; without provenance, delete it.

    :param path: final path of the vectors.
    :param finished: their path now.
    """
    if path.suffix != ".npy":
        return
    if provenance is None:
        if sidecar(path).is_file():
            sidecar(path).unlink()
        return
    vectors = np.load(finished, mmap_mode="r", allow_pickle=False)
    write_json(sidecar(path), provenance.to_table() | {"file": _fingerprint(finished, vectors)})


def read_provenance(path: str | Path) -> Provenance | None:
    """Return the provenance of vectors, or None if the file has none.

    Provenance that is damaged, or was written for another file, is ignored with a warning.

    :param path: .npy, .parquet or a directory of shards.
    :raises FileNotFoundError: if the file does not exist.
    :raises TableError: if it is not a readable file of its kind.
    """
    if is_directory(path):
        from onnxsim_embed.files.vector_directory import open_vectors

        return open_vectors(path).provenance
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    file = sidecar(path)
    try:
        if path.suffix == ".parquet":
            metadata = _read_metadata(path)
            return None if metadata is None else _parse(metadata)[0]
        if not os.path.lexists(file):
            return None
        provenance, fingerprint = _parse(_read_sidecar(file))
    except (OSError, ValueError) as error:
        logger.warning("%s: its provenance is ignored: %s", path, error)
        return None
    from onnxsim_embed.files.vectors import read_vectors

    if fingerprint != _fingerprint(path, read_vectors(path)):
        logger.warning("%s is ignored: it describes other vectors than those of %s", file, path)
        return None
    return provenance


def _read_sidecar(path: Path) -> bytes:
    """Read a sidecar; a link is followed inside its directory only.

    :raises ValueError: if it is too large, elsewhere or not a file.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ValueError(f"{path.name} is a link out of its directory")
    if not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as stream:
        data = stream.read(MAX_SIDECAR_BYTES + 1)
    if len(data) > MAX_SIDECAR_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_SIDECAR_BYTES:,} bytes")
    return data


def _parse(data: bytes) -> tuple[Provenance, Any]:
    """Return provenance and the fingerprint of the file that it was written for.

    :raises ValueError: if the data are invalid.
    """
    try:
        table = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return parse_provenance(table), table.get("file")


def parse_provenance(table: Any) -> Provenance:  # noqa: ANN401 - from JSON
    """Return provenance from its JSON representation.

    :raises ValueError: if it is invalid.
    """
    if not isinstance(table, dict) or table.get("format_version") != FORMAT_VERSION:
        raise ValueError("it is not a provenance record, or one of another version")
    values = table.get("origin")
    if not isinstance(values, dict) or set(values) != set(FIELD_TYPES):
        raise ValueError(f"it must have the fields {', '.join(FIELD_TYPES)}")
    for name, value in values.items():
        if type(value) not in FIELD_TYPES[name]:
            raise ValueError(f"{name} cannot be {value!r:.60}")
    return Provenance(**values)


def _read_metadata(path: Path) -> bytes | None:
    with open_parquet(path) as table:
        metadata: dict[bytes, bytes] = table.schema_arrow.metadata or {}
    return metadata.get(METADATA_KEY)


def _fingerprint(path: Path, vectors: npt.NDArray[Any]) -> dict[str, Any]:
    """Return what identifies a .npy file: shape, dtype, size and a digest of its ends."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        ends = stream.read(END_BYTES)
        stream.seek(max(len(ends), size - END_BYTES))
        ends += stream.read(END_BYTES)
    return {
        "rows": vectors.shape[0],
        "width": vectors.shape[1],
        "dtype": str(vectors.dtype),
        "size": size,
        "ends": hashlib.sha256(ends).hexdigest()[:32],
    }
