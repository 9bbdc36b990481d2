"""A model directory as its readers see it: JSON and ONNX files, never read outside of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from onnxsim_embed.artifact.manifest import Artifact, is_artifact, outside
from onnxsim_embed.export.checkpoint import AFTER_PADDING, LONGEST_SEQUENCE, TRANSFORMER_CONFIGS
from onnxsim_embed.export.modules import LEGACY_POOLING
from onnxsim_embed.export.tokenizer import SPECIAL_TOKENS

# "tokenizers": programs that read tokenizer.json with this library, as it is.
ST, FASTEMBED, TEI, JS, TOKENIZERS, OURS = READERS = (
    "sentence-transformers", "fastembed", "text-embeddings-inference", "transformers.js", "tokenizers", "onnxsim-embed",
)  # fmt: skip

LEGACY_TYPES = "sentence_transformers.models."
# Keys that every version wrote until 5.3; the later ones count as false where they are missing.
FIRST_POOLING_KEYS = ("word_embedding_dimension", "pooling_mode_cls_token", "pooling_mode_max_tokens",
                      "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens")  # fmt: skip

MAIN = "onnx/model.onnx"
ROOT = "model.onnx"
OTHERS = tuple(f"onnx/model_{kind}.onnx" for kind in ("fp16", "quantized", "int8", "uint8"))

# The largest tokenizer.json in use (250,000 words of many languages) have 17 MB.
MAX_JSON = 100 << 20


@dataclass(frozen=True)
class Finding:
    """A file or key that breaks a reader.

    :param file: path inside the directory.
    :param key: key of the file; None if it is about the whole file.
    :param readers: programs that it breaks.
    :param effect: what happens there.
    :param fix: what to change.
    :param change: turns the file's content (None if there is no file) into the right one; None if no JSON
        file can fix it.
    """

    file: str
    key: str | None
    readers: tuple[str, ...]
    effect: str
    fix: str
    change: Callable[[Any], Any] | None = None


class Directory:
    """A directory, and what its files say.

    :raises FileNotFoundError: if it is not a directory.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a directory")
        self.path = path
        self.damaged: list[Finding] = []
        self.config = self.table("config.json")
        self.tokenizer = self.table("tokenizer.json")
        self.tokenizer_config = self.table("tokenizer_config.json")
        self.entries = self.table("modules.json", list)
        self.modules = [entry for entry in self.entries if isinstance(entry, dict)]
        if not self.has("modules.json"):
            self.modules = _modules_of_subdirectories(path)
        self.kinds = [kind_of(entry) for entry in self.modules]
        paths = {kind_of(entry): str(entry.get("path")) for entry in reversed(self.modules)}
        # sentence-transformers looks in the directory of the Transformer module.
        self.inner_config = str(PurePosixPath(paths.get("Transformer", "")) / "config.json")
        self.pooling = f"{paths.get('Pooling', '1_Pooling')}/config.json"
        self.pooling_config = self.table(self.pooling)
        self.pooling_modes = _pooling_modes(self.pooling_config)
        self.legacy_pooling = _legacy_pooling(self)
        self.missing_pooling_keys = [
            key for key, value in self.legacy_pooling.items()
            if (key in FIRST_POOLING_KEYS or value is True) and key not in self.pooling_config
        ]  # fmt: skip
        # The file that states max_seq_length, whether it exists or not.
        self.transformer = next(filter(self.has, TRANSFORMER_CONFIGS), TRANSFORMER_CONFIGS[0])
        self.max_seq_length = self.table(self.transformer).get("max_seq_length")
        self.positions = _positions(self.config)
        stated = [self.max_seq_length, self.tokenizer_config.get("model_max_length")]
        valid = [n for n in stated if type(n) is int and 2 < n <= LONGEST_SEQUENCE][:1]
        # The maximum number of tokens, or None if nothing states it.
        self.length = min([*valid, *self.positions], default=None)
        self.special_tokens = _special_tokens(self)

    def has(self, *names: str) -> bool:
        """Return whether one of these files exists."""
        return any((self.path / name).is_file() for name in names)

    def table(self, name: str, kind: type = dict) -> Any:  # noqa: ANN401 - JSON
        """Return a JSON file's object (or list); empty if it is missing, or damaged and reported."""
        if os.path.lexists(self.path / name):
            try:
                return read_json(self.path, name, kind)
            except (OSError, ValueError) as error:
                effect = f"cannot be read: {error}"
                fix = "download the file again from the source of the model"
                self.damaged.append(Finding(name, None, READERS, effect, fix))
        return kind()


