"""The exceptions of this package; wrong arguments raise ValueError and TypeError."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class OnnxsimEmbedError(Exception):
    """Base of every error that is about the job rather than about an argument."""


class ArtifactError(OnnxsimEmbedError):
    """An artifact directory is missing, damaged, incomplete or of an unknown format."""


class CheckpointError(OnnxsimEmbedError):
    """A checkpoint cannot be found, read or exported."""


class VerificationError(OnnxsimEmbedError):
    """An export does not reproduce its reference closely enough to be published."""


class TrainingError(OnnxsimEmbedError):
    """Fine-tuning cannot go on; the message says which checkpoint is kept."""


class TableError(OnnxsimEmbedError):
    """A file of texts or vectors cannot be read or written."""


class NoTextsError(TableError):
    """A file of texts is whole, and empty."""


class MissingExtraError(OnnxsimEmbedError, ImportError):
    """An optional dependency is needed; the message holds the pip command."""

    def __init__(self, purpose: str, extra: str, package: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: {install_command(extra)}"
        )


def check_packages(purpose: str, extra: str, packages: Mapping[str, str]) -> None:
    """Raise MissingExtraError for the first package that is not installed.

    :param packages: the package of each module that is needed.
    """
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(purpose, extra, package)


@contextmanager
def needs_extra(purpose: str, extra: str, package: str = "") -> Iterator[None]:
    """Raise MissingExtraError if an import in the block fails; `package` is by default the missing module."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(purpose, extra, package or str(error.name)) from None


def install_command(extra: str) -> str:
    """Return the pip command for an extra, from where this package was installed."""
    import json
    import shutil
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        record = json.loads(distribution("onnxsim-embed").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # run from a clone
        record = {"url": Path(__file__).parents[1].as_uri(), "dir_info": {}}
    url, target = record.get("url", ""), f"onnxsim-embed[{extra}]"
    if "dir_info" in record:
        editable = "-e " if record["dir_info"].get("editable") else ""
        requirement = f"{editable}'{url2pathname(urlsplit(url).path)}[{extra}]'"
    elif "vcs_info" in record:
        vcs = record["vcs_info"]
        requirement = f"'{target} @ {vcs['vcs']}+{url}@{vcs['commit_id']}'"
    else:
        requirement = f"'{target} @ {url}'" if url else f"'{target}'"
    pip = shutil.which("pip")
    here = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return f"{'pip' if here else f'{sys.executable} -m pip'} install {requirement}"
