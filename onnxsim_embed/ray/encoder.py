"""The model inside an actor, how it gets there, and the rows that it encodes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, is_artifact
from onnxsim_embed.artifact.recipes import cache_directory
from onnxsim_embed.errors import ArtifactError, TableError
from onnxsim_embed.files.atomic import atomic_directory
from onnxsim_embed.files.provenance import Provenance
from onnxsim_embed.files.vector_directory import RowDiagnostic
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import EncodeOptions
from onnxsim_embed.runtime.provenance import provenance_of

Float32 = npt.NDArray[np.float32]

# Longer texts are reported, although their beginning is encoded: rather a damaged row than a text.
LONG_TEXT = 1_000_000

ON_ERROR = ("skip", "raise")


@dataclass(frozen=True)
class PackedModel:
    """The files of one precision of an artifact, by path; each node writes them to its own disk once."""

    name: str
    precision: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, embedder: Embedder) -> PackedModel:
        """Pack the files of a loaded model."""
        artifact, precision = embedder.artifact, embedder.precision
        entry = artifact.manifest.precisions[precision]
        names = [MANIFEST, "tokenizer.json", entry.file, *entry.data]
        names += [] if entry.encoder is None else [entry.encoder]
        for path in artifact.manifest.dense:
            names += [f"{path}/config.json", f"{path}/model.safetensors"]
        files = {name: (artifact.directory / name).read_bytes() for name in names}
        return cls(artifact.manifest.name, precision, files)

    def load(self, threads: int) -> Embedder:
        """Load the model from this node's copy of the files, which is written if there is none.

        :param threads: batches encoded at the same time.
        """
        from filelock import FileLock

        digest = hashlib.sha256(self.files[MANIFEST] + self.precision.encode()).hexdigest()[:16]
        target = cache_directory() / "ray" / f"{self.name.replace('/', '_')}-{digest}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):  # actors of a node load together
            if is_artifact(target):
                try:
                    return Embedder(target, precision=self.precision, device="cpu", threads=threads)
                except ArtifactError:  # damaged
                    shutil.rmtree(target, ignore_errors=True)
            with atomic_directory(target) as work:
                for name, content in self.files.items():
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    (work / name).write_bytes(content)
            return Embedder(target, precision=self.precision, device="cpu", threads=threads)


@dataclass(frozen=True)
class RowOptions:
    """How an actor encodes rows.

    :param encode: options of the encode call.
    :param max_seq_length: tokens after which a text is truncated; None for the model's own limit.
    :param on_error: "skip" leaves out rows without a usable text and reports them; "raise" stops.
    """

    encode: EncodeOptions
    max_seq_length: int | None = None
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            allowed = ", ".join(ON_ERROR)
            raise ValueError(f"on_error must be one of {allowed}, got {self.on_error!r}")

    def apply(self, embedder: Embedder) -> Provenance:
        """Set up a model, and return the provenance of its vectors.

        :raises ValueError: for a length or dimension that the model does not have.
        """
        if self.max_seq_length is not None:
            embedder.max_seq_length = self.max_seq_length
        embedder.encode_with(self.encode, [])
        return provenance_of(embedder, self.encode)


def prepare_model(
    model: str | Embedder,
    precision: str,
    max_seq_length: int | None,
    on_error: str,
    **encode: Any,  # noqa: ANN401
) -> tuple[Embedder, RowOptions, Provenance]:
    """Return a model that is set up as those of the actors, the actors' options, and the provenance.

    :param encode: arguments of `EncodeOptions`.
    """
    if isinstance(model, Embedder):
        artifact = Artifact.open(model.artifact.directory)
        embedder = Embedder(artifact, precision=model.precision, device="cpu", threads=1)
    else:
        embedder = Embedder.from_pretrained(model, precision=precision, device="cpu", threads=1)
    prompt = embedder.prompt_text(encode.pop("prompt_name"), encode.pop("prompt"))
    options = RowOptions(EncodeOptions(prompt=prompt, **encode), max_seq_length, on_error)
    return embedder, options, options.apply(embedder)


class TextEncoder:
    """A model that encodes rows with or without usable texts; the state of an actor.

    :param model: the packed model, or a reference to it in the object store.
    :param threads: batches encoded at the same time.
    """

    def __init__(self, model: Any, options: RowOptions, threads: int) -> None:  # noqa: ANN401
        import ray

        packed: PackedModel = model if isinstance(model, PackedModel) else ray.get(model)
        self._embedder = packed.load(threads)
        self._options = options
        self.provenance = options.apply(self._embedder)

    def encode(
        self, ids: Sequence[Any], values: Sequence[Any]
    ) -> tuple[list[int], Float32, list[RowDiagnostic]]:
        """Return the numbers of the rows that have a vector, their vectors, and diagnostics of rows.

        :param ids: ids of the rows.
        :param values: texts, or what the source holds instead.
        :raises TableError: with on_error="raise", naming a row without a usable text.
        """
        diagnostics, encoded = [], []
        for row, (name, value) in enumerate(zip(ids, values, strict=True)):
            if (problem := _problem(value)) is None:
                encoded.append(row)
                if len(value) > LONG_TEXT:
                    reason = f"a text of {len(value):,} characters: its beginning was encoded"
                    diagnostics.append(RowDiagnostic(name, reason, encoded=True))
            elif self._options.on_error == "raise":
                raise TableError(
                    f"row {name!r} holds {problem}; fill it, drop it, or use on_error='skip'"
                )
            else:
                diagnostics.append(RowDiagnostic(name, problem, encoded=False))
        texts = [values[row] for row in encoded]
        return encoded, self._embedder.encode_with(self._options.encode, texts), diagnostics


def _problem(value: object) -> str | None:
    """Return why a value cannot be encoded; None if it can."""
    if value is None:
        return "no text (null)"
    if not isinstance(value, str):
        return f"no text but {value!r:.60}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"no valid Unicode (character {error.start}: a lone surrogate)"
    return None
