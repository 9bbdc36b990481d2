"""Access to parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from onnxsim_embed.errors import TableError, check_packages
from onnxsim_embed.files.uris import local_path


def require_pyarrow() -> None:
    """Raise MissingExtraError if pyarrow is not installed."""
    check_packages("reading and writing parquet", "parquet", {"pyarrow": "pyarrow"})


@contextmanager
def open_parquet(path: str | Path, source: IO[bytes] | None = None) -> Iterator[Any]:
    """Open a parquet file as `pyarrow.parquet.ParquetFile`."""
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    if source is None:
        check_file(path)
    try:
        with parquet.ParquetFile(path if source is None else source) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"{path} is not a readable parquet file: {error}") from None


def check_file(path: str | Path) -> None:
    """Raise if a path is not an existing file of this machine."""
    if not local_path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a directory, not a file")
