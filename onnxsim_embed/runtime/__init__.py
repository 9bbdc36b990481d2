"""Texts -> vectors: the Embedder and what it is made of."""
