"""sentence-transformers: a SentenceTransformer that runs this package's models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.errors import needs_extra
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import EncodeOptions, LongTexts, OutputPrecision
from onnxsim_embed.runtime.postprocess import make_output
from onnxsim_embed.runtime.prompts import Prompted
from onnxsim_embed.runtime.tokenization import Tokens

with needs_extra(
    "onnxsim_embed.integrations.sentence_transformers",
    "sentence-transformers",
    "sentence-transformers",
):
    import sentence_transformers
    import torch

    try:
        from sentence_transformers.base.modules import InputModule
    except ModuleNotFoundError:  # before 5.4
        from sentence_transformers.models import InputModule


def load(
    model: str | Path | Embedder,
    *,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    truncate_dim: int | None = None,
    long_texts: LongTexts = "truncate",
) -> SentenceTransformer:
    """Return a SentenceTransformer that runs on this package, for libraries that take one.

    `encode` and its relatives return the vectors of `Embedder`, bit for bit, whatever `batch_size` is.
    Prompts, similarity function and maximum length are the model's. It cannot be trained.

    :param model: recipe name, artifact directory, checkpoint directory, Hub id, an Embedder, or a
        directory that `save_pretrained` wrote.
    :param precision: as for `Embedder`, as are `device` and `threads`; an Embedder keeps its own.
    :param truncate_dim: truncate embeddings to this dimension.
    :param long_texts: "truncate" texts beyond the model's length, or "mean" of windows; see
        `Embedder.encode`. It is not saved with the model.
    :raises MissingExtraError: at import, if sentence-transformers is not installed.
    :raises ValueError: if a saved model has modules of its own behind this package's.

    Usage::

        from onnxsim_embed.integrations.sentence_transformers import load

        model = load("all-MiniLM-L6-v2")
        vectors = model.encode(["feeder roads", "cold chain for vaccines"])
        print(model.similarity(vectors[:1], vectors[1:]).shape)
    """
    if not isinstance(model, Embedder) and (Path(model) / OnnxEncoder.folder).is_dir():
        # Not by sentence-transformers' loader, which would run any code in the directory.
        if len(json.loads((Path(model) / "modules.json").read_text("utf-8"))) > 1:
            raise ValueError(f"{model} has modules behind OnnxEncoder; load takes models without")
        settings = {"device": device, "threads": threads}
        settings |= {} if precision == "auto" else {"precision": precision}
        encoder = OnnxEncoder.load(str(model), OnnxEncoder.folder, model_kwargs=settings)
        stored = json.loads((Path(model) / "config_sentence_transformers.json").read_text("utf-8"))
        names = ("prompts", "default_prompt_name", "similarity_fn_name")
        known = {name: stored[name] for name in names if name in stored}
    else:
        if not isinstance(model, Embedder):
            model = Embedder(model, precision=precision, device=device, threads=threads)
        encoder = OnnxEncoder(model)
        prompts = {"query": model.query_prompt(), "document": model.document_prompt()}
        known = {
            "prompts": prompts | model.prompts,
            "default_prompt_name": model.default_prompt_name,
            "similarity_fn_name": model.artifact.manifest.similarity_fn_name,
        }
    loaded = SentenceTransformer(
        modules=[encoder], device="cpu", truncate_dim=truncate_dim, **known
    )
    loaded.long_texts = long_texts
    return loaded


class OnnxEncoder(InputModule):
    """Module from texts to embeddings of tokens and texts: tokenizer, ONNX session and pooling."""

    save_in_root = False
    folder = "0_OnnxEncoder"  # where SentenceTransformer saves it
    config_file_name = "onnx_encoder.json"

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens per text; may be set lower."""
        return self.embedder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.embedder.max_seq_length = value

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers' class
        """The model's tokenizer in transformers, for libraries that ask for it."""
        return _transformers_tokenizer(self.embedder.artifact.directory)

    def get_embedding_dimension(self) -> int:
        """Return the dimension of an embedding."""
        return self.embedder.embedding_dimension

    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **_: object
    ) -> dict[str, Any]:
        """Return token ids, attention mask and the number of a prompt's tokens."""
        tokenizer = self.embedder._pipeline.tokenizer
        tokens = tokenizer([prompt + text for text in inputs] if prompt else inputs)
        ids, mask = tokens.pad(np.arange(len(inputs)), tokenizer.pad_token_id)
        longest = int(tokens.counts.max())  # as theirs, which measures prompts so
        arrays = {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}
        features: dict[str, Any] = {n: torch.from_numpy(array) for n, array in arrays.items()}
        return features | ({"prompt_length": tokenizer.prompt_tokens(prompt)} if prompt else {})

    def tokenize(self, texts: Sequence[str], **_: object) -> dict[str, Any]:
        """Return token ids and attention mask (the name of `preprocess` before version 5.4)."""
        return self.preprocess(texts)

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        """Add token embeddings, with zeros for padding, and sentence embeddings to token ids."""
        ids, mask = (features[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
        manifest = self.embedder.artifact.manifest
        skip = 0 if manifest.include_prompt else int(features.get("prompt_length", 0))
        # Whatever made the ids: `encode_tokens` rejects those that lack this model's special tokens.
        offsets = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
        tokens = Tokens(ids[mask == 1], offsets, np.zeros(len(ids), np.int64))
        output = make_output(self.embedder.head, 0, EncodeOptions(output_value="token_embeddings"))
        states = self.embedder._pipeline.run_tokens(tokens, output)
        hidden = np.zeros((*ids.shape, manifest.hidden_size), np.float32)
        hidden[mask == 1] = np.concatenate(states)
        vectors = self.embedder.head(hidden, mask, skip)
        results = {"token_embeddings": hidden, "sentence_embedding": vectors}
        device = features["input_ids"].device
        features.update({name: torch.from_numpy(a).to(device) for name, a in results.items()})
        return features

    def get_config_dict(self) -> dict[str, Any]:
        """Return what is saved beside the artifact."""
        return {name: getattr(self.embedder, name) for name in ("precision", "max_seq_length")}

    def save(self, output_path: str, *_: object, **__: object) -> None:
        """Copy the artifact to a directory."""
        shutil.copytree(self.embedder.artifact.directory, output_path, dirs_exist_ok=True)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> OnnxEncoder:  # noqa: ANN401
        """Load what `save` wrote, from a directory or the Hub."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        source = {name: options[name] for name in names if name in options}
        settings = cls.load_config(model_name_or_path, subfolder, **source)
        length = settings.pop("max_seq_length")
        directory = cls.load_dir_path(model_name_or_path, subfolder, **source)
        encoder = cls(Embedder(directory, **settings | (options.get("model_kwargs") or {})))
        encoder.max_seq_length = length
        return encoder


class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """A SentenceTransformer whose first module is an OnnxEncoder; see `load`.

    The class has its base's name, which sentence-transformers saves and expects in a saved model.
    """

    long_texts: LongTexts = "truncate"

    def encode(
        self,
        inputs: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: OutputPrecision | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,  # noqa: ANN401
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Any = None,  # noqa: ANN401
        chunk_size: int | None = None,
        *,
        sentences: str | Iterable[str] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return embeddings as `SentenceTransformer.encode`; several texts are batched as in `Embedder`.

        In other processes (`pool`, or a list of devices), and for other values than sentence embeddings,
        `batch_size` applies.
        """
        texts = sentences if inputs is None else inputs
        in_process = pool is None and not isinstance(device, list)
        known = in_process and output_value == "sentence_embedding" and not set(options) - {"task"}
        if not known or len(self) > 1 or texts is None:
            return super().encode(
                texts, prompt_name, prompt, batch_size, show_progress_bar, output_value, precision,
                convert_to_numpy, convert_to_tensor, device, normalize_embeddings, truncate_dim, pool,
                chunk_size, **options,
            )  # fmt: skip
        embedder = self[0].embedder
        limit = self.truncate_dim if truncate_dim is None else truncate_dim
        result = embedder.encode(
            texts,
            prompt=Prompted.prompt_text(self, prompt_name, prompt),
            show_progress_bar=show_progress_bar,
            precision=precision or "float32",
            normalize_embeddings=normalize_embeddings,
            truncate_dim=None if limit is None else min(limit, embedder.embedding_dimension),
            long_texts=self.long_texts,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
        )
        return result.to(device) if convert_to_tensor and device is not None else result


@lru_cache(maxsize=8)
def _transformers_tokenizer(directory: Path) -> Any:  # noqa: ANN401
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
