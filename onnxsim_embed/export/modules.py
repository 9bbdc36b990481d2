"""Modules of a Sentence-Transformers directory: where the encoder is and what follows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.weights import read_json, read_tensors
from onnxsim_embed.runtime.pooling import PoolingMode
from onnxsim_embed.system.arrays import Float32

# Boolean keys of Pooling's config.json before sentence-transformers 5.4, which has one key with mode
# names. The order is that in which several modes are concatenated.
LEGACY_POOLING = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST_TOKEN,
}


@dataclass
class Modules:
    """Modules of modules.json; paths are relative to the checkpoint."""

    transformer: str = ""
    pooling: tuple[PoolingMode, ...] = ()
    dense: tuple[str, ...] = ()
    normalize: bool = False
    include_prompt: bool = True  # whether the tokens of a prompt are pooled


def read_modules(directory: Path) -> Modules:
    """Read modules.json; without one, the directory is a plain transformer.

    :raises CheckpointError: naming the module that cannot be exported.
    """
    path = directory / "modules.json"
    modules = Modules()
    if not path.is_file():
        return modules
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        classes = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable list of modules: {error!r}") from None
    for number, (name, folder) in enumerate(classes):
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise CheckpointError(f"{path} names a path outside the checkpoint: {folder!r}")
        kind = _module_kind(path, number, name)
        if kind == "Transformer":
            modules.transformer = folder
        elif kind == "Pooling" and not (modules.pooling or modules.dense or modules.normalize):
            config = read_json(directory / folder / "config.json")
            modules.pooling = _read_pooling(directory / folder / "config.json", config)
            modules.include_prompt = config.get("include_prompt") is not False
        elif kind == "Dense" and not modules.normalize:
            modules.dense += (folder,)
        elif kind == "Normalize":
            modules.normalize = True
        elif kind != "Dropout":  # has no effect outside training
            raise CheckpointError(
                f"{path}: module {kind!r} cannot be exported in position {number}; supported are "
                "Transformer, Pooling, Dense and a final Normalize"
            )
    return modules


def _module_kind(path: Path, number: int, name: str) -> str:
    package, _, kind = name.rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise CheckpointError(
            f"{path}: module class {name!r} is not part of sentence-transformers: what it computes is "
            "not known, so that it cannot be exported"
        )
    if (kind == "Transformer") != (number == 0):
        raise CheckpointError(
            f"{path}: module {kind!r} cannot be exported in position {number}: the first module, and "
            "no other, must be a Transformer"
        )
    return kind


def _read_pooling(path: Path, config: dict[str, Any]) -> tuple[PoolingMode, ...]:
    if "pooling_mode" not in config:
        return tuple(mode for key, mode in LEGACY_POOLING.items() if config.get(key))
    names = config["pooling_mode"]
    try:
        return tuple(map(PoolingMode.parse, [names] if isinstance(names, str) else names))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_dense(
    directory: Path,
) -> tuple[Float32, Float32 | None, str]:
    """Read a Dense module.

    :returns: weight (in_features, out_features), bias (out_features,) or None, activation name.
    :raises CheckpointError: if it cannot be read or exported.
    """
    config = read_json(directory / "config.json")
    keys = ("module_input_name", "module_output_name")
    names = [config.get(key) or "sentence_embedding" for key in keys]
    if config.get("use_residual") or set(names) != {"sentence_embedding"}:
        raise CheckpointError(
            f"{directory}: a Dense module on tokens, to another output or with a residual is not "
            f"supported ({', '.join(keys)}: {', '.join(map(str, names))})"
        )
    tensors = read_tensors(directory)
    if "linear.weight" not in tensors:
        raise CheckpointError(f"{directory} has no tensor linear.weight")
    shapes = {name: value.shape for name, value in tensors.items()}
    outputs = shapes["linear.weight"][0]
    expected: dict[str, tuple[Any, ...]] = {
        "linear.weight": (outputs, config.get("in_features", shapes["linear.weight"][-1]))
    }
    if config.get("bias", True):
        expected["linear.bias"] = (outputs,)
    if shapes != expected or config.get("out_features", outputs) != outputs:
        raise CheckpointError(
            f"{directory}: tensors {shapes} do not fit config.json, which implies {expected}"
        )
    # Tanh is sentence-transformers' own default.
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return np.ascontiguousarray(tensors["linear.weight"].T), tensors.get("linear.bias"), activation
