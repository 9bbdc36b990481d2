"""The commands `eval` and `verify`."""

from __future__ import annotations

import json
import shutil

import pytest
from support import SCORED_PAIRS, TEXTS, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.evaluation import evaluate_sts

# eval


def write_pairs(path):
    rows = "".join(f"{a},{b},{score}\n" for a, b, score in zip(*SCORED_PAIRS, strict=True))
    path.write_text("sentence1,sentence2,score\n" + rows, encoding="utf-8")
    return path


def table(out: str) -> dict[str, list[str]]:
    rows = [line.split() for line in out.splitlines() if line.startswith(("fp32", "int8"))]
    return {name: cells for name, *cells in rows}


def test_eval_prints_correlations_of_each_precision(succeed, tmp_path, artifact):
    out = succeed("eval", write_pairs(tmp_path / "pairs.csv"), "--model", artifact)
    found = evaluate_sts(Embedder(artifact, precision="fp32"), *SCORED_PAIRS)
    assert list(table(out)) == ["fp32", "int8"]
    assert table(out)["fp32"][:3] == [f"{found.spearman:.2f}", f"{found.pearson:.2f}", "6"]
    assert table(out)["int8"][2] == "6"


def test_eval_takes_the_precisions_it_is_given(run, succeed, tmp_path, artifact):
    pairs = write_pairs(tmp_path / "pairs.csv")
    options = ["--precision", "int8", "--device", "cpu", "--threads", "1"]
    out = succeed("eval", pairs, "-m", artifact, *options)
    assert list(table(out)) == ["int8"]
    cut = run("eval", pairs, "-m", artifact, *options, "--max-seq-length", 3)[1]
    assert table(cut)["int8"][:2] != table(out)["int8"][:2]


def test_eval_reads_other_delimiters_and_skips_rows(
    run, succeed, reject, tmp_path, artifact, caplog
):
    path = tmp_path / "pairs.csv"
    path.write_text("a~b~x\nthe road~the river~2\na cat~~4,5\n\ndata~code~1\nsun~sky~4\n")
    arguments = ("eval", path, "-m", artifact, "--precision", "fp32", "--delimiter", "~")
    assert "row 2 " in reject(*arguments, code=1)
    code, out, _ = run(*arguments, "--on-error", "skip")
    assert (code, table(out)["fp32"][2]) == (0, "3")
    assert "2 of 6 rows without a pair are skipped: rows 2, 3" in caplog.text
    succeed(*arguments, "--on-error", "skip", "--no-header")
    assert "3 of 6 rows without a pair are skipped: rows 0, 2, 3" in caplog.text


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("left,right,score\na,b,1\nc,d,\n", 1, "line 3"),
        ("left,right,score\n", 1, "no scored pairs"),
        ("a,b,1\nc,d,1\n", 2, "two different"),
    ],
)
def test_eval_says_what_is_wrong_with_its_file(reject, tmp_path, artifact, text, code, message):
    path = tmp_path / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    assert message in reject("eval", path, "-m", artifact, code=code)


# verify


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_verify_compares_int8_with_fp32(succeed, artifact, texts_file):
    out = succeed("verify", artifact, "--texts", texts_file)
    assert list(table(out)) == ["int8"]
    assert table(out)["int8"][:2] == ["fp32", str(len(TEXTS))]


def test_verify_against_a_checkpoint_compares_fp32_too(succeed, artifact, checkpoint, texts_file):
    out = succeed("verify", artifact, "--against", checkpoint, "--texts", texts_file)
    assert list(table(out)) == ["fp32", "int8"]
    assert table(out)["fp32"][:2] == ["PyTorch", str(len(TEXTS))]


def test_verify_against_another_checkpoint_fails(run, artifact, tmp_path, texts_file):
    other = write_checkpoint(tmp_path / "other", seed=3)
    code, out, err = run("verify", artifact, "--against", other, "--texts", texts_file)
    assert code == 1
    assert "fp32 is not faithful to PyTorch: mean cosine " in err
    assert list(table(out)) == ["fp32", "int8"]


def test_verify_of_a_damaged_file_fails_naming_it(reject, artifact, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes()[:-1])
    assert f"{copy / 'tokenizer.json'} is damaged" in reject("verify", copy, code=1)
