"""Shared by the adapters: a model that loads on first use, and encoding with an adapter's options."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.texts import check_iterable

# Adapters with equal settings share one model while any of them lives: a pipeline often embeds
# documents with one component and queries with another, and a grid search clones its steps.
_models: WeakValueDictionary[tuple[Any, ...], Embedder] = WeakValueDictionary()
_loading = threading.Lock()

# Attributes of adapters that are arguments of `encode`.
OPTIONS = ("normalize_embeddings", "truncate_dim", "long_texts")


@dataclass(frozen=True)
class LazyModel:
    """A model that is loaded on first use, by these arguments. Pickles and copies carry only them."""

    name: str
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None

    @cached_property
    def model(self) -> Embedder:
        """The model; the first access loads it and raises as `Embedder.from_pretrained`."""
        name, precision, device, threads = key = astuple(self)
        with _loading:
            model = _models.get(key)
            if model is None:
                model = Embedder.from_pretrained(
                    name, precision=precision, device=device, threads=threads
                )
                _models[key] = model
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyModel, astuple(self)


@dataclass(eq=False, repr=False, kw_only=True)
class ModelOptions:
    """Arguments that adapters share, as attributes; a subclass gives `model` its default."""

    model: str | Path | Embedder = field(kw_only=False)
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    normalize_embeddings: bool | None = None
    truncate_dim: int | None = None
    long_texts: str = "truncate"

    def _load(self) -> Embedder:
        return self.model if isinstance(self.model, Embedder) else load_model(self, self.model)


def load_model(adapter: Any, name: str | Path) -> Embedder:  # noqa: ANN401
    """Return the model that the attributes of an adapter name, which may have changed since it was loaded."""
    lazy = LazyModel(str(name), adapter.precision, adapter.device, adapter.threads)
    if getattr(adapter, "_model", None) != lazy:
        adapter._model = lazy
    return adapter._model.model


def options_of(adapter: Any, *more: str) -> dict[str, Any]:  # noqa: ANN401
    """Return the attributes of an adapter that are arguments of `encode`, and `more` that it may have."""
    return {name: getattr(adapter, name) for name in (*OPTIONS, *more) if hasattr(adapter, name)}


def embed_documents(adapter: Any, texts: Iterable[str], prompt: str | None) -> list[list[float]]:  # noqa: ANN401
    """Return the embeddings of documents with the options that are attributes of an adapter."""
    check_iterable(texts)
    options = options_of(adapter, "batch_size", "show_progress_bar")
    return adapter._load().encode_document(texts, prompt=prompt, **options).tolist()


def embed_query(adapter: Any, text: str, prompt: str | None) -> list[float]:  # noqa: ANN401
    """Return the embedding of a query with the options that are attributes of an adapter."""
    if not isinstance(text, str):
        raise TypeError(f"expected one text as a string, got {type(text).__name__}")
    return adapter._load().encode_query(text, prompt=prompt, **options_of(adapter)).tolist()
