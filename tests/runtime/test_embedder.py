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
from dataclasses import replace
from itertools import islice

import numpy as np
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


@pytest.fixture(scope="module")
def minilm(real_artifact):
    """The real MiniLM."""
    return Embedder(real_artifact, precision="fp32")


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
def test_minilm_equals_sentence_transformers(real_checkpoint, minilm):
    vectors = minilm.encode(varied_texts())
    expected = reference(real_checkpoint).encode(varied_texts(), batch_size=16)
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    alone = np.stack([minilm.encode(text) for text in varied_texts()[::9]])
    np.testing.assert_array_equal(alone, vectors[::9])


@pytest.mark.real
def test_minilm_gives_the_published_quickstart_matrix(minilm):
    vectors = minilm.encode(QUICKSTART)
    expected = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(minilm.similarity(vectors, vectors), expected, atol=1e-4)


def test_int8_vectors_are_close_to_fp32_and_of_the_same_kind(artifact, vectors):
    quantized = Embedder(artifact, precision="int8").encode(MORE_TEXTS)
    assert (quantized.shape, quantized.dtype) == (vectors.shape, np.float32)
    assert np.sum(quantized * vectors, axis=1).mean() > 0.9


# what may be encoded


def test_one_text_gives_one_vector(model, vectors):
    vector = model.encode(MORE_TEXTS[4])
    assert (vector.shape, vector.dtype) == ((32,), np.float32)
    np.testing.assert_array_equal(vector, vectors[4])
    np.testing.assert_array_equal(model.encode(np.str_(MORE_TEXTS[4])), vectors[4])


def series(texts):
    import pandas as pd

    return pd.Series(texts, index=range(7, 7 + len(texts)))


@pytest.mark.parametrize(
    "wrap",
    [list, tuple, iter, series, lambda texts: np.array(texts, object), np.array,
     lambda texts: dict.fromkeys(texts).keys()],
    ids=["list", "tuple", "generator", "series", "objects", "array", "keys"],
)  # fmt: skip
def test_any_ordered_iterable_of_texts_is_encoded(model, wrap):
    texts = MORE_TEXTS[-20:]
    np.testing.assert_array_equal(model.encode(wrap(texts)), model.encode(texts))


@pytest.mark.parametrize(
    ("kwargs", "width", "dtype"),
    [({}, 32, np.float32), ({"truncate_dim": 8}, 8, np.float32), ({"precision": "binary"}, 4, np.int8),
     ({"precision": "uint8", "truncate_dim": 16}, 16, np.uint8)],
)  # fmt: skip
def test_no_texts_yield_no_rows_of_the_right_dim_and_dtype(model, kwargs, width, dtype):
    for empty in ([], (), iter(()), np.array([], str)):
        vectors = model.encode(empty, **kwargs)
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


def frame(texts):
    import pandas as pd

    return pd.DataFrame({"text": texts, "id": range(len(texts))})


@pytest.mark.parametrize(
    "wrap",
    [frame, lambda texts: frame(texts)[["text"]], lambda texts: np.array([texts]), set, frozenset,
     lambda texts: dict.fromkeys(texts), lambda texts: b"bytes", lambda texts: bytearray(b"x"),
     lambda texts: 3, lambda texts: object(), lambda texts: np.array("x")],
    ids=["frame", "column frame", "matrix", "set", "frozenset", "dict", "bytes", "bytearray", "int",
         "object", "0-d"],
)  # fmt: skip
def test_other_containers_raise_and_name_what_to_pass(model, wrap):
    texts = wrap(["a road", "a bridge"])
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


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 1000])
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
@pytest.mark.parametrize("truncate_dim", [None, 1, 20, 32])
def test_truncation_and_normalization_equal_sentence_transformers(
    model, theirs, truncate_dim, normalize
):
    vectors = model.encode(TEXTS, truncate_dim=truncate_dim, normalize_embeddings=normalize)
    expected = theirs.encode(TEXTS, truncate_dim=truncate_dim, normalize_embeddings=bool(normalize))
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    assert vectors.flags.c_contiguous


@pytest.mark.parametrize("truncate_dim", [0, -1, 33])
def test_an_impossible_dimension_is_an_error(model, truncate_dim):
    for texts in (TEXTS, []):
        with pytest.raises(ValueError, match="truncate_dim"):
            model.encode(texts, truncate_dim=truncate_dim)


@pytest.mark.parametrize("length", [3, 8, 20])
def test_a_shorter_maximum_cuts_texts_as_in_sentence_transformers(artifact, checkpoint, length):
    ours, theirs = Embedder(artifact, precision="fp32"), reference(checkpoint)
    assert ours.max_seq_length == theirs.max_seq_length == 48
    ours.max_seq_length = theirs.max_seq_length = length
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=CLOSE)
    assert max(len(ids) for ids in ours.token_ids(TEXTS)) == length


