"""Where a checkpoint comes from, and what it says: lengths, pooling, prompts, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import outside
from onnxsim_embed.artifact.recipes import Recipe
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.texts import read_json
from onnxsim_embed.export.weights import (
    Tensors,
    check_finite,
    read_pickle,
    read_safetensors,
    read_tensors,
)
from onnxsim_embed.runtime.pooling import PoolingMode

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
# Position ids of these architectures start after the padding's, so that so many fewer tokens fit.
AFTER_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "ibert",
    "data2vec-text",
)  # fmt: skip

# What a tokenizer can be read from, here or by transformers.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
    "tokenizer.model",
)  # fmt: skip
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
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


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def open_checkpoint(
    directory: Path,
    *,
    pooling: str | None = None,
    recipe: Recipe | None = None,
    source: str | None = None,
    revision: str | None = None,
    prompts: Mapping[str, str] | None = None,
    max_seq_length: int | None = None,
) -> Checkpoint:
    """Read what a checkpoint directory says, without its weights.

    Pooling comes from the caller, else from the checkpoint, else from the recipe, and never from a
    default: a wrong one is silent and ruins every result.

    :param pooling: a mode that overrides what the checkpoint says.
    :param recipe: what is known of the model, used where the checkpoint says nothing.
    :param source: where the checkpoint came from, for the manifest.
    :param prompts: texts by name, beside those of the checkpoint or in their place.
    :param max_seq_length: tokens kept of a text, in place of what the checkpoint says.
    :raises CheckpointError: naming the file that is missing or says something impossible.
    :raises ValueError: for an unknown `pooling`, or a length that the model does not have.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    _check_links(directory)
    modules = _read_modules(directory)
    transformer = directory / modules.transformer
    config = read_json(transformer / "config.json")
    modes = (PoolingMode.parse(pooling),) if pooling else modules.pooling
    normalize = modules.normalize
    if not modules.pooling and recipe is not None:
        modes = modes or (PoolingMode.parse(recipe.pooling),)
        normalize = recipe.normalize
    if not modes:
        raise CheckpointError(
            f"{directory} does not say how token vectors are pooled (no modules.json with a Pooling "
            "module); say it with --pooling mean or --pooling cls, as the model was trained"
        )
    if not any((transformer / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{transformer} has no tokenizer: neither tokenizer.json nor vocab.txt is there"
        )
    st_config = _transformer_config(transformer)
    st_main = _optional_json(directory / "config_sentence_transformers.json")
    stated = _read_prompts(st_main, directory, recipe)
    longest = _max_seq_length(transformer, config, st_config, recipe, max_seq_length)
    return Checkpoint(
        directory=directory,
        transformer=transformer,
        name=recipe.name if recipe else (source or directory.resolve().name).rpartition("/")[2],
        source=source or (recipe.source if recipe else directory.resolve().name),
        revision=revision or (recipe.revision if recipe else None),
        config=config,
        pooling=modes,
        dense=modules.dense,
        normalize=normalize,
        max_seq_length=longest,
        do_lower_case=bool(st_config.get("do_lower_case", False)),
        prompts=stated | dict(prompts or {}),
        default_prompt_name=st_main.get("default_prompt_name"),
        similarity_fn_name=str(st_main.get("similarity_fn_name") or "cosine"),
    )


def _check_links(directory: Path) -> None:
    """Refuse a link that leads out of the directory, at the top of it or in one of its modules."""
    for path in (*directory.glob("*"), *directory.glob("*/*")):
        if path.is_symlink() and (real := outside(path, directory)) is not None:
            raise CheckpointError(f"{path} is a link to {real}, outside {directory}")


def _read_prompts(
    config: Mapping[str, Any], directory: Path, recipe: Recipe | None
) -> dict[str, str]:
    """Return the prompts of config_sentence_transformers.json, or the recipe's where it has none."""
    path = directory / "config_sentence_transformers.json"
    stated = config.get("prompts") or {}
    if not isinstance(stated, dict) or not all(
        v is None or isinstance(v, str) for v in stated.values()
    ):
        raise CheckpointError(f"{path}: prompts must map names to texts, got {stated!r:.80}")
    prompts = {name: text for name, text in stated.items() if text is not None}
    if not any(prompts.values()) and recipe is not None:
        prompts = dict(recipe.prompts)
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(
            f"{path}: default_prompt_name {default!r} is not among its prompts: {sorted(prompts) or 'none'}"
        )
    measure = config.get("similarity_fn_name") or "cosine"
    if measure not in SIMILARITIES:
        raise CheckpointError(
            f"{path}: similarity_fn_name {measure!r} is not one of {', '.join(SIMILARITIES)}"
        )
    return prompts


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
        elif kind == "Pooling" and not (found.pooling or found.dense or found.normalize):
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
    wanted: int | None,
) -> int:
    positions = _positions(config)
    if wanted is not None:
        most = LONGEST_SEQUENCE if positions is None else positions
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 3 <= wanted <= most:
            raise ValueError(
                f"max_seq_length must be an integer from 3 to {most} for this model, got {wanted!r}"
            )
        return wanted
    stated = st_config.get("max_seq_length")
    if stated is not None and (
        not isinstance(stated, int) or isinstance(stated, bool) or stated < 3
    ):
        raise CheckpointError(
            f"{transformer}: max_seq_length must be an integer of at least 3 (two special tokens and a "
            f"word), got {stated!r}"
        )
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


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the position embeddings are for, or None where there are none."""
    for key in ("max_position_embeddings", "n_positions"):
        count = config.get(key)
        if isinstance(count, int) and count > 2:
            after = config.get("model_type") in AFTER_PADDING
            return count - (int(config.get("pad_token_id") or 0) + 1 if after else 0)
    return None


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
        tensors = read_safetensors(directory / "model.safetensors")
    elif (directory / "pytorch_model.bin").is_file():
        tensors = read_pickle(directory / "pytorch_model.bin")
    else:
        raise CheckpointError(
            f"{directory} has no weights: neither model.safetensors nor pytorch_model.bin is there"
        )
    if "linear.weight" not in tensors:
        raise CheckpointError(f"{directory} holds no tensor linear.weight")
    check_finite(tensors, directory)
    shapes = {name: value.shape for name, value in tensors.items()}
    outputs = shapes["linear.weight"][0]
    if len(shapes["linear.weight"]) != 2 or shapes.get("linear.bias", (outputs,)) != (outputs,):
        raise CheckpointError(f"{directory}: shapes do not make a linear layer: {shapes}")
    # sentence-transformers' own default where the config is silent.
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return np.ascontiguousarray(tensors["linear.weight"].T), tensors.get("linear.bias"), activation
