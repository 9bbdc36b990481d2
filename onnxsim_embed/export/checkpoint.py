"""Where a checkpoint comes from, and what it says: lengths, pooling, prompts, weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.pooling import PoolingMode
from onnxsim_embed.recipes import Recipe

Tensors = dict[str, npt.NDArray[np.float32]]

# Lengths above this are a tokenizer's way to say that it knows none (1e30 is common).
LONGEST_SEQUENCE = 1_000_000

# Both schemas of sentence-transformers' Pooling: booleans until 5.3, a name since 5.4. The order is
# that in which several modes are concatenated.
LEGACY_POOLING = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST_TOKEN,
}
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint directory.

    :param directory: the Sentence-Transformers or Hugging Face directory.
    :param transformer: where config.json, weights and tokenizer are (often the same directory).
    :param config: config.json.
    :param pooling: modes, concatenated in order.
    :param dense: directories of Dense modules relative to `directory`, applied after pooling.
    """

    directory: Path
    transformer: Path
    name: str
    source: str
    revision: str | None
    config: Mapping[str, Any]
    pooling: tuple[PoolingMode, ...]
    dense: tuple[str, ...]
    normalize: bool
    max_seq_length: int
    do_lower_case: bool
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str

    @property
    def architecture(self) -> str:
        """`model_type` of config.json."""
        return str(self.config.get("model_type", ""))

    def tensors(self) -> Tensors:
        """Read every weight of the encoder as float32, under plain BERT names.

        :raises CheckpointError: if the weights are missing, damaged or hold NaN or infinity.
        """
        return read_tensors(self.transformer)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    :raises CheckpointError: naming the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def open_checkpoint(
    directory: Path,
    *,
    pooling: str | None = None,
    recipe: Recipe | None = None,
    source: str | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Read what a checkpoint directory says, without its weights.

    Pooling comes from the caller, else from the checkpoint, else from the recipe, and never from a
    default: a wrong one is silent and ruins every result.

    :param pooling: a mode that overrides what the checkpoint says.
    :param recipe: what is known of the model, used where the checkpoint says nothing.
    :param source: where the checkpoint came from, for the manifest.
    :raises CheckpointError: naming the file that is missing or says something impossible.
    :raises ValueError: for an unknown `pooling`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    modules = _read_modules(directory)
    transformer = directory / modules.transformer
    config = read_json(transformer / "config.json")
    modes = (PoolingMode.parse(pooling),) if pooling else modules.pooling
    normalize = modules.normalize
    if not modes and recipe is not None:
        modes, normalize = (PoolingMode.parse(recipe.pooling),), recipe.normalize
    if not modes:
        raise CheckpointError(
            f"{directory} does not say how token vectors are pooled (no modules.json with a Pooling "
            "module); say it with --pooling mean or --pooling cls, as the model was trained"
        )
    if not any((transformer / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise CheckpointError(
            f"{transformer} has no tokenizer: neither tokenizer.json nor vocab.txt is there"
        )
    st_config = _transformer_config(transformer)
    st_main = _optional_json(directory / "config_sentence_transformers.json")
    prompts = {str(k): str(v) for k, v in (st_main.get("prompts") or {}).items() if v is not None}
    if not any(prompts.values()) and recipe is not None:
        prompts = dict(recipe.prompts)
    return Checkpoint(
        directory=directory,
        transformer=transformer,
        name=recipe.name if recipe else directory.resolve().name,
        source=source or (recipe.source if recipe else directory.resolve().name),
        revision=revision or (recipe.revision if recipe else None),
        config=config,
        pooling=modes,
        dense=modules.dense,
        normalize=normalize,
        max_seq_length=_max_seq_length(transformer, config, st_config, recipe),
        do_lower_case=bool(st_config.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt_name=st_main.get("default_prompt_name"),
        similarity_fn_name=str(st_main.get("similarity_fn_name") or "cosine"),
    )


@dataclass
class _Modules:
    transformer: str = ""
    pooling: tuple[PoolingMode, ...] = ()
    dense: tuple[str, ...] = ()
    normalize: bool = False


def _read_modules(directory: Path) -> _Modules:
    path = directory / "modules.json"
    if not path.is_file():
        return _Modules()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(str(e["type"]).rsplit(".", 1)[-1], str(e["path"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable list of modules: {error!r}") from None
    found = _Modules()
    for kind, where in kinds:
        if PurePosixPath(where).is_absolute() or ".." in PurePosixPath(where).parts:
            raise CheckpointError(f"{path} names a path outside the checkpoint: {where!r}")
        if kind == "Transformer":
            found.transformer = where
        elif kind == "Pooling":
            found.pooling = _read_pooling(directory / where / "config.json")
        elif kind == "Dense" and not found.normalize:
            found.dense += (where,)
        elif kind == "Normalize":
            found.normalize = True
        elif kind != "Dropout":  # does nothing outside training
            raise CheckpointError(
                f"{path}: module {kind!r} at this place cannot be exported; supported are "
                "Transformer, Pooling, Dense and a final Normalize"
            )
    return found


def _read_pooling(path: Path) -> tuple[PoolingMode, ...]:
    config = read_json(path)
    if config.get("include_prompt") is False:
        raise CheckpointError(
            f"{path}: include_prompt false (prompt tokens left out of pooling) is not supported"
        )
    if "pooling_mode" in config:
        names = config["pooling_mode"]
        names = [names] if isinstance(names, str) else names
        try:
            return tuple(PoolingMode.parse(name) for name in names)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    return tuple(mode for key, mode in LEGACY_POOLING.items() if config.get(key))


def _transformer_config(transformer: Path) -> dict[str, Any]:
    for name in TRANSFORMER_CONFIGS:
        if (transformer / name).is_file():
            return read_json(transformer / name)
    return {}


def _max_seq_length(
    transformer: Path,
    config: Mapping[str, Any],
    st_config: Mapping[str, Any],
    recipe: Recipe | None,
) -> int:
    positions = config.get("max_position_embeddings")
    stated = st_config.get("max_seq_length")
    if stated is None and recipe is not None and not st_config:
        stated = recipe.max_seq_length
    if stated is None:
        stated = _optional_json(transformer / "tokenizer_config.json").get("model_max_length")
    numbers = [
        n for n in (stated, positions) if isinstance(n, int | float) and 2 < n <= LONGEST_SEQUENCE
    ]
    if not numbers:
        raise CheckpointError(
            f"{transformer} states no maximum length: neither max_seq_length in sentence_bert_config.json, "
            "model_max_length in tokenizer_config.json nor max_position_embeddings in config.json"
        )
    return int(min(numbers))


def read_tensors(directory: Path) -> Tensors:
    """Read `model.safetensors`, its shards, or `pytorch_model.bin` (through PyTorch) as float32.

    Names lose the prefixes that heads and wrappers add, and TensorFlow's old gamma and beta become
    weight and bias.

    :raises CheckpointError: naming the file and the tensor.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        raw = _read_safetensors(directory / "model.safetensors")
    elif index.is_file():
        shards = {str(name) for name in read_json(index).get("weight_map", {}).values()}
        if any(Path(name).name != name for name in shards):
            raise CheckpointError(f"{index} names files outside its directory")
        raw = {}
        for name in sorted(shards):
            raw.update(_read_safetensors(directory / name))
    elif (directory / "pytorch_model.bin").is_file():
        raw = _read_pickle(directory / "pytorch_model.bin")
    else:
        raise CheckpointError(
            f"{directory} has no weights: none of model.safetensors, model.safetensors.index.json "
            "and pytorch_model.bin is there"
        )
    tensors = {}
    for name, value in raw.items():
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"tensor {name!r} in {directory} holds NaN or infinite values: the "
                "checkpoint is broken (a diverged training run?)"
            )
        tensors[_plain_name(name)] = value
    return tensors


def _plain_name(name: str) -> str:
    for prefix in ("0.auto_model.", "auto_model.", "model.", "bert."):
        name = name.removeprefix(prefix)
    stem, _, last = name.rpartition(".")
    renamed = {"gamma": "weight", "beta": "bias"}.get(last, last)
    return f"{stem}.{renamed}"


def _read_safetensors(path: Path) -> Tensors:
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


DECODERS: dict[str, Callable[[bytes], npt.NDArray[np.float32]]] = {
    "F64": lambda data: np.frombuffer(data, "<f8").astype(np.float32),
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype(np.float32),
    "BF16": _decode_bfloat16,
}


def _read_pickle(path: Path) -> Tensors:
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


def read_dense(
    directory: Path,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, str]:
    """Read a Dense module.

    :returns: weight (in_features, out_features), bias (out_features,) or None, activation name.
    :raises CheckpointError: if it cannot be read.
    """
    config = read_json(directory / "config.json")
    if (
        config.get("use_residual")
        or config.get("module_input_name", "sentence_embedding") != "sentence_embedding"
    ):
        raise CheckpointError(
            f"{directory}: a Dense module on tokens or with a residual is not supported"
        )
    if (directory / "model.safetensors").is_file():
        tensors = _read_safetensors(directory / "model.safetensors")
    else:
        tensors = _read_pickle(directory / "pytorch_model.bin")
    if "linear.weight" not in tensors:
        raise CheckpointError(f"{directory} holds no tensor linear.weight")
    # sentence-transformers' own default where the config is silent.
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return np.ascontiguousarray(tensors["linear.weight"].T), tensors.get("linear.bias"), activation
