"""Read and write vectors as .npy and .parquet."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.parquet import check_file, open_parquet, require_pyarrow
from onnxsim_embed.files.provenance import (
    METADATA_KEY,
    Provenance,
    fingerprint,
    parse_provenance,
    parse_record,
    read_sidecar,
    sidecar,
    write_sidecar,
)
from onnxsim_embed.files.uris import is_directory, local_path
from onnxsim_embed.files.vector_directory import open_vectors

logger = logging.getLogger(__name__)

# Bytes of the header of a .npy file. numpy leaves room for any number of rows, so that the size is
# the same for every array (n, dim).
NPY_HEADER = 128

# Rows of a parquet row group: 25 MB of float32 vectors of dimension 384.
GROUP_ROWS = 16384

# Dtypes that are read from parquet as they were written; all others are read as float32.
PARQUET_DTYPES = (np.float16, np.int8, np.uint8)


def check_ending(path: Path) -> None:
    """Raise ValueError if a file is neither .npy nor .parquet, MissingExtraError without pyarrow."""
    if path.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{path}: vectors are written as .npy or .parquet")
    if path.suffix == ".parquet":
        require_pyarrow()


def write_vectors(
    vectors: npt.NDArray[Any], path: str | Path, provenance: Provenance | None = None
) -> None:
    """Write vectors (n, dim) as .npy, or as .parquet with a column `vector`, and their provenance.

    :raises ValueError: for another ending.
    """
    path = local_path(path)
    check_ending(path)
    table = None if provenance is None else provenance.to_table()
    with atomic_file(path) as work:
        with work.open("wb") as stream:
            if path.suffix == ".npy":
                np.save(stream, vectors, allow_pickle=False)
            else:
                write_parquet(vectors, stream, table)
        write_sidecar(path, work, table)


def write_parquet(
    vectors: npt.NDArray[Any],
    stream: IO[bytes],
    table: Mapping[str, Any] | None,
    ids: Sequence[Any] | None = None,
) -> None:
    """Write vectors, which may be memory-mapped, and the record of their provenance as parquet.

    :param ids: written to the column `id`: int, or str if not all are.
    """
    import pyarrow
    from pyarrow import parquet

    list_type = pyarrow.list_(pyarrow.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    metadata = None if table is None else {METADATA_KEY: json.dumps(table)}
    fields = [("vector", list_type)]
    if ids is not None:
        numbers = all(type(value) is int for value in ids)
        names = pyarrow.array(ids if numbers else map(str, ids), "int64" if numbers else "string")
        fields.insert(0, ("id", names.type))
    schema = pyarrow.schema(fields, metadata=metadata)
    with parquet.ParquetWriter(stream, schema) as writer:
        for start in range(0, len(vectors), GROUP_ROWS):
            flat = np.ascontiguousarray(vectors[start : start + GROUP_ROWS]).ravel()
            columns = [pyarrow.FixedSizeListArray.from_arrays(flat, type=list_type)]
            if ids is not None:
                columns.insert(0, names.slice(start, GROUP_ROWS))
            writer.write_table(pyarrow.table(columns, schema=schema))


def npy_header(rows: int, dim: int, dtype: np.dtype[Any]) -> bytes:
    """Return the header of a .npy file, NPY_HEADER bytes."""
    descr = np.lib.format.dtype_to_descr(dtype)
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": (rows, dim)}
    )
    return stream.getvalue()


def holds_vectors(path: str | Path, column: str | None = None) -> bool:
    """Return whether a file holds vectors rather than texts: .npy, or parquet with a list column."""
    if is_directory(path):
        return True
    if Path(path).suffix != ".parquet":
        return Path(path).suffix == ".npy"
    with open_parquet(path) as table:
        schema, name = table.schema_arrow, column or "vector"
        return name in schema.names and _is_list(schema.field(name).type)


def read_vectors(path: str | Path, column: str | None = None) -> npt.NDArray[Any]:
    """Read vectors from .npy (memory-mapped), a list column of .parquet, or a directory of shards.

    :returns: array (n, dim).
    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: if the column does not exist, naming those that do.
    :raises TableError: if the file is damaged or does not hold vectors.
    """
    if is_directory(path):
        return open_vectors(path).read()
    path = Path(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, column or "vector")
    check_file(path)
    try:
        with path.open("rb") as stream:
            if stream.read(6) != b"\x93NUMPY":
                raise ValueError("magic bytes missing")
        with np.errstate(over="ignore"):  # for an absurd shape, which numpy rejects afterwards
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of any type: numpy parses the header as Python literals
        raise TableError(f"{path} is not a readable .npy file: {error}") from None
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise TableError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}, not vectors of shape (n, dim)"
        )
    return vectors


def read_ids(path: str | Path, column: str | None = None) -> list[Any] | None:
    """Return the ids of vectors: a column of .parquet, or those of a directory of shards.

    :param column: its name; None for `id`, if there is one.
    :returns: an id for each vector, or None if they have none.
    :raises ValueError: if the column does not exist.
    """
    if is_directory(path):
        return open_vectors(path).ids()
    names: list[str] = []
    if Path(path).suffix == ".parquet":
        with open_parquet(path) as table:
            names, name = table.schema_arrow.names, column or "id"
            if name in names:
                return list(table.read([name]).column(0).to_pylist())
    if column is not None:
        known = ", ".join(names) or "none"
        raise ValueError(f"{path} has no column {column!r}; it has: {known}")
    return None


def read_provenance(path: str | Path) -> Provenance | None:
    """Return the provenance of vectors, or None if the file has none.

    Provenance that is damaged, or was written for another file, is ignored with a warning.

    :param path: .npy, .parquet or a directory of shards.
    :raises FileNotFoundError: if the file does not exist.
    :raises TableError: if it is not a readable file of its kind.
    """
    if is_directory(path):
        return open_vectors(path).provenance
    table = read_record(Path(path))
    return None if table is None else parse_provenance(table)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record that holds the provenance of a file; see `read_provenance`."""
    try:
        if path.suffix == ".parquet":
            with open_parquet(path) as table:
                metadata = (table.schema_arrow.metadata or {}).get(METADATA_KEY)
            return metadata and parse_record(metadata)
        vectors = read_vectors(path)
        if not os.path.lexists(sidecar(path)):
            return None
        record = read_sidecar(path)
        if record.get("file") != fingerprint(path, vectors):
            raise ValueError(f"{sidecar(path)} describes other vectors")
        return record
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: its provenance is ignored: %s", path, error)
        return None


