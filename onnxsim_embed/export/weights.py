"""Weight files -> float32 arrays: safetensors, shards, and PyTorch's pickles through PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.texts import read_json

Tensors = dict[str, npt.NDArray[np.float32]]


# What holds a module's weights, first choice first: one file, or the index of several.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def has_weights(directory: Path) -> bool:
    """Return whether a directory holds weights in a form that is read."""
    return any((directory / name).is_file() for name in WEIGHT_FILES)


def read_tensors(directory: Path) -> Tensors:
    """Read `model.safetensors` or `pytorch_model.bin` (through PyTorch), or their shards, as float32.

    Names lose the prefixes that heads and wrappers add, and TensorFlow's old gamma and beta become
    weight and bias.

    :raises CheckpointError: naming the file and the tensor.
    """
    found = next((name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{directory} has no weights: none of {', '.join(WEIGHT_FILES)} is there"
        )
    read = read_safetensors if ".safetensors" in found else read_pickle
    files = [found]
    if found.endswith(".index.json"):
        files = _shards(directory / found)
    raw: Tensors = {}
    for name in files:
        raw.update(read(directory / name))
    check_finite(raw, directory)
    return {_plain_name(name): value for name, value in raw.items()}


def _shards(index: Path) -> list[str]:
    """Return the files that an index names, all of its own directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    shards = {str(name) for name in weight_map.values()}
    if any(Path(name).name != name for name in shards):
        raise CheckpointError(f"{index} names files outside its directory")
    return sorted(shards)


def check_finite(tensors: Tensors, directory: Path) -> None:
    """Raise CheckpointError naming the first tensor that holds NaN or infinity."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"tensor {name!r} in {directory} holds NaN or infinite values: the "
                "checkpoint is broken (a diverged training run?)"
            )


def _plain_name(name: str) -> str:
    for prefix in ("0.auto_model.", "auto_model.", "model.", "bert."):
        name = name.removeprefix(prefix)
    stem, _, last = name.rpartition(".")
    renamed = {"gamma": "weight", "beta": "bias"}.get(last, last)
    return f"{stem}.{renamed}"


def read_safetensors(path: Path) -> Tensors:
    """Read the floating-point tensors of a safetensors file as float32."""
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
        decode = DECODERS.get(entry["dtype"])
        if decode is not None:  # the rest are integer buffers such as position_ids
            tensors[name] = decode(entry["data"]).reshape(entry["shape"])
    return tensors


def _decode_bfloat16(data: bytes) -> npt.NDArray[np.float32]:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_float64(data: bytes) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named
        return np.frombuffer(data, "<f8").astype(np.float32)


DECODERS: dict[str, Callable[[bytes], npt.NDArray[np.float32]]] = {
    "F64": _decode_float64,
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype(np.float32),
    "BF16": _decode_bfloat16,
}


def read_pickle(path: Path) -> Tensors:
    """Read the floating-point tensors of a PyTorch pickle as float32, with weights_only."""
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
    return {
        name: value.to(torch.float32).numpy()
        for name, value in state.items()
        if value.is_floating_point()
    }
