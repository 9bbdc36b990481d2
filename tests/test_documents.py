"""Every command and every line of Python in README and docs/ works and prints what it says."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from documents import blocks, commands, run_python

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_to_run(document):
    return [
        block
        for block in blocks(document.read_text(encoding="utf-8"))
        if block.language == "python" or (block.language == "console" and any(commands(block)))
    ]


@pytest.fixture(scope="module")
def copied(real_artifact):
    """A function that copies the real MiniLM, and stands for its export: as good as a second one.

    The copy is also where `from_pretrained` looks; `verify` takes an eighth of its texts.
    """
    from onnxsim_embed import export
    from onnxsim_embed.artifact.cache import locate_artifact
    from onnxsim_embed.export.verify import verification_texts, verify_artifact

    def copy(model, target, **_):
        assert "minilm" in str(model)
        return Artifact.open(shutil.copytree(real_artifact, target, copy_function=os.link))

    def verify_few(artifact, texts, **options):
        return verify_artifact(artifact, texts=(texts or verification_texts())[::8], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXSIM_EMBED_CACHE", str(real_artifact.with_name("cache")))
        patch.setattr(export, "export_model", copy, raising=False)
        patch.setattr(export, "verify_artifact", verify_few, raising=False)
        locate_artifact("all-MiniLM-L6-v2")
        yield copy


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
def test_a_document_works_from_top_to_bottom(document, copied, vectors, run, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    if document.stem != "README":  # which makes them
        copied("minilm", tmp_path / "model")
        if document.stem != "tutorial":
            np.save(tmp_path / "vectors.npy", vectors)
    namespace = {"__name__": "document"}
    for block in blocks_to_run(document):
        if block.language == "python":
            run_python(block, namespace, document)
            continue
        for command in commands(block):
            code, _, err = run(*shlex.split(command)[1:])
            assert code == 0, f"{document}:{block.line}: {command}\n{err}"


def test_blocks_are_found_with_what_they_print():
    readme = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\nb\n"
    readme += "```console\n$ onnxsim-embed x \\\n  y\nz\n```\n```sh\nls\n```\n"
    python, text, console, shell = blocks(readme)
    assert python == ("python", "print(1)\n", 3, "1\n")
    assert (text.language, console.printed, shell.language) == ("text", None, "sh")
    assert list(commands(console)) == ["onnxsim-embed x    y"]
