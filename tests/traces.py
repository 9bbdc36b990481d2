"""Seeded tiny encoders of transformers' architectures, as Sentence-Transformers directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support import VOCABULARY, tokenizer_json, write_checkpoint, write_json

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
PADDED_WITH_1 = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 50, "type_vocab_size": 1}
ENDS = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
KINDS = {
    "albert": {**SMALL, "embedding_size": 16},
    "bert": SMALL,
    "camembert": PADDED_WITH_1,
    "deberta-v2": {
        **SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 48},
    "electra": {**SMALL, "embedding_size": 16},
    "eurobert": {**SMALL, "num_key_value_heads": 2, "pad_token_id": 1},
    "gte": {**SMALL, "pad_token_id": 1},
    "modernbert": {**SMALL, **ENDS, "pad_token_id": 1, "local_attention": 8, "num_hidden_layers": 4},
    "mpnet": PADDED_WITH_1,
    "nomic_bert": SMALL,
    "roberta": PADDED_WITH_1,
    "xlm-roberta": PADDED_WITH_1,
}  # fmt: skip
# Where padding is token 1.
OTHER_ORDER = ["[CLS]", "[PAD]", "[SEP]", *(t for t in VOCABULARY if t not in ("[CLS]", "[PAD]", "[SEP]"))]  # fmt: skip


def write_model(directory: Path, kind: str, **changes) -> Path:
    """Write a seeded tiny model, mean-pooled, of at most 48 tokens."""
    import torch
    from transformers import AutoConfig, AutoModel

    settings = KINDS[kind] | {"vocab_size": len(VOCABULARY)} | changes
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(8)  # so that attention is uneven
    write_checkpoint(directory, tensors={"none": np.zeros(1, np.float32)})
    for name in ("model.safetensors", "vocab.txt", "config.json", "sentence_bert_config.json"):
        (directory / name).unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}
    write_json(directory / "tokenizer_config.json", config)
    order = OTHER_ORDER if settings.get("pad_token_id") == 1 else VOCABULARY
    write_json(directory / "tokenizer.json", tokenizer_json(order))
    model.save_pretrained(directory)
    return directory


def check_hidden_states(directory: Path, file: Path, bound: float = 2e-5) -> None:
    """Compare hidden states of an ONNX file with PyTorch's: lengths from 1 to 48, alone and padded."""
    import torch

    from onnxsim_embed.export.checkpoint import open_checkpoint
    from onnxsim_embed.export.reference import load_model
    from onnxsim_embed.runtime.session import Session

    model, session = load_model(open_checkpoint(directory)), Session(file, "cpu")
    pad = model.config.pad_token_id or 0
    rng = np.random.default_rng(0)
    batches = [[1], [2], [3], [47], [48], [1, 1], [48, 48, 48], [1, 48, 2, 47, 9], [9, 3]]
    for lengths in batches:
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        ids = np.where(mask, rng.integers(5, len(VOCABULARY), mask.shape), pad)
        with torch.inference_mode():
            expected = model(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
            ).last_hidden_state.numpy()
        difference = np.abs(session.run(ids, mask) - expected)[mask == 1]
        assert difference.max() < bound, lengths
