"""models: the recipes, and whether they reproduce published results."""

from __future__ import annotations

import typer
from typer import Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import print_table


def models(
    verify: bool = Option(
        False, "--verify", help="Export each available model and check its published results."
    ),
    token: options.Token = None,
    local_files_only: options.Local = False,
) -> None:
    """List the recipes: models with known sources, settings and results."""
    from onnxsim_embed.artifact.recipes import recipes

    if verify:
        _verify(token, local_files_only)
        return
    rows = [
        [r.name, ", ".join(r.aliases), str(r.dim), str(r.max_seq_length),
         "installed" if r.installed_directory() else "Hub", str(r.layers), r.licence, r.pooling]
        for r in recipes()
    ]  # fmt: skip
    header = ["model", "alias", "dim", "tokens", "weights", "layers", "licence", "pooling"]
    print_table(header, rows)


def _verify(token: str | None, local_files_only: bool) -> None:
    """Print for each recipe whether it reproduces its known answers; fail if one does not."""
    from onnxsim_embed.artifact.recipes import recipes
    from onnxsim_embed.errors import CheckpointError, VerificationError
    from onnxsim_embed.export import verify_recipe

    rows, missing, problems = [], {}, []
    for recipe in recipes():
        known = str(len(recipe.known_answers))
        try:
            report = verify_recipe(recipe, token=token, local_files_only=local_files_only)
        except CheckpointError as error:
            rows.append([recipe.name, known, "no weights", ""])
            missing[recipe.name] = error
            continue
        result = "reproduced" if recipe.known_answers else "none are published"
        if report["problems"]:
            result = "MISSED"
            problems += [f"{recipe.name}: {problem}" for problem in report["problems"]]
        compared = f"{report['min_cosine']:.6f} ({report['reference']})"
        rows.append([recipe.name, known, result, compared])
    print_table(["model", "known answers", "result", "fp32 min cosine"], rows)
    if missing:
        typer.echo(f"Not verified, because the weights are not available: {', '.join(missing)}.")
        typer.echo(f"The first error: {next(iter(missing.values()))}")
    if problems:
        raise VerificationError("; ".join(problems))
