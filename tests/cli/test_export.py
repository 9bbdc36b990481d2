"""export and verify: what they write and print, and errors."""

from __future__ import annotations

import re

import pytest

from onnxsim_embed import Embedder


def test_export_prints_files_and_fidelity(succeed, tmp_path, checkpoint, caplog):
    target = tmp_path / "new"
    out = succeed("export", checkpoint, "-o", target, "--pooled")
    assert {"verifying fp32", "quantizing to int8", "verifying int8"} <= set(caplog.messages)
    assert "onnx/model_int8_pooled.onnx" in out
    for part in ("fp32 ", "int8 ", "onnx/model.onnx", " MB ", "min cosine", "PyTorch", str(target)):
        assert part in out
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert Embedder(target).encode("a road").shape == (32,)


def test_quiet_exports_and_verifications_print_nothing(run, tmp_path, checkpoint, caplog):
    target, nothing = tmp_path / "a", (0, "", "")
    assert run("export", checkpoint, "-o", target, "--precision", "fp32", "-q") == nothing
    assert run("verify", target, "-q") == nothing
    assert caplog.messages == []


def test_sizes_and_fidelity_are_one_table(succeed, checkpoint, tmp_path, few_texts):
    options = ["--precision", "fp32,int8,fp16", "--matryoshka-dims", "16, 8"]
    options += ["--prompt", "query=find: ", "--max-seq-length", "32"]
    out = succeed("export", checkpoint, "-o", tmp_path / "a", *options)
    header = next(line for line in out.splitlines() if "min cosine" in line)
    assert header.split()[:2] == ["precision", "size"]
    for precision in ("fp32", "int8", "fp16"):
        assert re.search(rf"^{precision} +\d+\.\d MB +(PyTorch|fp32) ", out, re.MULTILINE)
    for fact in ("directly", "matryoshka dims  16, 8", "query: 'find: '", "max tokens       32"):
        assert fact in out


def test_export_replaces_an_artifact_only_by_force(
    succeed, reject, tmp_path, checkpoint, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    succeed("export", checkpoint, "--precision", "fp32")
    target = tmp_path / f"{checkpoint.name}-onnx"  # the default name
    before = (target / "onnxsim_embed.json").read_bytes()
    assert "--force" in reject("export", checkpoint)
    assert (target / "onnxsim_embed.json").read_bytes() == before
    succeed("export", checkpoint, "--force")
    assert (target / "onnx/model_int8.onnx").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt", "query", "NAME=TEXT"),
        ("--prompt", "=x", "NAME=TEXT"),
        ("--matryoshka-dims", "16,x", "got 'x'"),
        ("--via", "magic", "optimum, adopt"),
        ("--precision", "fp8", "fp32, int8, fp16"),
        ("--pooling", "median", "unknown pooling 'median'"),
        ("--min-fidelity", "2,0", "got '2,0'"),
    ],
)
def test_a_wrong_option_names_what_is_allowed(reject, checkpoint, tmp_path, option, value, message):
    assert message in reject("export", checkpoint, "-o", tmp_path / "a", option, value)
    assert list(tmp_path.iterdir()) == []


def test_calibration_texts_come_from_a_file(run, reject, tmp_path, checkpoint):
    texts, target = tmp_path / "texts.csv", tmp_path / "new"
    lines = "".join(f"{i},project {i} in the village\n" for i in range(30))
    texts.write_text(f"id,name\n{lines}", encoding="utf-8")
    arguments = ["export", checkpoint, "-o", target, "--calibrate", texts]
    assert "id, name" in reject(*arguments)
    code, out, _ = run(*arguments, "--column", "name", "--min-fidelity", "0.5,0.1")
    assert (code, target.is_dir()) == (0, True), out


@pytest.mark.parametrize("option", ["--min-fidelity", "--bar"])
def test_verify_exits_with_one_below_the_threshold(run, artifact, option):
    code, out, err = run("verify", artifact, option, "1,1")
    assert (code, "\nint8 " in out, "\nNot faithful: the vectors of " in out) == (1, True, True)
    assert err.startswith("onnxsim-embed: int8 is not faithful to fp32")
    assert err.count("\n") == 1
