"""Encode any number of texts into a file of vectors, in bounded memory and resumable."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsim_embed.files.checkpoint import (
    EmbeddingCheckpoint,
    count_rows,
    differing_settings,
    ids_digest,
)
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import EncodeArguments, EncodeOptions
from onnxsim_embed.runtime.provenance import encode_settings, provenance_of
from onnxsim_embed.runtime.report import EncodeReport
from onnxsim_embed.runtime.texts import check_iterable, check_texts, to_utf8

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class EncodeResult:
    """What a call of `encode_to_file` wrote.

    :param dim: values of a row; for binary and ubinary bytes, each of eight dimensions.
    :param rows_found: rows that earlier, interrupted calls had finished.
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
    ids: Sequence[Any] | None = None,
    force: bool = False,
    on_rows: Callable[[int], None] | None = None,
    **arguments: Unpack[EncodeArguments],
) -> EncodeResult:
    """Encode any number of texts into a .npy or .parquet file, or continue an interrupted call.

    Neither all texts nor all vectors are in memory at once. Finished vectors are written to a checkpoint
    beside the file; after a kill, a full disk or an invalid text, the same call with the same texts
    encodes the rest. The file appears when it is complete, with the same bytes as an uninterrupted call
    would have written (on the same kind of processor). To guarantee that, the texts of the finished rows
    are read again and compared; if all rows are finished, nothing is encoded. The provenance of the vectors is written to a sidecar of a .npy file
    (vectors.npy.json), and to the metadata of a .parquet file.

    :param texts: any iterable of texts, from the first one on. If it raises, the vectors of all texts
        before that are kept in the checkpoint, and the exception propagates.
    :param path: vectors.npy or vectors.parquet (column `vector`).
    :param ids: id of each text, int or str, written to the column `id` of a .parquet file; they are read
        after the last text, so that a list may grow with the texts.
    :param force: start over, and replace a file that exists.
    :param on_rows: called with the number of finished rows, once at the start and after each batch.
    :param arguments: `precision`, `ranges` (required for int8 and uint8), `normalize_embeddings`,
        `truncate_dim`, `long_texts` and `stride`; see `Embedder.encode`, also for the prompts.
    :raises FileExistsError: if the file exists and was not written by the same call, naming what differs.
    :raises ValueError: if the checkpoint belongs to a run with other settings or texts, naming what
        differs; for a text that is not valid Unicode, naming the row.
    :raises TypeError: if `texts` is not an iterable of texts, naming the row or what to pass.
    :raises TableError: if another process writes this file, the checkpoint is damaged, or the file cannot
        be written.

    Usage::

        lines = (line.rstrip() for line in open("texts.txt"))
        encode_to_file(model, lines, "vectors.npy")
        vectors = np.load("vectors.npy", mmap_mode="r")
    """
    checkpoint = EmbeddingCheckpoint(Path(path))
    record = checkpoint.check_target(force)
    check_iterable(texts)
    if ids is not None and checkpoint.target.suffix != ".parquet":
        raise ValueError(f"{path} cannot hold ids: pass a .parquet file")
    prompt = embedder.prompt_text(prompt_name, prompt)
    options = EncodeOptions(
        prompt=prompt, batch_size=batch_size, output_value="sentence_embedding", **arguments
    )
    # Raises for invalid dimensions and ranges.
    prefix, output = embedder._prefix_and_output(options)
    empty = np.empty((0, *output.shape), output.dtype)
    report, provenance = EncodeReport(), provenance_of(embedder, options)
    reader = _DigestingReader(texts)
    on_rows = on_rows or (lambda rows: None)
    if record is not None:
        reason = differing_settings(record["origin"], asdict(provenance))
        reason = reason or reader.skip(record["rows"], record.get("texts"), last=True)
        if reason or record.get("ids") != ids_digest(ids):
            raise FileExistsError(
                f"{checkpoint.target} exists, written by another run ({reason or 'its ids differ'}): "
                "replace it with force=True, or choose another name"
            )
        on_rows(rows := record["rows"])
        return EncodeResult(checkpoint.target, rows, empty.shape[1], empty.dtype, rows, report)
    with checkpoint:
        checkpoint.open(encode_settings(embedder, options), empty, force)
        if reason := reader.skip(checkpoint.rows, checkpoint.texts):
            raise ValueError(
                f"{checkpoint.target} has an unfinished run of {count_rows(checkpoint.rows)}, but "
                f"{reason}: continue with the texts of that run, or start over with force=True"
            )
        finished = checkpoint.rows
        batches = embedder._pipeline.stream(
            reader,
            prefix,
            output,
            batch_size=batch_size,
            progress=bool(show_progress_bar),
            progress_start=finished,
            small_first=True,
            report=report,
        )
        with closing(batches):  # cancels waiting batches
            on_rows(finished)
            for batch in batches:
                checkpoint.append(batch, reader.digest(len(batch)))
                on_rows(checkpoint.rows)
        if ids is not None and len(ids) != checkpoint.rows:
            raise ValueError(f"got {len(ids):,} ids for {count_rows(checkpoint.rows)}")
        checkpoint.finish(provenance, ids)
    return EncodeResult(
        checkpoint.target, checkpoint.rows, empty.shape[1], empty.dtype, finished, report
    )


class _DigestingReader:
    """Passes texts to the encoder, which reads ahead, and digests those whose vectors are finished.

    The digest is one of the digests of all texts, so that it does not depend on batches.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._source = iter(texts)
        self._rows = 0
        self._pending: deque[bytes] = deque()
        self._finished = hashlib.sha256()
        self._texts = length_hint(texts)

    def __length_hint__(self) -> int:
        return max(0, self._texts - self._rows)

    def __iter__(self) -> Iterator[str]:
        for text in self._source:
            check_texts([text], self._rows)
            self._pending.append(hashlib.sha256(to_utf8(text, self._rows)).digest())
            self._rows += 1
            yield text

    def digest(self, rows: int) -> str:
        """Return the digest of all texts up to the next rows, which are finished."""
        for _ in range(rows):
            self._finished.update(self._pending.popleft())
        return self._finished.hexdigest()

    def skip(self, rows: int, digest: object, last: bool = False) -> str:
        """Read the texts of finished rows again; return how they differ from those that were encoded.

        :param last: whether there must not be more texts.
        """
        found = sum(1 for _ in islice(self, rows))
        if found < rows:
            return f"there are only {found:,} texts"
        if rows and self.digest(rows) != digest:
            return "its texts differ from these"
        return f"there are more than {rows:,} texts" if last and any(True for _ in self) else ""
