"""The package as a whole: import cost, the core environment, names, and nothing of this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import TEXTS

import onnxsim_embed
from onnxsim_embed import Embedder
from onnxsim_embed.artifact.recipes import tomllib

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "onnx", "onnxruntime", "pandas", "matplotlib", "pyarrow",
         "sentence_transformers", "scipy", "tokenizers", "numpy"]  # fmt: skip


def fresh(code, *arguments):
    """Run code in an interpreter of its own; return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


# what an import costs


@pytest.mark.parametrize(
    ("modules", "foreign"),
    [("onnxsim_embed.util", "torch onnxruntime"), ("onnxsim_embed.finetune, onnxsim_embed.cli", "torch"),
     ("onnxsim_embed.cli, onnxsim_embed.ray, onnxsim_embed.ray.texts", "ray pyarrow pandas")],
)  # fmt: skip
def test_modules_load_nothing_that_they_can_do_without(modules, foreign):
    loaded = fresh(f"import sys, {modules}; print(*sys.modules)").split()
    assert "onnxsim_embed" in loaded
    assert not set(foreign.split()) & set(loaded)


def test_importing_loads_nothing_heavy_and_has_no_side_effects():
    code = """
import logging, os, sys, warnings
before = dict(os.environ), list(warnings.filters), logging.root.level, list(logging.root.handlers)
import onnxsim_embed
assert before == (dict(os.environ), warnings.filters, logging.root.level, logging.root.handlers)
print(*sys.modules)
"""
    assert not set(HEAVY) & set(fresh(code).split())


# what the core environment can do


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def missing_from_core():
    """Installed modules that an environment with only the core and its engine would not have."""
    wanted, core = ["onnxsim-embed", "onnxruntime"], set()  # the extra cpu
    while wanted:
        name = plain(wanted.pop())
        if name in core:
            continue
        core.add(name)
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                wanted.append(needed.name)
    return {
        module
        for module, names in packages_distributions().items()
        if not core & {plain(name) for name in names}
    }


ONLY_CORE = """
import importlib.util, json, sys

class OnlyCore:
    missing = set(json.loads(sys.argv.pop(1)))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.missing:
            raise ModuleNotFoundError(f"no {name!r} in the core environment", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in OnlyCore.missing else find_spec(name, *rest)
)
sys.meta_path.insert(0, OnlyCore())
"""


def only_core(code, *arguments, without=()):
    missing = sorted(missing_from_core() | set(without))
    return fresh(ONLY_CORE + code, json.dumps(missing), *arguments)


def test_extras_are_no_part_of_the_core():
    extras = ["torch", "onnx", "transformers", "matplotlib", "pyarrow", "pandas"]
    code = f"""
from contextlib import suppress
for name in {extras}:
    with suppress(ModuleNotFoundError):
        __import__(name)
        print(name)
"""
    assert only_core(code) == ""


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_core_encodes_with_an_exported_artifact(artifact, precision):
    code = """
from onnxsim_embed import Embedder, similarity_matrix, top_k
model = Embedder.from_pretrained(sys.argv[1], precision=sys.argv[2])
vectors = model.encode(json.loads(sys.argv[3]))
assert similarity_matrix(vectors, 0.5).shape == (len(vectors), len(vectors))
assert top_k(vectors, vectors, 2).indices.shape == (len(vectors), 2)
print(json.dumps(vectors.tolist()))
"""
    printed = only_core(code, artifact, precision, json.dumps(TEXTS))
    assert json.loads(printed) == Embedder(artifact, precision=precision).encode(TEXTS).tolist()


def test_the_core_runs_the_command_line(artifact, tmp_path):
    (tmp_path / "texts.txt").write_text("a road\nthe sun\na road\n", encoding="utf-8")
    code = "from onnxsim_embed.cli import main; main()"
    assert "mean cosine" in only_core(code, "info", artifact)
    output = tmp_path / "v.npy"
    only_core(code, "encode", tmp_path / "texts.txt", "-m", artifact, "-o", output)
    assert "row 0  ~  row 2" in only_core(code, "similarity", output)


