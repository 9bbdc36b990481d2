"""Recipes: every one reads, and says sane things with a source for each."""

import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import contents

from onnxsim_embed.artifact import recipes as module
from onnxsim_embed.artifact.recipes import find_recipe, read_recipe, recipes, recipes_directory
from onnxsim_embed.runtime.pooling import PoolingMode

ROOT = Path(__file__).resolve().parent.parent.parent
EVERY = pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)

MINIMAL = """
name = "x"
source = "owner/x"
revision = "1"
licence = "MIT"
architecture = "bert"
layers = 1
dim = 2
max_seq_length = 3
pooling = "mean"
normalize = true
summary = "X."
"""


def test_every_file_is_a_recipe_of_its_own_name_and_other_names_are_unknown():
    files = sorted(path.name for path in recipes_directory().iterdir())
    assert files == sorted(f"{recipe.name}.toml" for recipe in recipes())
    assert find_recipe("no-such-model") is find_recipe("") is None


@EVERY
def test_facts_are_sane_and_have_a_source(recipe):
    for name in (recipe.name, recipe.source, *recipe.aliases):
        assert find_recipe(name) is find_recipe(name.upper()) is recipe
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.source)
    assert re.fullmatch(r"[0-9a-f]{40}", recipe.revision)
    assert recipe.licence in ("Apache-2.0", "MIT")
    assert recipe.architecture
    assert 1 <= recipe.layers <= 48
    assert recipe.dim % 64 == 0
    assert recipe.max_seq_length in (128, 256, 384, 512, 8192)
    assert PoolingMode.parse(recipe.pooling).value == recipe.pooling
    assert isinstance(recipe.normalize, bool)
    assert recipe.summary.endswith(".")
    assert "\n" not in recipe.summary
    assert all(isinstance(text, str) for text in recipe.prompts.values())
    assert (recipe.package is None) == (recipe.package_path is None)
    needed = {"licence", "architecture", "pooling", "max_seq_length", "normalize", "revision"}
    needed |= {"prompts"} if recipe.prompts else set()
    needed |= {"package"} if recipe.package else set()
    assert set(recipe.sources) >= needed
    assert all(url.startswith("https://") for url in recipe.sources.values())


@EVERY
def test_known_answers_have_the_shape_of_their_texts(recipe):
    for answer in recipe.known_answers:
        n = len(answer.texts)
        assert answer.source
        assert 0 < answer.tolerance <= 1e-3
        assert answer.prompt_name is None or answer.prompt_name in recipe.prompts
        assert answer.max_length is None or answer.max_length <= recipe.max_seq_length
        assert answer.normalize in (None, True, recipe.normalize)
        assert len(answer.token_counts or answer.texts) == n
        matrix, rest = answer.cosine_matrix, answer.cosine_of_first_to_rest
        rows = [part for part in (answer.vector_head, answer.vector_tail) if part is not None]
        assert matrix or rest or rows or answer.norms
        if matrix is not None:
            np.testing.assert_array_equal(matrix, np.transpose(matrix))
            np.testing.assert_array_equal(np.diag(matrix), np.ones(n))
        assert rest is None or len(rest) == n - 1
        for part in rows:
            assert np.shape(part)[0] <= n
            assert 3 <= np.shape(part)[1] <= recipe.dim


# Reading


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + 'colour = "red"', r"x.toml: unknown keys \['colour'\]; known are"),
        (MINIMAL + "[[known_answers]]\ntext = 1", r"x.toml, known_answers 1: unknown keys \['text'\]"),
        (MINIMAL + '[[known_answers]]\nsource = ""\ntexts = []', "x.toml, known_answers 1: .*tolerance"),
        (MINIMAL.replace('licence = "MIT"', ""), "x.toml: .*licence"),
        ("name = ", "x.toml"),
        ("\xff", "x.toml"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_read_names_its_file(tmp_path, text, message):
    (tmp_path / "x.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "x.toml")


# Packages


@pytest.mark.parametrize(
    ("path", "directory"),
    [(None, None), ("no_such_module/model", None), ("onnxsim_embed/nowhere", None),
     ("onnxsim_embed/data", ROOT / "onnxsim_embed/data")],
    ids=["none", "module", "path", "data"],
)  # fmt: skip
def test_the_directory_inside_an_installed_package(path, directory):
    assert replace(find_recipe("minilm"), package_path=path).installed_directory() == directory


def test_an_archive_in_several_packages_is_unpacked_once(tmp_path, monkeypatch):
    archive = tmp_path / "whole.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("model/modules.json", "[]")
        stream.writestr("model/1_Pooling/config.json", "{}")
    content = archive.read_bytes()
    recipe = replace(find_recipe("minilm"), package="p-1 p-2", package_path="p_*/x.zip.*")
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    for number, part in enumerate((content[:50], content[50:]), start=1):
        assert recipe.installed_directory() is None
        monkeypatch.syspath_prepend(tmp_path / f"site{number}")
        path = tmp_path / f"site{number}/p_{number}/x.zip.00{number}"
        path.parent.mkdir(parents=True)
        path.write_bytes(part)
    directory = recipe.installed_directory()
    assert directory == tmp_path / "cache/packages" / recipe.name / "model"
    assert sorted(contents(directory)) == ["1_Pooling/config.json", "modules.json"]
    path.write_bytes(b"")  # not read again
    assert recipe.installed_directory() == directory


def test_recipes_ship_inside_the_wheel():
    project = module.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["models"] == "onnxsim_embed/models"
    assert "models" in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    minilm = find_recipe("minilm").package
    assert [minilm] == [
        p.split("==")[0] for p in project["project"]["optional-dependencies"]["minilm"]
    ]


def test_an_installed_folder_of_recipes_comes_first(tmp_path, monkeypatch):
    (tmp_path / "onnxsim_embed/models").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "onnxsim_embed/artifact/recipes.py"))
    assert recipes_directory() == tmp_path / "onnxsim_embed/models"
    (tmp_path / "onnxsim_embed/models").rmdir()
    assert recipes_directory() == tmp_path / "models"
