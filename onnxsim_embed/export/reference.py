"""References for an export that transformers and sentence-transformers compute."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.numpy_encoder import numpy_reference
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.pooling import Head
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.threads import map_chunks

Hidden = Callable[[Int64], Float32]

logger = logging.getLogger(__name__)

# Texts in a padded batch: enough for lengths to differ, few enough for a small machine.
PADDED_TEXTS = 16
# Attention scores of a head in such a batch: a few long texts, of 2,048 tokens one.
PADDED_SCORES = 4 * 512**2

# With these the added tokens and a text beyond the maximum length; see `probe_texts`.
PROBES = (
    "",
    " ",
    "  Leading, trailing  and double  spaces ",
    "UPPER Case and MixedCase, \u0130stanbul STRASSE Stra\u00dfe",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcn\u00efc\u00f6de \u00c5ngstr\u00f6m \ufb01ne \uff21\uff22",
    "\u4f60\u597d\u4e16\u754c \u6f22\u5b57\u304b\u306a \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "tabs\tnew\nlines\r\n, \u200bzero width, no\u00a0break, \u3000wide \x07 bell \ufffd",
    "\U0001f642 \u2026 \u2014 (a-b) [x] {y} <z> 3,14 $5 50% e.g. don't http://a.b/c?d=e&f",
)


def has_transformers() -> bool:
    """Return whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def has_torch() -> bool:
    """Return whether PyTorch and transformers are installed."""
    return has_transformers() and importlib.util.find_spec("torch") is not None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers, PyTorch and optimum."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("optimum", "torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def load_model(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - transformers is untyped
    """Return transformers' model with all weights of the checkpoint.

    transformers initializes weights at random that it does not find, as under the prefix of a
    wrapper; those are filled from the tensors that this package reads.

    :raises CheckpointError: if weights are missing, not finite or cannot be loaded.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    if "auto_map" in checkpoint.config and checkpoint.architecture not in CONFIG_MAPPING:
        raise CheckpointError(
            f"architecture {checkpoint.architecture!r} is defined by code inside the checkpoint (auto_map "
            "in config.json), which is never run; use a copy of the model whose config.json names an "
            "architecture of transformers, or a directory of its ONNX file without the weights"
        )
    try:
        with quiet_transformers():
            model, report = AutoModel.from_pretrained(
                checkpoint.transformer,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        missing = report["missing_keys"]
        if any("pooler" not in name for name in missing):
            tensors = {k: torch.from_numpy(v.copy()) for k, v in checkpoint.tensors().items()}
            missing = model.load_state_dict(tensors, strict=False).missing_keys
    except CheckpointError:
        raise
    except Exception as error:  # configuration, OS and unpickling errors share no base class
        raise CheckpointError(
            f"transformers cannot load {checkpoint.transformer}: {first_line(error)}"
        ) from error
    missing = sorted(name for name in missing if "pooler" not in name)
    if missing:
        raise CheckpointError(
            f"the weights lack {len(missing)} tensors, {missing[0]!r} first; is this a complete "
            f"{checkpoint.architecture} model?"
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"tensor {name!r} in {checkpoint.transformer} contains NaN or infinite values: the "
                "checkpoint is broken (a diverged training run?)"
            )
    return model.eval()


def reference_tokenizer(checkpoint: Checkpoint) -> Callable[[Sequence[str]], list[Int64]]:
    """Return transformers' own tokenizer as a function from texts to token ids (t,)."""
    from tokenizers.normalizers import Lowercase, Normalizer
    from tokenizers.normalizers import Sequence as Normalizers
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.transformer, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers' and the tokenizers library's share no base class
        raise CheckpointError(
            f"transformers cannot load the tokenizer of {checkpoint.transformer}: {first_line(error)}"
        ) from error
    if checkpoint.do_lower_case:  # as sentence-transformers does
        normalizer: Normalizer | None = tokenizer.backend_tokenizer.normalizer
        steps = [Lowercase(), *([] if normalizer is None else [normalizer])]
        tokenizer.backend_tokenizer.normalizer = Normalizers(steps)

    def run(texts: Sequence[str]) -> list[Int64]:
        ids = tokenizer(list(texts), truncation=True, max_length=checkpoint.max_seq_length)
        return [np.asarray(row, np.int64) for row in ids["input_ids"]]

    return run


def compare_token_ids(
    checkpoint: Checkpoint, texts: Sequence[str], own: list[Int64]
) -> tuple[dict[str, Any], list[Int64], list[str]]:
    """Return a report on transformers' token ids, those ids (else our own), and problems."""
    try:
        if not has_transformers():
            raise CheckpointError("transformers is not installed")
        ids = reference_tokenizer(checkpoint)(texts)
    except CheckpointError as error:
        logger.warning("token ids are not compared with transformers': %s", error)
        return {"reference": None, "reason": str(error)}, own, []
    different = [i for i, row in enumerate(ids) if not np.array_equal(row, own[i])]
    problems = []
    if different:
        first = different[0]
        problems.append(
            f"token ids of {len(different)} of {len(texts)} texts differ from transformers', as of "
            f"{texts[first]!r:.60}: {own[first][:20].tolist()}, not {ids[first][:20].tolist()}"
        )
    return {"reference": "transformers", "texts": len(texts)}, ids, problems


def sentence_transformers_vectors(
    checkpoint: Checkpoint,
    loaded: Any,  # noqa: ANN401 - transformers is untyped
    texts: Sequence[str],
) -> Float32 | None:
    """Return sentence-transformers' own vectors, or None if it is not installed or has other modules."""
    if importlib.util.find_spec("sentence_transformers") is None or checkpoint.overridden:
        return None
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        model = SentenceTransformer(
            str(checkpoint.directory), device="cpu", local_files_only=True, trust_remote_code=False
        )
    model.float()
    model[0].auto_model.load_state_dict(loaded.state_dict())
    model.max_seq_length = checkpoint.max_seq_length
    return np.asarray(
        model.encode(list(texts), prompt="", batch_size=8, show_progress_bar=False), np.float32
    )


def probe_texts(model: Embedder) -> list[str]:
    """Return texts on which tokenizers differ: case, accents, scripts, added tokens, lengths."""
    table = json.loads((model.artifact.directory / "tokenizer.json").read_text(encoding="utf-8"))
    added = [entry["content"] for entry in table["added_tokens"]]
    return [
        *PROBES,
        "far too long, " * model.max_seq_length,
        *(
            f"one {t} two{t}three {t.lower()} {t.upper()} {t}"
            for t in [*added[:20], *added[20:][-20:]]
        ),
    ]


def length_probes(token_ids: Sequence[Int64], longest: int) -> list[Int64]:
    """Return token ids of texts cut and repeated to 1, 2, `longest` - 1 and `longest` tokens."""
    stream = np.concatenate(token_ids)
    return [np.resize(stream, length) for length in sorted({1, 2, longest - 1, longest})]


def torch_reference(model: Any) -> Hidden:  # noqa: ANN401
    """Return a model of `load_model` as a function from input_ids (1, t) to hidden states (1, t, h)."""
    import torch

    def run(input_ids: Int64) -> Float32:
        with torch.inference_mode():
            ids = torch.from_numpy(input_ids)
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return np.asarray(hidden.numpy())

    return run


def reference_vectors(
    hidden: Hidden, finish: Callable[[Float32], Float32], token_ids: Sequence[Int64]
) -> Float32:
    """Run a reference one text at a time, unpadded; `finish` pools (1, t, h) to (1, dim)."""
    return np.concatenate(list(map_chunks(lambda ids: finish(hidden(ids[None])), token_ids)))


def checkpoint_vectors(
    checkpoint: Checkpoint,
    head: Head,
    texts: Sequence[str],
    ids: Sequence[Int64],
    lengths: Sequence[Int64],
    token_ids: dict[str, Any],
) -> tuple[str, Float32, Float32]:
    """Return what computes a checkpoint's vectors, those of texts, and those of the ids `lengths`.

    :param ids: of the texts, for `head` where sentence-transformers does not compute their vectors.
    :param token_ids: report of `compare_token_ids`, which learns what pooled.
    """
    vectors = None
    if has_torch():
        name, loaded = "PyTorch", load_model(checkpoint)
        hidden = torch_reference(loaded)
        if token_ids["reference"]:
            vectors = sentence_transformers_vectors(checkpoint, loaded, texts)
        token_ids["pipeline"] = "own pooling" if vectors is None else "sentence-transformers"
    else:
        name, hidden = "numpy", numpy_reference(checkpoint.config, checkpoint.tensors())
    if vectors is None:
        vectors = reference_vectors(hidden, head, ids)
    return name, vectors, reference_vectors(hidden, head, lengths)


def padded_vectors(
    session: Session,
    model: Embedder,
    token_ids: Sequence[Int64],
    head: Callable[[Float32, Int64], Float32] | None = None,
) -> Float32:
    """Return the vectors (n, dim) of a portable file in padded batches.

    :param head: from the file's first output and the mask to vectors; None for the model's pooling.
    """
    head = head or model.head
    pad_id = model.artifact.manifest.pad_token_id
    vectors, start = [], 0
    while start < len(token_ids):
        batch = token_ids[start : start + PADDED_TEXTS]
        batch = batch[: max(1, PADDED_SCORES // max(map(len, batch)) ** 2)]
        start += len(batch)
        ids = np.full((len(batch), max(map(len, batch))), pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        vectors.append(head(session.run(ids, mask), mask))
    return np.concatenate(vectors)
