"""Vectors out and in: .npy and .parquet."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.provenance import METADATA_KEY, Provenance, write_sidecar
from onnxsim_embed.files.texts import require_pyarrow
from onnxsim_embed.files.uris import is_directory

# Bytes before the numbers of a .npy file. numpy leaves room for any number of rows, and so comes to
# the same for every table of vectors.
NPY_HEADER = 128

# Rows of one row group of a parquet file: 25 MB of 384-wide float32.
GROUP_ROWS = 16384

# Number formats that parquet gives back as they were written; all others are read as float32.
KEPT_FORMATS = (np.float16, np.int8, np.uint8)

# What numpy raises for a damaged .npy file, whose header it reads as Python's literals.
NPY_DAMAGE = (OSError, ValueError, EOFError, TypeError, SyntaxError, TokenError, OverflowError,
              MemoryError, RecursionError)  # fmt: skip


def check_ending(path: Path) -> None:
    """Refuse a file that is neither .npy nor .parquet.

    :raises ValueError: naming the endings there are.
    :raises MissingExtraError: for parquet without pyarrow.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{path}: vectors are written as .npy or .parquet")
    if path.suffix == ".parquet":
        require_pyarrow()


def write_vectors(
    vectors: npt.NDArray[Any], path: str | Path, origin: Provenance | None = None
) -> None:
    """Write vectors as .npy, or as .parquet with a column `vector`.

    :param vectors: array (n, dim).
    :param origin: what made them, to be kept with them (see `origins`).
    :raises ValueError: for another ending.
    """
    path = Path(path)
    check_ending(path)
    with atomic_file(path) as work:
        with work.open("wb") as stream:
            if path.suffix == ".npy":
                np.save(stream, vectors, allow_pickle=False)
            else:
                write_parquet(vectors, stream, origin)
        write_sidecar(path, work, origin)


def write_parquet(
    vectors: npt.NDArray[Any], stream: IO[bytes], origin: Provenance | None = None
) -> None:
    """Write vectors, which may be memory-mapped, as parquet in groups of rows.

    :param vectors: array (n, dim).
    :param origin: what made them, for the metadata.
    """
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.list_(pyarrow.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    told = None if origin is None else {METADATA_KEY: json.dumps(origin.to_table()).encode()}
    schema = pyarrow.schema([("vector", kind)], metadata=told)
    with parquet.ParquetWriter(stream, schema) as writer:
        for start in range(0, len(vectors), GROUP_ROWS):
            flat = pyarrow.array(np.ascontiguousarray(vectors[start : start + GROUP_ROWS]).ravel())
            column = pyarrow.FixedSizeListArray.from_arrays(flat, type=kind)
            writer.write_table(pyarrow.table([column], schema=schema))


def npy_header(rows: int, width: int, dtype: np.dtype[Any]) -> bytes:
    """Return the NPY_HEADER bytes that stand before the numbers of a .npy file, as numpy writes them.

    Format 1.0 of https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
    """
    descr = np.lib.format.dtype_to_descr(dtype)
    fields = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", NPY_HEADER - 10)
    return start + fields.ljust(NPY_HEADER - 11).encode("ascii") + b"\n"


def holds_vectors(path: str | Path, column: str | None = None) -> bool:
    """Return whether a file holds vectors rather than texts: .npy, or parquet with a list column.

    So does a directory that `onnxsim_embed.ray` wrote, path or URI.
    """
    if is_directory(path):
        return True
    path = Path(path)
    if path.suffix != ".parquet":
        return path.suffix == ".npy"
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        schema = parquet.read_schema(path)
    except pyarrow.ArrowException as error:
        raise TableError(f"{path} is not a readable parquet file: {error}") from None
    name = column or "vector"
    return name in schema.names and _is_list(schema.field(name).type)


def read_vectors(path: str | Path, column: str | None = None) -> npt.NDArray[Any]:
    """Read vectors from .npy (memory-mapped), from a list column of .parquet, or from a directory of parts.

    :returns: array (n, dim).
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the column is not there, naming those that are.
    :raises TableError: if the file is damaged or does not hold a table of numbers.
    """
    if is_directory(path):
        from onnxsim_embed.files.vector_directory import open_vectors

        return open_vectors(path).read()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".parquet":
        return _read_parquet(path, column or "vector")
    try:
        with path.open("rb") as stream:
            if stream.read(6) != b"\x93NUMPY":
                raise ValueError("it does not begin as one")
        with np.errstate(over="ignore"):  # of a shape beyond all bounds, which numpy then refuses
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_DAMAGE as error:
        raise TableError(f"{path} is not a readable .npy file: {error}") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        shape = getattr(vectors, "shape", "no array")
        raise TableError(
            f"{path} holds {shape} {getattr(vectors, 'dtype', '')}, not vectors of shape (n, dim)"
        )
    return vectors


def _read_parquet(path: Path, column: str) -> npt.NDArray[Any]:
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    where = f"{path}: column {column!r}"
    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise ValueError(
                    f"{path} has no column {column!r}; it has: {', '.join(schema.names)}"
                )
            batches = table.iter_batches(columns=[column])
            blocks = [_as_matrix(batch.column(0), where) for batch in batches]
            if not blocks:
                return _as_matrix(pyarrow.array([], schema.field(column).type), where)
    except pyarrow.ArrowException as error:
        raise TableError(f"{path} is not a readable parquet file: {error}") from None
    if len({block.shape[1] for block in blocks}) > 1:
        raise TableError(f"{where} holds no vectors: their lengths differ")
    return np.concatenate(blocks)


def _is_list(kind: Any) -> bool:  # noqa: ANN401 - pyarrow is untyped
    from pyarrow import types

    return types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)


def _as_matrix(column: Any, where: str) -> npt.NDArray[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Return a pyarrow array of lists as an array (n, dim)."""
    from pyarrow import compute

    if not _is_list(column.type):
        raise TableError(f"{where} holds no vectors: it is of type {column.type}")
    lengths = compute.unique(compute.list_value_length(column)).to_pylist()
    values = column.flatten()
    if column.null_count or values.null_count:
        raise TableError(f"{where} holds no vectors: there are nulls in it")
    if len(lengths) > 1:
        raise TableError(f"{where} holds no vectors: their lengths differ")
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in "fiu":
        raise TableError(f"{where} holds no vectors: it is of type {column.type}")
    dtype = numbers.dtype if numbers.dtype in KEPT_FORMATS else np.dtype(np.float32)
    width = lengths[0] if lengths else getattr(column.type, "list_size", 0)
    return numbers.astype(dtype, copy=False).reshape(len(column), width)
