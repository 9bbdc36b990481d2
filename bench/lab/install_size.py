"""What an installation takes on disk: measured in a fresh environment, without the model's own files."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.conditions import today
from lab.peers import TORCH, make_environment

# What a user installs to encode texts, as each project's documentation says it.
INSTALLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sentence-transformers, PyTorch": (TORCH, (*TORCH, "sentence-transformers")),
    "sentence-transformers, ONNX": (TORCH, (*TORCH, "sentence-transformers[onnx]")),
    "sentence-transformers, OpenVINO": (("sentence-transformers[openvino]",),),
    "fastembed": (("fastembed",),),
}


def directory_mb(directory: Path) -> float:
    """Return the size of all files below a directory, 1e6 bytes; links count nothing."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e6


def packages(directory: Path) -> set[str]:
    """Return the distributions that an environment holds, each with its version."""
    return {path.name.removesuffix(".dist-info") for path in directory.rglob("*.dist-info")}


def install_size(installs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Install into a fresh environment, which is removed afterwards; return size and number of packages.

    :param installs: what pip installs, call by call.
    :returns: `mb` and `packages`, both beyond an empty environment, and `holds`, the names and versions
        of the packages; or `failed`, the reason.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "environment"
        make_environment(directory, ())
        empty, few = directory_mb(directory), packages(directory)
        reason = make_environment(directory, installs)
        if reason:
            return {"failed": reason}
        holds = sorted(packages(directory) - few)
        mb = round(directory_mb(directory) - empty, 1)
        return {"mb": mb, "packages": len(holds), "holds": holds}


def install_sizes(
    ours: str, chosen: Mapping[str, Sequence[Sequence[str]]], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the size of our installation and of others.

    :param ours: what pip installs of ours: a directory or a requirement.
    :param chosen: of INSTALLS.
    :returns: `python`, `date`, and `installs`: what `install_size` says of each.
    """
    sizes: dict[str, dict[str, Any]] = {}
    for name, installs in ({"onnxsim-embed": ((ours,),)} | dict(chosen)).items():
        say(f"install size: {name}")
        try:
            sizes[name] = install_size(installs)
        except (OSError, subprocess.SubprocessError) as error:
            sizes[name] = {"failed": str(error)}
    return {"python": platform.python_version(), "date": today(), "installs": sizes}
