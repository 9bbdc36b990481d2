"""Published results, reproduced wherever the weights are available without the network."""

import pytest

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.recipes import find_recipe, recipes
from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.export import verify_recipe
from onnxsim_embed.runtime.tokenization import Tokenizer

MINILM = "all-MiniLM-L6-v2"
COUNTED = [
    pytest.param(recipe, answer, id=f"{recipe.name}-{number}")
    for recipe in recipes()
    for number, answer in enumerate(recipe.known_answers, start=1)
    if answer.token_counts is not None
]


# Those of MiniLM are: its export compares them, and fails where they differ.
@pytest.mark.parametrize(
    "recipe", [recipe for recipe in recipes() if recipe.name != MINILM], ids=lambda r: r.name
)
def test_published_results_are_reproduced(recipe, few_texts):
    try:
        report = verify_recipe(recipe, local_files_only=True)
    except OnnxsimEmbedError as error:
        pytest.skip(f"the weights of {recipe.source} are not on this machine: {error}")
    assert (report["problems"], report["known_answers"]) == ([], len(recipe.known_answers))
    assert report["min_cosine"] > 0.999999


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
    rows = [a.cosine_matrix[0] for a in find_recipe("minilm").known_answers if a.cosine_matrix]
    assert (
        pytest.approx((1.0, 0.6660, 0.1046), abs=1e-4) in rows
    )  # sentence-transformers' quickstart


@pytest.mark.real
def test_the_manifest_of_minilm_states_the_facts_of_its_recipe(real_artifact):
    recipe, manifest = find_recipe("minilm"), Artifact.open(real_artifact).manifest
    assert (manifest.name, manifest.source) == (recipe.name, recipe.source)
    for key in ("dim", "layers", "max_seq_length", "normalize"):
        assert getattr(manifest, key) == getattr(recipe, key)
    assert manifest.pooling == (recipe.pooling,)
    report = manifest.verification["fp32"]
    assert (report["problems"], report["known_answers"]) == ([], len(recipe.known_answers))
    assert report["min_cosine"] > 0.999999
