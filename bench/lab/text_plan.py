"""What a measurement of texts is about: the model, its checkpoint, the texts, the cases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lab.bench import Plan
from lab.corpus import Corpus
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.runtime.tokenization import Tokenizer

CASES = ("latency", "growth", "start")

# Long texts are as long as nearly all encoders can take, whatever a model is set to.
LONG_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class TextPlan(Plan):
    """What to measure.

    :param model: recipe name, artifact, checkpoint directory or Hub id.
    :param corpora: kinds of texts; latency and growth take the first, memory the last but one.
    :param cases: of CASES; throughput and fidelity are always measured.
    :param checkpoint: what peers load; None: what the artifact was made from.
    :param sts: sentence pairs with human scores.
    """

    model: str
    corpora: tuple[Corpus, ...]
    cases: tuple[str, ...] = CASES
    checkpoint: Path | None = None
    sts: Path | None = None


def linear_operations(artifact: Artifact) -> int:
    """Return the operations (a multiplication and an addition are two) of linear layers for a token."""
    config = json.loads(artifact.file("config.json").read_text(encoding="utf-8"))
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    return 2 * int(config["num_hidden_layers"]) * (4 * hidden * hidden + 2 * hidden * inner)


def most_tokens(artifact: Artifact, kind: str) -> int:
    """Return how many tokens of a text are kept: the model's number, for long texts its positions."""
    if kind != "long":
        return artifact.manifest.max_seq_length
    config = json.loads(artifact.file("config.json").read_text(encoding="utf-8"))
    return min(LONG_TOKENS, int(config["max_position_embeddings"]))


def count_tokens(artifact: Artifact, corpus: Corpus) -> int:
    """Return the tokens of a corpus as the model sees them, special ones included."""
    manifest = artifact.manifest
    tokenizer = Tokenizer(
        artifact.file("tokenizer.json"),
        most_tokens(artifact, corpus.kind),
        manifest.do_lower_case,
        manifest.pad_token_id,
    )
    return int(tokenizer(list(corpus.texts)).counts.sum())
