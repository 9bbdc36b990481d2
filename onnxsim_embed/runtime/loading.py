"""From a name to a running model: its artifact, precision, provider, tokenizer and session."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import Artifact, is_artifact
from onnxsim_embed.artifact.precision import choose_precision
from onnxsim_embed.artifact.recipes import cache_directory
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.batching import GPU_CALLERS
from onnxsim_embed.runtime.cuda import CudaSession
from onnxsim_embed.runtime.engine import Engine
from onnxsim_embed.runtime.options import LoadArguments, check_positive
from onnxsim_embed.runtime.pipeline import Pipeline
from onnxsim_embed.runtime.pooling import Head, load_head
from onnxsim_embed.runtime.prompts import Prompted
from onnxsim_embed.runtime.report import EncodeReport
from onnxsim_embed.runtime.session import Session, first_provider
from onnxsim_embed.runtime.texts import check_iterable
from onnxsim_embed.runtime.tokenization import Tokenizer
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import CPU_PROVIDER, CUDA_PROVIDER, available_cpus
from onnxsim_embed.system.onnx_session import Device

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

logger = logging.getLogger(__name__)

ENGINES = ("auto", "onnxruntime", "openvino")


class LoadedModel(Prompted):
    """A model that runs: its artifact, the modules after its encoder, its weight precision.

    For arguments and errors see `Embedder`. A damaged artifact in the cache is exported again.
    """

    def __init__(
        self,
        artifact: Artifact | str | Path,
        *,
        precision: str = "auto",
        device: Device = "auto",
        engine: str = "auto",
        threads: int | None = None,
        pooling: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        check_positive("threads", threads)
        self._device, self._engine = device, engine
        if isinstance(artifact, Artifact):
            self._load(artifact, precision, threads)
            return
        from onnxsim_embed.artifact.cache import is_cached, locate_artifact

        locate = partial(
            locate_artifact, artifact, pooling=pooling, revision=revision, token=token,
            local_files_only=local_files_only,
        )  # fmt: skip
        located = locate()
        try:
            self._load(located, precision, threads)
        except ArtifactError:
            if not is_cached(located):
                raise
            self._load(locate(rebuild=True), precision, threads)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **arguments: Unpack[LoadArguments]) -> Self:
        """Return `Embedder(name_or_path, ...)`, with its arguments."""
        return cls(name_or_path, **arguments)

    def _load(self, artifact: Artifact, precision: str, threads: int | None) -> None:
        """Load an artifact on the device, or on the CPU if that is "auto" and CUDA does not start."""
        openvino = uses_openvino(self._engine, precision, self._device)
        self.artifact, self.head = artifact, load_head(artifact)
        self.prompts = dict(artifact.manifest.prompts)
        self.default_prompt_name = artifact.manifest.default_prompt_name
        for tried in ("cpu",) if openvino else (self._device, "cpu"):
            provider = first_provider(tried)
            self.precision = choose_precision(artifact, precision, provider)
            self._pipeline = _make_pipeline(
                artifact, self.head, self.precision, tried, threads, openvino
            )
            if openvino or self._device != "auto" or self.provider == provider:
                break
            logger.warning("using the CPU: %s could not be started", provider)

    def __reduce__(self) -> tuple[Any, ...]:
        artifact = replace(self.artifact, directory=self.artifact.directory.absolute())
        settings = {
            "precision": self.precision,
            "device": self._device,
            "engine": self._engine,
            "threads": self.threads,
        }
        names = ("prompts", "default_prompt_name", "max_seq_length")
        state = {name: getattr(self, name) for name in names}
        return load_pickled, (type(self), artifact, settings), (None, state)

    @property
    def embedding_dimension(self) -> int:
        """Dimension of an embedding."""
        return self.artifact.manifest.dim

    @property
    def matryoshka_dims(self) -> tuple[int, ...]:
        """Values of `truncate_dim` that the model was trained for, largest first; empty if unknown."""
        return self.artifact.manifest.matryoshka_dims

    def get_embedding_dimension(self) -> int:
        """Return the dimension of an embedding (sentence-transformers' name)."""
        return self.embedding_dimension

    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens per text, special tokens included; may be set lower."""
        return self._pipeline.tokenizer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        check_positive("max_seq_length", value)
        longest = self.artifact.manifest.max_seq_length
        if value > longest:
            raise ValueError(f"max_seq_length of this model is at most {longest}, got {value}")
        self._pipeline.tokenizer.max_seq_length = value

    @property
    def provider(self) -> str:
        """The execution provider of ONNX Runtime that runs the model, or "OpenVINO" and its version."""
        return self._pipeline.engine.provider

    @property
    def threads(self) -> int:
        """Number of batches run concurrently."""
        return self._pipeline.threads

    @property
    def last_report(self) -> EncodeReport:
        """Figures of this thread's last encode call, or of any thread's if it has made none."""
        return self._pipeline.last_report

    def settings(self, *, threads: int, token_budget: int) -> AbstractContextManager[None]:
        """Encode with other threads and tokens per batch inside the block; not while other threads encode."""
        return self._pipeline.settings(threads=threads, token_budget=token_budget)

    def __repr__(self) -> str:
        name = self.artifact.manifest.name
        return (
            f"{type(self).__name__}({name!r}, precision={self.precision!r}, dim={self.embedding_dimension}, "
            f"provider={self.provider!r}, threads={self.threads})"
        )

    def token_ids(self, texts: Sequence[str]) -> list[Int64]:
        """Return each text's token ids as the model sees them: truncated, with special tokens.

        :returns: int64 arrays (tokens,), one per text.
        """
        check_iterable(texts)
        tokens = self._pipeline.tokenizer(texts)
        return np.split(tokens.ids, tokens.offsets[1:-1]) if len(texts) else []

    @property
    def truncation_direction(self) -> str:
        """Side on which long texts are truncated: "right" or "left"."""
        return self._pipeline.tokenizer.direction

    def similarity(self, left: npt.ArrayLike, right: npt.ArrayLike) -> Float32:
        """Return the scores (n, m) of n left and m right embeddings by the model's own measure."""
        from onnxsim_embed.similarity.compare import score_all

        return score_all(left, right, self.artifact.manifest.similarity_fn_name)

    def similarity_pairwise(self, left: npt.ArrayLike, right: npt.ArrayLike) -> Float32:
        """Return the scores (n,) of n left embeddings and the right ones of the same rows."""
        from onnxsim_embed.similarity.compare import score_pairs

        return score_pairs(left, right, self.artifact.manifest.similarity_fn_name)


def _make_pipeline(
    artifact: Artifact,
    head: Head,
    precision: str,
    device: Device,
    threads: int | None,
    openvino: bool,
) -> Pipeline:
    manifest = artifact.manifest
    provider = first_provider(device)

    def checked_file() -> Path:
        encoder = manifest.entry(precision).encoder
        file = artifact.open_file(precision)  # holds the weights of the encoder too
        ours = provider == CPU_PROVIDER or (provider == CUDA_PROVIDER and precision == "fp16")
        return artifact.file(encoder) if ours and encoder and not openvino else file

    with ThreadPoolExecutor(1) as checker:  # computes digests while the tokenizer loads
        file = checker.submit(checked_file)
        tokenizer = Tokenizer(
            artifact.file("tokenizer.json"),
            manifest.max_seq_length,
            manifest.do_lower_case,
            manifest.pad_token_id,
        )
    on_gpu = provider == CUDA_PROVIDER
    if threads is None:
        threads = GPU_CALLERS if on_gpu else available_cpus()
    make_engine: Callable[[int], Engine]
    if on_gpu:
        make_engine = partial(CudaSession, file.result(), device, head=head)
    elif not openvino:
        make_engine = partial(Session, file.result(), device)
    else:
        from onnxsim_embed.runtime.openvino_engine import OpenVINOEngine

        # Other versions of this package may read the same file in other ways.
        digests = [__version__, *(entry.sha256 for entry in manifest.files.values())]
        key = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        cache = cache_directory() / "openvino" / key
        make_engine = partial(
            OpenVINOEngine, file.result(), manifest.max_seq_length, cache, precision, threads
        )
    return Pipeline(tokenizer, make_engine, threads)


def uses_openvino(engine: str, precision: str, device: Device) -> bool:
    """Return whether OpenVINO runs a model; "auto" chooses it for bf16, and ONNX Runtime otherwise.

    :raises ValueError: for an unknown engine, or a precision or device that it does not have.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; allowed are {', '.join(ENGINES)}")
    if engine == "onnxruntime" and precision == "bf16":
        raise ValueError("precision 'bf16' runs on OpenVINO: use engine='openvino' or 'auto'")
    chosen = engine == "openvino" or precision == "bf16"
    if chosen and device not in ("auto", "cpu"):
        raise ValueError(f"OpenVINO runs on the CPU here, got device {device!r}: use device='cpu'")
    return chosen


def load_pickled(kind: Callable[..., Any], artifact: Artifact, settings: dict[str, Any]) -> Any:  # noqa: ANN401
    """Load the model of a pickle, which holds the path of its artifact, not the weights."""
    if not is_artifact(artifact.directory):
        raise ArtifactError(
            f"a pickled Embedder holds the path of its model, {artifact.directory}, where there is "
            "none now: load the model from where it is, and pickle it again"
        )
    return kind(artifact, **settings)
