"""The systems that are measured beside ours: what they are called, what they need, where they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.workers import shortened
from onnxsim_embed.benchmark.measure import PEERS

# PyTorch first and by version, in every call: else pip fetches several GB of CUDA on some machines.
TORCH = ("torch==2.13.0",)

# What pip installs into each environment, call by call.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "torch": (TORCH, (*TORCH, "sentence-transformers")),
    "st-onnx": (TORCH, (*TORCH, "sentence-transformers", "optimum-onnx[onnxruntime]")),
    # Needs torchvision, which fits only the build of PyTorch that pip finds for it.
    "st-openvino": (("sentence-transformers", "optimum-intel[openvino,nncf]", "nncf", "datasets"),),
    "fastembed": (("fastembed",),),
    "ctranslate2": (TORCH, (*TORCH, "transformers", "ctranslate2")),
    "chroma": (("chromadb",),),
    "faiss": (("faiss-cpu", "scipy"),),
    "sklearn": (("scikit-learn",),),
    "sparse-dot-topn": (("sparse-dot-topn",),),
}


@dataclass(frozen=True)
class Peer:
    """A system.

    :param title: for tables.
    :param environment: a name of ENVIRONMENTS; "" for ours.
    :param packages: what must be installed.
    """

    title: str
    environment: str = ""
    packages: tuple[str, ...] = ()

    @property
    def loads_checkpoint(self) -> bool:
        """Whether it reads the checkpoint itself, not an ONNX file of it."""
        return self.environment in ("torch", "st-onnx", "st-openvino", "ctranslate2")


OURS = "ours-int8"
SHARED = {"st-torch": "torch", "st-onnx-O3": "st-onnx", "st-onnx-qint8": "st-onnx",
          "st-openvino-static": "st-openvino"}  # fmt: skip
TEXT_SYSTEMS = {
    OURS: Peer("onnxsim-embed int8"),
    "ours-fp32": Peer("onnxsim-embed fp32"),
    **{
        name: Peer(title, SHARED.get(name, name), packages)
        for name, (title, packages) in PEERS.items()
    },
    "ours-int8-openvino": Peer("onnxsim-embed int8, OpenVINO", "", ("openvino",)),
    "ours-bf16": Peer("onnxsim-embed bf16, OpenVINO", "", ("openvino",)),
    # Our run path around their file: what the file alone makes of it. Needs st-onnx before it.
    "ours-dynamic": Peer("quantize_dynamic in our run path", "", ("onnx",)),
}
SIMILARITY_SYSTEMS = {
    "ours": Peer("onnxsim-embed"),
    "ours-float32": Peer("onnxsim-embed, int8 filter off"),
    "notebook": Peer("torch cos_sim, mask, coo_matrix", "torch", ("torch", "scipy")),
    "st-util": Peer("sentence-transformers semantic_search", "torch", ("sentence-transformers",)),
    "faiss": Peer("faiss IndexFlatIP", "faiss", ("faiss-cpu", "scipy")),
    "sklearn": Peer("scikit-learn, brute force", "sklearn", ("scikit-learn",)),
    "sparse-dot-topn": Peer("sparse_dot_topn", "sparse-dot-topn", ("sparse-dot-topn",)),
}

MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try: version(name)
    except PackageNotFoundError: print(name)
"""


def missing_packages(python: str, peer: Peer) -> list[str]:
    """Return which of a peer's packages are not installed for an interpreter."""
    if not peer.packages:
        return []
    command = [python, "-c", MISSING, *peer.packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else list(peer.packages)


class Environments:
    """Where systems run.

    :param python: an interpreter with the peers; None for this process's own.
    :param directory: where environments are made, one for each kind of peer; None to make none.
    """

    def __init__(
        self, python: str | None, directory: Path | None, say: Callable[[str], None]
    ) -> None:
        self._python = python
        self._directory = directory
        self._say = say

    def find(self, peer: Peer) -> tuple[str | None, str]:
        """Return a peer's interpreter, or None and the reason why there is none."""
        python, reason = sys.executable, ""
        if peer.environment and self._python is not None:
            python = self._python
        elif peer.environment and self._directory is not None:
            python, reason = self._make(peer.environment)
        if reason:
            return None, reason
        missing = missing_packages(python, peer)
        if missing:
            return None, f"not installed: {', '.join(missing)}"
        return python, ""

    def choose(self, names: Sequence[str], systems: dict[str, Peer]) -> tuple[str, ...]:
        """Return the systems that are named, beside ours.

        :param names: of systems, or "all", or "installed": what can be imported where peers run.
        """
        python = self._python or sys.executable
        peers = [name for name, peer in systems.items() if peer.environment or peer.packages]
        if "installed" in names:
            with_own = (name for name in peers if systems[name].environment)
            return tuple(name for name in with_own if not missing_packages(python, systems[name]))
        return tuple(name for name in peers if "all" in names or name in names)

    def _make(self, name: str) -> tuple[str, str]:
        """Return the interpreter of an environment, made once, or a reason why it cannot be made."""
        assert self._directory is not None
        directory = self._directory / name
        python, done = directory / "bin" / "python", directory / "complete"
        if not done.exists():
            self._say(f"making the environment {directory}")
            reason = make_environment(directory, ENVIRONMENTS[name])
            if reason:
                return str(python), reason
            done.touch()
        return str(python), ""


def make_environment(directory: Path, installs: Sequence[Sequence[str]]) -> str:
    """Make a virtual environment and install packages; return what went wrong, or nothing."""
    python = str(directory / "bin" / "python")
    commands = [[sys.executable, "-m", "venv", "--clear", str(directory)]]
    commands += [[python, "-m", "pip", "install", "-q", *packages] for packages in installs]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            errors = [line for line in said if line.startswith("ERROR")] or said
            return shortened(f"{' '.join(command[-2:])}: {errors[-1]}")
    return ""


def title(name: str, systems: dict[str, Peer], versions: dict[str, str]) -> str:
    """Return a system's title with the version of the package that makes it."""
    peer = systems[name]
    if name.startswith("ours"):
        return peer.title
    known = versions.get(peer.packages[0], "")
    head, comma, rest = peer.title.partition(",")
    version = f" {'.'.join(known.split('+')[0].split('.')[:2])}" if known else ""
    return f"{head}{version}{comma}{rest}"
