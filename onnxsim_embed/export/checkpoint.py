"""A checkpoint directory: pooling, lengths, prompts and weights that its files state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.manifest import outside
from onnxsim_embed.artifact.recipes import Recipe
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.architectures import ARCHITECTURES
from onnxsim_embed.export.modules import read_modules
from onnxsim_embed.export.weights import Tensors, read_json, read_optional_json, read_tensors
from onnxsim_embed.runtime.pooling import PoolingMode

# Larger values of model_max_length mean that the tokenizer states none (1e30 is common).
LONGEST_SEQUENCE = 1_000_000

# Architectures whose position ids start after that of the padding, which leaves fewer for tokens.
AFTER_PADDING = (
    "xlm-roberta-xl", "longformer", "ibert", "data2vec-text",
    *(kind for kind, entry in ARCHITECTURES.items() if entry.skipped_id is not None),
)  # fmt: skip

# Files from which this package or transformers can build a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
    "tokenizer.model",
)  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

# Keys of those files that change what the encoder computes, with the values that are supported.
SUPPORTED_SETTINGS: dict[str, tuple[object, ...]] = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "tokenizer_name_or_path": (None,),
    "processing_kwargs": (None, {}),
}


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint directory; `transformer` holds config.json, weights and tokenizer.

    Pooling modes are concatenated in order; Dense modules (paths in `directory`) follow the pooling.
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
    licence: str | None  # the Hub's identifier
    overridden: bool  # whether modules.json is missing or states another pooling
    include_prompt: bool = True  # whether the tokens of a prompt are pooled

    @property
    def architecture(self) -> str:
        """`model_type` of config.json."""
        return str(self.config.get("model_type", ""))

    def tensors(self) -> Tensors:
        """Read the encoder's weights as float32; see `read_tensors`."""
        return read_tensors(self.transformer)


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
    """Read a checkpoint directory without its weights; for arguments see `export_model`.

    Pooling comes from the caller, else from the checkpoint, else from the recipe, and never from a
    default: a wrong one gives wrong vectors without an error.

    :raises CheckpointError: naming the file that is missing or invalid.
    :raises ValueError: for an unknown `pooling`, or a length beyond the model's positions.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    for path in (*directory.glob("*"), *directory.glob("*/*")):
        if path.is_symlink() and (real := outside(path, directory)) is not None:
            raise CheckpointError(f"{path} is a link to {real}, outside {directory}")
    modules = read_modules(directory)
    transformer = directory / modules.transformer
    config = read_json(transformer / "config.json")
    modes = (PoolingMode.parse(pooling),) if pooling else modules.pooling
    normalize = modules.normalize
    if not modules.pooling and recipe is not None:
        modes = modes or (PoolingMode.parse(recipe.pooling),)
        normalize = recipe.normalize
    if not modes:
        raise CheckpointError(
            f"{directory} does not state a pooling mode (in modules.json and the config.json of a "
            "Pooling module); pass pooling='mean' or pooling='cls', as the model was trained"
        )
    if adapter := next((n for n in ADAPTER_FILES if (transformer / n).is_file()), None):
        raise CheckpointError(
            f"{transformer} has an adapter ({adapter}), which the weights of the base model do not "
            "include: merge it with PEFT's merge_and_unload() and save the merged model"
        )
    if not any((transformer / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{transformer} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}"
        )
    st_config = _transformer_config(transformer)
    main_config = read_optional_json(directory / "config_sentence_transformers.json")
    own_prompts = _read_prompts(main_config, directory, recipe)
    length = _max_seq_length(transformer, config, st_config, recipe, max_seq_length)
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
        max_seq_length=length,
        do_lower_case=bool(st_config.get("do_lower_case", False)),
        prompts=own_prompts | dict(prompts or {}),
        default_prompt_name=main_config.get("default_prompt_name"),
        similarity_fn_name=str(main_config.get("similarity_fn_name") or "cosine"),
        licence=_licence(directory) or (recipe.licence.lower() if recipe else None),
        overridden=(modes, normalize) != (modules.pooling, modules.normalize),
        include_prompt=modules.include_prompt,
    )


def _licence(directory: Path) -> str | None:
    """Return the `license` of a model card's front matter, if there is one."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    front = (
        card.read_text(encoding="utf-8", errors="replace").removeprefix("---").partition("\n---")
    )
    match = re.search(r"^license:[ \t]*['\"]?([\w.-]+)", front[0] if front[1] else "", re.MULTILINE)
    return match[1] if match else None


def _transformer_config(transformer: Path) -> dict[str, Any]:
    """Return sentence_bert_config.json, or that of another architecture, if it is supported."""
    for path in map(transformer.joinpath, TRANSFORMER_CONFIGS):
        if not path.is_file():
            continue
        config = read_json(path)
        for key, allowed in SUPPORTED_SETTINGS.items():
            if config.get(key) not in allowed:
                raise CheckpointError(
                    f"{path}: {key} {config[key]!r:.80} is not supported; supported: {allowed[-1]}"
                )
        return config
    return {}


def _read_prompts(
    config: Mapping[str, Any], directory: Path, recipe: Recipe | None
) -> dict[str, str]:
    """Return the prompts of config_sentence_transformers.json, or the recipe's if it has none."""
    path = directory / "config_sentence_transformers.json"
    table = config.get("prompts") or {}
    if not isinstance(table, dict) or not all(
        text is None or isinstance(text, str) for text in table.values()
    ):
        raise CheckpointError(f"{path}: prompts must map names to texts, got {table!r:.80}")
    prompts = {name: text for name, text in table.items() if text is not None}
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


def _max_seq_length(
    transformer: Path,
    config: Mapping[str, Any],
    st_config: Mapping[str, Any],
    recipe: Recipe | None,
    requested: int | None,
) -> int:
    positions = position_count(config)
    if requested is not None:
        limit = LONGEST_SEQUENCE if positions is None else positions
        if type(requested) is not int or not 3 <= requested <= limit:
            raise ValueError(
                f"max_seq_length must be an integer from 3 to {limit} for this model, got {requested!r}"
            )
        return requested
    length = st_config.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 3):
        raise CheckpointError(
            f"{transformer}: max_seq_length must be an integer of at least 3 (two special tokens and a "
            f"word), got {length!r}"
        )
    if length is None and recipe is not None and not st_config:
        length = recipe.max_seq_length
    if length is None:
        length = read_optional_json(transformer / "tokenizer_config.json").get("model_max_length")
    lengths = [
        n for n in (length, positions) if isinstance(n, int | float) and 2 < n <= LONGEST_SEQUENCE
    ]
    if not lengths:
        raise CheckpointError(
            f"{transformer} states no maximum length: neither max_seq_length in sentence_bert_config.json, "
            "model_max_length in tokenizer_config.json nor max_position_embeddings in config.json"
        )
    return int(min(lengths))


def position_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens for which config.json states position embeddings, or None."""
    for key in ("max_position_embeddings", "n_positions"):
        count = config.get(key)
        if isinstance(count, int) and count > 2:
            kind = str(config.get("model_type"))
            if kind not in AFTER_PADDING:
                return count
            # As for RoBERTa, also where the architecture is traced.
            skipped = ARCHITECTURES.get(kind, ARCHITECTURES["roberta"]).skipped(config)
            return count - 1 - int(skipped or 0)
    return None
