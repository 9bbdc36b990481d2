"""Embedder: texts in, embeddings out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.precision import choose_precision
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.options import (
    RANGED,
    EncodeArguments,
    EncodeOptions,
    OutputPrecision,
    OutputValue,
    check_positive,
)
from onnxsim_embed.runtime.pipeline import EncodeReport, Pipeline
from onnxsim_embed.runtime.pooling import load_head
from onnxsim_embed.runtime.postprocess import make_output, quantize_vectors
from onnxsim_embed.runtime.session import Session, first_provider
from onnxsim_embed.runtime.tokenization import Tokenizer, as_list, check_iterable
from onnxsim_embed.system.hardware import CPU_PROVIDER, available_cpus
from onnxsim_embed.system.onnx_session import Device

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Embedder:
    """A sentence-embedding model on ONNX Runtime.

    Any number of threads may share one Embedder. It pickles as its artifact's directory and settings.
    Use `from_pretrained` to create one from a name.

    :param artifact: an artifact directory, or an opened artifact.
    :param precision: weight precision: "fp32", "int8" (CPU), "fp16" (GPU), or "auto" for the fastest
        accurate one on this machine.
    :param device: "auto" (CUDA if onnxruntime offers it, otherwise the CPU), "cpu", "cuda",
        "cuda:N", "openvino" or onnxruntime's own list of providers.
    :param threads: number of batches run concurrently; None for the number of available processors.
    :raises ArtifactError: if the directory is not an artifact or one of its files is damaged.
    :raises ValueError: if the precision or device is not available.

    Usage::

        model = Embedder.from_pretrained("all-MiniLM-L6-v2")
        vectors = model.encode(["a text", "another"])      # float32 (2, 384)
    """

    def __init__(
        self,
        artifact: Artifact | str | Path,
        *,
        precision: str = "auto",
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        check_positive("threads", threads)
        if not isinstance(artifact, Artifact):
            artifact = Artifact.open(Path(artifact))
        self.artifact = artifact
        self.prompts = dict(artifact.manifest.prompts)
        self.default_prompt_name = artifact.manifest.default_prompt_name
        self.head = load_head(artifact)
        self._device = device
        threads = available_cpus() if threads is None else int(threads)
        for tried in (device, "cpu"):
            provider = first_provider(tried)
            self.precision = choose_precision(artifact, precision, provider)
            self._pipeline = self._make_pipeline(tried, provider, threads)
            if device != "auto" or self.provider == provider:
                break
            logger.warning("using the CPU: %s could not be started", provider)

    def _make_pipeline(self, device: Device, provider: str, threads: int) -> Pipeline:
        manifest = self.artifact.manifest

        def checked_file() -> Path:
            encoder = manifest.precisions[self.precision].encoder
            file = self.artifact.open_file(self.precision)  # holds the weights of the encoder too
            return self.artifact.file(encoder) if provider == CPU_PROVIDER and encoder else file

        with ThreadPoolExecutor(1) as checker:  # computes digests while the tokenizer loads
            file = checker.submit(checked_file)
            tokenizer = Tokenizer(
                self.artifact.file("tokenizer.json"),
                manifest.max_seq_length,
                manifest.do_lower_case,
                manifest.pad_token_id,
            )
        return Pipeline(tokenizer, partial(Session, file.result(), device), threads)

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(
            type(self), precision=self.precision, device=self._device, threads=self.threads
        )
        names = ("prompts", "default_prompt_name", "max_seq_length")
        return make, (self.artifact,), (None, {name: getattr(self, name) for name in names})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        precision: str = "auto",
        device: Device = "auto",
        threads: int | None = None,
        pooling: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Embedder:
        """Load a model by recipe name, artifact directory, checkpoint directory or Hub id.

        A checkpoint is exported on first use into the user's cache directory (`ONNXSIM_EMBED_CACHE`
        overrides it), with a log message, and loaded from there afterwards. A Hub id that is in the
        local cache is loaded without the network; pass `revision` for another version of it.

        :param name_or_path: for example "all-MiniLM-L6-v2", "./my-model", "BAAI/bge-base-en-v1.5".
        :param precision: "auto", "fp32", "int8" or "fp16".
        :param device: "auto", "cpu", "cuda", "cuda:N", "openvino" or a list of providers.
        :param threads: number of batches run concurrently; None for that of available processors.
        :param pooling: pooling mode of a checkpoint that specifies none.
        :param revision: revision of a Hub id.
        :param token: access token for the Hub; None for that of the logged-in user, False for none.
        :param local_files_only: whether to load a Hub id from the local cache only.
        :raises CheckpointError: if the model cannot be located or exported.
        :raises ArtifactError: if an artifact is damaged.
        :raises MissingExtraError: if the export needs a package that is not installed.
        """
        from onnxsim_embed.artifact.cache import is_cached, locate_artifact

        locate = partial(
            locate_artifact,
            name_or_path,
            pooling=pooling,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        load = partial(cls, precision=precision, device=device, threads=threads)
        artifact = locate()
        try:
            return load(artifact)
        except ArtifactError:
            if not is_cached(artifact):
                raise
            return load(locate(rebuild=True))

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
        """The execution provider that runs the model."""
        return self._pipeline.session.provider

    @property
    def threads(self) -> int:
        """Number of batches run concurrently."""
        return self._pipeline.threads

    @property
    def last_report(self) -> EncodeReport:
        """Figures of this thread's last encode call, or of any thread's if it has made none."""
        return self._pipeline.last_report

    def settings(self, *, threads: int, token_budget: int) -> AbstractContextManager[None]:
        """Encode with other threads and batches inside the block; not while other threads encode.

        :param threads: number of batches run concurrently.
        :param token_budget: tokens per batch.
        """
        return self._pipeline.settings(threads=threads, token_budget=token_budget)

    def __repr__(self) -> str:
        name = self.artifact.manifest.name
        return (
            f"Embedder({name!r}, precision={self.precision!r}, dim={self.embedding_dimension}, "
            f"provider={self.provider!r}, threads={self.threads})"
        )

    def encode(
        self,
        inputs: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        output_value: OutputValue = "sentence_embedding",
        precision: OutputPrecision = "float32",
        ranges: npt.ArrayLike | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        sentences: str | Iterable[str] | None = None,
    ) -> npt.NDArray[Any]:
        """Return the embeddings of texts.

        The embedding of a text depends neither on the other texts nor on batches and threads (on a
        GPU, where batches are padded, up to rounding).

        :param inputs: one text, or any iterable of texts.
        :param prompt_name: name of one of the model's prompts, prepended to each text.
        :param prompt: string prepended to each text; overrides `prompt_name`.
        :param batch_size: maximum number of texts per model call; None (recommended) fits batches
            to the processor's cache.
        :param show_progress_bar: whether to show a progress bar on standard error.
        :param output_value: "sentence_embedding", or "token_embeddings" for the hidden states of each
            text's tokens.
        :param precision: dtype of the result: float32, float16, int8, uint8, binary or ubinary.
        :param ranges: float32 array (2, dim), minimum and maximum of each dimension, for int8 and
            uint8; None computes them from the result itself.
        :param normalize_embeddings: True scales embeddings to unit L2 norm. None and False leave them
            as the model's own modules return them (many end in a normalization layer).
        :param truncate_dim: truncate embeddings to this dimension, before `normalize_embeddings`.
        :param sentences: former name of `inputs`.
        :returns: array (n, dim), or (dim,) for one text; float32 unless `precision` differs. With
            "token_embeddings" a list of n float32 arrays (tokens, hidden), or one such array.
        :raises TypeError: if the input is not a text or an iterable of texts, naming the row.
        :raises ValueError: for an unknown prompt, an invalid precision, range or dimension.
        """
        texts = sentences if inputs is None else inputs
        if texts is None or (inputs is not None and sentences is not None):
            raise TypeError(
                "encode takes texts either as `inputs` or, under the former name, as `sentences`"
            )
        options = EncodeOptions(
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            output_value=output_value,
            precision=precision,
            ranges=ranges,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
        )
        result: npt.NDArray[Any] = self.encode_with(options, texts, bool(show_progress_bar))
        return result

    def encode_with(
        self, options: EncodeOptions, texts: str | Iterable[str], show_progress_bar: bool = False
    ) -> Any:  # noqa: ANN401 - an array or a list of arrays
        """Return what `encode` returns for these options."""
        single, rows = isinstance(texts, str), as_list(texts)
        own_ranges = options.precision in RANGED and options.ranges is None
        computed = replace(options, precision="float32") if own_ranges else options
        output = make_output(self.head, self.embedding_dimension, computed)
        prefix = self.prompt_text(options.prompt_name, options.prompt)
        if single and not own_ranges:
            return self._pipeline.run_one(rows[0], prefix, output)
        result = np.empty((len(rows), *output.shape), output.dtype)
        done = 0
        for window in self._pipeline.stream(
            rows, prefix, output, batch_size=options.batch_size, progress=show_progress_bar
        ):
            result[done : done + len(window)] = window
            done += len(window)
        if own_ranges:
            result = quantize_vectors(result, options.precision)
        if single:
            return result[0]
        return list(result) if options.output_value == "token_embeddings" else result

    def encode_query(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        **arguments: Unpack[EncodeArguments],
    ) -> npt.NDArray[Any]:
        """Encode search queries: `encode` with the model's "query" prompt, if it has one."""
        if prompt_name is None and prompt is None:
            prompt = self.query_prompt()
        return self.encode(inputs, prompt_name, prompt, batch_size, show_progress_bar, **arguments)

    def encode_document(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        **arguments: Unpack[EncodeArguments],
    ) -> npt.NDArray[Any]:
        """Encode documents: `encode` with the model's "document", "passage" or "corpus" prompt."""
        if prompt_name is None and prompt is None:
            prompt = self.document_prompt()
        return self.encode(inputs, prompt_name, prompt, batch_size, show_progress_bar, **arguments)

    def encode_stream(
        self,
        inputs: Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        progress_start: int = 0,
        **arguments: Unpack[EncodeArguments],
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield the embeddings of an iterable of any length, in order, with bounded memory.

        Each array is new and holds 4,096 rows, the last one the rest. Texts are read up to two arrays
        ahead. If the iterable raises, the embeddings of all texts before that are yielded first.

        :param inputs: any iterable of texts.
        :param progress_start: number of texts that the progress bar counts as done before. For the
            other arguments see `encode`; int8 and uint8 need `ranges`.
        :returns: arrays (n, dim); together one row for each text.
        """
        options = EncodeOptions(
            prompt_name=prompt_name, prompt=prompt, batch_size=batch_size, **arguments
        )
        return self.stream_with(
            options,
            inputs,
            show_progress_bar=bool(show_progress_bar),
            progress_start=progress_start,
        )

    def stream_with(
        self,
        options: EncodeOptions,
        texts: Iterable[str],
        *,
        show_progress_bar: bool = False,
        progress_start: int = 0,
        report: EncodeReport | None = None,
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield what `encode_stream` yields for these options, and fill the report of the call."""
        check_iterable(texts)
        return self._pipeline.stream(
            texts,
            self.prompt_text(options.prompt_name, options.prompt),
            make_output(self.head, self.embedding_dimension, options),
            batch_size=options.batch_size,
            progress=show_progress_bar,
            progress_start=progress_start,
            report=report,
        )

    def token_ids(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Return each text's token ids as the model sees them: truncated, with special tokens.

        :returns: int64 arrays (tokens,), one per text.
        """
        check_iterable(texts)
        tokens = self._pipeline.tokenizer(texts)
        return np.split(tokens.ids, tokens.offsets[1:-1]) if len(texts) else []

    def similarity(self, left: npt.ArrayLike, right: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the score of each left and each right embedding by the model's own measure.

        :param left: (n, dim) or (dim,).
        :param right: (m, dim) or (dim,).
        :returns: float32 array (n, m).
        """
        from onnxsim_embed.similarity.compare import score_all

        return score_all(left, right, self.artifact.manifest.similarity_fn_name)

    def similarity_pairwise(
        self, left: npt.ArrayLike, right: npt.ArrayLike
    ) -> npt.NDArray[np.float32]:
        """Return the score of each left embedding and the right embedding of the same row.

        :param left: (n, dim).
        :param right: (n, dim).
        :returns: float32 array (n,).
        """
        from onnxsim_embed.similarity.compare import score_pairs

        return score_pairs(left, right, self.artifact.manifest.similarity_fn_name)

    def prompt_text(self, prompt_name: str | None = None, prompt: str | None = None) -> str:
        """Return the string that `encode` prepends to each text.

        :raises ValueError: if the model has no prompt of that name, listing its prompts.
        """
        if prompt is not None:
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            known = sorted(self.prompts) or "none"
            raise ValueError(f"prompt_name {name!r} is not among the model's prompts: {known}")
        return self.prompts[name]

    def query_prompt(self) -> str:
        """Return the string that `encode_query` prepends: the "query" prompt, or an empty one."""
        return self.prompts.get("query", "")

    def document_prompt(self) -> str:
        """Return the string that `encode_document` prepends: the first document prompt, or an empty one."""
        return next((self.prompts[name] for name in DOCUMENT_PROMPTS if name in self.prompts), "")
