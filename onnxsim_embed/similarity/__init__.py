"""Vectors -> matrix, top-k, pairs, index, clusters, similarity graphs on disk. numpy and scipy only."""

from onnxsim_embed.similarity.compare import (
    Pairs,
    TopK,
    check_threshold,
    closest_pairs,
    cos_sim,
    estimate_similarity,
    neighbours,
    score_all,
    score_pairs,
    similar_pairs,
    similarity_matrix,
    top_k,
    unit_vectors,
)

__all__ = [
    "Pairs",
    "TopK",
    "check_threshold",
    "closest_pairs",
    "cos_sim",
    "estimate_similarity",
    "neighbours",
    "score_all",
    "score_pairs",
    "similar_pairs",
    "similarity_matrix",
    "top_k",
    "unit_vectors",
]
