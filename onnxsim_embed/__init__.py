"""Fast, faithful sentence embeddings on the CPU, and exact similarity graphs."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. Names are imported on first use, so that `import onnxsim_embed` costs
# nothing and the similarity functions work without onnxruntime.
_HOMES = {
    "AsyncEmbedder": "serving",
    "Duplicates": "mining",
    "Embedder": "embedder",
    "Pairs": "similarity",
    "SimilarityGraph": "graph_store",
    "TopK": "similarity",
    "VectorIndex": "search",
    "communities": "mining",
    "components": "mining",
    "cos_sim": "similarity",
    "deduplicate": "mining",
    "encode_to_file": "encode_job",
    "estimate_similarity": "similarity",
    "neighbours": "similarity",
    "open_graph": "graph_store",
    "similar_pairs": "similarity",
    "similarity_matrix": "similarity",
    "top_k": "similarity",
    "write_graph": "graph_job",
}

if TYPE_CHECKING:
    from onnxsim_embed.embedder import Embedder
    from onnxsim_embed.encode_job import encode_to_file
    from onnxsim_embed.graph_job import write_graph
    from onnxsim_embed.graph_store import SimilarityGraph, open_graph
    from onnxsim_embed.mining import Duplicates, communities, components, deduplicate
    from onnxsim_embed.search import VectorIndex
    from onnxsim_embed.serving import AsyncEmbedder
    from onnxsim_embed.similarity import (
        Pairs,
        TopK,
        cos_sim,
        estimate_similarity,
        neighbours,
        similar_pairs,
        similarity_matrix,
        top_k,
    )

__all__ = [
    "AsyncEmbedder",
    "Duplicates",
    "Embedder",
    "Pairs",
    "SimilarityGraph",
    "TopK",
    "VectorIndex",
    "__version__",
    "communities",
    "components",
    "cos_sim",
    "deduplicate",
    "encode_to_file",
    "estimate_similarity",
    "neighbours",
    "open_graph",
    "similar_pairs",
    "similarity_matrix",
    "top_k",
    "write_graph",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
