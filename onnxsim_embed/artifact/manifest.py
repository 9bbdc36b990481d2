"""The artifact directory: file names, manifest and integrity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.files.uris import local_path

FORMAT_VERSION = 1
MANIFEST = "onnxsim_embed.json"
CARD = "README.md"
MODEL_FILES = {
    "fp32": "onnx/model.onnx",
    "int8": "onnx/model_int8.onnx",
    "fp16": "onnx/model_fp16.onnx",
}
ENCODER_FILES = {
    "fp32": "onnx/encoder.onnx",
    "int8": "onnx/encoder_int8.onnx",
    "fp16": "onnx/encoder_fp16.onnx",
}
PRECISIONS = ("fp32", "int8")  # default of an export


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact."""

    sha256: str
    size: int


@dataclass(frozen=True)
class PrecisionEntry:
    """One weight precision.

    :param file: the portable ONNX file.
    :param encoder: the file for our own run path, on the CPU or, of fp16, on CUDA, which refers to the
        weights inside `file`; None if the run path loads `file` itself.
    :param operators: number of nodes of each operator in `file`.
    :param calibration: the texts of the calibration: source, number, tokens, sha256.
    :param data: external data files of `file` (an ONNX file cannot exceed 2 GB).
    :param pooled: `file` with the modules after the encoder, whose first output is
        `sentence_embedding`, for readers that have no pooling; None if it was not asked for.
    """

    file: str
    encoder: str | None
    method: str
    operators: Mapping[str, int]
    layers: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[str] = ()
    pooled: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of `onnxsim_embed.json`.

    :param max_seq_length: tokens kept of a text, special tokens included.
    :param dense: directories of Dense modules, in order, applied after pooling.
    :param files: every file but the manifest, by its path inside the artifact.
    :param verification: the report of `verify`, by precision; one that is not among `precisions` was
        skipped for the reasons in its "problems".
    :param via: how the fp32 file was made: "direct", "torch", "optimum" or "adopted".
    :param include_prompt: whether the tokens of a prompt are pooled; false for Instructor models.
    :param matryoshka_dims: dimensions to which the model was trained to have embeddings truncated.
    """

    name: str
    source: str
    revision: str | None
    architecture: str
    hidden_size: int
    layers: int
    dim: int
    max_seq_length: int
    do_lower_case: bool
    pad_token_id: int
    pooling: tuple[str, ...]
    dense: tuple[str, ...]
    normalize: bool
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str
    precisions: Mapping[str, PrecisionEntry]
    tools: Mapping[str, str]
    verification: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    via: str = "direct"
    matryoshka_dims: tuple[int, ...] = ()
    include_prompt: bool = True

    def entry(self, precision: str) -> PrecisionEntry:
        """Return the files of a precision; bf16 computes those of fp32."""
        return self.precisions["fp32" if precision == "bf16" else precision]

    def to_json(self) -> str:
        """Return the manifest as JSON with sorted keys; equal inputs give equal text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a manifest.

        :raises ArtifactError: naming the key that is missing, unknown or of another format version.
        """
        try:
            table = json.loads(text)
            version = table.get("format_version")
            if version != FORMAT_VERSION:
                raise ArtifactError(
                    f"{where} has format version {version}; this version of onnxsim-embed reads "
                    f"{FORMAT_VERSION}: export the model again"
                )
            known = {entry.name for entry in fields(cls)}
            if unknown := set(table) - known:
                raise ArtifactError(f"{where} has unknown keys {sorted(unknown)}")
            table["files"] = {path: FileEntry(**entry) for path, entry in table["files"].items()}
            table["precisions"] = {
                name: PrecisionEntry(**{**entry, "data": tuple(entry.get("data", ()))})
                for name, entry in table["precisions"].items()
            }
            table.setdefault("matryoshka_dims", ())
            for name in ("pooling", "dense", "matryoshka_dims"):
                if isinstance(table[name], str):
                    raise TypeError(f"{name} is a string, not a list")
                table[name] = tuple(table[name])
            if not table["pooling"]:
                raise ValueError("pooling is empty")
            manifest = cls(**table)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{where} is not a readable manifest: {error!r}") from error
        for path in manifest.files:
            parts = Path(path).parts
            if not parts or Path(path).is_absolute() or ".." in parts or "\\" in path:
                raise ArtifactError(f"{where} lists a path outside the artifact: {path!r}")
        return manifest


@dataclass(frozen=True)
class Artifact:
    """An artifact directory and its manifest."""

    directory: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, directory: Path) -> Artifact:
        """Open an artifact; reads only the manifest.

        :raises ArtifactError: if there is none, or it cannot be read.
        """
        path = local_path(directory) / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtifactError(
                f"{directory} is not an exported model: it holds no {MANIFEST}; export it with "
                "onnxsim_embed.export.export_model, or load it with Embedder.from_pretrained"
                if directory.exists()
                else f"{directory} does not exist"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"cannot read {path}: {error}") from error
        return cls(directory, Manifest.from_json(text, str(path)))

    def file(self, name: str) -> Path:
        """Return a file of the artifact after checking its size and sha256.

        :raises ArtifactError: if it is missing, truncated or changed.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtifactError(f"{self.directory / MANIFEST} does not list {name!r}")
        path = self.directory / name
        if (real := outside(path, self.directory)) is not None:
            raise ArtifactError(f"{path} links to {real}, outside the artifact")
        try:
            if (size := path.stat().st_size) != entry.size:
                problem = f"damaged: {size:,} bytes instead of {entry.size:,}"
            elif sha256(path) != entry.sha256:
                problem = "damaged: its sha256 differs from the manifest"
            else:
                return path
        except OSError as error:
            problem = f"missing: {error.strerror}"
        raise ArtifactError(f"{path} is {problem}; export the model again")

    def open_file(self, precision: str) -> Path:
        """Return the portable file of a precision after checking it and its external data."""
        entry = self.manifest.entry(precision)
        for name in entry.data:
            self.file(name)
        return self.file(entry.file)

    def check(self) -> None:
        """Raise ArtifactError naming the first file that is missing or damaged."""
        for name in self.manifest.files:
            self.file(name)


def outside(path: Path, directory: Path) -> Path | None:
    """Return the target of a link that leaves the directory (or its repository in the Hub's cache)."""
    real, home = path.resolve(), directory.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    return None if real.is_relative_to(home) else real


def is_artifact(directory: Path) -> bool:
    """Return whether the directory holds a manifest."""
    return (directory / MANIFEST).is_file()


def sha256(path: Path) -> str:
    """Return the file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Return every file below a directory but the manifest, by its path with forward slashes."""
    return {
        path.relative_to(directory).as_posix(): FileEntry(sha256(path), path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def check_target(target: Path, force: bool) -> None:
    """Raise FileExistsError if the target is not empty, unless it is an artifact and `force` is set."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_artifact(target):
        raise FileExistsError(f"{target} exists and is not an artifact; choose another directory")
    if not force:
        advice = "replace it with force=True, or choose another directory"
        raise FileExistsError(f"{target} exists; {advice}")
