"""The model inside an actor, how it gets there, and the rows that it encodes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import MANIFEST, Artifact
from onnxsim_embed.artifact.recipes import cache_directory
from onnxsim_embed.errors import ArtifactError, OnnxsimEmbedError, TableError
from onnxsim_embed.files.atomic import atomic_directory
from onnxsim_embed.files.checkpoint import differing_settings
from onnxsim_embed.files.provenance import Provenance
from onnxsim_embed.files.texts import ON_ERROR
from onnxsim_embed.files.vector_directory import RowDiagnostic
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import EncodeOptions
from onnxsim_embed.runtime.provenance import provenance_of
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.hardware import int8_supported
from onnxsim_embed.system.onnx_session import RUNTIME_VERSION

logger = logging.getLogger(__name__)

# Longer texts are reported, although their beginning is encoded: rather a damaged row than a text.
LONG_TEXT = 1_000_000


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
        entry = artifact.manifest.entry(precision)
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
        options: Any = {"precision": self.precision, "device": "cpu", "threads": threads}
        with FileLock(target.with_name(target.name + ".lock")):  # actors of a node load together
            with suppress(ArtifactError):  # there is none, or it is damaged
                return Embedder(Artifact.open(target), **options)
            with atomic_directory(target) as work:
                for name, content in self.files.items():
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    (work / name).write_bytes(content)
            return Embedder(Artifact.open(target), **options)


@dataclass(frozen=True)
class RowOptions:
    """How an actor encodes rows.

    :param encode: options of the encode call.
    :param on_error: what to do with rows without a text: "skip", "blank" or "fail".
    :param int8: whether processors must be those for which int8 is exact (True), or must not be (False),
        as precision="auto" chose for them; None after an explicit choice.
    :param provenance: of the vectors, the same in all actors.
    """

    encode: EncodeOptions
    on_error: str
    int8: bool | None
    provenance: Provenance

    def check_node(self, node: str, facts: NodeFacts) -> None:
        """Raise OnnxsimEmbedError if a node would compute other vectors than the driver."""
        supported, reason, versions = facts
        precision = self.provenance.precision
        if self.int8 is not None and supported != self.int8:
            raise OnnxsimEmbedError(
                f"node {node}: {reason}, but precision='auto' chose {precision} by the processor of this "
                "process: pass precision='fp32', or precision='int8' for vectors that depend on the node"
            )
        ours = {name: getattr(self.provenance, name) for name in versions}
        if differing := differing_settings(ours, versions):
            raise OnnxsimEmbedError(
                f"node {node} has other versions ({differing}): install the same on all nodes"
            )
        if precision == "int8" and not supported:
            logger.warning(
                "node %s: %s: its vectors differ from those of other nodes", node, reason
            )


# Whether int8 is exact on the processor of a node, why, and the versions that vectors depend on.
NodeFacts = tuple[bool, str, dict[str, str]]


def node_facts() -> NodeFacts:
    """Return what vectors of this node depend on."""
    versions = {"onnxsim_embed": __version__, "onnxruntime": RUNTIME_VERSION}
    return (*int8_supported(), versions)


def prepare_model(
    model: str | Embedder,
    precision: str = "auto",
    max_seq_length: int | None = None,
    on_error: str = "skip",
    prompt_name: str | None = None,
    prompt: str | None = None,
    **encode: Any,  # noqa: ANN401
) -> tuple[Embedder, RowOptions]:
    """Return a model that is set up as those of the actors, and the actors' options.

    :param precision: "auto" is that of a loaded model.
    :param encode: other arguments of `EncodeOptions`.
    :raises ValueError: for an invalid argument, or a length or dimension that the model does not have.
    """
    on_error = {"raise": "fail"}.get(on_error, on_error)  # its earlier name
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
    int8: bool | None = None
    if isinstance(model, Embedder):
        artifact = Artifact.open(model.artifact.directory)
        chosen = model.precision if precision == "auto" else precision
        embedder = Embedder(artifact, precision=chosen, device="cpu", threads=1)
        int8 = True if precision == "auto" and chosen == "int8" else None
    else:
        embedder = Embedder.from_pretrained(model, precision=precision, device="cpu", threads=1)
        if precision == "auto" and "int8" in embedder.artifact.manifest.precisions:
            int8 = embedder.precision == "int8"
    if max_seq_length is not None:
        embedder.max_seq_length = max_seq_length
    options = EncodeOptions(prompt=embedder.prompt_text(prompt_name, prompt), **encode)
    embedder.encode_with(options, [])  # raises for invalid dimensions
    return embedder, RowOptions(options, on_error, int8, provenance_of(embedder, options))


class TextEncoder:
    """A model that encodes rows with or without usable texts; the state of an actor.

    :param model: the packed model, or a reference to it in the object store.
    :param threads: batches encoded at the same time.
    """

    def __init__(self, model: Any, options: RowOptions, threads: int) -> None:  # noqa: ANN401
        import ray

        packed: PackedModel = model if isinstance(model, PackedModel) else ray.get(model)
        self._embedder = packed.load(threads)
        self._embedder.max_seq_length = options.provenance.max_seq_length
        self._options = options
        self.provenance = options.provenance
        options.check_node(ray.util.get_node_ip_address(), node_facts())

    def encode(
        self, ids: Sequence[Any], texts: Sequence[str], problems: Mapping[int, str]
    ) -> tuple[list[int], Float32, list[RowDiagnostic]]:
        """Return the numbers of the rows that have a vector, their vectors, and diagnostics of rows.

        :param ids: ids of the rows.
        :param texts: their texts, empty where there is none.
        :param problems: why there is none, by row.
        :raises TableError: with on_error="fail", naming a row without a text.
        """
        diagnostics, encoded = [], []
        for row, (name, text) in enumerate(zip(ids, texts, strict=True)):
            reason, has_vector = problems.get(row, ""), True
            if reason:
                has_vector = self._options.on_error == "blank"
            elif len(text) > LONG_TEXT:
                reason = f"has a text of {len(text):,} characters: its beginning was encoded"
            if row in problems and self._options.on_error == "fail":
                raise TableError(
                    f"row {name!r} {reason}; fix it, or pass on_error='skip' or 'blank'"
                )
            if reason:
                diagnostics.append(RowDiagnostic(name, reason, encoded=has_vector))
            if has_vector:
                encoded.append(row)
        chosen = [texts[row] for row in encoded]
        return encoded, self._embedder.encode_with(self._options.encode, chosen), diagnostics
