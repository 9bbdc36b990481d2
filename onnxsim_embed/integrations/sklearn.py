"""scikit-learn: a transformer from texts to vectors, for pipelines, grids and column transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations.loading import LazyModel, ModelSettings
from onnxsim_embed.runtime.embedder import Embedder

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.sklearn", "sklearn", "scikit-learn"
    ) from None


class EmbeddingVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Scikit-learn transformer: a column of texts to float32 vectors, by `encode`.

    There is nothing to learn: `fit` loads the model, and `transform` without it does so too. Clones
    and pickles carry the parameters alone; transformers with the same model, precision, device and
    threads share one in memory.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: "auto", "fp32" or "int8".
    :param device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
    :param threads: batches run at the same time; None for the processors this process may use.
    :param batch_size: at most so many texts in one call of the model; None (recommended): as many as
        fill the processor's cache.
    :param prompt: text put before each text; None for the model's default prompt, if it has one.
    :param normalize_embeddings: True scales vectors to L2 norm 1; None leaves them as the model does.
    :param truncate_dim: keep only the first so many components.
    :raises MissingExtraError: at import, if scikit-learn is not installed.

    Usage::

        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from onnxsim_embed.integrations.sklearn import EmbeddingVectorizer

        texts = ["feeder roads", "a gravel road", "vaccines", "a rural clinic"]
        classifier = make_pipeline(EmbeddingVectorizer("all-MiniLM-L6-v2"), LogisticRegression())
        classifier.fit(texts, ["transport", "transport", "health", "health"])
        print(classifier.predict(["immunisation"]))
    """

    def __init__(
        self,
        model: str | Path = "all-MiniLM-L6-v2",
        *,
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        self.model = model
        self.precision = precision
        self.device = device
        self.threads = threads
        self.batch_size = batch_size
        self.prompt = prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim

    def fit(self, X: Iterable[str], y: object = None) -> EmbeddingVectorizer:  # noqa: N803 - scikit-learn's names
        """Load the model.

        :param X: n texts; they are not read.
        :param y: not read.
        """
        self._load()
        return self

    def transform(self, X: Iterable[str]) -> npt.NDArray[np.float32]:  # noqa: N803
        """Turn texts into vectors.

        :param X: n texts: a list, an array of one dimension, a pandas or polars Series.
        :returns: float32 array (n, dim), or a data frame where `set_output` asks for one.
        :raises TypeError: naming the row that is not a string.
        :raises ValueError: for a table, or one bare string.
        """
        return self._load().encode(
            _as_texts(X),
            prompt=self.prompt,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )

    @property
    def _n_features_out(self) -> int:  # what ClassNamePrefixFeaturesOutMixin makes names for
        return self._load().embedding_dimension if self.truncate_dim is None else self.truncate_dim

    def _load(self) -> Embedder:
        settings = ModelSettings(str(self.model), self.precision, self.device, self.threads)
        held: LazyModel | None = self.__dict__.get("_model")
        if held is None or held.settings != settings:  # set_params may have changed them
            held = self._model = LazyModel(settings)
        return held.get()

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401 - scikit-learn is untyped
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags


def _as_texts(texts: Iterable[str]) -> list[str]:
    """Return a column of texts as a list.

    :raises ValueError: for what scikit-learn's users hand over by mistake.
    """
    if isinstance(texts, str):
        raise ValueError(
            "EmbeddingVectorizer takes an iterable of texts, got one string: put it into a list"
        )
    shape = getattr(texts, "shape", (0,))
    if len(shape) != 1:
        raise ValueError(
            f"EmbeddingVectorizer takes one column of texts, got a table of shape {shape}: pass "
            "X['column'], and in a ColumnTransformer name the column as 'column', not ['column']"
        )
    return list(texts)
