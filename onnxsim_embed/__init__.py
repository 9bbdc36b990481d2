"""Fast, faithful sentence embeddings on the CPU, and exact similarity graphs."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. Names are imported on first use, so that `import onnxsim_embed` costs
# nothing and the similarity functions work without onnxruntime.
_HOMES = {
    "AsyncEmbedder": "runtime.async_embedder",
    "Duplicates": "similarity.clustering",
    "Embedder": "runtime.embedder",
    "Pairs": "similarity.compare",
    "SimilarityGraph": "similarity.graph",
    "TopK": "similarity.compare",
    "VectorIndex": "similarity.index",
    "communities": "similarity.clustering",
    "components": "similarity.clustering",
    "cos_sim": "similarity.compare",
    "deduplicate": "similarity.clustering",
    "encode_to_file": "runtime.encode_to_file",
    "estimate_similarity": "similarity.compare",
    "neighbours": "similarity.compare",
    "open_graph": "similarity.graph",
    "open_vectors": "files.vector_directory",
    "similar_pairs": "similarity.compare",
    "similarity_matrix": "similarity.compare",
    "top_k": "similarity.compare",
    "write_graph": "similarity.graph_writer",
}

if TYPE_CHECKING:
    from onnxsim_embed.files.vector_directory import open_vectors
    from onnxsim_embed.runtime.async_embedder import AsyncEmbedder
    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.encode_to_file import encode_to_file
    from onnxsim_embed.similarity.clustering import Duplicates, communities, components, deduplicate
    from onnxsim_embed.similarity.compare import (
        Pairs,
        TopK,
        cos_sim,
        estimate_similarity,
        neighbours,
        similar_pairs,
        similarity_matrix,
        top_k,
    )
    from onnxsim_embed.similarity.graph import SimilarityGraph, open_graph
    from onnxsim_embed.similarity.graph_writer import write_graph
    from onnxsim_embed.similarity.index import VectorIndex

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
    "open_vectors",
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
