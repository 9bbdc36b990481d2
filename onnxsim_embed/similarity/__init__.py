"""Vectors -> matrix, top-k, pairs, index, clusters, similarity graphs on disk. numpy and scipy only."""
