"""similarity: all texts or vectors of a file with each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsim_embed.cli.options import (
    DEFAULT_MODEL,
    AddressOption,
    ColumnOption,
    EngineOption,
    ForceOption,
    FormatOption,
    ModelOption,
    PrecisionOption,
    QuietOption,
    ThreadsOption,
    on_ray,
)
from onnxsim_embed.cli.output import on_terminal
from onnxsim_embed.cli.ray import compare_on_ray, reject_local_options
from onnxsim_embed.cli.texts import counted, encode_texts, load, read_texts
from onnxsim_embed.files.atomic import check_output

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from onnxsim_embed.cli.graph_files import SimilarityJob


def similarity(
    file: Annotated[
        str,
        typer.Argument(
            help="A file of texts, or vectors: .npy, .parquet with a column vector, or a directory that encode --engine ray wrote."
        ),
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="matrix.npz: sparse, all scores above --threshold. neighbours.csv: needs --top-k. DIRECTORY: either, of any size, part by part; goes on after a stop. May be given twice.",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option("--threshold", "-t", min=-1.0, max=1.0, help="Keep scores strictly above."),
    ] = 0.5,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            "-k",
            min=1,
            help="Closest rows of each row, for -o neighbours.csv or DIRECTORY.",
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
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Only say, from a sample of rows, how many scores are above --threshold (or --top-k of each row) and what they take.",
        ),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", help="Such as 4GB or 500MB; default: three quarters of what is free."
        ),
    ] = None,
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    file_format: FormatOption = None,
    engine: EngineOption = None,
    address: AddressOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare all texts (or vectors) of a file with each other, exactly."""
    named = _similarity_outputs(output or [], top_k, drop_duplicates, estimate)
    if on_ray(engine):
        reject_local_options(
            pairs=pairs, heatmap=heatmap, show=show, drop_duplicates=drop_duplicates,
            estimate=estimate, threads=threads,
        )  # fmt: skip
        if list(named) != ["graph"]:
            raise ValueError("--engine ray writes a directory: give -o a name without an ending")
        from onnxsim_embed.system.units import parse_bytes

        compare_on_ray(
            file,
            named["graph"],
            threshold=threshold if top_k is None else None,
            k=top_k,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            address=address,
            force=force,
            quiet=quiet,
        )
        return
    files = [path for kind, path in named.items() if kind != "graph"]
    files += [path for path in (pairs, heatmap) if path is not None]
    _check_similarity_outputs(files, pairs, heatmap, force)
    from onnxsim_embed.cli.graph_files import SimilarityJob
    from onnxsim_embed.similarity.graph_writer import GraphCheckpoint
    from onnxsim_embed.similarity.memory import MemoryBudget
    from onnxsim_embed.system.units import parse_bytes

    if "graph" in named:
        GraphCheckpoint(named["graph"]).check_target(force)
    most = None if max_memory is None else MemoryBudget(parse_bytes(max_memory)).max_bytes
    started = time.perf_counter()
    texts, vectors = _texts_and_vectors(file, column, file_format, model, precision, threads, quiet)
    kept = _first_of_equals(texts if texts is not None else vectors) if drop_duplicates else None
    job = SimilarityJob(
        vectors if kept is None else vectors[kept],
        texts,
        kept,
        len(vectors),
        max_memory=most,
        show_progress_bar=on_terminal() and not quiet,
    )
    if estimate:
        what = f"Above {threshold}" if top_k is None else f"The {top_k} best of each row"
        typer.echo(f"{what}: {job.estimate(threshold, top_k)}.")
        return
    said = [f"Compared {len(job.vectors):,} rows"]
    if kept is not None:
        said[0] += f" ({len(vectors) - len(kept):,} duplicates left out)"
    said += _write(job, named, threshold, top_k, force)
    if pairs is not None:
        said.append(f"{job.write_pairs(pairs, threshold):,} pairs above {threshold} -> {pairs}")
    if heatmap is not None:
        job.draw(heatmap)
        said.append(f"heatmap -> {heatmap}")
    written = len(said) > 1
    closest = list(job.closest(show if show is not None else (0 if written else 10)))
    if not quiet:
        typer.echo(", ".join(said) + f", in {time.perf_counter() - started:.2f} s.")
    for line in closest:
        typer.echo(line)


def _write(
    job: SimilarityJob, named: dict[str, Path], threshold: float, top_k: int | None, force: bool
) -> list[str]:
    """Write what -o names, and return what to say of it."""
    said = []
    if path := named.get("graph"):
        made = job.write_graph(path, threshold, top_k, force)
        what = f"scores above {threshold}" if top_k is None else f"scores, {top_k} of each row"
        said.append(f"{made.nnz:,} {what} in {counted(len(made.parts), 'part')} -> {path}")
    if path := named.get("matrix"):
        said.append(f"{job.write_matrix(path, threshold):,} scores above {threshold} -> {path}")
    if (path := named.get("neighbours")) and top_k is not None:
        job.write_neighbours(path, top_k)
        said.append(f"{top_k} neighbours each -> {path}")
    return said


def _check_similarity_outputs(
    outputs: list[Path], pairs: Path | None, heatmap: Path | None, force: bool
) -> None:
    """Refuse, before any work, what could not be written after it."""
    for path in outputs:
        check_output(path, force)
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"{outputs[-1]} is named for two outputs")
    if pairs is not None and pairs.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{pairs}: pairs are written as .csv or .tsv")
    if heatmap is not None:
        from onnxsim_embed.plot import check_format

        check_format(heatmap)


def _similarity_outputs(
    outputs: list[Path], top_k: int | None, drop_duplicates: bool, estimate: bool
) -> dict[str, Path]:
    """Tell by their endings what outputs are: a matrix, neighbours, or the directory of a graph."""
    kinds = {".npz": "matrix", ".csv": "neighbours", ".tsv": "neighbours", "": "graph"}
    by_kind: dict[str, Path] = {}
    for path in outputs:
        kind = "graph" if path.is_dir() else kinds.get(path.suffix)
        if kind is None or kind in by_kind:
            raise ValueError(
                f"-o {path}: takes one .npz (matrix), one .csv or .tsv (neighbours) and one name without "
                "an ending (a directory of parts)"
            )
        by_kind[kind] = path
    if "neighbours" in by_kind and top_k is None:
        raise ValueError("neighbours need both: --top-k K and -o neighbours.csv")
    if top_k is not None and not estimate and not {"neighbours", "graph"} & set(by_kind):
        raise ValueError("give both: --top-k K and -o neighbours.csv (or -o DIRECTORY)")
    if "graph" in by_kind and drop_duplicates:
        raise ValueError(
            f"-o {by_kind['graph']}: --drop-duplicates cannot be used with a directory of parts; drop "
            "them before, with: onnxsim-embed dedupe FILE -o FILE"
        )
    return by_kind


def _texts_and_vectors(
    file: str,
    column: str | None,
    kind: str | None,
    model: str,
    precision: str,
    threads: int | None,
    quiet: bool,
) -> tuple[list[str] | None, npt.NDArray[Any]]:
    from onnxsim_embed.files.vectors import holds_vectors, read_vectors

    if holds_vectors(file, column):
        return None, read_vectors(file, column)
    texts = read_texts(file, column, kind)
    return texts, encode_texts(load(model, precision, threads), texts, None, quiet)


def _first_of_equals(rows: list[str] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    import numpy as np

    keys = rows if isinstance(rows, list) else [row.tobytes() for row in rows]
    return np.fromiter(
        sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values()), np.int64
    )
