"""similarity: all texts or vectors of a file with each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import VectorInputs
from onnxsim_embed.cli.output import check_table, counted
from onnxsim_embed.files.atomic import check_output

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.cli.graph_files import SimilarityJob
    from onnxsim_embed.cli.texts import Texts


def similarity(
    inputs: VectorInputs,
    file: str = Argument(
        ..., help="Texts, or vectors: .npy, .parquet or a directory of encode --engine ray."
    ),
    output: list[Path] | None = Option(
        None, "--output", "-o", help="matrix.npz, neighbours.csv or DIRECTORY; see above."
    ),
    threshold: float = Option(
        0.5, "--threshold", "-t", min=-1, max=1, help="Keep scores above it."
    ),
    top_k: int | None = Option(
        None, "--top-k", "-k", min=1, help="Number of nearest neighbours of each row."
    ),
    pairs: Path | None = Option(None, help="Pairs above --threshold in descending order, .csv."),
    heatmap: Path | None = Option(None, help="Picture of all scores, .png, .svg or .pdf."),
    show: int | None = Option(
        None, min=0, help="Number of top pairs to print; default: 10 without outputs."
    ),
    drop_duplicates: bool = Option(
        False, "--drop-duplicates", help="Compare only the first of equal rows."
    ),
    estimate: bool = Option(
        False, "--estimate", help="Only estimate the number of scores and their memory."
    ),
    max_memory: options.MaxMemory = None,
    address: options.Address = None,
) -> None:
    """Compare all texts (or vectors) of a file with each other, exactly.

    Outputs, of which -o may name several: matrix.npz holds the scores above --threshold as a sparse
    matrix; neighbours.csv the --top-k nearest rows of each row; a DIRECTORY either of them in shards, of
    any size, and continues after an interruption. Tables name rows by --id-column, else by row numbers
    from 0, which count the rows of the matrix too.
    """
    targets = _targets(output or [], top_k, drop_duplicates, estimate)
    distributed = inputs.on_ray(
        delimiter=inputs.delimiter, no_header=inputs.no_header, on_error=inputs.on_error != "fail",
        pairs=pairs, heatmap=heatmap, show=show, threads=inputs.threads, id_column=inputs.id_column,
        drop_duplicates=drop_duplicates, estimate=estimate, vectors=inputs.vectors,
    )  # fmt: skip
    memory = options.parse_memory(max_memory)
    if distributed:
        if list(targets) != ["graph"]:
            raise ValueError("--engine ray writes a directory: pass a name without a suffix to -o")
        limits: dict[str, Any] = {"threshold": threshold} if top_k is None else {"k": top_k}
        limits |= {"max_memory": memory, "address": address}
        _compare_on_ray(file, targets["graph"], inputs, **limits)
        return
    targets |= {"pairs": pairs} if pairs else {}
    targets |= {"heatmap": heatmap} if heatmap else {}
    _check_targets(targets, inputs.force)
    from onnxsim_embed.cli.graph_files import SimilarityJob, check_heatmap

    started = time.perf_counter()

    def encode(source: Texts, texts: list[str]) -> npt.NDArray[Any]:
        if heatmap is not None and not estimate:
            check_heatmap(set(texts) if drop_duplicates else texts)  # before they are encoded
        return source.encode(texts)

    rows = inputs.read(file, encode=encode)
    if rows.source.report.skipped and "graph" in targets:
        raise ValueError("-o DIRECTORY cannot number skipped rows: use --on-error blank")
    job = SimilarityJob(rows, inputs, threshold, memory)
    dropped = job.drop_duplicates() if drop_duplicates else 0
    if estimate:
        from onnxsim_embed.similarity.compare import estimate_similarity

        what = f"Above {threshold}" if top_k is None else f"Top {top_k} of each row"
        typer.echo(f"{what}: {estimate_similarity(job.vectors, threshold, k=top_k)}.")
        return
    if heatmap is not None:
        check_heatmap(job.vectors)  # before other outputs are written
    done = [f"Compared {counted(len(job.vectors), 'row')}"]
    if drop_duplicates:
        done[0] += f" ({counted(dropped, 'duplicate')} dropped)"
    done += _write(job, targets, top_k)
    default = 10 if len(done) == 1 else 0
    lines = list(job.closest(default if show is None else show))
    inputs.say(", ".join(done) + f", in {time.perf_counter() - started:.2f} s.")
    for line in lines:
        typer.echo(line)


def _compare_on_ray(vectors: str, directory: Path, inputs: VectorInputs, **options: Any) -> None:  # noqa: ANN401
    """Compare vectors on a cluster with `onnxsim_embed.ray.write_graph`, and print the result."""
    from onnxsim_embed.ray import write_graph

    started = time.perf_counter()
    graph = write_graph(
        vectors,
        directory,
        force=inputs.force,
        show_progress_bar=inputs.show_progress_bar,
        **options,
    )
    what = f"scores, top {graph.k} of each row" if graph.k else f"scores above {graph.threshold}"
    inputs.say(
        f"Compared {graph.rows:,} rows, {graph.nnz:,} {what} in "
        f"{counted(len(graph.parts), 'shard')} -> {directory}, in "
        f"{time.perf_counter() - started:.1f} s including startup."
    )


def _write(job: SimilarityJob, targets: dict[str, Path], top_k: int | None) -> list[str]:
    """Write the outputs; return what was written, in words."""
    done = []
    if path := targets.get("graph"):
        done.append(job.write_graph(path, top_k))
    if path := targets.get("matrix"):
        done.append(job.write_matrix(path))
    if (path := targets.get("neighbours")) and top_k is not None:
        done.append(job.write_neighbours(path, top_k))
    if path := targets.get("pairs"):
        done.append(job.write_pairs(path))
    if path := targets.get("heatmap"):
        done.append(job.draw(path))
    return done


def _targets(
    outputs: list[Path], top_k: int | None, drop_duplicates: bool, estimate: bool
) -> dict[str, Path]:
    """Return the outputs by kind: a matrix, neighbours, or the directory of a similarity graph."""
    kinds = {".npz": "matrix", ".csv": "neighbours", ".tsv": "neighbours", "": "graph"}
    targets: dict[str, Path] = {}
    for path in outputs:
        kind = "graph" if path.is_dir() else kinds.get(path.suffix)
        if kind is None or kind in targets:
            raise ValueError(
                f"-o {path}: expected one .npz (matrix), one .csv or .tsv (neighbours) and one name "
                "without a suffix (a directory of shards)"
            )
        targets[kind] = path
    if "neighbours" in targets and top_k is None:
        raise ValueError("-o neighbours.csv requires --top-k K")
    if top_k is not None and not estimate and not {"neighbours", "graph"} & set(targets):
        raise ValueError("--top-k requires -o neighbours.csv or -o DIRECTORY")
    if "graph" in targets and drop_duplicates:
        raise ValueError(
            f"-o {targets['graph']}: --drop-duplicates cannot be combined with a directory of shards; "
            "first run: onnxsim-embed dedupe FILE -o FILE"
        )
    return targets


def _check_targets(targets: dict[str, Path], force: bool) -> None:
    """Raise, before any work, for outputs that could not be written after it."""
    if "graph" in targets:
        from onnxsim_embed.similarity.graph_writer import GraphCheckpoint

        GraphCheckpoint(targets["graph"]).check_target(force)
    files = [path for kind, path in targets.items() if kind != "graph"]
    for path in files:
        check_output(path, force)
    if len(set(files)) < len(files):
        raise ValueError(f"{files[-1]} is the target of two outputs")
    if "pairs" in targets:
        check_table(targets["pairs"], force, ".csv", ".tsv")
    if "heatmap" in targets:
        from onnxsim_embed.plot import check_format

        check_format(targets["heatmap"])
