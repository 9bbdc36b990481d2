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
from onnxsim_embed.runtime.options import LongTexts
from onnxsim_embed.runtime.texts import check_iterable

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.sklearn", "sklearn", "scikit-learn"
    ) from None


class EmbeddingVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Scikit-learn transformer of a column of texts to float32 embeddings, by `encode`.

    It is stateless: `fit` only loads the model, and `transform` does so if need be. Clones and pickles
    carry only the parameters; transformers with the same model, precision, device and threads share
    one model in memory.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param prompt: string prepended to each text; None for the model's default prompt, if it has one.
    :param normalize_embeddings: True scales embeddings to unit L2 norm; None leaves them as they are.
    :param truncate_dim: truncate embeddings to this dimension.
    :param long_texts: "truncate" texts beyond the model's length, or "mean" of windows; see `Embedder.encode`.
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
        long_texts: LongTexts = "truncate",
    ) -> None:
        self.model = model
        self.precision = precision
        self.device = device
        self.threads = threads
        self.batch_size = batch_size
        self.prompt = prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self.long_texts = long_texts

    def fit(self, X: Iterable[str], y: object = None) -> EmbeddingVectorizer:  # noqa: N803 - scikit-learn's names
        """Load the model.

        :param X: ignored.
        :param y: ignored.
        """
        self._load()
        return self

    def transform(self, X: Iterable[str]) -> npt.NDArray[np.float32]:  # noqa: N803
        """Return the embeddings of texts.

        :param X: n texts: a list, a one-dimensional array, a pandas or polars Series.
        :returns: float32 array (n, dim), or a data frame if `set_output` requests one.
        :raises TypeError: for a table, a single string, or naming the row that is not a string.
        """
        try:
            check_iterable(X)
        except TypeError as error:
            hint = "in a ColumnTransformer name the column as 'text', not ['text']"
            raise TypeError(f"{error}; {hint}") from None
        return self._load().encode(
            X,
            prompt=self.prompt,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
            long_texts=self.long_texts,
        )

    @property
    def _n_features_out(self) -> int:  # for the names of ClassNamePrefixFeaturesOutMixin
        return self._load().embedding_dimension if self.truncate_dim is None else self.truncate_dim

    def _load(self) -> Embedder:
        settings = ModelSettings(str(self.model), self.precision, self.device, self.threads)
        model: LazyModel | None = vars(self).get("_model")
        if model is None or model.settings != settings:  # set_params may have changed them
            model = self._model = LazyModel(settings)
        return model.get()

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
