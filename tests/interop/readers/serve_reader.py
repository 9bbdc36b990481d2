"""Embeddings of a running server, through the clients that its users have: argv[1] names the job."""

import os

import numpy as np
from job import finish, job

url, texts, name = job["url"], job["texts"], job["name"]
facts = {}
if job["client"] == "openai":
    from openai import NotFoundError, OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=job["key"], max_retries=0)
    answer = client.embeddings.create(model=name, input=texts)  # base64 is its default
    vectors = [row.embedding for row in answer.data]
    floats = client.embeddings.create(
        model=name, input=texts, encoding_format="float", dimensions=8
    )
    facts["models"] = [model.id for model in client.models.list()]
    facts["tokens"] = answer.usage.prompt_tokens
    facts["dimensions"] = {len(row.embedding) for row in floats.data} == {8}
    try:
        client.embeddings.create(model="other", input="x")
    except NotFoundError as error:
        facts["error"] = error.body["message"]
elif job["client"] == "langchain-openai":
    from langchain_openai import OpenAIEmbeddings

    options = {"model": name, "base_url": f"{url}/v1", "api_key": job["key"], "max_retries": 0}
    model = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    vectors = model.embed_documents(texts)
    facts["query"] = model.embed_query(texts[0]) == vectors[0]
else:
    os.environ.pop("HF_HUB_OFFLINE", None)  # it would not reach this machine either
    from huggingface_hub import InferenceClient

    client = InferenceClient(f"{url}/embed", token=job["key"])
    vectors = client.feature_extraction(texts, normalize=True, truncate=True)
    one = InferenceClient(url, token=job["key"]).feature_extraction(texts[0])
    facts["query"] = bool((np.array(one)[0] == np.array(vectors)[0]).all())
    scores = InferenceClient(f"{url}/similarity", token=job["key"]).sentence_similarity(
        texts[0], other_sentences=texts[:5]
    )
    facts["scores"] = len(scores)
finish(vectors, **facts)
