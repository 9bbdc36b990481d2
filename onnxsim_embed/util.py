"""The functions of `sentence_transformers.util` that notebooks use, on numpy.

Signatures and return formats are the same, so that one changed import is enough. Inputs may be arrays,
lists, or PyTorch tensors on the CPU (PyTorch is not imported); scores are float32. What differs: arrays
come back where tensors did, values that are NaN or infinite raise ValueError, equal scores come in the
order of their rows, and no limit is applied that was not given (see `paraphrase_mining_embeddings`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.options import OutputPrecision
from onnxsim_embed.runtime.postprocess import quantize_vectors
from onnxsim_embed.similarity.clustering import BestPairs, best_of_rows, communities, score_chunks
from onnxsim_embed.similarity.compare import (
    cos_sim,
    neighbours,
    score_all,
    score_pairs,
    unit_vectors,
)
from onnxsim_embed.similarity.compare import top_k as closest

__all__ = [
    "community_detection",
    "cos_sim",
    "dot_score",
    "normalize_embeddings",
    "pairwise_cos_sim",
    "pairwise_dot_score",
    "paraphrase_mining",
    "paraphrase_mining_embeddings",
    "quantize_embeddings",
    "semantic_search",
    "truncate_embeddings",
]

Scores = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
ScoreFunction = Callable[[Any, Any], Any]

# The limits that sentence-transformers' paraphrase mining has by default.
THEIR_PAIRS = 500_000
THEIR_TOP_K = 100


def dot_score(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the dot product of every row of `a` with every row of `b`.

    :param a: (n, dim) or (dim,).
    :param b: (m, dim) or (dim,).
    :returns: float32 array (n, m).
    """
    return score_all(a, b, "dot")


