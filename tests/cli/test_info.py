"""models and info."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import provenance

from onnxsim_embed.artifact import recipes
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.files.vectors import write_vectors


def test_models_lists_every_recipe(succeed):
    out = succeed("models")
    listed = [line.split()[0] for line in out.splitlines() if line]
    assert listed[2:] == [recipe.name for recipe in recipes.recipes()]


def test_models_verify_prints_a_result_for_each(run, succeed, monkeypatch):
    real = recipes.find_recipe("all-MiniLM-L6-v2")
    known = [replace(real, name=name) for name in ("absent", "broken", "fine")]
    report = {"min_cosine": 1.0, "reference": "PyTorch", "problems": []}

    def verify_recipe(recipe, **options):
        if recipe.name == "absent":
            raise CheckpointError("cannot get it")
        return report | {"problems": ["norms differ"] if recipe.name == "broken" else []}

    monkeypatch.setattr(recipes, "recipes", lambda: tuple(known))
    monkeypatch.setattr("onnxsim_embed.export.verify_recipe", verify_recipe)
    code, out, err = run("models", "--verify")
    assert (code, err) == (1, "onnxsim-embed: broken: norms differ\n")
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "no weights" in rows["absent"]
    assert "MISSED" in rows["broken"]
    assert "reproduced" in rows["fine"]
    assert "cannot get it" in out
    monkeypatch.setattr(recipes, "recipes", lambda: (known[0], known[2]))
    succeed("models", "--verify")


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "minilm", "BAAI/bge-base-en-v1.5"])
def test_info_describes_a_recipe(succeed, name):
    out = succeed("info", name)
    for field in ("source", "licence", "pooling", "max tokens", "prompts"):
        assert f"\n{field} " in out


def test_info_describes_an_artifact(succeed, artifact):
    out = succeed("info", artifact)
    for part in ("mean, then L2", "onnx/model_int8.onnx", " MB ", "min cosine", "query: 'a dog '"):
        assert part in out


def test_info_of_other_directories_and_names(reject, tmp_path, checkpoint):
    for directory in (tmp_path, checkpoint):
        assert "onnxsim_embed.json" in reject("info", directory, code=1)
    assert "onnxsim-embed models" in reject("info", "no-such-model", code=1)


def test_info_describes_vectors_with_and_without_provenance(
    run, succeed, tmp_path, artifact, texts_csv
):
    write_vectors(np.zeros((3, 4), np.float32), tmp_path / "p.npy", provenance(model="ti\x1bny"))
    _, out, _ = run("info", tmp_path / "p.npy")
    assert all(value in out for value in ("fp32", "cd", "a dog"))
    assert "\x1b" not in out
    np.save(tmp_path / "plain.npy", np.zeros((3, 4), np.float16))
    code, out, _ = run("info", tmp_path / "plain.npy")
    assert (code, "4 float16" in out, "unknown" in out) == (0, True, True)
    succeed("encode", texts_csv, "-m", artifact, "-o", tmp_path / "v.npy")
    code, out, _ = run("info", tmp_path / "v.npy")
    fields = dict(line.split("  ", 1) for line in out.splitlines())
    assert {name: fields[name].strip() for name in ("rows", "components", "dtype", "prompt")} == {
        "rows": "12", "components": "32 float32", "dtype": "float32", "prompt": "None",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "lines"),
    [("avx2", ["does not run here: the processor has neither avx512_bf16 nor amx_bf16", "no AMX"]),
     ("avx512_vnni avx512_bf16", ["--precision bf16 runs here", "avx512_bf16", "no AMX"]),
     ("avx512_vnni amx_bf16 amx_int8", ["--precision bf16 runs here", "amx_bf16, amx_int8: bf16"])],
)  # fmt: skip
def test_info_says_what_the_processor_offers(run, tmp_path, monkeypatch, flags, lines):
    (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
    monkeypatch.setattr("onnxsim_embed.system.hardware.CPUINFO", tmp_path / "cpuinfo")
    _, out, _ = run("info", "minilm")
    assert all(line in out for line in lines), out


def test_info_names_wheels_of_onnxruntime_that_overwrite_each_other(run, artifact, monkeypatch):
    monkeypatch.setattr("onnxsim_embed.system.hardware.WHEELS", ["numpy", "no-such-package"])
    assert "overwrite" not in run("info", artifact)[1]
    monkeypatch.setattr("onnxsim_embed.system.hardware.WHEELS", ["numpy", "scipy"])
    assert "numpy and scipy are installed together" in run("info", artifact)[1]
