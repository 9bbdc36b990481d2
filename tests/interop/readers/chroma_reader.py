"""Chroma's own default embedding function, and ours in its place: vectors, and collections of either."""

import chromadb
import numpy as np
from chromadb.utils.embedding_functions import DefaultEmbeddingFunction, register_embedding_function
from job import finish, job

from onnxsim_embed.integrations.chroma import OnnxsimDefaultEmbeddingFunction

texts = job["texts"]
default, ours = DefaultEmbeddingFunction(), OnnxsimDefaultEmbeddingFunction()
vectors = np.array(default(texts))
difference = float(np.abs(np.array(ours(texts)) - vectors).max())
assert difference < 1e-5

texts = texts[:40]
ids = [str(row) for row in range(len(texts))]
for client in (chromadb.EphemeralClient(), chromadb.PersistentClient("database")):
    for maker, reader in ((default, ours), (ours, default)):
        # Chroma looks "default" up by its name, and a collection made with ours registers ours.
        register_embedding_function(type(maker))
        name = type(maker).__name__
        made = client.create_collection(name, embedding_function=maker)
        made.add(ids=ids, documents=texts)
        register_embedding_function(type(reader))
        again = client.get_collection(name, embedding_function=reader)
        assert type(again.configuration["embedding_function"]) is type(reader)
        found = again.query(query_texts=texts, n_results=1, include=["distances", "documents"])
        assert np.max(found["distances"]) < 1e-9
        assert again.configuration_json == made.configuration_json
        again.add(ids=["new"], documents=["one more"])
        assert again.count() == len(texts) + 1
finish(vectors, difference=difference)