def pairwise_cos_sim(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the cosine of each row of `a` with the same row of `b`, float32 array (n,)."""
    return score_pairs(a, b, "cosine")


def pairwise_dot_score(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the dot product of each row of `a` with the same row of `b`, float32 array (n,)."""
    return score_pairs(a, b, "dot")


def normalize_embeddings(embeddings: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Scale each row, or one vector, to L2 norm 1; zero rows stay zero. Returns float32."""
    array = np.asarray(embeddings)
    return unit_vectors(array[None])[0] if array.ndim == 1 else unit_vectors(array)


def truncate_embeddings(embeddings: npt.ArrayLike, truncate_dim: int | None) -> npt.NDArray[Any]:
    """Keep the first `truncate_dim` components of each vector; None keeps all."""
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
    :param ranges: (2, dim), least and largest value of each component, for int8 and uint8.
    :param calibration_embeddings: (m, dim), the vectors to take ranges from where none are given; None
        takes them from `embeddings`.
    :raises ValueError: for integers, an unknown precision, or ranges that do not fit.
    """
    array = np.asarray(embeddings)
    if array.dtype.kind != "f":
        raise ValueError(f"embeddings to quantize must be floats, got dtype {array.dtype}")
    if ranges is None and calibration_embeddings is not None:
        known = np.asarray(calibration_embeddings)
        ranges = np.stack([known.min(axis=0), known.max(axis=0)])
    return quantize_vectors(array.astype(np.float32, copy=False), precision, ranges)


def semantic_search(
    query_embeddings: npt.ArrayLike,
    corpus_embeddings: npt.ArrayLike,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500000,
    top_k: int = 10,
    score_function: ScoreFunction = cos_sim,
) -> list[list[dict[str, Any]]]:
    """Find the vectors of a corpus that score best with each query.

    :param query_embeddings: (n, dim) or (dim,).
    :param corpus_embeddings: (m, dim).
    :param query_chunk_size: at most so many queries in one call of a score function of your own. No
        result depends on it.
    :param corpus_chunk_size: at most so many vectors of the corpus in one such call.
    :param top_k: how many for each query; all where the corpus has fewer.
    :param score_function: `cos_sim`, `dot_score`, or any function of two chunks (of what was given:
        arrays, or tensors) that returns an array of their scores.
    :returns: for each query a list of {"corpus_id": row, "score": score}, best first, ties by lower row.
    :raises ValueError: for a negative `top_k`, or values and shapes as `similarity_matrix`.
    """
    _check_limit("top_k", top_k)
    queries, corpus = _rows(query_embeddings), _rows(corpus_embeddings)
    k = min(top_k, len(corpus))
    if k == 0 or len(queries) == 0:
        return [[] for _ in range(len(queries))]
    if score_function is cos_sim:
        scores, ids = closest(queries, corpus, k)
        return [_hits(*row) for row in zip(ids, scores, strict=True)]
    chunks = (query_chunk_size, corpus_chunk_size)
    strips = score_chunks(queries, corpus, score_function, chunks)
    best = (best_of_rows(scores, k) for _, scores in strips)
    return [_hits(*row) for part in best for row in zip(*part, strict=True)]


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
) -> list[list[Any]]:
    """Encode sentences and find the pairs that score best; see `paraphrase_mining_embeddings`.

    :param model: an `Embedder`, a SentenceTransformer, or whatever has `encode(sentences)`. It gets
        `show_progress_bar`, `batch_size`, `truncate_dim`, `prompt_name` and `prompt` where they are
        given.
    :param batch_size: None leaves it to the model.
    """
    asked = {
        "show_progress_bar": show_progress_bar or None,
        "batch_size": batch_size,
        "truncate_dim": truncate_dim,
        "prompt_name": prompt_name,
        "prompt": prompt,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    vectors = model.encode(sentences, **given)
    return paraphrase_mining_embeddings(
        vectors, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
    )


def paraphrase_mining_embeddings(
    embeddings: npt.ArrayLike,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int | None = None,
    top_k: int | None = None,
    score_function: ScoreFunction = cos_sim,
) -> list[list[Any]]:
    """Find the pairs of rows that score best.

    sentence-transformers looks at the 100 closest rows of each row and returns the best 500,000 pairs of
    these, so that a group of more than 101 like rows silently loses pairs. Here the limits apply where
    they are given: `max_pairs` alone returns the best of all pairs, `top_k=100, max_pairs=500000` what
    sentence-transformers returns. With neither, the result is the best 500,000 of all pairs, and
    besides them the pairs that sentence-transformers would return: at most a million, and none is
    missing that scores above the 500,000th. `similar_pairs` returns all above a threshold.

    :param embeddings: (n, dim).
    :param query_chunk_size: at most so many rows in one call of a score function of your own. No result
        depends on it.
    :param corpus_chunk_size: at most so many rows on the other side of such a call.
    :param max_pairs: most pairs returned, the best ones, ties by lower rows.
    :param top_k: only pairs in which one row is among the so many that score best with the other.
    :param score_function: as for `semantic_search`; it must be symmetric.
    :returns: lists [score, i, j] with i below j, best first, ties by lower rows.
    :raises ValueError: for a negative limit, or values and shapes as `similarity_matrix`.
    """
    _check_limit("max_pairs", max_pairs)
    _check_limit("top_k", top_k)
    rows = _rows(embeddings)
    n = len(rows)
    if n < 2 or 0 in (max_pairs, top_k):
        return []
    score, chunks = score_function, (query_chunk_size, corpus_chunk_size)
    if score_function is cos_sim:
        rows, score, chunks = unit_vectors(rows), _dot_of_units, (n, n)
    found: list[tuple[Int64, Scores]] = []
    if top_k is None:
        best = BestPairs(THEIR_PAIRS if max_pairs is None else max_pairs)
        for start, scores in score_chunks(rows, rows, score, chunks, upper=True):
            best.add_upper(start, scores, n)
        found.append(best.result())
    unlimited = max_pairs is None and top_k is None
    if top_k is not None or (unlimited and n * (n - 1) // 2 > THEIR_PAIRS):
        best = BestPairs(THEIR_PAIRS if unlimited else max_pairs)
        k = min(THEIR_TOP_K if top_k is None else top_k, n - 1)
        for start, ids, scores in _neighbours(rows, k, score, chunks):
            own = np.broadcast_to(np.arange(start, start + len(ids))[:, None], ids.shape)
            best.add((np.minimum(own, ids) * n + np.maximum(own, ids)).ravel(), scores.ravel())
        found.append(best.result())
    everything = BestPairs(None)
    for part in found:
        everything.add(*part)
    keys, scores = everything.result()
    order = np.argsort(-scores, kind="stable")  # keys rise, so ties go by lower rows
    left, right = np.divmod(keys[order], n)
    columns = zip(scores[order].tolist(), left.tolist(), right.tolist(), strict=True)
    return [list(pair) for pair in columns]


def _neighbours(
    rows: Any,  # noqa: ANN401
    k: int,
    score: ScoreFunction,
    chunks: tuple[int, int],
) -> Iterator[tuple[int, Int64, Scores]]:
    """Yield first row, columns and scores of the k other rows that score best with each row."""
    if score is _dot_of_units:
        best = neighbours(rows, k)
        yield 0, best.indices, best.scores
        return
    for start, scores in score_chunks(rows, rows, score, chunks):
        ids, best_scores = best_of_rows(scores, k + 1)
        own = ids == np.arange(start, start + len(ids))[:, None]
        own[~own.any(axis=1), k] = True  # not among the k + 1 best itself: the last is one too many
        shape = (len(ids), k)
        yield start, ids[~own].reshape(shape), best_scores[~own].reshape(shape)


def _dot_of_units(a: Scores, b: Scores) -> Scores:
    scores = a @ b.T
    return np.minimum(scores, np.float32(1), out=scores)  # rounding may pass 1, a cosine never does


def community_detection(
    embeddings: npt.ArrayLike,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Find groups of rows around central rows; see `mining.communities`.

    :param embeddings: (n, dim) or (dim,).
    :param threshold: least cosine with the central row.
    :param min_community_size: least rows of a community.
    :param batch_size: taken for compatibility: no result depends on it, nor does memory.
    :param show_progress_bar: taken for compatibility; nothing is shown.
    :returns: lists of rows, the largest first; each begins with its central row.
    """
    rows = _rows(embeddings)
    if len(rows) == 0:
        return []
    return [group.tolist() for group in communities(rows, threshold, min_community_size)]


def _rows(vectors: Any) -> Any:  # noqa: ANN401
    """Return what can be sliced by rows: arrays and tensors as they are, one vector as one row."""
    array = vectors if hasattr(vectors, "shape") else np.asarray(vectors)
    return array[None] if len(array.shape) == 1 and len(array) else array


def _hits(ids: Int64, scores: Scores) -> list[dict[str, Any]]:
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    return [{"corpus_id": row, "score": score} for row, score in pairs]


def _check_limit(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
