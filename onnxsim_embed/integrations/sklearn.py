"""scikit-learn: a transformer from texts to vectors, for pipelines, grids and column transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import needs_extra
from onnxsim_embed.integrations.loading import ModelOptions, options_of
from onnxsim_embed.runtime.texts import check_iterable

with needs_extra("onnxsim_embed.integrations.sklearn", "sklearn", "scikit-learn"):
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin


@dataclass(eq=False, repr=False, kw_only=True)
class EmbeddingVectorizer(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, ModelOptions
):
    """Scikit-learn transformer of a column of texts to float32 embeddings, by `encode`.

    It is stateless: `fit` only loads the model, and `transform` does so if need be. Clones and pickles
    carry only the parameters; transformers with the same model, precision, device and threads share
    one model in memory.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param prompt: string prepended to each text; None for the model's default prompt, if it has one.
    :param normalize_embeddings: as for `Embedder.encode`, as are `truncate_dim` and `long_texts`.
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

    model: str | Path = field(default="all-MiniLM-L6-v2", kw_only=False)
    batch_size: int | None = None
    prompt: str | None = None

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
        return self._load().encode(X, **options_of(self, "prompt", "batch_size"))

    @property
    def _n_features_out(self) -> int:  # for the names of ClassNamePrefixFeaturesOutMixin
        return self._load().embedding_dimension if self.truncate_dim is None else self.truncate_dim

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
