"""Prompts: those of encode_query and encode_document, and tokens that are not pooled."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from support import TEXTS, change_json, read_json, write_checkpoint
from support import sentence_transformer as reference

from onnxsim_embed import AsyncEmbedder, Embedder, encode_to_file
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.export import export_model
from onnxsim_embed.runtime.provenance import provenance_of

CLOSE = 1e-5
MODES = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "cls+mean")
PROMPT = "represent the rural project: "


def with_prompts(artifact, prompts, default=None):
    """The tiny model with other prompts."""
    manifest = Artifact.open(artifact).manifest
    changed = replace(manifest, prompts=prompts, default_prompt_name=default)
    return Embedder(Artifact(artifact, changed), precision="fp32")


@pytest.mark.parametrize(
    ("prompts", "default"),
    [({"query": "a dog ", "document": "the cat "}, None),
     ({"query": "a dog ", "document": "the cat "}, "document"),
     ({"query": "a dog "}, "query"),
     ({"sts": "as it is ", "query": "", "document": ""}, "sts"),
     ({}, None)],
)  # fmt: skip
def test_prompts_apply_as_in_sentence_transformers(artifact, tmp_path, prompts, default):
    checkpoint = write_checkpoint(tmp_path / "tiny", prompts=prompts)
    change_json(checkpoint / "config_sentence_transformers.json", default_prompt_name=default)
    ours, theirs = with_prompts(artifact, prompts, default), reference(checkpoint)
    calls = [{}, {"prompt": "x "}, {"prompt": ""}]
    calls += [{"prompt_name": name} for name in prompts]
    for method in ("encode", "encode_query", "encode_document"):
        for arguments in calls:
            expected = getattr(theirs, method)(TEXTS, **arguments)
            vectors = getattr(ours, method)(TEXTS, **arguments)
            np.testing.assert_allclose(vectors, expected, atol=CLOSE)


@pytest.mark.parametrize("names", ["document passage corpus", "passage corpus", "corpus"])
def test_documents_take_the_first_prompt_that_is_there(artifact, names):
    first, *others = names.split()
    prompts = {name: f"{name} " for name in others} | {first: "the cat ", "query": "a dog "}
    model = with_prompts(artifact, prompts)
    expected = model.encode(TEXTS, prompt="the cat ")
    np.testing.assert_array_equal(model.encode_document(TEXTS), expected)


# models whose prompts are not pooled


def instructor(directory, pooling="mean", **options):
    """A tiny checkpoint with include_prompt false, and its artifact."""
    checkpoint = write_checkpoint(directory / "checkpoint", pooling=pooling, **options)
    change_json(checkpoint / "1_Pooling/config.json", include_prompt=False)
    export_model(checkpoint, directory / "artifact", precisions=["fp32"])
    return checkpoint, directory / "artifact"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """Such a model with a "query" prompt: ours, and what sentence-transformers encodes."""
    home = tmp_path_factory.mktemp("instructor")
    checkpoint, artifact = instructor(home, prompts={"query": PROMPT})
    return Embedder(artifact, threads=2), reference(checkpoint)


@pytest.mark.parametrize("pooling", MODES)
def test_prompts_that_are_not_pooled_equal_sentence_transformers(tmp_path, pooling):
    checkpoint, artifact = instructor(tmp_path, pooling)
    assert read_json(artifact / "1_Pooling/config.json")["include_prompt"] is False
    ours, theirs = Embedder(artifact), reference(checkpoint)
    for prompt in (PROMPT, "", "a", " ", "water " * 60):  # the last fills the model
        expected = theirs.encode(TEXTS, prompt=prompt)
        np.testing.assert_allclose(ours.encode(TEXTS, prompt=prompt), expected, atol=CLOSE)


def test_every_way_to_encode_leaves_the_prompt_out(prompted, tmp_path):
    model, theirs = prompted
    expected = theirs.encode_query(TEXTS)
    assert np.abs(model.encode([PROMPT + text for text in TEXTS]) - expected).max() > 0.01
    vectors = model.encode_query(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    alone = np.stack([model.encode(text, prompt_name="query") for text in TEXTS])
    np.testing.assert_array_equal(alone, vectors)
    stream = np.concatenate(list(model.encode_stream(TEXTS, "query")))
    np.testing.assert_array_equal(stream, vectors)
    encode_to_file(model, TEXTS, tmp_path / "vectors.npy", prompt_name="query")
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), vectors)


def test_concurrent_callers_keep_their_prompts(prompted):
    model, _ = prompted
    prompts = [PROMPT, "", "a dog ", PROMPT, None]

    async def main():
        async with AsyncEmbedder(model) as served:
            return await asyncio.gather(*(served.encode(TEXTS, prompt=p) for p in prompts))

    for prompt, vectors in zip(prompts, asyncio.run(main()), strict=True):
        np.testing.assert_array_equal(vectors, model.encode(TEXTS, prompt=prompt))


def test_the_provenance_tells_whether_prompts_are_pooled(prompted):
    model, _ = prompted
    manifest = replace(model.artifact.manifest, include_prompt=True)
    other = Embedder(Artifact(model.artifact.directory, manifest))
    assert provenance_of(model).model_digest != provenance_of(other).model_digest


def test_an_unknown_prompt_lists_the_known_ones(prompted):
    model, _ = prompted
    for encode in (model.encode, model.encode_query, model.encode_document, model.encode_stream):
        with pytest.raises(ValueError, match=r"prompt_name 'pasage' is not among .*\['query'\]"):
            encode(["a"], prompt_name="pasage")
