"""Vectors -> matrix, top-k, pairs, index, clusters, similarity graphs on disk. numpy and scipy only."""

from onnxsim_embed.similarity.compare import *  # noqa: F403 - its __all__: the public functions
