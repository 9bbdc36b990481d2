"""Python as people write it: notebooks of other libraries with one import changed, and their habits."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from support import TEXTS, jargon_pairs, write_checkpoint

import onnxsim_embed
from onnxsim_embed import AsyncEmbedder, Embedder, VectorIndex, deduplicate, similarity_matrix, util
from onnxsim_embed.errors import ArtifactError, TableError
from onnxsim_embed.export import export_model

pytestmark = pytest.mark.usefixtures("few_texts")

THEIRS = "from sentence_transformers import SentenceTransformer, util"
OURS = "from onnxsim_embed import Embedder as SentenceTransformer, util"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with an empty cache of models; weights are float32 on any processor."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    no_int8 = (False, "this is a test")
    monkeypatch.setattr("onnxsim_embed.artifact.precision.int8_supported", lambda: no_int8)
    return tmp_path


def run_cells(cells, names, **replaced):
    """Run the cells of a notebook one after the other; return its variables."""
    for cell in cells:
        for old, new in replaced.items():
            cell = cell.replace(old, new)
        exec(inspect.cleandoc(cell), names)
    return names


# notebooks


CAPITALS = [
    f"{THEIRS}; model = SentenceTransformer(MODEL)",
    """
    def embed(text):
        return model.encode(text.replace("\\r", " ").replace("\\n", " "), normalize_embeddings=True)
    embeddings = [embed(text) for text in sentences]
    """,
    "scores = util.cos_sim(embeddings, embeddings)",
]


def test_a_heatmap_of_five_texts(home):
    """bge-base-en: CLS pooling, one text at a time, 5 x 5 scores."""
    checkpoint = write_checkpoint(home / "bge", pooling="cls", seed=3)
    artifact = export_model(checkpoint, home / "artifact", precisions=["fp32"]).directory
    sentences = [f"{text}\n{text}" for text in TEXTS[:5]]
    theirs = run_cells(CAPITALS, {"sentences": sentences, "MODEL": str(checkpoint)})
    ours = run_cells(CAPITALS, {"sentences": sentences, "MODEL": artifact}, **{THEIRS: OURS})
    np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-5)
    figure = onnxsim_embed.plot.heatmap(ours["scores"], labels=sentences)
    assert figure.axes[0].images[0].get_array().shape == (5, 5)


DESCRIPTIONS = [
    f"""
    import numpy as np
    from scipy import sparse
    {THEIRS}
    model = SentenceTransformer(MODEL)
    """,
    """
    embeddings = model.encode(sentences, batch_size=32, show_progress_bar=True,
                              convert_to_numpy=True, device=None)
    tensors = model.encode(sentences, convert_to_tensor=True)
    """,
    """
    scores = np.asarray(util.pytorch_cos_sim(tensors, tensors))
    kept = sparse.coo_matrix(np.where(scores > 0.5, scores, 0))
    sparse.save_npz("similar.npz", kept)
    """,
]


def test_descriptions_above_a_threshold(home, checkpoint, capsys):
    """all-MiniLM-L6-v2: a checkpoint, exported on first use; the dense way and the sparse one."""
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 3)]
    kept = {}
    for line in (THEIRS, OURS):
        names = {"sentences": texts, "MODEL": str(checkpoint)}
        names = run_cells(DESCRIPTIONS, names, **{THEIRS: line})
        assert type(names["tensors"]).__name__ == "Tensor"
        np.testing.assert_array_equal(names["tensors"].numpy(), names["embeddings"])
        kept[line] = names["sparse"].load_npz("similar.npz").toarray()
    clear = np.abs(kept[THEIRS] - 0.5) > 1e-5
    np.testing.assert_allclose(kept[OURS][clear], kept[THEIRS][clear], atol=1e-5)
    sparse = similarity_matrix(names["embeddings"], 0.5)
    np.testing.assert_allclose(sparse.toarray(), kept[OURS], atol=1e-6)
    assert list((home / "cache").glob("tiny-*/onnxsim_embed.json"))
    assert " tokens" in capsys.readouterr().err


def test_fine_tuning_on_pairs_of_sentences(home, checkpoint):
    """A list of pairs, as InputExample(texts=[a, b]) holds them; the result encodes and is better."""
    from onnxsim_embed.finetune import finetune

    pairs = list(zip(*jargon_pairs(64), strict=True))
    options = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3}
    result = finetune(pairs, home / "tuned", model=checkpoint, **options)
    model = Embedder(home / "tuned")
    assert result.report["pairs"]["read"] == 64
    sources, targets = model.encode([a for a, _ in pairs]), model.encode([b for _, b in pairs])
    base = Embedder(checkpoint)
    before = [base.encode([pair[side] for pair in pairs]) for side in (0, 1)]
    assert util.pairwise_cos_sim(sources, targets).mean() > util.pairwise_cos_sim(*before).mean()


# arguments that other libraries have


def test_tensors_are_those_of_torch(artifact):
    torch = pytest.importorskip("torch")
    model = Embedder(artifact, precision="fp32")
    vectors = model.encode(TEXTS)
    for encode in (model.encode, model.encode_document):
        tensor = encode(TEXTS, convert_to_tensor=True)
        assert torch.equal(tensor, torch.from_numpy(vectors))
        assert torch.equal(encode(TEXTS[0], convert_to_tensor=True), tensor[0])
        assert all(map(torch.equal, encode(TEXTS, convert_to_numpy=False), tensor))
    tokens = model.encode(TEXTS, output_value="token_embeddings", convert_to_tensor=True)
    assert [len(states) for states in tokens] == [len(ids) for ids in model.token_ids(TEXTS)]


def test_without_torch_tensors_are_an_error_that_says_what_to_do(artifact, monkeypatch):
    model = Embedder(artifact, precision="fp32")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        model.encode(TEXTS, convert_to_tensor=True)


def test_the_device_is_that_of_the_model(artifact):
    model = Embedder(artifact, precision="fp32")
    for device in (None, "cpu", "auto"):
        assert model.encode("a road", device=device).shape == (32,)
    with pytest.raises(ValueError, match=r"device='cuda'; load it with"):
        model.encode("a road", device="cuda")


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_each_precision_error_names_the_other(artifact, weights):
    model = Embedder(artifact, precision="int8")
    with pytest.raises(ValueError, match=rf"{weights} is a weight precision: Embedder\(") as error:
        model.encode(TEXTS, precision=weights)
    assert "float32, float16, int8" in str(error.value)
    with pytest.raises(ValueError, match=r"auto, fp32, int8.* argument of encode: float32"):
        Embedder(artifact, precision="float32")


def test_util_is_there_and_shows_its_public_names():
    from onnxsim_embed import plot

    assert onnxsim_embed.util is util
    assert onnxsim_embed.plot is plot
    assert dir(util) == sorted(util.__all__)
    assert util.cos_sim is util.pytorch_cos_sim is onnxsim_embed.cos_sim


@pytest.mark.parametrize("threshold", [np.eye(3), None, "0.5"], ids=["vectors", "None", "text"])
@pytest.mark.parametrize("compare", [similarity_matrix, onnxsim_embed.similar_pairs])
def test_what_is_no_threshold_is_named(compare, threshold):
    with pytest.raises(TypeError, match=f"got {type(threshold).__name__}.*`other`.*cos_sim"):
        compare(np.eye(3), threshold)
    assert compare(np.eye(3), np.float32(0.5)) is not None


# pickles, copies, processes


def test_another_process_encodes(artifact):
    model = Embedder(artifact, precision="fp32", threads=1)
    model.max_seq_length = 8
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as processes:
        vectors = processes.submit(model.encode, TEXTS).result()
    np.testing.assert_array_equal(vectors, model.encode(TEXTS))


def test_a_pickle_of_a_model_that_moved_says_so(artifact, tmp_path, monkeypatch):
    shutil.copytree(artifact, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Embedder("model", precision="fp32"))
    monkeypatch.chdir("/")  # the path is absolute
    assert pickle.loads(pickled).encode("a road").shape == (32,)
    (tmp_path / "model").rename(tmp_path / "other")
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/model, where there is none now"):
        pickle.loads(pickled)


@pytest.mark.parametrize("mapped", [False, True])
def test_an_index_pickles_and_copies(tmp_path, mapped):
    vectors = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    index = VectorIndex(np.load(tmp_path / "vectors.npy", mmap_mode="r" if mapped else None))
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000 if mapped else len(pickled) > vectors.nbytes
    expected = index.search(vectors[:3], 5)
    for other in (pickle.loads(pickled), copy.deepcopy(index)):
        for found, wanted in zip(other.search(vectors[:3], 5), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    part = pickle.loads(pickle.dumps(VectorIndex(index.vectors[10:20])))
    np.testing.assert_array_equal(part.vectors, vectors[10:20])
    (tmp_path / "vectors.npy").unlink()
    if mapped:
        with pytest.raises(TableError, match=r"vectors\.npy, which cannot be read now"):
            pickle.loads(pickled)


def test_every_repr_fits_a_line(artifact):
    model = Embedder(artifact, precision="fp32", threads=2)
    vectors = model.encode(TEXTS * 100)
    index = VectorIndex(vectors)
    shown = [model, model.artifact, AsyncEmbedder(model), index, deduplicate(vectors, 0.9)]
    assert repr(index) == f"VectorIndex({len(vectors):,} vectors, dim=32, dtype=float32)"
    for each in shown:
        assert repr(each).startswith(type(each).__name__ + "(")
        assert len(repr(each)) < 200
