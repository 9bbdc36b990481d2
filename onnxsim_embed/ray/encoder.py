"""The actor that holds one model, and how the model gets to it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.cache import cache_directory
from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, is_artifact
from onnxsim_embed.errors import ArtifactError, TableError
from onnxsim_embed.files.atomic import atomic_directory
from onnxsim_embed.files.provenance import Provenance
from onnxsim_embed.files.vector_directory import RowDiagnostic
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.encode_to_file import provenance_of

Float32 = npt.NDArray[np.float32]

# Longer texts are encoded (their beginning is), and named: more likely a damaged row than a text.
LONG_TEXT = 1_000_000

ON_ERROR = ("skip", "raise")


@dataclass(frozen=True)
class PackedModel:
    """The files of an artifact that one precision needs; an actor anywhere puts them on its own disk, once.

    :param files: their bytes by path.
    """

    name: str
    precision: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, artifact: Artifact, precision: str) -> PackedModel:
        """Pack a precision of an artifact."""
        manifest = artifact.manifest
        entry = manifest.precisions[precision]
        names = [MANIFEST, "tokenizer.json", entry.file, *entry.data]
        names += [] if entry.encoder is None else [entry.encoder]
        for path in manifest.dense:
            names += [f"{path}/config.json", f"{path}/model.safetensors"]
        files = {name: (artifact.directory / name).read_bytes() for name in names}
        return cls(manifest.name, precision, files)

    def load(self, threads: int) -> Embedder:
        """Load the model from this machine's copy of the files, which is made where there is none.

        :param threads: batches encoded at the same time.
        """
        from filelock import FileLock

        digest = hashlib.sha256(self.files[MANIFEST] + self.precision.encode()).hexdigest()[:16]
        target = cache_directory() / "ray" / f"{self.name.replace('/', '_')}-{digest}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):  # a node's actors load at one time
            for _ in range(2):
                if not is_artifact(target):
                    self._unpack(target)
                try:
                    return Embedder(target, precision=self.precision, device="cpu", threads=threads)
                except ArtifactError:
                    shutil.rmtree(target, ignore_errors=True)
        raise ArtifactError(
            f"{target} is damaged again right after it was written: is the disk full?"
        )

    def _unpack(self, target: Path) -> None:
        with atomic_directory(target) as work:
            for name, data in self.files.items():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).write_bytes(data)


@dataclass(frozen=True)
class EncodeOptions:
    """How texts are encoded; see `Embedder.encode`.

    :param max_seq_length: tokens kept of a text; None for the model's own.
    :param on_error: "skip" leaves rows without a usable text out and reports them; "raise" stops.
    """

    prompt: str | None = None
    max_seq_length: int | None = None
    normalize_embeddings: bool | None = None
    truncate_dim: int | None = None
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(
                f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}"
            )

    def apply(self, embedder: Embedder) -> Provenance:
        """Set up a model, and describe its vectors.

        :raises ValueError: for a length or width that the model does not have.
        """
        if self.max_seq_length is not None:
            embedder.max_seq_length = self.max_seq_length
        self.encode(embedder, [])
        return provenance_of(
            embedder,
            prompt=self.prompt,
            normalize=bool(self.normalize_embeddings),
            truncate_dim=self.truncate_dim,
        )

    def encode(self, embedder: Embedder, texts: Sequence[str]) -> Float32:
        """Return the vectors of texts, float32 (n, dim)."""
        return embedder.encode(
            texts,
            prompt=self.prompt or "",
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )


class TextEncoder:
    """A model that takes rows as they come, with or without usable texts.

    :param model: the model's files, or a reference to them in the object store.
    :param threads: batches encoded at the same time.
    """

    def __init__(self, model: Any, options: EncodeOptions, threads: int) -> None:  # noqa: ANN401
        import ray

        packed: PackedModel = model if isinstance(model, PackedModel) else ray.get(model)
        self._embedder = packed.load(threads)
        self._options = options
        self.origin = options.apply(self._embedder)

    def encode(
        self, ids: Sequence[Any], values: Sequence[Any]
    ) -> tuple[list[int], Float32, list[RowDiagnostic]]:
        """Return the places of the rows that have a vector, their vectors, and what there is to say of rows.

        :param ids: names of the rows.
        :param values: texts, or whatever is in their place.
        :raises TableError: if a row has no usable text, naming it, and the options say so.
        """
        remarks = []
        places = []
        for place, (name, value) in enumerate(zip(ids, values, strict=True)):
            problem = _problem(value)
            if problem is None:
                places.append(place)
                if len(value) > LONG_TEXT:
                    told = (
                        f"a text of {len(value):,} characters, of which the beginning was encoded"
                    )
                    remarks.append(RowDiagnostic(name, told, encoded=True))
            elif self._options.on_error == "raise":
                raise TableError(
                    f"row {name!r} holds {problem}; fill it or drop it, or let it be skipped"
                )
            else:
                remarks.append(RowDiagnostic(name, problem, encoded=False))
        vectors = self._options.encode(self._embedder, [values[place] for place in places])
        return places, vectors, remarks


def _problem(value: object) -> str | None:
    """Say why a row cannot be encoded; None where it can."""
    if value is None:
        return "no text (null)"
    if not isinstance(value, str):
        return f"no text but {value!r:.60}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"no valid Unicode (character {error.start}: a lone surrogate)"
    return None
