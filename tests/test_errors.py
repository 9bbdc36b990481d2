"""The command of a missing extra fits how the package was installed."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

import onnxsim_embed
from onnxsim_embed.errors import MissingExtraError

CLONE = {"url": "file:///src/one%20clone", "dir_info": {}}
VCS = {"vcs": "git", "commit_id": "0a1b"}


@pytest.mark.parametrize(
    ("record", "requirement"),
    [
        (None, "'onnxsim-embed[plot]'"),
        (CLONE, "'/src/one clone[plot]'"),
        (CLONE | {"dir_info": {"editable": True}}, "-e '/src/one clone[plot]'"),
        ({"url": "https://host/x.git", "vcs_info": VCS}, "'onnxsim-embed[plot] @ git+https://host/x.git@0a1b'"),
        ({"url": "file:///x.whl", "archive_info": {}}, "'onnxsim-embed[plot] @ file:///x.whl'"),
    ],
    ids=["index", "clone", "editable", "git", "wheel"],
)  # fmt: skip
@pytest.mark.parametrize("pip", ["/elsewhere/pip", None])
def test_the_command_installs_from_the_same_place(monkeypatch, record, requirement, pip):
    class Installed:
        def read_text(self, name):
            return None if record is None else json.dumps(record)

    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    monkeypatch.setattr("shutil.which", lambda name: pip)
    monkeypatch.setattr("sys.executable", "/venv/bin/python")
    command = str(MissingExtraError("this", "plot", "matplotlib")).partition("installed: ")[2]
    assert command == f"/venv/bin/python -m pip install {requirement}"


def test_without_an_installation_it_is_the_clone(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    clone = Path(onnxsim_embed.__file__).parents[1]
    assert str(MissingExtraError("this", "plot", "x")).endswith(f"pip install '{clone}[plot]'")