def _read_parquet(path: Path, column: str) -> npt.NDArray[Any]:
    with open_parquet(path) as table:
        schema = table.schema_arrow
        if column not in schema.names:
            raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(schema.names)}")
        columns = [batch.column(0) for batch in table.iter_batches(columns=[column])]
        columns = columns or [schema.empty_table().column(column).combine_chunks()]
        arrays = [_as_matrix(array, f"{path}: column {column!r}") for array in columns]
    if len({array.shape[1] for array in arrays}) > 1:
        raise TableError(f"{path}: column {column!r} does not hold vectors: lengths differ")
    return np.concatenate(arrays)


def _is_list(arrow_type: Any) -> bool:  # noqa: ANN401 - pyarrow is untyped
    import pyarrow

    lists = (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType)
    return isinstance(arrow_type, lists)


def _as_matrix(column: Any, name: str) -> npt.NDArray[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Return a pyarrow array of lists as an array (n, dim)."""
    from pyarrow import compute

    problem = f"its type is {column.type}"
    if _is_list(column.type):
        lengths = compute.unique(compute.list_value_length(column)).to_pylist()
        values = column.flatten()
        if column.null_count or values.null_count:
            problem = "it has nulls"
        elif len(lengths) > 1:
            problem = "lengths differ"
        elif (numbers := values.to_numpy(zero_copy_only=False)).dtype.kind in "fiu":
            dtype = numbers.dtype if numbers.dtype in PARQUET_DTYPES else np.dtype(np.float32)
            dim = lengths[0] if lengths else getattr(column.type, "list_size", 0)
            return numbers.astype(dtype, copy=False).reshape(len(column), dim)
    raise TableError(f"{name} does not hold vectors: {problem}")
