"""Embedder: texts in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.loading import LoadedModel
from onnxsim_embed.runtime.options import (
    RANGED,
    EncodeArguments,
    EncodeOptions,
    LongTexts,
    OutputPrecision,
    OutputValue,
)
from onnxsim_embed.runtime.postprocess import Output, as_tensors, make_output, quantize_vectors
from onnxsim_embed.runtime.texts import as_list, check_iterable
from onnxsim_embed.runtime.windows import WindowSplitter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Embedder(LoadedModel):
    """A sentence-embedding model on ONNX Runtime or OpenVINO.

    Any number of threads may share one Embedder. It pickles as its artifact's directory and settings.

    A checkpoint is exported on first use into the user's cache directory (`ONNXSIM_EMBED_CACHE`
    overrides it), with a log message, and loaded from there afterwards. A Hub id that is in the local
    cache is loaded without the network; pass `revision` for another version of it.

    :param artifact: recipe name, artifact directory, checkpoint directory or Hub id, for example
        "all-MiniLM-L6-v2", "./my-model", "BAAI/bge-base-en-v1.5"; or an opened artifact.
    :param precision: weight precision: "fp32", "int8" (CPU), "bf16" (fp32 weights computed in bfloat16,
        on processors that have it), "fp16" (GPU), or "auto" for the fastest accurate one of fp32, int8
        and fp16 on this machine. The dtype of embeddings is an argument of `encode`.
    :param device: "auto" (CUDA if onnxruntime offers it, otherwise the CPU), "cpu", "cuda",
        "cuda:N" or onnxruntime's own list of providers.
    :param engine: "onnxruntime", "openvino" (the extra `openvino`; CPU), or "auto": OpenVINO for bf16,
        otherwise ONNX Runtime.
    :param threads: number of batches run concurrently; None for the number of available processors.
    :param pooling: pooling mode of a checkpoint that specifies none.
    :param revision: revision of a Hub id.
    :param token: access token for the Hub; None for that of the logged-in user, False for none.
    :param local_files_only: whether to load a Hub id from the local cache only.
    :raises CheckpointError: if the model cannot be located or exported.
    :raises ArtifactError: if an artifact is damaged.
    :raises MissingExtraError: if the export or the engine needs a package that is not installed.
    :raises ValueError: if the precision, engine or device is not available.

    Usage::

        model = Embedder("all-MiniLM-L6-v2")
        vectors = model.encode(["a text", "another"])      # float32 (2, 384)
    """

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
        long_texts: LongTexts = "truncate",
        stride: int = 0,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
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
        :param precision: dtype of the result: float32, float16, int8, uint8, binary or ubinary. Not
            that of the weights, which is fixed when the model is loaded.
        :param ranges: float32 array (2, dim), minimum and maximum of each dimension, for int8 and
            uint8; None computes them from the result itself.
        :param normalize_embeddings: True scales embeddings to unit L2 norm. None and False leave them
            as the model's own modules return them (many end in a normalization layer).
        :param truncate_dim: truncate embeddings to this dimension, before `normalize_embeddings`.
        :param long_texts: what to do with texts of more tokens than `max_seq_length`: "truncate" them, or
            "mean": encode windows of that length, which end after a sentence where possible, and
            return their mean, weighted by tokens (and scaled to unit L2 norm if the model does so).
        :param stride: with "mean", number of tokens that consecutive windows share.
        :param convert_to_numpy: False returns a list of PyTorch tensors, one a text.
        :param convert_to_tensor: True returns one PyTorch tensor in place of an array.
        :param device: None, or the device of the model, which is fixed when it is loaded.
        :param sentences: former name of `inputs`.
        :returns: array (n, dim), or (dim,) for one text; float32 unless `precision` differs. With
            "token_embeddings" a list of n float32 arrays (tokens, hidden), or one such array.
        :raises TypeError: if the input is not a text or an iterable of texts, naming the row.
        :raises ValueError: for an unknown prompt, an invalid precision, range, dimension or device.
        :raises ImportError: if tensors are requested without PyTorch.
        """
        own_device = "cpu" if self._pipeline.engine.runs_on_cpu else "cuda"
        if device is not None and str(device) not in (own_device, str(self._device)):
            raise ValueError(
                f"this model was loaded on {self.provider}, got device={str(device)!r}; load it with "
                f"Embedder(..., device={str(device)!r}), or leave device out here"
            )
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
            long_texts=long_texts,
            stride=stride,
        )
        result = self.encode_with(options, texts, bool(show_progress_bar))
        if convert_to_numpy and not convert_to_tensor:
            return result
        tensors = as_tensors(result)
        return tensors if convert_to_tensor or isinstance(texts, str) else list(tensors)  # type: ignore[return-value]

    def encode_with(
        self, options: EncodeOptions, texts: str | Iterable[str], show_progress_bar: bool = False
    ) -> Any:  # noqa: ANN401 - an array or a list of arrays
        """Return what `encode` returns for these options."""
        single, rows = isinstance(texts, str), as_list(texts)
        own_ranges = options.precision in RANGED and options.ranges is None
        computed = replace(options, precision="float32") if own_ranges else options
        prefix, output = self._prefix_and_output(computed)
        if single and not own_ranges and output.long_texts is None:
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
        check_iterable(inputs)
        return self._pipeline.stream(
            inputs,
            *self._prefix_and_output(options),
            batch_size=batch_size,
            progress=bool(show_progress_bar),
            progress_start=progress_start,
        )

    def _prefix_and_output(self, options: EncodeOptions) -> tuple[str, Output]:
        """Return the string to prepend to each text, and the stage after the encoder."""
        prefix = self.prompt_text(options.prompt_name, options.prompt)
        pooled = self.artifact.manifest.include_prompt or not prefix
        skip = 0 if pooled else self._pipeline.tokenizer.prompt_tokens(prefix)
        splitter = None
        if options.long_texts == "mean":
            splitter = WindowSplitter(self._pipeline.tokenizer, prefix, options.stride)
        return prefix, make_output(self.head, self.embedding_dimension, options, skip, splitter)

    def encode_tokens(
        self,
        token_ids: Iterable[Sequence[int]],
        *,
        output_value: OutputValue = "sentence_embedding",
        **arguments: Unpack[EncodeArguments],
    ) -> Any:  # noqa: ANN401 - an array or a list of arrays
        """Return the embeddings of tokenized texts, bit for bit those of `encode`.

        :param token_ids: ids of each text as `token_ids` returns them.
        :param arguments: as for `encode`, without prompts.
        :raises ValueError: naming the row, if it is not a list of the model's token ids, lacks its
            special tokens, or exceeds `max_seq_length`.
        """
        tokens = self._pipeline.tokenizer.from_ids(token_ids)
        options = EncodeOptions(prompt="", output_value=output_value, **arguments)
        return self._pipeline.run_tokens(tokens, self._prefix_and_output(options)[1])