@pytest.mark.parametrize("length", [49, 2, 0, 7.5])
def test_an_impossible_maximum_length_is_an_error(model, length):
    with pytest.raises(ValueError, match=f"max_seq_length .*got {length}"):
        model.max_seq_length = length
    assert model.max_seq_length == 48


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"batch_size": 0}, ValueError), ({"batch_size": 2.5}, ValueError),
     ({"precision": "int4"}, ValueError), ({"output_value": "all"}, ValueError),
     ({"prompt": 5}, TypeError), ({"prompt_name": b"query"}, TypeError)],
)  # fmt: skip
def test_an_invalid_option_is_named(model, options, kind):
    for texts in ([], ["a"], "a"):
        with pytest.raises(kind, match=next(iter(options))):
            model.encode(texts, **options)


# streams


def test_a_stream_reads_no_further_ahead_than_it_needs(model):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield MORE_TEXTS[taken % len(MORE_TEXTS)]

    stream = model.encode_stream(endless())
    assert taken == 0
    rows = sum(len(block) for block in islice(stream, 2))
    assert rows <= taken < 50_000
    stream.close()


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


class Bar:
    """A progress bar that notes what it is told."""

    def __init__(self, **options):
        self.unit, self.total, self.text = options["unit"], None, ""
        self.totals, self.steps = [], []

    def update(self, tokens):
        self.totals.append(self.total)
        self.steps.append(tokens)

    def set_postfix_str(self, text):
        self.text = text

    def close(self):
        pass


def test_progress_counts_tokens_and_says_how_many_there_will_be(model, monkeypatch):
    bars = []
    monkeypatch.setattr(report, "progress_bar", lambda **o: bars.append(Bar(**o)) or bars[-1])
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 60)
    texts = [f"{number} road " + "water " * (number % 20) for number in range(300)]
    sources = (texts, np.array(texts), iter(texts), (text for text in texts))
    for source, known in zip(sources, (True, True, True, False), strict=True):
        list(model.encode_stream(source, show_progress_bar=True, progress_start=1000))
        bar, tokens = bars.pop(), model.last_report.tokens
        assert (sum(bar.steps), bar.unit, bar.text) == (tokens, " tokens", "1,300 texts")
        assert bar.totals[0] == (pytest.approx(tokens, rel=0.05) if known else None)
        assert bar.totals[-1] == (tokens if known else None)
    model.encode(texts)
    assert bars == []


def test_properties(model, artifact):
    assert model.embedding_dimension == model.get_embedding_dimension() == 32
    assert model.get_sentence_embedding_dimension() == 32
    assert model.prompts == {"query": "a dog "}
    assert repr(model).startswith("Embedder('tiny', precision='fp32', dim=32, ")
    assert model.artifact.directory == artifact


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_equals_sentence_transformers(artifact, checkpoint, vectors, measure):
    opened = Artifact.open(artifact)
    manifest = replace(opened.manifest, similarity_fn_name=measure)
    ours, theirs = Embedder(Artifact(artifact, manifest)), reference(checkpoint)
    theirs.similarity_fn_name = measure
    left, right = vectors[:9] * 3, vectors[9:18]
    every, paired = ours.similarity(left, right), ours.similarity_pairwise(left, right)
    assert every.dtype == paired.dtype == np.float32
    np.testing.assert_allclose(every, theirs.similarity(left, right), atol=1e-4)
    np.testing.assert_allclose(paired, theirs.similarity_pairwise(left, right), atol=1e-4)
    np.testing.assert_allclose(
        ours.similarity(left[0], right), theirs.similarity(left[0], right), atol=1e-4
    )


def test_the_similarity_function_of_the_checkpoint_is_kept(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", normalize=False)
    change_json(checkpoint / "config_sentence_transformers.json", similarity_fn_name="dot")
    model = Embedder(export_model(checkpoint, tmp_path / "artifact", precisions=["fp32"]))
    vectors = model.encode(TEXTS)
    np.testing.assert_allclose(model.similarity(vectors, vectors), vectors @ vectors.T, rtol=1e-5)


# loading


def test_an_artifact_loads_by_path_in_every_form(artifact, vectors):
    for form in (artifact, str(artifact)):
        model = Embedder.from_pretrained(form, precision="fp32", device="cpu", threads=1)
        np.testing.assert_array_equal(model.encode(MORE_TEXTS), vectors)
    assert Embedder(Artifact.open(artifact)).embedding_dimension == 32


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
