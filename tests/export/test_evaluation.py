"""Correlation with human scores, and the commands `eval` and `verify`."""

import json
import shutil

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr
from support import TEXTS, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import MODEL_FILES, PRECISIONS
from onnxsim_embed.evaluation import evaluate_sts

LEFT = ["solar energy", "the water of the river", "a cat", "rural school", "data code", "x"]
RIGHT = ["energy of the sun", "the river", "a dog", "village market", "the sky today", "x"]
SCORES = [4.2, 3.5, 3.0, 1.5, 0.0, 5.0]


@pytest.fixture(scope="module")
def model(artifact) -> Embedder:
    return Embedder(artifact, precision="fp32", threads=1)


@pytest.fixture
def refuse(run):
    """Call the program, expecting an exit code and one line; return the line."""

    def call(*arguments, code):
        got, out, err = run(*arguments)
        assert (got, out) == (code, ""), err
        assert err.startswith("onnxsim-embed: ")
        assert err.count("\n") == 1
        return err

    return call


class Fixed:
    """A model whose cosines are given: each pair is a fixed angle apart."""

    def __init__(self, cosines):
        self.cosines = np.asarray(cosines, np.float64)

    def encode(self, texts):
        n = len(texts) // 2
        left = np.tile([1, 0], (n, 1))
        right = np.stack([self.cosines, np.sqrt(1 - self.cosines**2)], axis=1)
        return np.concatenate([left, right]).astype(np.float32)


# Correlation


def test_correlations_equal_the_plain_computation():
    cosines, human = [0.9, 0.1, 0.5, 0.5, -0.3], [5, 1, 2, 4, 0]
    found = evaluate_sts(Fixed(cosines), ["a"] * 5, ["b"] * 5, human)
    ranks = np.corrcoef(rankdata(cosines), rankdata(human))[0, 1]
    assert found.pairs == 5
    assert found.spearman == pytest.approx(100 * ranks, abs=1e-4)
    assert found.pearson == pytest.approx(100 * np.corrcoef(cosines, human)[0, 1], abs=1e-4)


def test_correlations_of_a_model_equal_scipy_s(model):
    a, b = model.encode(LEFT).astype("f8"), model.encode(RIGHT).astype("f8")
    cosines = (a * b).sum(axis=1)
    found = evaluate_sts(model, LEFT, RIGHT, SCORES)
    assert found.spearman == pytest.approx(100 * spearmanr(cosines, SCORES).statistic, abs=1e-6)
    assert found.pearson == pytest.approx(100 * pearsonr(cosines, SCORES).statistic, abs=1e-3)


@pytest.mark.parametrize(("scale", "shift"), [(20, 0), (1, -2.5), (0.01, 7)])
def test_scores_may_be_on_any_scale(model, scale, shift):
    plain = evaluate_sts(model, LEFT, RIGHT, SCORES)
    moved = evaluate_sts(model, LEFT, RIGHT, np.array(SCORES) * scale + shift)
    assert moved.spearman == pytest.approx(plain.spearman)
    assert moved.pearson == pytest.approx(plain.pearson)


def test_the_order_of_a_pair_does_not_matter(model):
    forwards, backwards = (
        evaluate_sts(model, *sides, SCORES) for sides in ((LEFT, RIGHT), (RIGHT, LEFT))
    )
    assert forwards.spearman == pytest.approx(backwards.spearman)
    assert forwards.pearson == pytest.approx(backwards.pearson)


@pytest.mark.parametrize(
    ("left", "right", "scores", "message"),
    [
        (LEFT, RIGHT[:-1], SCORES, "equal lengths, got 6, 5 and 6"),
        (LEFT, RIGHT, SCORES[:-1], "equal lengths, got 6, 6 and 5"),
        (LEFT[:2], RIGHT[:2], [1, float("nan")], "must be finite"),
        (LEFT[:2], RIGHT[:2], [1, float("inf")], "must be finite"),
        (LEFT[:3], RIGHT[:3], [2, 2, 2], "not all the same"),
        (LEFT[:1], RIGHT[:1], [2], "not all the same"),
        ([], [], [], "not all the same"),
    ],
)
def test_pairs_that_have_no_correlation_are_refused(model, left, right, scores, message):
    with pytest.raises(ValueError, match=message):
        evaluate_sts(model, left, right, scores)


def test_equal_texts_in_every_pair_are_no_crash(model):
    found = evaluate_sts(Fixed([1, 1, 1]), LEFT[:3], LEFT[:3], [1, 2, 3])
    assert found.pairs == 3
    assert not found.spearman > 0


# eval


