"""Every command and every line of Python in README and docs/ works and prints what it says."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import blocks, commands, run_python

from onnxsim_embed import Embedder

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_to_run(document):
    return [
        block
        for block in blocks(document.read_text(encoding="utf-8"))
        if block.language == "python" or (block.language == "console" and any(commands(block)))
    ]


@pytest.fixture
def directory(real_artifact, tmp_path, monkeypatch):
    """A directory with the examples, and the real MiniLM where `from_pretrained` looks for it."""
    import onnxsim_embed.export
    from onnxsim_embed.artifact.cache import locate_artifact

    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with monkeypatch.context() as patch:  # a copy is as good as a second export
        patch.setattr(
            onnxsim_embed.export,
            "export_model",
            lambda model, target, **_: shutil.copytree(real_artifact, target),
        )
        locate_artifact("all-MiniLM-L6-v2")
    return tmp_path


@pytest.fixture(scope="module")
def vectors(real_artifact):
    """What the tutorial leaves behind beside the model: the vectors of the projects."""
    with (ROOT / "examples" / "projects.csv").open(encoding="utf-8", newline="") as stream:
        texts = [row["title_and_description"] for row in csv.DictReader(stream)]
    return Embedder(real_artifact).encode(texts)


@pytest.mark.real
@pytest.mark.parametrize(
    "document",
    # Recipes for other libraries run beside them: `make interop`.
    [page for page in DOCUMENTS if page.parent.name != "recipes" and blocks_to_run(page)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_a_document_works_from_top_to_bottom(document, directory, real_artifact, vectors):
    if document.stem != "README":  # which makes them
        shutil.copytree(real_artifact, directory / "model")
        if document.stem != "tutorial":
            np.save(directory / "vectors.npy", vectors)
    namespace = {"__name__": "document"}
    for block in blocks_to_run(document):
        if block.language == "python":
            run_python(block, namespace, document)
            continue
        for command in commands(block):
            done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{document}:{block.line}: {command}\n{done.stderr}"


def test_blocks_are_found_with_what_they_print():
    readme = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\nb\n"
    readme += "```console\n$ onnxsim-embed x \\\n  y\nz\n```\n```sh\nls\n```\n"
    python, text, console, shell = blocks(readme)
    assert python == ("python", "print(1)\n", 3, "1\n")
    assert (text.language, console.printed, shell.language) == ("text", None, "sh")
    assert list(commands(console)) == ["onnxsim-embed x    y"]
