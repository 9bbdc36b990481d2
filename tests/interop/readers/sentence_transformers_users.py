"""Libraries that take a SentenceTransformer, on ours: what they compute with it and with its vectors."""

import numpy as np
from job import finish, job
from sklearn.cluster import KMeans

from onnxsim_embed.integrations.sentence_transformers import load

texts = job["texts"]
model = load(job["directory"], precision="fp32")
vectors = model.encode(texts)
facts = {}

if job["library"] == "keybert":
    from keybert import KeyBERT

    # The best keyword of each text is the one of its words whose vector is nearest.
    found = KeyBERT(model).extract_keywords(texts, top_n=1, stop_words=None)
    for text, vector, keywords in zip(texts, vectors, found, strict=True):
        words = KeyBERT(model).extract_keywords(text, top_n=50, stop_words=None)
        assert keywords == words[:1]
        for word, score in words:
            assert abs(float(model.encode([word])[0] @ vector) - score) < 1e-3, (word, score)
    facts["keywords"] = [keywords[0][0] for keywords in found if keywords]
else:
    from bertopic import BERTopic
    from bertopic.dimensionality import BaseDimensionalityReduction

    def topics(embedding_model, embeddings=None):
        topic_model = BERTopic(
            embedding_model=embedding_model,
            umap_model=BaseDimensionalityReduction(),
            hdbscan_model=KMeans(6, random_state=0, n_init=4),
        )
        return topic_model, topic_model.fit_transform(texts, embeddings)[0]

    topic_model, found = topics(model)
    assert found == topics(None, vectors)[1]
    # A topic's vector is made by the model; texts are looked up with it.
    nearest, scores = topic_model.find_topics("rural water supply", top_n=3)
    assert len(nearest) == 3
    assert np.isfinite(scores).all()
    topic_model.save(job["output"] + ".topics", serialization="pickle", save_embedding_model=True)
    again = BERTopic.load(job["output"] + ".topics")
    assert list(again.transform(texts)[0]) == list(topic_model.transform(texts)[0])
    facts["topics"] = len(set(found))

finish(vectors, **facts)
