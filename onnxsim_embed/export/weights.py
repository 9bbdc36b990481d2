"""Files of a checkpoint: JSON objects, and weights in safetensors files, shards or PyTorch pickles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.architectures import ARCHITECTURES
from onnxsim_embed.files.atomic import json_bytes
from onnxsim_embed.system.arrays import Float32

Tensors = dict[str, Float32]

# Names of weight files in order of preference: a single file, or the index of its shards.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

PREFIXES = tuple(dict.fromkeys(entry.prefix for entry in ARCHITECTURES.values()))
LFS_HEADER = b"version https://git-lfs"
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; raise CheckpointError if there is none."""
    check_content(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def check_content(path: Path) -> None:
    """Raise if a file is a git-lfs pointer to its content, as in a clone without git-lfs."""
    try:
        with path.open("rb") as stream:
            pointer = stream.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return  # reported where the file is read
    if pointer:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run 'git lfs pull' in its directory"
        )


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, or an empty one if there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, in the form of every JSON file of an artifact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_bytes(value))


def has_weights(directory: Path) -> bool:
    """Return whether a directory holds weights in a supported format."""
    return any((directory / name).is_file() for name in WEIGHT_FILES)


def read_tensors(directory: Path) -> Tensors:
    """Return the weights of a directory as float32 arrays, under names without wrapper prefixes.

    :raises CheckpointError: naming the file or tensor that is missing, damaged or not finite.
    """
    source = next((name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if source is None:
        raise CheckpointError(
            f"{directory} has no weights: expected one of {', '.join(WEIGHT_FILES)}"
        )
    read = read_safetensors if ".safetensors" in source else read_pickle
    names = {source}
    if source.endswith(".index.json"):
        weight_map = read_json(directory / source).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / source} has no weight_map from tensors to files")
        names = {str(name) for name in weight_map.values()}
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{directory / source} names files outside its directory")
    tensors: Tensors = {}
    for name in sorted(names):
        check_content(directory / name)
        for key, value in read(directory / name).items():
            plain = _plain_name(key)
            if plain in tensors and not np.array_equal(tensors[plain], value):
                raise CheckpointError(
                    f"{directory} has two different tensors {plain!r}, one of them named {key!r}: "
                    "save the model again without the copy"
                )
            tensors[plain] = value
    return tensors


def _plain_name(name: str) -> str:
    for prefix in ("0.auto_model.", "auto_model.", "model.", *PREFIXES):
        name = name.removeprefix(prefix)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _check_finite(tensors: Tensors, path: Path) -> Tensors:
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"tensor {name!r} in {path} holds NaN or infinite values: the checkpoint is broken "
                "(a diverged training run?)"
            )
    return tensors


def read_safetensors(path: Path) -> Tensors:
    """Return the floating-point tensors of a safetensors file as float32."""
    import safetensors

    try:
        # Not safetensors.numpy: numpy has no bfloat16.
        entries = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    tensors: Tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in FLOATS:
            continue  # integer buffers such as position_ids
        values = np.frombuffer(entry["data"], FLOATS[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported
            tensors[name] = values.astype(np.float32, copy=False).reshape(entry["shape"])
    return _check_finite(tensors, path)


def read_pickle(path: Path) -> Tensors:
    """Return the floating-point tensors of a PyTorch pickle as float32, read with weights_only."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, which only PyTorch reads safely: pip install torch, or save "
            "the model as safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise CheckpointError(f"{path} cannot be read with weights_only=True: {error}") from None
    tensors = {
        name: value.to(torch.float32).numpy()
        for name, value in state.items()
        if value.is_floating_point()
    }
    return _check_finite(tensors, path)
