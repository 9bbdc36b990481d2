"""Functions of `sentence_transformers.util` on numpy.

Signatures and return formats are the same. Inputs may be arrays, lists, or PyTorch tensors on the CPU
(PyTorch is not imported). Differences: arrays are returned in place of tensors, NaN and infinite values
raise ValueError, equal scores are ordered by row, and no limit applies that the caller did not set.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.files.texts import list_rows
from onnxsim_embed.runtime.options import OutputPrecision
from onnxsim_embed.runtime.postprocess import quantize_vectors
from onnxsim_embed.similarity import clustering, compare, duplicates
from onnxsim_embed.similarity.clustering import ScoreFunction, Vectors
from onnxsim_embed.similarity.compare import cos_sim, score_all, score_pairs, unit_vectors
from onnxsim_embed.similarity.selection import TopPairs, top_k_of_rows
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.units import check_integer

logger = logging.getLogger(__name__)

__all__ = [
    "community_detection", "cos_sim", "dot_score", "normalize_embeddings", "pairwise_cos_sim",
    "pairwise_dot_score", "paraphrase_mining", "paraphrase_mining_embeddings", "pytorch_cos_sim",
    "quantize_embeddings", "semantic_search", "truncate_embeddings",
]  # fmt: skip

pytorch_cos_sim = cos_sim  # the name of old notebooks

# The default limits of sentence-transformers' paraphrase mining.
DEFAULT_MAX_PAIRS = 500_000
DEFAULT_TOP_K = 100


def dot_score(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Return the dot product of every row of `a` with every row of `b`, float32 array (n, m)."""
    return score_all(a, b, "dot")


