"""What made a file of vectors: kept beside a .npy, and in the metadata of a .parquet.

`vectors.npy.json` lies beside `vectors.npy`. It also holds the file's shape, size and a digest of its
two ends, so that it is never taken for the description of another file that came to its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import durable_file
from onnxsim_embed.files.uris import is_directory

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
METADATA_KEY = b"onnxsim_embed"  # of a parquet file's schema
SUFFIX = ".json"

# A description is about 700 bytes long, with a prompt perhaps some thousand.
LARGEST_DESCRIPTION = 1 << 20

# So much of the beginning and of the end of a file goes into its digest: vectors of other texts or of
# another model differ there, and a file of any size is read in a millisecond.
END_BYTES = 1 << 16

TEXT, NUMBER, FLAG, NOTHING = (str,), (int,), (bool,), (type(None),)


@dataclass(frozen=True)
class Provenance:
    """What vectors depend on, apart from the texts.

    :param model: its name.
    :param model_digest: of its float32 weights, tokenizer, pooling and what follows: the same for each
        precision of an artifact.
    :param weights_digest: of the files of the precision that was run.
    :param pooling: modes, joined by "+".
    :param normalize: whether vectors were scaled to L2 norm 1, by the model or on request.
    :param prompt: text put before each text.
    :param max_seq_length: tokens kept of a text.
    :param dim: width of the model's vectors.
    :param truncate_dim: components that were kept of them.
    :param dtype: number format as `Embedder.encode` names it.
    :param ranges: digest of the ranges of int8 and uint8.
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
        """Return it as what JSON holds."""
        return {"format_version": FORMAT_VERSION, "origin": asdict(self)}


KINDS: Mapping[str, tuple[type, ...]] = {
    entry.name: {
        "str": TEXT,
        "int": NUMBER,
        "bool": FLAG,
        "str | None": TEXT + NOTHING,
        "int | None": NUMBER + NOTHING,
    }[str(entry.type)]
    for entry in fields(Provenance)
}


def differences(one: Provenance, other: Provenance) -> list[str]:
    """Say in what two origins differ so that their vectors must not be compared; nothing if they may.

    Precisions of one model may be compared: an export is published only if they agree. So may other
    lengths and prompts, in which queries and documents are meant to differ. A model's name alone means
    nothing: equal digests are equal models.
    """
    told = []
    if one.model_digest != other.model_digest:
        told = [
            f"{name.replace('_', ' ')} {getattr(one, name)}, not {getattr(other, name)}"
            for name in ("model", "model_digest", "pooling")
            if getattr(one, name) != getattr(other, name)
        ]
    widths = [origin.truncate_dim or origin.dim for origin in (one, other)]
    if widths[0] != widths[1]:
        told.append(f"width {widths[0]}, not {widths[1]}")
    return told


def vectors_match(one: Provenance, other: Provenance) -> bool:
    """Return whether vectors of two origins may be compared with each other; see `differences`."""
    return not differences(one, other)


def sidecar(path: Path) -> Path:
    """Return the file that describes a .npy file."""
    return path.with_name(path.name + SUFFIX)


def check_sidecar(path: Path, force: bool) -> None:
    """Refuse to write vectors where a file that is no description of vectors has the sidecar's name.

    :raises FileExistsError: with the next step.
    """
    beside = sidecar(path)
    if path.suffix != ".npy" or force or not os.path.lexists(beside):
        return
    try:
        _parse(_read_small(beside))
    except (OSError, ValueError):
        raise FileExistsError(
            f"{beside} exists, and a description of {path.name} is to be written there; replace it with "
            "--force, or choose another name"
        ) from None


def write_sidecar(path: Path, finished: Path, origin: Provenance | None) -> None:
    """Describe a .npy file that is about to take its place; without an origin, drop the description.

    :param path: where the vectors are to be.
    :param finished: where they are now.
    """
    if path.suffix != ".npy":
        return
    if origin is None:
        if sidecar(path).is_file():
            sidecar(path).unlink()
        return
    vectors = np.load(finished, mmap_mode="r", allow_pickle=False)
    table = origin.to_table() | {"file": _describe(finished, vectors)}
    with durable_file(sidecar(path)) as stream:
        stream.write((json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())


def read_provenance(path: str | Path) -> Provenance | None:
    """Return what made a file of vectors, or None where the file does not say.

    A description that is damaged, or was made for another file, is left aside with a warning.

    :param path: .npy, .parquet or a directory of parts.
    :raises FileNotFoundError: if there is no such file.
    :raises TableError: if it is not a readable file of its kind.
    """
    if is_directory(path):
        from onnxsim_embed.files.vector_directory import open_vectors

        return open_vectors(path).origin
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".parquet":
            found = _read_metadata(path)
            return None if found is None else _parse(found)[0]
        beside = sidecar(path)
        if not os.path.lexists(beside):
            return None
        origin, file = _parse(_read_small(beside))
    except (OSError, ValueError) as error:
        logger.warning("%s: its description is left aside: %s", path, error)
        return None
    from onnxsim_embed.files.vectors import read_vectors

    if file != _describe(path, read_vectors(path)):
        logger.warning(
            "%s describes other vectors than those of %s now, and is left aside", beside, path
        )
        return None
    return origin


def _read_small(path: Path) -> bytes:
    """Read a description; a link is followed only inside its directory.

    :raises ValueError: if it is too large, or elsewhere.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ValueError(f"{path.name} is a link out of its directory")
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    with path.open("rb") as stream:
        data = stream.read(LARGEST_DESCRIPTION + 1)
    if len(data) > LARGEST_DESCRIPTION:
        raise ValueError(f"{path.name} is larger than {LARGEST_DESCRIPTION:,} bytes")
    return data


def _parse(data: bytes) -> tuple[Provenance, Any]:
    """Return what a description says of the vectors, and of their file.

    :raises ValueError: if it is none.
    """
    try:
        table = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return parse_provenance(table), table.get("file")


def parse_provenance(table: Any) -> Provenance:  # noqa: ANN401 - from JSON
    """Return what `Provenance.to_table` gave.

    :raises ValueError: if it is none.
    """
    if not isinstance(table, dict) or table.get("format_version") != FORMAT_VERSION:
        raise ValueError("it is no description of vectors, or one of another version")
    stated = table.get("origin")
    if not isinstance(stated, dict) or set(stated) != set(KINDS):
        raise ValueError("it does not name what a description of vectors names")
    if wrong := [name for name, value in stated.items() if type(value) not in KINDS[name]]:
        raise ValueError(f"{wrong[0]} cannot be {stated[wrong[0]]!r:.60}")
    return Provenance(**stated)


def _read_metadata(path: Path) -> bytes | None:
    from onnxsim_embed.files.texts import require_pyarrow

    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_schema(path).metadata
    except pyarrow.ArrowException as error:
        raise TableError(f"{path} is not a readable parquet file: {error}") from None
    found: bytes | None = (metadata or {}).get(METADATA_KEY)
    return found


def _describe(path: Path, vectors: npt.NDArray[Any]) -> dict[str, Any]:
    """Return what tells a .npy file from another: shape, number format, size and digest of its ends."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        ends = stream.read(END_BYTES)
        stream.seek(max(len(ends), size - END_BYTES))
        ends += stream.read(END_BYTES)
    rows, width = vectors.shape
    digest = hashlib.sha256(ends).hexdigest()[:32]
    return {
        "rows": rows,
        "width": width,
        "dtype": str(vectors.dtype),
        "size": size,
        "ends": digest,
    }