def write_pairs(path, header: bool = True, separator: str = ","):
    rows = [list(map(str, row)) for row in zip(LEFT, RIGHT, SCORES, strict=True)]
    lines = [["sentence1", "sentence2", "score"], *rows] if header else rows
    path.write_text("\n".join(map(separator.join, lines)) + "\n", encoding="utf-8")
    return path


def table(out: str) -> dict[str, list[str]]:
    rows = [line.split() for line in out.splitlines() if line.startswith(("fp32", "int8"))]
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(("name", "separator"), [("pairs.csv", ","), ("pairs.tsv", "\t")])
def test_eval_reads_pairs_with_and_without_a_header(
    run, tmp_path, artifact, model, header, name, separator
):
    code, out, err = run(
        "eval", write_pairs(tmp_path / name, header, separator), "--model", artifact
    )
    assert (code, err) == (0, "")
    found = evaluate_sts(model, LEFT, RIGHT, SCORES)
    assert list(table(out)) == ["fp32", "int8"]
    assert table(out)["fp32"][:3] == [f"{found.spearman:.2f}", f"{found.pearson:.2f}", "6"]
    assert table(out)["int8"][2] == "6"


def test_eval_takes_the_precisions_it_is_given(run, tmp_path, artifact):
    pairs = write_pairs(tmp_path / "pairs.csv")
    code, out, _ = run("eval", pairs, "-m", artifact, "--precision", "int8", "--threads", "1")
    assert code == 0
    assert list(table(out)) == ["int8"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("a,b,1\nc,d\n", 1, "line 2"),
        ("a,b,1\nc,d,good\n", 1, "line 2"),
        ("left,right,score\na,b,1\nc,d,\n", 1, "line 3"),
        ("left,right,score\n", 1, "no scored pairs"),
        ("", 1, "no scored pairs"),
        ("a,b,1\nc,d,1\n", 2, "not all the same"),
        ("a,b,1\nc,d,nan\n", 2, "finite"),
    ],
)
def test_eval_says_what_is_wrong_with_its_file(refuse, tmp_path, artifact, text, code, message):
    path = tmp_path / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    assert message in refuse("eval", path, "-m", artifact, code=code)


def test_eval_of_a_missing_file_or_precision_is_refused(refuse, tmp_path, artifact):
    assert "no file" in refuse("eval", tmp_path / "absent.csv", "-m", artifact, code=2)
    pairs = write_pairs(tmp_path / "pairs.csv")
    assert "int4" in refuse("eval", pairs, "-m", artifact, "--precision", "int4", code=2)


# verify


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_verify_compares_int8_with_fp32(run, artifact, texts_file):
    code, out, err = run("verify", artifact, "--texts", texts_file)
    assert (code, err) == (0, "")
    assert list(table(out)) == ["int8"]
    assert table(out)["int8"][:2] == ["fp32", str(len(TEXTS))]


def test_verify_against_a_checkpoint_compares_fp32_too(run, artifact, checkpoint, texts_file):
    code, out, err = run("verify", artifact, "--against", checkpoint, "--texts", texts_file)
    assert (code, err) == (0, "")
    assert list(table(out)) == ["fp32", "int8"]
    assert table(out)["fp32"][:2] == ["PyTorch", str(len(TEXTS))]


def test_verify_against_another_checkpoint_fails(run, artifact, tmp_path, texts_file):
    other = write_checkpoint(tmp_path / "other", seed=3)
    code, out, err = run("verify", artifact, "--against", other, "--texts", texts_file)
    assert code == 1
    assert "fp32 is not faithful to PyTorch: mean cosine " in err
    assert list(table(out)) == ["fp32", "int8"]


def test_verify_below_the_bar_fails_with_the_numbers(run, artifact, texts_file):
    code, out, err = run("verify", artifact, "--texts", texts_file, "--bar", "0.9999999,0.9999999")
    assert code == 1
    assert err.startswith("onnxsim-embed: int8 is not faithful to fp32: mean cosine 0.9")
    assert "(at least 0.9999999)" in err
    assert err.count("\n") == 1
    assert list(table(out)) == ["int8"]


@pytest.mark.parametrize("name", ["tokenizer.json", *(MODEL_FILES[p] for p in PRECISIONS)])
def test_verify_of_a_damaged_file_fails_naming_it(refuse, artifact, tmp_path, name):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert f"{copy / name} is damaged" in refuse("verify", copy, code=1)


def test_verify_needs_an_artifact_and_two_texts(refuse, artifact, checkpoint, tmp_path):
    assert "does not exist" in refuse("verify", tmp_path / "absent", code=1)
    assert "not an artifact" in refuse("verify", checkpoint, code=1)
    single = tmp_path / "single.txt"
    single.write_text("one text\n", encoding="utf-8")
    assert "at least 2 texts, got 1" in refuse("verify", artifact, "--texts", single, code=2)
