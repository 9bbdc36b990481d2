"""Fast, faithful sentence embeddings on the CPU, and exact similarity graphs."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names by module, imported on first use: `import onnxsim_embed` costs nothing, and the
# similarity functions work without onnxruntime.
_MODULES = {
    "files.vector_directory": "open_vectors",
    "runtime.async_embedder": "AsyncEmbedder",
    "runtime.embedder": "Embedder",
    "runtime.encode_to_file": "encode_to_file",
    "similarity.clustering": "communities components least_similarities",
    "similarity.compare": (
        "Pairs TopK cos_sim estimate_similarity neighbours similar_pairs similarity_matrix top_k"
    ),
    "similarity.duplicates": "Duplicates deduplicate",
    "similarity.graph": "SimilarityGraph open_graph",
    "similarity.graph_writer": "write_graph",
    "similarity.index": "VectorIndex",
}

if TYPE_CHECKING:
    from onnxsim_embed.files.vector_directory import open_vectors
    from onnxsim_embed.runtime.async_embedder import AsyncEmbedder
    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.encode_to_file import encode_to_file
    from onnxsim_embed.similarity.clustering import communities, components, least_similarities
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
    from onnxsim_embed.similarity.duplicates import Duplicates, deduplicate
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
    "least_similarities",
    "neighbours",
    "open_graph",
    "open_vectors",
    "similar_pairs",
    "similarity_matrix",
    "top_k",
    "write_graph",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in ("plot", "util"):  # modules, also as attributes: onnxsim_embed.util.cos_sim
        return import_module(f"{__name__}.{name}")
    for module, names in _MODULES.items():
        if name in names.split():
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
