"""Embedder: texts in, vectors out. Wires the run path together; holds no maths of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from numbers import Integral
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

    Any number of threads may call one Embedder at once. Use `from_pretrained` to make one from a name.

    :param artifact: an artifact directory, or an opened one.
    :param precision: "fp32", "int8" (CPU), "fp16" (GPU) or "auto": the one of these that is fastest
        here.
    :param device: "auto" (CUDA where onnxruntime offers it, else the CPU), "cpu", "cuda", "cuda:N",
        "openvino" or onnxruntime's own list of providers.
    :param threads: batches run at the same time; None for the processors this process may use.
    :raises ArtifactError: if the directory is no artifact or a file of it is damaged.
    :raises ValueError: if the precision or device is not there.

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
        if not isinstance(artifact, Artifact):
            artifact = Artifact.open(Path(artifact))
        check_positive("threads", threads)
        self.artifact = artifact
        self.prompts = dict(artifact.manifest.prompts)
        self.default_prompt_name = artifact.manifest.default_prompt_name
        self._longest = artifact.manifest.max_seq_length
        self.head = load_head(artifact)
        callers = available_cpus() if threads is None else int(threads)
        provider = first_provider(device)
        self.precision = choose_precision(artifact, precision, provider)
        self._pipeline = self._make_pipeline(device, provider, callers)
        if device == "auto" and self.provider != provider:
            logger.warning("using the CPU: %s could not be started", provider)
            self.precision = choose_precision(artifact, precision, CPU_PROVIDER)
            self._pipeline = self._make_pipeline("cpu", CPU_PROVIDER, callers)

    def _make_pipeline(self, device: Device, provider: str, threads: int) -> Pipeline:
        manifest = self.artifact.manifest
        with ThreadPoolExecutor(1) as checker:  # digests are computed while the tokenizer loads
            file = checker.submit(self._model_file, provider)
            tokenizer = Tokenizer(
                self.artifact.file("tokenizer.json"),
                manifest.max_seq_length,
                manifest.do_lower_case,
                manifest.pad_token_id,
            )
        return Pipeline(tokenizer, partial(Session, file.result(), device), threads)

    def _model_file(self, provider: str) -> Path:
        encoder = self.artifact.manifest.precisions[self.precision].encoder
        file = self.artifact.open_file(self.precision)  # holds the weights of the encoder too
        if provider == CPU_PROVIDER and encoder is not None:
            file = self.artifact.file(encoder)
        return file

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

        A checkpoint is exported once, into the user's cache directory (`ONNXSIM_EMBED_CACHE`
        overrides it), and loaded from there afterwards; the log says so.

        :param name_or_path: for example "all-MiniLM-L6-v2", "./my-model", "BAAI/bge-base-en-v1.5".
        :param precision: "auto", "fp32", "int8" or "fp16".
        :param device: "auto", "cpu", "cuda", "cuda:N", "openvino" or a list of providers.
        :param threads: batches run at the same time; None for the processors this process may use.
        :param pooling: pooling mode of a checkpoint that states none.
        :param revision: revision of a Hub id.
        :param token: access token for the Hub; None for the one that is logged in, False for none.
        :param local_files_only: take a Hub id from the local cache, without the network.
        :raises CheckpointError: if the model cannot be found or exported.
        :raises ArtifactError: if an artifact is damaged.
        :raises MissingExtraError: if exporting needs a package that is not installed.
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
        make = partial(cls, precision=precision, device=device, threads=threads)
        artifact = locate()
        try:
            return make(artifact)
        except ArtifactError:
            if not is_cached(artifact):
                raise
            return make(locate(rebuild=True))

    @property
    def embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.artifact.manifest.dim

    @property
    def matryoshka_dims(self) -> tuple[int, ...]:
        """Widths for `truncate_dim` that the model was trained for, widest first; none where not known."""
        return self.artifact.manifest.matryoshka_dims

    def get_embedding_dimension(self) -> int:
        """Return the width of a vector (sentence-transformers' name)."""
        return self.embedding_dimension

    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a text, special tokens included; may be set lower."""
        return self._pipeline.tokenizer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if isinstance(value, Integral) and value > self._longest:
            raise ValueError(
                f"max_seq_length can be at most {self._longest} for this model, got {value}"
            )
        self._pipeline.tokenizer.max_seq_length = value

    @property
    def provider(self) -> str:
        """The execution provider that runs the model."""
        return self._pipeline.session.provider

    @property
    def threads(self) -> int:
        """Batches run at the same time."""
        return self._pipeline.threads

    @property
    def last_report(self) -> EncodeReport:
        """What the last call of `encode` or `encode_stream` did."""
        return self._pipeline.last_report

    def settings(self, *, threads: int, token_budget: int) -> AbstractContextManager[None]:
        """Encode with other threads and batches for a while; not while other threads encode.

        :param threads: batches run at the same time.
        :param token_budget: tokens in a batch.
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
        if (inputs is None) == (sentences is None):
            raise TypeError(
                "encode takes texts either as `inputs` or, under the former name, as `sentences`"
            )
        texts = inputs if inputs is not None else sentences
        assert texts is not None
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
        return self.encode_with(options, texts, show_progress_bar=bool(show_progress_bar))

    def encode_with(
        self,
        options: EncodeOptions,
        texts: str | Iterable[str],
        *,
        show_progress_bar: bool = False,
        report: EncodeReport | None = None,
    ) -> Any:  # noqa: ANN401 - an array or a list of arrays
        """Return what `encode` returns for these options.

        :param report: filled with the figures of this call; None creates one.
        """
        single, rows = isinstance(texts, str), as_list(texts)
        own_ranges = options.precision in RANGED and options.ranges is None
        computed = replace(options, precision="float32") if own_ranges else options
        output = make_output(self.head, self.embedding_dimension, computed)
        prefix = self.prompt_text(options.prompt_name, options.prompt)
        if single and not own_ranges:
            return self._pipeline.run_one(rows[0], prefix, output, report)
        result = np.empty((len(rows), *output.shape), output.dtype)
        for _ in self._pipeline.stream(
            rows,
            prefix,
            output,
            batch_size=options.batch_size,
            progress=show_progress_bar,
            into=result,
            report=report,
        ):
            pass
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
        """Encode search queries: `encode` with the model's "query" prompt, where it has one."""
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
        """Yield what `encode_stream` yields for these options.

        :param report: filled with the figures of this call; None creates one.
        """
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
        """Return each text's token ids as the model sees them: truncated, special tokens included.

        :returns: int64 arrays (t,), one a text.
        """
        tokens = self._pipeline.tokenizer(texts)
        return np.split(tokens.ids, tokens.offsets[1:-1]) if len(texts) else []

    def similarity(self, left: npt.ArrayLike, right: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the score of every left with every right vector, by the model's own measure.

        :param left: (n, dim) or (dim,).
        :param right: (m, dim) or (dim,).
        :returns: float32 array (n, m).
        """
        from onnxsim_embed.similarity.compare import score_all

        return score_all(left, right, self.artifact.manifest.similarity_fn_name)

    def similarity_pairwise(
        self, left: npt.ArrayLike, right: npt.ArrayLike
    ) -> npt.NDArray[np.float32]:
        """Return the score of each left vector with the right vector of the same row.

        :param left: (n, dim).
        :param right: (n, dim).
        :returns: float32 array (n,).
        """
        from onnxsim_embed.similarity.compare import score_pairs

        return score_pairs(left, right, self.artifact.manifest.similarity_fn_name)

    def prompt_text(self, prompt_name: str | None = None, prompt: str | None = None) -> str:
        """Return what `encode` puts before each text.

        :raises ValueError: naming the prompts there are, if `prompt_name` is none of them.
        """
        if prompt is not None:
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(
                f"prompt_name {name!r} is not among the model's prompts: {sorted(self.prompts) or 'none'}"
            )
        return self.prompts[name]

    def query_prompt(self) -> str:
        """Return what `encode_query` puts before each text: the "query" prompt, or nothing."""
        return self.prompts.get("query", "")

    def document_prompt(self) -> str:
        """Return what `encode_document` puts before each text: the first document prompt, or nothing."""
        return next((self.prompts[name] for name in DOCUMENT_PROMPTS if name in self.prompts), "")
