"""Texts of any number -> a file of vectors, in bounded memory; a run that was stopped is continued."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import Manifest
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint, Settings, count_rows
from onnxsim_embed.files.provenance import Provenance
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import (
    RANGED,
    EncodeOptions,
    OutputPrecision,
    check_ranges,
)
from onnxsim_embed.runtime.pipeline import EncodeReport
from onnxsim_embed.runtime.tokenization import check_iterable, check_texts, name_invalid_text
from onnxsim_embed.system.onnx_session import RUNTIME_VERSION

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True)
class EncodeResult:
    """What a job wrote.

    :param path: the file of vectors.
    :param rows: rows of its table.
    :param dim: numbers in a row; bytes, each of eight components, for binary and ubinary.
    :param dtype: number format.
    :param rows_found: rows that earlier runs had done.
    :param report: what this run did.
    """

    path: Path
    rows: int
    dim: int
    dtype: np.dtype[Any]
    rows_found: int
    report: EncodeReport


def encode_to_file(
    embedder: Embedder,
    texts: Iterable[str],
    path: str | Path,
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int | None = None,
    show_progress_bar: bool | None = None,
    precision: OutputPrecision = "float32",
    ranges: npt.ArrayLike | None = None,
    normalize_embeddings: bool | None = None,
    truncate_dim: int | None = None,
    force: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> EncodeResult:
    """Encode texts of any number into a .npy or .parquet file, or go on where an earlier call stopped.

    Neither all texts nor all vectors are ever in memory. Vectors that are done are kept in a hidden
    directory beside the file; after a kill, a full disk or a broken text the same call with the same
    texts does the rest. The file comes into being at the end, whole, with the bytes that a call
    without a stop would have given it (on the same kind of processor). To be sure of that, the texts
    of the kept rows are read again and compared. With it goes what made it (see `origins`): beside a
    .npy as vectors.npy.json, in the metadata of a .parquet.

    :param texts: any iterable of texts, from the first one on. When it raises, the vectors of the
        texts before are kept, and the error passes.
    :param path: vectors.npy or vectors.parquet (column `vector`).
    :param ranges: float32 array (2, dim), smallest and largest value of each component in a
        representative set; needed for int8 and uint8.
    :param force: start over, and replace a file that exists.
    :param on_rows: called with the number of rows that are kept: once when the work begins, and after
        each block. The rest: see `Embedder.encode`.
    :raises FileExistsError: if the file exists.
    :raises ValueError: if the rows kept are those of other settings or texts, naming what differs; for
        a text that is not valid Unicode, naming the row.
    :raises TypeError: naming the row that is not a string.
    :raises TableError: if another process writes this file, what was kept is damaged, or the file
        cannot be written.

    Usage::

        lines = (line.rstrip() for line in open("texts.txt"))
        encode_to_file(model, lines, "vectors.npy")
        vectors = np.load("vectors.npy", mmap_mode="r")
    """
    path = Path(path).absolute()
    checkpoint = EmbeddingCheckpoint(path)
    checkpoint.check_target(force)
    check_format(precision, ranges is not None)
    check_iterable(texts)
    prompt = embedder.prompt_text(prompt_name, prompt)
    limits = None if ranges is None else check_ranges(ranges)
    options = EncodeOptions(
        prompt=prompt,
        batch_size=batch_size,
        precision=precision,
        ranges=limits,
        normalize_embeddings=normalize_embeddings,
        truncate_dim=truncate_dim,
    )
    empty = embedder.encode_with(options, [])  # raises for invalid dimensions
    settings: Settings = {
        **identity(embedder),
        "prompt": repr(prompt),
        "max_seq_length": embedder.max_seq_length,
        "dtype": precision,
        "ranges": None if limits is None else _digest(limits.tobytes()),
        "normalize": bool(normalize_embeddings),
        "truncate_dim": truncate_dim,
        "dim": embedder.embedding_dimension,
        "provider": embedder.provider,
        "onnxsim_embed": __version__,
        "onnxruntime": RUNTIME_VERSION,
    }
    with checkpoint:
        checkpoint.open(settings, empty, force)
        source = iter(texts)
        digest = _read_again(source, checkpoint)
        found = checkpoint.rows
        if on_rows is not None:
            on_rows(found)
        reader = _Reader(source, found)
        report = EncodeReport()
        blocks = embedder.stream_with(
            options,
            reader,
            show_progress_bar=bool(show_progress_bar),
            progress_start=found,
            report=report,
        )
        try:
            for block in blocks:
                digest.update(reader.take(len(block)))
                checkpoint.append(block, digest.hexdigest())
                if on_rows is not None:
                    on_rows(checkpoint.rows)
        finally:
            if isinstance(blocks, Generator):
                blocks.close()  # batches that wait for a thread are not run
        checkpoint.finish(
            provenance_of(
                embedder,
                prompt=prompt,
                normalize=bool(normalize_embeddings),
                truncate_dim=truncate_dim,
                dtype=precision,
                ranges=limits,
            )
        )
        return EncodeResult(path, checkpoint.rows, empty.shape[1], empty.dtype, found, report)


def check_format(precision: str, has_ranges: bool) -> None:
    """Refuse a number format that is unknown, lacks its ranges, or takes none.

    :raises ValueError: saying what is allowed.
    """
    if precision not in get_args(OutputPrecision):
        raise ValueError(
            f"unknown number format {precision!r}; known are {', '.join(get_args(OutputPrecision))}"
        )
    if precision in RANGED and not has_ranges:
        raise ValueError(
            f"{precision} vectors need --ranges: an array (2, dim) of the smallest and largest value of "
            "each component in a representative set of float32 vectors"
        )
    if has_ranges and precision not in RANGED:
        raise ValueError(f"ranges are for {' and '.join(RANGED)}; {precision} takes none")


def provenance_of(
    embedder: Embedder,
    *,
    prompt: str | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    dtype: str = "float32",
    ranges: npt.NDArray[np.float32] | None = None,
) -> Provenance:
    """Describe the vectors that a model makes, to be kept with them or compared with those of a file.

    :param prompt: text put before each text.
    :param normalize: whether vectors are normalized on request; a model may do it anyway.
    :param ranges: float32 array (2, dim), as for `Embedder.encode`. The rest: see there.
    """
    manifest = embedder.artifact.manifest
    precise = "fp32" if "fp32" in manifest.precisions else embedder.precision
    parts = [_head_parts(manifest), _weight_parts(manifest, precise)]
    cut = truncate_dim if truncate_dim and truncate_dim < manifest.dim else None
    return Provenance(
        model=manifest.name,
        model_digest=_digest(json.dumps(parts).encode()),
        weights_digest=_digest(json.dumps(_weight_parts(manifest, embedder.precision)).encode()),
        precision=embedder.precision,
        pooling="+".join(manifest.pooling),
        normalize=normalize or (manifest.normalize and cut is None),
        prompt=prompt or None,
        max_seq_length=int(embedder.max_seq_length),
        dim=manifest.dim,
        truncate_dim=cut,
        dtype=dtype,
        ranges=None if ranges is None else _digest(ranges.tobytes()),
        provider=embedder.provider,
        onnxsim_embed=__version__,
        onnxruntime=RUNTIME_VERSION,
    )


def identity(embedder: Embedder) -> Settings:
    """Return the precision, and digests of every file and setting of the model that vectors depend on."""
    manifest = embedder.artifact.manifest
    weights = _weight_parts(manifest, embedder.precision)
    return {
        "precision": embedder.precision,
        "model": f"{manifest.name} {_digest(json.dumps(_head_parts(manifest)).encode())}",
        "weights": _digest(json.dumps(weights).encode()),
    }


def _head_parts(manifest: Manifest) -> list[Any]:
    """Return digests and settings of the tokenizer and of all that comes after the encoder."""
    files = ["tokenizer.json"]
    for path in manifest.dense:
        files += [f"{path}/config.json", f"{path}/model.safetensors"]
    return [
        [manifest.files[name].sha256 for name in files],
        manifest.pooling,
        manifest.normalize,
        manifest.do_lower_case,
    ]


def _weight_parts(manifest: Manifest, precision: str) -> list[str]:
    """Return the digests of the files of a precision."""
    entry = manifest.precisions[precision]
    names = (entry.encoder, entry.file, *entry.data)
    return [manifest.files[name].sha256 for name in names if name is not None]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _text_digest(text: str, row: int) -> bytes:
    check_texts([text], row)
    try:
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError:
        name_invalid_text([text], row)
        raise


def _read_again(source: Iterator[str], checkpoint: EmbeddingCheckpoint) -> _Hash:
    """Read the texts of the finished rows, and return the digest that is equal to theirs, to be continued.

    It is the digest of the texts' digests, so that it does not depend on batches.

    :raises ValueError: if they are other texts.
    """
    digest = hashlib.sha256()
    rows = 0
    for text in islice(source, checkpoint.rows):
        digest.update(_text_digest(text, rows))
        rows += 1
    if rows == checkpoint.rows and (not rows or digest.hexdigest() == checkpoint.texts):
        return digest
    reason = f"it has {rows:,} texts" if rows < checkpoint.rows else "these texts differ from them"
    raise ValueError(
        f"{checkpoint.target} has an unfinished run of {count_rows(checkpoint.rows)}, but {reason}: finish "
        "with the texts of that run, or start over with force=True"
    )


class _Reader:
    """Hands texts on, which the encoder reads ahead, and keeps each one's digest until its vector is there.

    :param source: texts.
    :param row: number of the first of them in the caller's own count.
    """

    def __init__(self, source: Iterator[str], row: int) -> None:
        self._source = source
        self._row = row
        self._digests: deque[bytes] = deque()

    def __iter__(self) -> Iterator[str]:
        for row, text in enumerate(self._source, self._row):
            self._digests.append(_text_digest(text, row))
            yield text

    def take(self, number: int) -> bytes:
        """Return the digests of the next texts, one after the other."""
        return b"".join(self._digests.popleft() for _ in range(number))
