"""similarity: all texts or vectors of a file with each other."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import Rows, VectorInputs, with_inputs
from onnxsim_embed.cli.output import check_table, counted, resumable
from onnxsim_embed.cli.ray import compare_on_ray
from onnxsim_embed.files.atomic import check_output

if TYPE_CHECKING:
    from onnxsim_embed.cli.graph_files import SimilarityJob


@with_inputs
def similarity(
    inputs: VectorInputs,
    file: str = Argument(
        ..., help="Texts, or vectors: .npy, .parquet or a directory of encode --engine ray."
    ),
    output: list[Path] | None = Option(
        None, "--output", "-o", help="matrix.npz, neighbours.csv or DIRECTORY; see above."
    ),
    threshold: options.Threshold = 0.5,
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
    local = inputs.local | {"pairs": pairs, "heatmap": heatmap, "show": show}
    local |= {"threads": inputs.threads, "id_column": inputs.id_column}
    local |= {"drop_duplicates": drop_duplicates, "estimate": estimate, "vectors": inputs.vectors}
    distributed = options.on_ray(inputs.engine, {}, local)
    _check_targets(targets, pairs, heatmap, inputs.force, distributed)
    memory = options.parse_memory(max_memory)
    if distributed:
        limits = {"threshold": threshold} if top_k is None else {"k": top_k}
        compare_on_ray(file, targets["graph"], inputs, **limits, max_memory=memory, address=address)
        return
    started = time.perf_counter()
    rows = inputs.read(file)
    if rows.source.report.skipped and "graph" in targets:
        raise ValueError("-o DIRECTORY cannot number skipped rows: use --on-error blank")
    job = _job(rows, inputs, threshold, drop_duplicates, memory)
    if estimate:
        what = f"Above {threshold}" if top_k is None else f"Top {top_k} of each row"
        typer.echo(f"{what}: {job.estimate(top_k)}.")
        return
    done = [f"Compared {counted(len(job.vectors), 'row')}"]
    if drop_duplicates:
        dropped = len(rows.vectors) - len(job.vectors)
        done[0] += f" ({counted(dropped, 'duplicate')} dropped)"
    done += _write(job, targets, top_k, inputs.force)
    if pairs is not None:
        done.append(f"{counted(job.write_pairs(pairs), 'pair')} above {threshold} -> {pairs}")
    if heatmap is not None:
        job.draw(heatmap)
        done.append(f"heatmap -> {heatmap}")
    default = 10 if len(done) == 1 else 0
    lines = list(job.closest(default if show is None else show))
    inputs.say(", ".join(done) + f", in {time.perf_counter() - started:.2f} s.")
    for line in lines:
        typer.echo(line)


def _job(
    rows: Rows, inputs: VectorInputs, threshold: float, drop_duplicates: bool, memory: int | None
) -> SimilarityJob:
    """Return what is compared; `kept` are its rows in the input if some are missing."""
    from onnxsim_embed.cli.graph_files import SimilarityJob

    vectors, texts, names, source = rows
    kept = np.array(source.rows) if source.report.skipped else None
    total = len(vectors) + len(source.report.skipped)
    if drop_duplicates:
        first: dict[str | bytes, int] = {}
        keys: Iterable[str | bytes] = map(bytes, vectors) if texts is None else texts
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        chosen = np.array(list(first.values()), np.int64)
        kept = chosen if kept is None else kept[chosen]
        vectors, names = vectors[chosen], [names[row] for row in chosen]
        texts = None if texts is None else [texts[row] for row in chosen]
    return SimilarityJob(
        vectors, names, texts, threshold, kept, total,
        not inputs.no_text, memory, inputs.show_progress_bar,
    )  # fmt: skip


def _write(
    job: SimilarityJob, targets: dict[str, Path], top_k: int | None, force: bool
) -> list[str]:
    """Write the targets of -o; return what was written, in words."""
    done = []
    if path := targets.get("graph"):
        with resumable(partial(_kept, path), force):
            graph = job.write_graph(path, top_k, force)
        what = f" above {job.threshold}" if top_k is None else f", top {top_k} of each row"
        done.append(
            f"{counted(graph.nnz, 'score')}{what} in {counted(len(graph.parts), 'shard')} -> {path}"
        )
    if path := targets.get("matrix"):
        scores = counted(job.write_matrix(path), "score")
        done.append(f"{scores} above {job.threshold} -> {path}")
    if (path := targets.get("neighbours")) and top_k is not None:
        job.write_neighbours(path, top_k)
        done.append(f"{counted(top_k, 'neighbour')} of each row -> {path}")
    return done


def _kept(path: Path) -> str:
    from onnxsim_embed.similarity.graph_writer import GraphCheckpoint

    shards = len(list(GraphCheckpoint(path).shards.glob("part-*.npz")))
    return counted(shards, "shard") if shards else ""


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


def _check_targets(
    targets: dict[str, Path],
    pairs: Path | None,
    heatmap: Path | None,
    force: bool,
    distributed: bool,
) -> None:
    """Raise, before any work, for outputs that could not be written after it."""
    if distributed:
        if list(targets) != ["graph"]:
            raise ValueError("--engine ray writes a directory: pass a name without a suffix to -o")
        return
    if "graph" in targets:
        from onnxsim_embed.similarity.graph_writer import GraphCheckpoint

        GraphCheckpoint(targets["graph"]).check_target(force)
    files = [path for kind, path in targets.items() if kind != "graph"]
    files += [path for path in (pairs, heatmap) if path is not None]
    for path in files:
        check_output(path, force)
    if len(set(files)) < len(files):
        raise ValueError(f"{files[-1]} is the target of two outputs")
    if pairs is not None:
        check_table(pairs, force, ".csv", ".tsv")
    if heatmap is not None:
        from onnxsim_embed.plot import check_format

        check_format(heatmap)
