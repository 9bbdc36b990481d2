"""Embedder: the embeddings of sentence-transformers, independent of batches and threads."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from support import TEXTS, change_json, write_checkpoint
from support import sentence_transformer as reference

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.export import export_model
from onnxsim_embed.runtime import pipeline, report

CLOSE = 1e-5
MODES = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "cls+mean")

MORE_TEXTS = [
    *TEXTS,
    "\x00\x1f control \x7f \ufffd",
    "tab\tand\r\nline\u2028breaks\u00a0here",
    "ÀÉÎÕÜ ß ﬁ Ⅷ ½ ㎏",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301",
    "העברית العربية हिन्दी ไทย 한국어",
    "x" * 150,
    "water " * 46,  # fills the model to the last token
    "water " * 47,
    *(f"project {number} in the village" for number in range(40)),
]

QUICKSTART = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


VARIED_WORDS = (
    "rural water supply for schools and clinics a new bridge across the river solar energy naïve "
    "Straße проект école مدرسة 学校 प्रकल्प 🙂 100% $5 co-operative don't e.g. 3.14"
)


@pytest.fixture(scope="module")
def model(artifact):
    return Embedder(artifact, precision="fp32", threads=2)


@pytest.fixture(scope="module")
def vectors(model):
    """The vectors of MORE_TEXTS."""
    return model.encode(MORE_TEXTS)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """The tiny checkpoint in sentence-transformers. Read-only."""
    return reference(checkpoint)


# the same vectors as sentence-transformers


@pytest.mark.parametrize("schema", ["legacy", "new"])
@pytest.mark.parametrize("pooling", MODES)
def test_fp32_equals_sentence_transformers(tmp_path, pooling, schema):
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint",
        pooling=pooling,
        schema=schema,
        normalize=schema == "new",
        dense=pooling in ("cls", "cls+mean"),
        seed=len(pooling),
    )
    model = Embedder(export_model(checkpoint, tmp_path / "artifact", precisions=["fp32"]))
    expected = reference(checkpoint).encode(MORE_TEXTS)
    vectors = model.encode(MORE_TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(MORE_TEXTS), model.embedding_dimension)
    np.testing.assert_allclose(vectors, expected, atol=CLOSE, rtol=CLOSE)


def varied_texts():
    """Some three hundred texts: short, long, odd, empty, repeated, in many scripts."""
    rng = np.random.default_rng(0)
    words = VARIED_WORDS.split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(150)]
    letters = [chr(c) for c in rng.integers(0x20, 0x2FFFF, 4000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(rng.choice(letters, rng.integers(1, 60))) for _ in range(40)]
    texts += [" ".join(rng.choice(words, 2000)) for _ in range(2)]
    return [*texts, *texts[:20], *MORE_TEXTS, *QUICKSTART, "\n", "\t \u3000", "🏳️‍🌈" * 300]


@pytest.mark.real
def test_minilm_equals_sentence_transformers(real_checkpoint, real_artifact):
    minilm = Embedder(real_artifact, precision="fp32")
    vectors = minilm.encode(varied_texts())
    expected = reference(real_checkpoint).encode(varied_texts(), batch_size=16)
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    alone = np.stack([minilm.encode(text) for text in varied_texts()[::9]])
    np.testing.assert_array_equal(alone, vectors[::9])
    published = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    vectors = minilm.encode(QUICKSTART)
    np.testing.assert_allclose(minilm.similarity(vectors, vectors), published, atol=1e-4)


# what may be encoded


def test_one_text_gives_one_vector(model, vectors):
    vector = model.encode(MORE_TEXTS[4])
    assert (vector.shape, vector.dtype) == ((32,), np.float32)
    np.testing.assert_array_equal(vector, vectors[4])
    np.testing.assert_array_equal(model.encode(np.str_(MORE_TEXTS[4])), vectors[4])


def test_any_ordered_iterable_of_texts_is_encoded(model):
    texts = MORE_TEXTS[-20:]
    series = pd.Series(texts, index=range(7, 7 + len(texts)))
    keys = dict.fromkeys(texts).keys()
    for given in (
        tuple(texts),
        iter(texts),
        series,
        np.array(texts, object),
        np.array(texts),
        keys,
    ):
        np.testing.assert_array_equal(model.encode(given), model.encode(texts))


@pytest.mark.parametrize(
    ("kwargs", "width", "dtype"),
    [({}, 32, np.float32), ({"precision": "binary"}, 4, np.int8),
     ({"precision": "uint8", "truncate_dim": 16}, 16, np.uint8)],
)  # fmt: skip
def test_no_texts_yield_no_rows_of_the_right_dim_and_dtype(model, kwargs, width, dtype):
    vectors = model.encode(iter(()), **kwargs)
    assert (vectors.shape, vectors.dtype) == ((0, width), dtype)


def test_sentences_is_the_former_name_of_inputs(model, vectors):
    np.testing.assert_array_equal(model.encode(sentences=MORE_TEXTS), vectors)
    for kwargs in ({}, {"inputs": ["a"], "sentences": ["a"]}):
        with pytest.raises(TypeError, match=r"`inputs`.*`sentences`"):
            model.encode(**kwargs)


def test_rows_of_errors_count_from_the_first_text(model):
    with pytest.raises(TypeError, match=r"^text 9000 is NoneType"):
        model.encode(["x"] * 9000 + [None], prompt="a ")
    with pytest.raises(ValueError, match=r"^text 1 is not valid Unicode"):
        model.encode(["a", "\ud800"])


@pytest.mark.parametrize(
    "texts",
    [pd.DataFrame({"text": ["a road"]}), np.array([["a road"]]), {"a road"}, {"a road": 1}, b"a road", 3],
    ids=lambda texts: type(texts).__name__,
)  # fmt: skip
def test_other_containers_raise_and_name_what_to_pass(model, texts):
    for encode in (model.encode, model.encode_query, model.encode_stream, model.token_ids):
        with pytest.raises(TypeError, match=rf"got {type(texts).__name__}: "):
            encode(texts)


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document", "encode_stream"])
def test_an_unknown_argument_is_a_type_error(model, method):
    with pytest.raises(TypeError, match="unexpected keyword argument 'convert_to_tensors'"):
        getattr(model, method)(["a"], convert_to_tensors=True)


# independence of other texts, batches and threads


def test_neither_order_nor_other_texts_matter(model, vectors):
    order = np.random.default_rng(0).permutation(len(MORE_TEXTS))
    permuted = model.encode([MORE_TEXTS[row] for row in order])
    np.testing.assert_array_equal(permuted, vectors[order])
    alone = np.stack([model.encode(text) for text in MORE_TEXTS])
    np.testing.assert_array_equal(alone, vectors)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_batches_and_threads_do_not_matter(artifact, vectors, threads, batch_size):
    model = Embedder(artifact, precision="fp32", threads=threads)
    np.testing.assert_array_equal(model.encode(MORE_TEXTS, batch_size=batch_size), vectors)


def test_last_report_is_the_threads_own(model):
    model.encode(["a", "b", "c"])
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: model.last_report.texts).result() == 3  # it has none of its own
        other.submit(model.encode, "x").result()
        assert other.submit(lambda: model.last_report.texts).result() == 1
    assert model.last_report.texts == 3


# dtypes, dimensions and lengths


@pytest.mark.parametrize("normalize", [None, False, True])
@pytest.mark.parametrize("truncate_dim", [None, 1, 20])
def test_truncation_and_normalization_equal_sentence_transformers(
    model, theirs, truncate_dim, normalize
):
    vectors = model.encode(TEXTS, truncate_dim=truncate_dim, normalize_embeddings=normalize)
    expected = theirs.encode(TEXTS, truncate_dim=truncate_dim, normalize_embeddings=bool(normalize))
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    assert vectors.flags.c_contiguous


@pytest.mark.parametrize("length", [49, 2, 0, 7.5])
def test_an_impossible_maximum_length_is_an_error(model, length):
    with pytest.raises(ValueError, match=f"max_seq_length .*got {length}"):
        model.max_seq_length = length
    assert model.max_seq_length == 48


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"batch_size": 0}, ValueError), ({"batch_size": 2.5}, ValueError),
     ({"truncate_dim": 0}, ValueError), ({"truncate_dim": 33}, ValueError),
     ({"precision": "int4"}, ValueError), ({"output_value": "all"}, ValueError),
     ({"prompt": 5}, TypeError), ({"prompt_name": b"query"}, TypeError)],
)  # fmt: skip
def test_an_invalid_option_is_named(model, options, kind):
    for texts in ([], ["a"], "a"):
        with pytest.raises(kind, match=next(iter(options))):
            model.encode(texts, **options)


# streams


def test_a_stream_checks_its_arguments_at_once(model):
    assert list(model.encode_stream([])) == []
    for kwargs, error in (
        ({"inputs": "one text"}, TypeError),
        ({"inputs": [], "prompt_name": "no"}, ValueError),
        ({"inputs": [], "truncate_dim": 99}, ValueError),
    ):
        with pytest.raises(error):
            model.encode_stream(**kwargs)


def test_an_abandoned_stream_breaks_nothing(model, vectors):
    next(model.encode_stream(MORE_TEXTS * 300))
    np.testing.assert_array_equal(model.encode(MORE_TEXTS), vectors)


class Keyboard(io.StringIO):
    """A terminal whose user presses Ctrl-C as soon as the progress bar moves."""

    pressed = False

    def write(self, text):
        if not self.pressed and re.search(r" [1-9]\d?%", text):
            self.pressed = True
            raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interruption_stops_the_work(artifact, monkeypatch, threads):
    model = Embedder(artifact, threads=threads)
    texts = [f"{number} " + "water road " * 20 for number in range(4000)]
    monkeypatch.setattr(sys, "stderr", Keyboard())
    with pytest.raises(KeyboardInterrupt):
        model.encode(texts, batch_size=1, show_progress_bar=True)
    time.sleep(0.1)  # a batch that runs may end
    spent = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - spent < 0.1
    assert model.encode("a road").shape == (32,)
    # Bars of other threads do not wait for a lock that the interrupted one took.
    other = threading.Thread(
        target=model.encode, args=(texts[:3],), kwargs={"show_progress_bar": True}, daemon=True
    )
    other.start()
    other.join(timeout=30)
    assert not other.is_alive()


# reports and properties


def test_the_report_counts_texts_and_tokens(artifact):
    model = Embedder(artifact, threads=2)
    model.encode([*TEXTS, "☂ ☃"])
    assert model.last_report.unknown_rows == [len(TEXTS)]
    model.encode(TEXTS)
    report = model.last_report
    assert (report.truncated_rows, report.unknown_rows) == ([10], [])
    distinct = dict.fromkeys(TEXTS)
    assert (report.texts, report.distinct) == (len(TEXTS), len(distinct))
    assert report.tokens == sum(len(ids) for ids in model.token_ids(list(distinct)))
    assert report.truncated == 1
    assert (report.threads, report.provider) == (2, "CPUExecutionProvider")
    assert 0 < report.seconds_tokenize < report.seconds
    assert min(report.seconds_run, report.seconds_pool) > 0
    model.encode(TEXTS[-2])
    one = model.last_report
    assert (one.texts, one.distinct, one.truncated, one.threads) == (1, 1, 1, 2)
    assert (one.truncated_rows, one.unknown_rows) == ([0], [])
    assert 0 < one.seconds_tokenize + one.seconds_run + one.seconds_pool <= one.seconds
    assert report.texts_per_second == pytest.approx(report.texts / report.seconds)
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)


def test_progress_counts_tokens_and_says_how_many_there_will_be(model, monkeypatch):
    bar, totals, steps = Mock(), [], []
    bar.update = lambda tokens: (totals.append(bar.total), steps.append(tokens))
    make = Mock(return_value=bar)
    monkeypatch.setattr(report, "progress_bar", make)
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 60)
    texts = [f"{number} road " + "water " * (number % 20) for number in range(300)]
    sources = (texts, np.array(texts), iter(texts), (text for text in texts))
    for source, known in zip(sources, (True, True, True, False), strict=True):
        bar.total = None
        totals.clear()
        steps.clear()
        list(model.encode_stream(source, show_progress_bar=True, progress_start=1000))
        tokens = model.last_report.tokens
        assert (sum(steps), make.call_args.kwargs["unit"]) == (tokens, " tokens")
        bar.set_postfix_str.assert_called_with("1,300 texts")
        assert totals[0] == (pytest.approx(tokens, rel=0.05) if known else None)
        assert totals[-1] == (tokens if known else None)
    model.encode(texts)
    assert make.call_count == len(sources)


def test_properties(model, artifact):
    assert model.embedding_dimension == model.get_embedding_dimension() == 32
    assert model.get_sentence_embedding_dimension() == 32
    assert model.prompts == {"query": "a dog "}
    assert repr(model).startswith("Embedder('tiny', precision='fp32', dim=32, ")
    assert model.artifact.directory == artifact


@pytest.mark.parametrize("measure", ["dot", "manhattan"])
def test_similarity_is_that_of_the_checkpoint(tmp_path, measure):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", normalize=False)
    change_json(checkpoint / "config_sentence_transformers.json", similarity_fn_name=measure)
    ours = Embedder(export_model(checkpoint, tmp_path / "artifact", precisions=["fp32"]))
    theirs, vectors = reference(checkpoint), ours.encode(TEXTS)
    left, right = vectors[:4], vectors[4:8]
    for score in ("similarity", "similarity_pairwise"):
        scores = getattr(ours, score)(left, right)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, getattr(theirs, score)(left, right), rtol=1e-4)


# tokens of others


@pytest.mark.parametrize(
    "ids", [[2, 99_999, 3], [2, -1, 3], [2, 10**30, 3], [2, *[5] * 50, 3]], ids=range(4)
)
def test_token_ids_that_the_model_cannot_take_are_named(artifact, ids):
    with pytest.raises(ValueError, match="input 1 "):
        Embedder(artifact, precision="fp32").encode_tokens([[2, 5, 3], ids])


# loading


def test_an_artifact_loads_by_path_in_every_form(artifact, vectors):
    for form in (artifact, str(artifact), Artifact.open(artifact)):
        model = Embedder.from_pretrained(form, precision="fp32", device="cpu", threads=1)
        np.testing.assert_array_equal(model.encode(TEXTS), vectors[: len(TEXTS)])


@pytest.mark.parametrize(
    "options", [{"precision": "fp64"}, {"device": "gpu"}, {"threads": 0}, {"threads": "2"}]
)
def test_an_invalid_setting_is_named(artifact, options):
    for make in (Embedder, Embedder.from_pretrained):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(artifact, **options)


def test_numpy_integers_are_integers(artifact):
    model = Embedder(artifact, threads=np.int64(1))
    model.max_seq_length = np.int32(20)
    assert model.encode(["a"], batch_size=np.uint8(2), truncate_dim=np.int16(4)).shape == (1, 4)


@pytest.mark.parametrize("again", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_it_pickles_as_its_artifact_and_settings(artifact, again):
    model = Embedder(artifact, precision="int8", device="cpu", threads=3)
    model.max_seq_length = 8
    model.prompts["query"] = "the cat "
    other = again(model)
    assert (other.precision, other.threads, other.max_seq_length) == ("int8", 3, 8)
    np.testing.assert_array_equal(other.encode_query(TEXTS), model.encode_query(TEXTS))