def test_similarity_needs_no_onnxruntime():
    code = """
import numpy as np
from onnxsim_embed import Pairs, TopK, cos_sim, similar_pairs, similarity_matrix, top_k
from onnxsim_embed import SimilarityGraph, estimate_similarity, neighbours, open_graph, write_graph
print(cos_sim(np.eye(2), np.eye(2)).tolist())
"""
    printed = only_core(code, without=("onnxruntime", "tokenizers", "huggingface_hub"))
    assert printed == "[[1.0, 0.0], [0.0, 1.0]]\n"


def test_extras_that_messages_name_exist_and_never_require_both_wheels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = "export plot parquet minilm finetune torch optimum sklearn serve chroma explore"
    assert set(named.split()) <= set(extras)
    wheels = {"cpu": "onnxruntime>", "gpu": "onnxruntime-gpu["}
    assert not [need for need in project["dependencies"] if need.startswith("onnxruntime")]
    for extra, wheel in wheels.items():
        found = [need for need in extras[extra] if need.startswith("onnx")]
        assert sum(need.startswith(tuple(wheels.values())) for need in found) == 1
        assert found[0].startswith(wheel)
    assert "onnxsim-embed[cpu]" in extras["export"]


def test_without_the_export_extra_one_line_names_it(checkpoint, tmp_path):
    code = """
try:
    from onnxsim_embed.export import export_model
    export_model(sys.argv[1], sys.argv[2])
except ImportError as error:
    print(error)
"""
    printed = only_core(code, checkpoint, tmp_path / "artifact")
    assert "pip install" in printed
    assert "[export]'" in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# what it offers


PUBLIC = (
    "Embedder SimilarityGraph cos_sim estimate_similarity neighbours open_graph similar_pairs "
    "similarity_matrix top_k write_graph"
)


def test_every_public_name_is_there():
    assert set(PUBLIC.split()) <= set(onnxsim_embed.__all__)
    assert sorted(onnxsim_embed.__all__) == dir(onnxsim_embed)
    for name in onnxsim_embed.__all__:
        value = getattr(onnxsim_embed, name)
        assert isinstance(value, str) or value.__doc__
    with pytest.raises(AttributeError, match="'onnxsim_embed' has no attribute 'Embeder'"):
        onnxsim_embed.Embeder  # noqa: B018


def test_types_recipes_and_a_changelog_are_shipped():
    from onnxsim_embed.artifact.recipes import recipes_directory

    assert Path(onnxsim_embed.__file__).with_name("py.typed").is_file()
    assert list(recipes_directory().glob("*.toml"))
    assert f"## {onnxsim_embed.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# nothing of the machine that made it


SKIPPED = {".git", ".hypothesis", ".venv", "build", "dist", "__pycache__", "node_modules"}
FOREIGN = {
    "a path of one machine": re.compile("/" + "(work|root|home)/"),
    "a registry of one site": re.compile(
        r"(index-url|trusted-host|find-links)\b|https?://[^/\s]+/simple\b"
    ),
}


def text_files():
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if SKIPPED & set(parts) or any(part.endswith(("_cache", ".egg-info")) for part in parts):
            continue
        if path.is_file() and path != Path(__file__) and b"\0" not in (data := path.read_bytes()):
            yield path, data.decode("utf-8", "replace")


@pytest.mark.parametrize("what", FOREIGN)
def test_no_file_names_a_thing_of_this_machine(what):
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in text_files()
        for match in FOREIGN[what].finditer(text)
    ]
    assert found == []


def test_the_module_and_the_script_are_the_command():
    script = [str(Path(sys.executable).with_name("onnxsim-embed"))]
    for command in ([sys.executable, "-m", "onnxsim_embed"], script):
        printed = subprocess.check_output([*command, "--version"], text=True)
        assert onnxsim_embed.__version__ in printed