def pairwise_cos_sim(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Return the cosine of each row of `a` with the same row of `b`, float32 array (n,)."""
    return score_pairs(a, b, "cosine")


def pairwise_dot_score(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Return the dot product of each row of `a` with the same row of `b`, float32 array (n,)."""
    return score_pairs(a, b, "dot")


def normalize_embeddings(embeddings: npt.ArrayLike) -> Float32:
    """Scale each row, or one vector, to L2 norm 1; zero rows stay zero. Returns float32."""
    array = np.asarray(embeddings)
    return unit_vectors(array[None])[0] if array.ndim == 1 else unit_vectors(array)


def truncate_embeddings(embeddings: npt.ArrayLike, truncate_dim: int | None) -> npt.NDArray[Any]:
    """Truncate vectors to `truncate_dim` dimensions; None keeps all."""
    return np.asarray(embeddings)[..., :truncate_dim]


def quantize_embeddings(
    embeddings: npt.ArrayLike,
    precision: OutputPrecision,
    ranges: npt.ArrayLike | None = None,
    calibration_embeddings: npt.ArrayLike | None = None,
) -> npt.NDArray[Any]:
    """Convert vectors to another number format; see `Embedder.encode`.

    :param embeddings: floats (n, dim).
    :param precision: float32, float16, int8, uint8, binary or ubinary.
    :param ranges: (2, dim), minimum and maximum of each component, for int8 and uint8.
    :param calibration_embeddings: (m, dim), compute ranges from these; None: from `embeddings`.
    :raises ValueError: for integers, an unknown precision, or ranges that do not match.
    """
    array = np.asarray(embeddings)
    if array.dtype.kind != "f":
        raise ValueError(f"embeddings to quantize must be floats, got dtype {array.dtype}")
    if ranges is None and calibration_embeddings is not None:
        calibration = np.asarray(calibration_embeddings)
        ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    return quantize_vectors(array.astype(np.float32, copy=False), precision, ranges)


def semantic_search(
    query_embeddings: npt.ArrayLike,
    corpus_embeddings: npt.ArrayLike,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500000,
    top_k: int = 10,
    score_function: ScoreFunction = cos_sim,
) -> list[list[dict[str, Any]]]:
    """Find the top-k vectors of a corpus for each query.

    :param query_embeddings: (n, dim) or (dim,).
    :param corpus_embeddings: (m, dim).
    :param query_chunk_size: maximum number of queries in one call of a custom score function.
    :param corpus_chunk_size: maximum number of corpus vectors in one such call.
    :param top_k: number of hits for each query; all if the corpus has fewer.
    :param score_function: `cos_sim`, `dot_score`, or any function of two chunks of the inputs (arrays, or
        tensors) that returns an array of their scores.
    :returns: for each query a list of {"corpus_id": row, "score": score}, best first.
    :raises ValueError: for a negative `top_k`, or as `similarity_matrix`.
    """
    top_k = check_integer("top_k", top_k, 0)
    queries, corpus = _rows(query_embeddings), _rows(corpus_embeddings)
    k = min(top_k, len(corpus))
    if k == 0 or len(queries) == 0:
        return [[] for _ in range(len(queries))]
    if score_function is cos_sim:
        results = [compare.top_k(queries, corpus, k)]
    else:
        chunks = (query_chunk_size, corpus_chunk_size)
        scored = clustering.score_chunks(queries, corpus, score_function, chunks)
        results = [top_k_of_rows(scores, k) for _, scores in scored]
    return [
        [
            {"corpus_id": row, "score": score}
            for row, score in zip(indices.tolist(), scores.tolist(), strict=True)
        ]
        for result in results
        for scores, indices in zip(*result, strict=True)
    ]


def paraphrase_mining(
    model: Any,  # noqa: ANN401
    sentences: Sequence[str],
    show_progress_bar: bool = False,
    batch_size: int | None = None,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int | None = None,
    top_k: int | None = None,
    score_function: ScoreFunction = cos_sim,
    truncate_dim: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    drop_unseen: bool = False,
) -> list[list[Any]]:
    """Encode sentences and find the pairs with the highest scores; see `paraphrase_mining_embeddings`.

    Sentences that the model does not tell from earlier ones, although they differ (beyond its maximum
    length, in unknown tokens) or are empty, are named in a warning.

    :param model: an `Embedder`, a SentenceTransformer, or any object with `encode(sentences)`, which
        receives `show_progress_bar`, `batch_size`, `truncate_dim`, `prompt_name` and `prompt` if set.
    :param drop_unseen: leave such sentences out.
    """
    options = {
        "show_progress_bar": show_progress_bar or None,
        "batch_size": batch_size,
        "truncate_dim": truncate_dim,
        "prompt_name": prompt_name,
        "prompt": prompt,
    }
    vectors = model.encode(sentences, **{n: v for n, v in options.items() if v is not None})
    unseen = duplicates.unseen_rows(vectors, sentences)
    rows = np.arange(len(sentences))
    if drop_unseen:
        rows = np.delete(rows, unseen)
        vectors = np.asarray(vectors)[rows]
    if len(unseen):
        state = "left out" if drop_unseen else "drop_unseen=True leaves them out"
        named = f"{list_rows(unseen)} ({state})"
        logger.warning("the model does not tell sentences from others that differ: %s", named)
    pairs = paraphrase_mining_embeddings(
        vectors, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
    )
    return [[score, int(rows[left]), int(rows[right])] for score, left, right in pairs]


def paraphrase_mining_embeddings(
    embeddings: npt.ArrayLike,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int | None = None,
    top_k: int | None = None,
    score_function: ScoreFunction = cos_sim,
) -> list[list[Any]]:
    """Find the pairs of rows with the highest scores.

    sentence-transformers considers the 100 nearest rows of each row and returns the top 500,000 of these
    pairs, so that a group of more than 101 similar rows silently loses pairs. Here a limit applies if it
    is set: `max_pairs` alone returns the top of all pairs, `top_k=100, max_pairs=500000` returns what
    sentence-transformers returns. With neither, the result is the top 500,000 of all pairs, and in
    addition the pairs that sentence-transformers would return: at most a million, and no pair is missing
    that scores above the 500,000th. `similar_pairs` returns all pairs above a threshold.

    :param embeddings: (n, dim).
    :param query_chunk_size: maximum number of rows in one call of a custom score function.
    :param corpus_chunk_size: maximum number of rows on the other side of such a call.
    :param max_pairs: maximum number of pairs; those with the highest scores, ties by lower rows.
    :param top_k: only pairs in which one row is among the top-k of the other.
    :param score_function: as for `semantic_search`; it must be symmetric.
    :returns: lists [score, i, j] with i below j, best first, ties by lower rows; cosines are bitwise
        those of `similar_pairs`.
    :raises ValueError: for a negative limit, or as `similarity_matrix`.
    """
    if max_pairs is not None:
        max_pairs = check_integer("max_pairs", max_pairs, 0)
    if top_k is not None:
        top_k = check_integer("top_k", top_k, 0)
    rows = _rows(embeddings)
    n = len(rows)
    if n < 2 or 0 in (max_pairs, top_k):
        return []
    chunks = (query_chunk_size, corpus_chunk_size)
    score = None if score_function is cos_sim else score_function
    if score is None:
        rows = unit_vectors(rows)
    unlimited = max_pairs is None and top_k is None
    limit = DEFAULT_MAX_PAIRS if unlimited else max_pairs
    best = TopPairs(n, None)
    if top_k is None:
        best.add(*clustering.top_pairs(rows, limit, None, score, chunks))
    if top_k is not None or (unlimited and n * (n - 1) // 2 > DEFAULT_MAX_PAIRS):
        k = min(DEFAULT_TOP_K if top_k is None else top_k, n - 1)
        best.add(*clustering.top_pairs(rows, limit, k, score, chunks))
    columns = (array.tolist() for array in best.result())
    return [[value, left, right] for left, right, value in zip(*columns, strict=True)]


def community_detection(
    embeddings: npt.ArrayLike,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Find groups of rows around central rows; see `onnxsim_embed.communities`.

    :param embeddings: (n, dim) or (dim,).
    :param threshold: minimum cosine with the central row.
    :param min_community_size: minimum number of rows of a community.
    :param batch_size: accepted for compatibility; neither results nor memory depend on it.
    :param show_progress_bar: accepted for compatibility; there is no bar.
    :returns: lists of rows, largest first; each begins with its central row.
    """
    rows = _rows(embeddings)
    if len(rows) == 0:
        return []
    return [group.tolist() for group in clustering.communities(rows, threshold, min_community_size)]


def _rows(vectors: Vectors) -> Vectors:
    """Return vectors as something to slice by row: arrays and tensors unchanged, one vector as one row."""
    array = vectors if hasattr(vectors, "shape") else np.asarray(vectors)
    return array[None] if len(array.shape) == 1 and len(array) else array


def __dir__() -> list[str]:
    return sorted(__all__)