def _modules_of_subdirectories(path: Path) -> list[dict[str, Any]]:
    """Return what a missing modules.json should hold, if the subdirectories leave no doubt.

    Without a manifest that needs a Normalize directory: empty ones get lost in copies.
    """
    matches = [re.fullmatch(r"(\d+)_(Pooling|Dense|Normalize)", p.name) for p in path.iterdir()]
    numbered = sorted((int(m[1]), m[0], m[2]) for m in matches if m and (path / m[0]).is_dir())
    paths = [("", "Transformer"), *((name, kind) for _, name, kind in numbered)]
    kinds = {kind for _, kind in paths}
    normalize = Artifact.open(path).manifest.normalize if is_artifact(path) else True
    if (
        ("Normalize" in kinds) != normalize
        or "Pooling" not in kinds
        or numbered[-1][0] != len(numbered)
    ):
        return []
    return [
        {"idx": i, "name": str(i), "path": path, "type": LEGACY_TYPES + kind}
        for i, (path, kind) in enumerate(paths)
    ]


def _pooling_modes(config: dict[str, Any]) -> list[str]:
    """Return the pooling modes of either schema."""
    stated = config.get("pooling_mode")
    if isinstance(stated, str):
        return stated.split("+")
    if isinstance(stated, list):
        return [str(mode) for mode in stated]
    return [mode.value for key, mode in LEGACY_POOLING.items() if config.get(key)]


def _legacy_pooling(d: Directory) -> dict[str, Any]:
    """Return the pooling configuration in the legacy schema."""
    config = d.pooling_config
    dim = config.get("word_embedding_dimension") or config.get("embedding_dimension")
    modes = {key: mode.value in d.pooling_modes for key, mode in LEGACY_POOLING.items()}
    return modes | {"word_embedding_dimension": dim or d.config.get("hidden_size")}


def _positions(config: dict[str, Any]) -> list[int]:
    """Return the number of tokens that the position embeddings allow, if there are any."""
    count, pad = config.get("max_position_embeddings"), config.get("pad_token_id")
    if type(count) is not int or not 2 < count <= LONGEST_SEQUENCE:
        return []
    after_padding = config.get("model_type") in AFTER_PADDING
    return [count - (1 + (pad if type(pad) is int else 0) if after_padding else 0)]


def _special_tokens(d: Directory) -> dict[str, str]:
    """Return the special tokens by key; the padding token by its id, if nothing else names it."""
    tables = [d.tokenizer_config, d.table("special_tokens_map.json")]
    named = {key: [token_text(table.get(key)) for table in tables] for key in SPECIAL_TOKENS}
    tokens = {key: texts[0] or texts[1] or "" for key, texts in named.items() if any(texts)}
    added = d.tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        padding = isinstance(entry, dict) and entry.get("id") == d.config.get("pad_token_id", 0)
        if padding and (text := token_text(entry)):
            tokens.setdefault("pad_token", text)
    return tokens


def kind_of(module: dict[str, Any]) -> str:
    """Return the class name of a module of sentence-transformers, or the whole name of another's."""
    name = str(module.get("type"))
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def token_text(token: Any) -> str | None:  # noqa: ANN401 - JSON
    """Return a special token's text; configurations hold it bare or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(directory: Path, name: str, kind: type) -> Any:  # noqa: ANN401
    """Read a JSON file of a directory.

    :raises ValueError: if it is damaged, too large, of another type, or outside of the directory.
    """
    path = directory / name
    check_inside(directory, name)
    size = path.stat().st_size
    if not path.is_file() or size > MAX_JSON:
        raise ValueError(f"{size:,} bytes are too large for a configuration file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"it holds {type(value).__name__}, not {kind.__name__}")
    return value


def check_inside(directory: Path, name: str) -> None:
    """Raise ValueError if a path leaves the directory, except by the links of the Hub's cache."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or outside(directory / name, directory):
        raise ValueError(f"it leads out of the directory, to {(directory / name).resolve()}")


class OnnxFile:
    """Types of an ONNX file's inputs and outputs, or the error that loading it raises."""

    def __init__(self, path: Path, name: str) -> None:
        from onnxsim_embed.system.hardware import CPU_PROVIDER
        from onnxsim_embed.system.onnx_session import onnxruntime

        self.path, self.name, self.error = path, name, ""
        self.inputs: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.first_output, self.first_axes = "", 3
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        # The fallback prints, and tries the same provider again.
        settings = {"providers": [CPU_PROVIDER], "enable_fallback": 0}
        try:
            check_inside(path, name)
            session = onnxruntime.InferenceSession(str(path / name), options, **settings)
        except Exception as error:  # onnxruntime's exceptions share no base class
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.error = f"{lines[0]:.200}"
            return
        self.inputs = {entry.name: entry.type for entry in session.get_inputs()}
        self.outputs = {entry.name: entry.type for entry in session.get_outputs()}
        first = session.get_outputs()[0]
        self.first_output, self.first_axes = first.name, len(first.shape)
