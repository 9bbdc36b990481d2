"""Loading shared by the adapters, and the error if their library is missing."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onnxsim_embed import Embedder
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations import loading
from onnxsim_embed.integrations.loading import LazyModel


@pytest.fixture
def lazy(artifact):
    return LazyModel(str(artifact), precision="fp32", threads=2)


def test_a_model_is_loaded_with_its_settings(lazy):
    model = lazy.model
    assert (model.precision, model.threads, model.provider) == ("fp32", 2, "CPUExecutionProvider")
    assert lazy.model is model
    assert LazyModel(lazy.name, precision="int8", threads=2).model is not model


def test_concurrent_threads_share_one_model(lazy, monkeypatch):
    loads, both = [], threading.Barrier(4)
    real = Embedder.from_pretrained
    monkeypatch.setattr(
        loading.Embedder, "from_pretrained", lambda *a, **o: loads.append(a) or real(*a, **o)
    )

    def ask(_):
        both.wait()
        return copy.copy(lazy).model

    with ThreadPoolExecutor(4) as workers:
        models = list(workers.map(ask, range(4)))
    assert len(loads) == 1
    assert all(model is models[0] for model in models)


def test_an_unused_model_is_freed(artifact):
    lazy = LazyModel(str(artifact), precision="fp32", threads=1)
    loaded = weakref.ref(lazy.model)
    assert loaded() is lazy.model
    del lazy
    gc.collect()
    assert loaded() is None


def test_pickles_and_copies_hold_only_the_settings(lazy):
    expected = lazy.model.encode("x")
    for again in (pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy)):
        assert again == lazy
        assert "model" not in vars(again)
        np.testing.assert_array_equal(again.model.encode("x"), expected)


@pytest.mark.parametrize(
    ("module", "library", "package"),
    [("langchain", "langchain_core", "langchain-core"), ("llama_index", "llama_index", "llama-index-core"),
     ("haystack", "haystack", "haystack-ai"), ("chroma", "chromadb", "chromadb"), ("sklearn", "sklearn", "scikit-learn"),
     ("sentence_transformers", "sentence_transformers", "sentence-transformers")],
)  # fmt: skip
def test_without_its_library_one_line_names_the_extra(monkeypatch, module, library, package):
    ours = f"onnxsim_embed.integrations.{module}"
    for name in [*sys.modules]:
        if name == ours or name.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError) as caught:
        importlib.import_module(ours)
    extra = module.replace("_", "-")
    assert f"needs the package '{package}', which is not installed" in str(caught.value)
    assert str(caught.value).endswith(f"[{extra}]'")
