"""Published results, reproduced wherever the weights can be loaded without the network."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.locate import HUB_PATTERNS
from onnxsim_embed.artifact.recipes import Recipe, find_recipe, recipes
from onnxsim_embed.export.fidelity import check_known_answer
from onnxsim_embed.runtime.tokenization import Tokenizer

CASES = [
    pytest.param(recipe, answer, id=f"{recipe.name}-{number}")
    for recipe in recipes()
    for number, answer in enumerate(recipe.known_answers, start=1)
]
COUNTED = [case for case in CASES if case.values[1].token_counts is not None]


@lru_cache
def local_checkpoint(recipe_name: str) -> Path | str:
    """Return the directory of a model's weights on this machine, or why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    recipe = find_recipe(recipe_name)
    if (installed := recipe.installed_directory()) is not None:
        return installed
    try:
        found = snapshot_download(
            recipe.source,
            revision=recipe.revision,
            allow_patterns=list(HUB_PATTERNS),
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        found = None
    if found is None or not (Path(found) / "model.safetensors").is_file():
        return f"the weights of {recipe.source} are not on this machine (no package, no Hub cache)"
    return Path(found)


@pytest.fixture(scope="module")
def load(few_texts, tmp_path_factory):
    """Return a function from a recipe to its fp32 Embedder; skips where there are no weights."""
    from onnxsim_embed.export import export_model

    loaded: dict[str, Embedder] = {}

    def get(recipe: Recipe) -> Embedder:
        if recipe.name not in loaded:
            where = local_checkpoint(recipe.name)
            if isinstance(where, str):
                pytest.skip(where)
            target = tmp_path_factory.mktemp("known") / recipe.name
            artifact = export_model(where, target, precisions=["fp32"], recipe=recipe)
            loaded[recipe.name] = Embedder(artifact)
        return loaded[recipe.name]

    return get


@pytest.mark.parametrize(("recipe", "answer"), CASES)
def test_published_results_are_reproduced(recipe, answer, load):
    model = load(recipe)
    assert model.encode(answer.texts).shape == (len(answer.texts), recipe.dim)
    assert check_known_answer(model, answer) == []


@pytest.mark.parametrize(("recipe", "answer"), COUNTED)
@pytest.mark.real
def test_token_counts_are_those_published(recipe, answer, real_checkpoint):
    # Every model with a recipe shares the uncased vocabulary of BERT, which the MiniLM package has.
    length = answer.max_length or recipe.max_seq_length
    tokenizer = Tokenizer(real_checkpoint / "tokenizer.json", length)
    prompt = recipe.prompts[answer.prompt_name] if answer.prompt_name else ""
    counts = tokenizer([prompt + text for text in answer.texts]).counts
    assert tuple(counts.tolist()) == answer.token_counts


def test_the_seed_cases_are_among_the_known_answers():
    counts = [a.token_counts for a in find_recipe("bert-base-nli-mean-tokens").known_answers]
    assert {(57, 52, 61, 16), (15, 22, 15, 16, 12, 14)} <= set(counts)
    answer = find_recipe("bge-base-en").known_answers[0]
    assert answer.texts[0] == "Berlin is the capital of Germany"
    assert answer.cosine_matrix[0] == (1.0, 0.819691, 0.71152, 0.685216, 0.701959)


@pytest.mark.real
def test_minilm_reproduces_the_quickstart_matrix(load):
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    recipe = find_recipe("all-MiniLM-L6-v2")
    assert texts in [list(answer.texts) for answer in recipe.known_answers]
    model = load(recipe)
    vectors = model.encode(texts)
    assert np.abs(model.similarity(vectors, vectors) - np.array(expected)).max() < 1e-4


@pytest.mark.real
def test_the_export_of_minilm_states_its_facts_and_checked_its_known_answers(load):
    recipe = find_recipe("minilm")
    artifact = load(recipe).artifact
    artifact.check()
    manifest = artifact.manifest
    assert (manifest.name, manifest.source) == (recipe.name, recipe.source)
    assert (manifest.dim, manifest.layers, manifest.max_seq_length) == (384, 6, 256)
    assert (manifest.pooling, manifest.normalize) == (("mean",), True)
    assert manifest.verification["fp32"]["known_answers"] == len(recipe.known_answers)
    assert manifest.verification["fp32"]["min_cosine"] > 0.999999
    tokenizer = json.loads((artifact.directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
