"""search: the rows of a file that are closest to a query."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsim_embed.cli.options import (
    DEFAULT_MODEL,
    ColumnOption,
    ForceOption,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
)
from onnxsim_embed.cli.output import on_terminal
from onnxsim_embed.cli.texts import counted, load, print_report, read_labels, read_texts
from onnxsim_embed.files.atomic import atomic_file, check_output

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.similarity.compare import TopK


def search(
    query: Annotated[
        list[str] | None, typer.Argument(help="What to look for; several are several searches.")
    ] = None,
    where: Annotated[
        str,
        typer.Option(
            "--in",
            help="Vectors (.npy, or .parquet with a column vector), or a file of texts to encode.",
        ),
    ] = "",
    texts: Annotated[
        str | None, typer.Option("--texts", help="Texts of the vectors, to show; one a row.")
    ] = None,
    column: ColumnOption = None,
    queries: Annotated[
        str | None, typer.Option("--queries", help="File of queries; - for standard input.")
    ] = None,
    query_column: Annotated[
        str | None, typer.Option("--query-column", help="Column of --queries.")
    ] = None,
    k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, help="Rows to show of each query.")
    ] = 10,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", "-t", min=-1.0, max=1.0, help="Of these, scores strictly above only."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="results.csv, .tsv or .jsonl, instead of printing."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    truncate_dim: Annotated[
        int | None,
        typer.Option("--truncate-dim", help="Components that the vectors were cut to."),
    ] = None,
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model", help="Search vectors even if another model made them than --model."
        ),
    ] = False,
    force: ForceOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")] = False,
) -> None:
    """Find the rows closest to a query, exactly.

    Queries get the model's query prompt, texts of --in its document prompt, where it has one.
    """
    if not where:
        raise ValueError("search needs --in: a file of vectors or of texts")
    _check_output(output, force)
    asked = list(query or [])
    if queries is not None:
        asked += read_texts(queries, query_column, None)
    if not asked:
        raise ValueError("search needs a query, or --queries FILE")
    vectors, known = _given(where, texts, column)
    if vectors is None:
        embedder = load(model, precision, threads)
        known = known or []
        vectors = embedder.encode_document(
            known, show_progress_bar=on_terminal() and not quiet, truncate_dim=truncate_dim
        )
        if not quiet:
            print_report(embedder, embedder.last_report)
    else:
        embedder, truncate_dim = _load_for(
            where, model, precision, threads, truncate_dim, any_model
        )
    _check_widths(vectors, where, embedder, model, truncate_dim)
    from onnxsim_embed.similarity.index import VectorIndex

    started = time.perf_counter()
    index = VectorIndex(vectors)
    best = index.search(
        embedder.encode_query(asked, truncate_dim=truncate_dim), min(k, len(vectors))
    )
    seconds = time.perf_counter() - started
    rows = _result(asked, best, known, threshold)
    from onnxsim_embed.files.uris import is_directory

    if is_directory(where):
        from onnxsim_embed.files.vector_directory import open_vectors

        ids = open_vectors(where).ids()
        rows["row"] = [ids[row] for row in rows["row"]]
    if output is None:
        _print(asked, rows, len(vectors), known is not None, quiet)
        return
    _write(rows, output)
    if not quiet:
        typer.echo(
            f"Searched {counted(len(vectors), 'row')} for {_counted_queries(len(asked))} in {seconds:.2f} s: "
            f"{counted(len(rows['row']), 'result')} -> {output}"
        )


def _check_output(output: Path | None, force: bool) -> None:
    if output is None:
        return
    if output.suffix not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{output}: results are written as .csv, .tsv or .jsonl")
    check_output(output, force)


def _given(
    where: str, texts: str | None, column: str | None
) -> tuple[npt.NDArray[Any] | None, list[str] | None]:
    """Return the vectors and the texts that there are; at least one of the two."""
    from onnxsim_embed.files.vectors import holds_vectors, read_vectors

    if not holds_vectors(where):
        if texts is not None:
            raise ValueError(f"{where} holds texts already: leave out --texts, or give vectors")
        return None, read_texts(where, column, None)
    if column is not None and texts is None:
        raise ValueError("--column names the column of texts: give --texts FILE as well")
    vectors = read_vectors(where)
    if vectors.dtype.kind != "f":
        raise ValueError(
            f"{where} holds {vectors.dtype} numbers, which are no components of a query's vector; "
            "search takes float32 and float16: encode without --dtype"
        )
    if not len(vectors):
        raise ValueError(f"{where} holds no vectors")
    return vectors, None if texts is None else read_labels(texts, column, None, vectors, where)


def _load_for(
    where: str,
    model: str,
    precision: str,
    threads: int | None,
    truncate_dim: int | None,
    any_model: bool,
) -> tuple[Embedder, int | None]:
    """Load the model of a file of vectors, and return the width to cut to as well.

    :raises ValueError: if the file says that another model made it.
    """
    from onnxsim_embed.files.provenance import differences, read_provenance
    from onnxsim_embed.runtime.encode_to_file import provenance_of

    origin = read_provenance(where)
    if origin is None or any_model:
        return load(model, precision, threads), truncate_dim
    if precision == "auto" and origin.precision == "fp32":
        precision = "fp32"  # what made the vectors, and not what is fastest
    truncate_dim = truncate_dim or origin.truncate_dim
    embedder = load(model, precision, threads)
    if told := differences(origin, provenance_of(embedder, truncate_dim=truncate_dim)):
        raise ValueError(
            f"{where} holds vectors of another model than {model} ({', '.join(told)}): give the --model "
            f"that made them (see: onnxsim-embed info {where}), or --any-model to search nevertheless"
        )
    return embedder, truncate_dim


def _check_widths(
    vectors: npt.NDArray[Any], where: str, embedder: Embedder, model: str, truncate_dim: int | None
) -> None:
    made = truncate_dim or embedder.embedding_dimension
    if vectors.shape[1] != made:
        raise ValueError(
            f"{where} holds vectors of {vectors.shape[1]} components, and {model} makes {made}; "
            "give the --model (and --truncate-dim) that made the vectors"
        )


def _result(
    asked: list[str], best: TopK, texts: list[str] | None, threshold: float | None
) -> dict[str, list[Any]]:
    """Return the columns of the results, query by query, best first."""
    import numpy as np

    from onnxsim_embed.cli.graph_files import digits

    k = best.indices.shape[1]
    kept = np.ones(best.scores.size, bool)
    if threshold is not None:
        kept = best.scores.ravel() > np.float32(threshold)
    number = np.repeat(np.arange(len(asked)), k)[kept].tolist()
    rows = best.indices.ravel()[kept].tolist()
    result: dict[str, list[Any]] = {
        "query": number,
        "rank": np.tile(np.arange(1, k + 1), len(asked))[kept].tolist(),
        "row": rows,
        "score": digits(best.scores.ravel()[kept]),
        "query_text": [asked[at] for at in number],
    }
    if texts is not None:
        result["text"] = [texts[row] for row in rows]
    return result


def _print(
    asked: list[str], result: dict[str, list[Any]], rows: int, texts: bool, quiet: bool
) -> None:
    """Print rank, score, row and text of each result, query by query."""
    from onnxsim_embed.cli.graph_files import shorten

    wide = max(3, len(str(rows - 1)), *(len(str(row)) for row in result["row"]))
    lines: list[list[str]] = [[] for _ in asked]
    for at, number in enumerate(result["query"]):
        text = f"  {shorten(result['text'][at])}" if texts else ""
        lines[number].append(
            f"{result['rank'][at]:>4}  {float(result['score'][at]):>7.4f}  "
            f"{result['row'][at]:>{wide}}{text}".rstrip()
        )
    header = f"rank    score  {'row':>{wide}}{'  text' if texts else ''}"
    for query, found in zip(asked, lines, strict=True):
        if not quiet:
            typer.echo(f"\n{shorten(query)}: {len(found)} of {counted(rows, 'row')}")
            typer.echo(header if found else "none above the threshold")
        for line in found:
            typer.echo(line)


def _write(result: dict[str, list[Any]], output: Path) -> None:
    from onnxsim_embed.files.texts import write_rows

    if output.suffix != ".jsonl":
        write_rows(result, output)
        return
    result = result | {"score": [float(score) for score in result["score"]]}
    with atomic_file(output) as work, work.open("w", encoding="utf-8", newline="\n") as stream:
        for cells in zip(*result.values(), strict=True):
            row = dict(zip(result, cells, strict=True))
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _counted_queries(number: int) -> str:
    return "1 query" if number == 1 else f"{number:,} queries"
