"""The scikit-learn transformer: clones, pipelines, names and frames."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from support import TEXTS, run_usage

from onnxsim_embed import Embedder

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.utils.validation import check_is_fitted

from onnxsim_embed.integrations.sklearn import EmbeddingVectorizer


@pytest.fixture
def vectorizer(artifact):
    return EmbeddingVectorizer(artifact, precision="fp32")


@pytest.fixture
def expected(artifact):
    return Embedder(artifact, precision="fp32").encode(TEXTS)


def test_texts_become_the_embedders_vectors(vectorizer, expected):
    check_is_fitted(vectorizer)
    for column in (TEXTS, tuple(TEXTS), np.array(TEXTS, object), np.array(TEXTS)):
        vectors = vectorizer.fit_transform(column)
        np.testing.assert_array_equal(vectors, expected, strict=True)
    assert vectorizer.transform([]).shape == (0, 32)


def test_options_are_those_of_encode(artifact):
    options = {"prompt": "a dog ", "normalize_embeddings": True, "truncate_dim": 5, "batch_size": 2}
    options["long_texts"] = "mean"
    vectorizer = EmbeddingVectorizer(str(artifact), precision="fp32", threads=1, **options)
    model = Embedder(artifact, precision="fp32", threads=1)
    np.testing.assert_array_equal(vectorizer.transform(TEXTS), model.encode(TEXTS, **options))
    assert len(vectorizer.get_feature_names_out()) == 5


def test_clones_share_the_model(vectorizer, artifact):
    """As a grid search makes and changes them."""
    vectorizer.set_params(truncate_dim=3).fit(TEXTS)
    copy = clone(vectorizer)
    assert copy.get_params() == vectorizer.get_params()
    assert copy.get_params()["model"] == artifact
    assert "_model" not in vars(copy)
    assert copy.set_params(truncate_dim=4)._load() is vectorizer._load()


def test_parameters_may_change_after_fit(vectorizer, expected, artifact):
    vectorizer.fit(TEXTS)
    vectorizer.set_params(precision="int8")
    int8 = Embedder(artifact, precision="int8").encode(TEXTS)
    assert (int8 != expected).any()
    np.testing.assert_array_equal(vectorizer.transform(TEXTS), int8)


def test_it_pickles_without_its_model(vectorizer, expected):
    content = pickle.dumps(vectorizer.fit(TEXTS))
    assert len(content) < 2000
    np.testing.assert_array_equal(pickle.loads(content).transform(TEXTS), expected)


def test_set_output_makes_a_frame(vectorizer, expected):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    column = pandas.Series(TEXTS, index=range(5, 5 + len(TEXTS)))
    frame = vectorizer.set_output(transform="pandas").fit_transform(column)
    np.testing.assert_array_equal(frame.to_numpy(), expected)
    assert list(frame.columns) == [f"embeddingvectorizer{column}" for column in range(32)]
    assert list(frame.index) == list(column.index)


def test_a_column_transformer_passes_one_column(vectorizer, expected):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.DataFrame({"text": TEXTS, "year": range(len(TEXTS))})
    columns = ColumnTransformer([("text", vectorizer, "text"), ("rest", "passthrough", ["year"])])
    np.testing.assert_array_equal(columns.fit_transform(table)[:, :-1], expected)
    assert columns.get_feature_names_out()[0] == "text__embeddingvectorizer0"
    columns = ColumnTransformer([("text", vectorizer, ["text"])])
    with pytest.raises(TypeError, match=r"\(12, 1\).*name the column as"):
        columns.fit_transform(table)


@pytest.mark.parametrize("texts", ["a road", ["a road", None], [["a"]]])
def test_only_a_column_of_texts_is_transformed(vectorizer, texts):
    with pytest.raises(TypeError):
        vectorizer.transform(texts)


def test_an_unknown_option_is_a_type_error(artifact):
    with pytest.raises(TypeError, match="batchsize"):
        EmbeddingVectorizer(artifact, batchsize=3)


def test_its_usage_runs(artifact):
    assert run_usage(EmbeddingVectorizer, artifact) in ("['health']", "['transport']")
