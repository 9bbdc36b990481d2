"""search: the nearest rows of queries."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import Rows, VectorInputs
from onnxsim_embed.cli.output import check_table, counted
from onnxsim_embed.files.tables import write_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.cli.texts import Texts
    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.similarity.compare import TopK


def search(
    inputs: VectorInputs,
    query: list[str] | None = Argument(None, help="Query; each argument is a search of its own."),
    where: str = Option(
        "", "--in", help="File of texts to encode (or with --vectors), or of vectors."
    ),
    texts: options.OldTexts = None,
    queries: str | None = Option(None, help="File of queries; - for standard input."),
    query_column: str | None = Option(None, help="Column of --queries."),
    k: int = Option(10, "--top-k", "-k", min=1, help="Results of each query."),
    threshold: float | None = Option(
        None, "--threshold", "-t", min=-1, max=1, help="Results score above it."
    ),
    output: Path | None = Option(None, "--output", "-o", help="results.csv, .tsv or .jsonl."),
    truncate_dim: int | None = Option(None, help="Dimensions of truncated vectors."),
    any_model: bool = Option(
        False, "--any-model", help="Accept vectors of another model than --model."
    ),
) -> None:
    """Find the nearest rows of a query, exactly.

    Queries get the model's query prompt, and texts of --in its document prompt, if it has one.
    """
    if not where:
        raise ValueError("search requires --in: a file of vectors or of texts")
    if output is not None:
        check_table(output, inputs.force, ".csv", ".tsv", ".jsonl")
    from onnxsim_embed.files.vectors import holds_vectors
    from onnxsim_embed.similarity.index import VectorIndex

    inputs, where = inputs.swapped(where, texts)
    asked = _read_queries(query or [], queries, query_column, inputs)
    stored = inputs.vectors or (where if holds_vectors(where) else None)
    if stored == where and inputs.column is not None:
        raise ValueError("--column requires --in FILE --vectors VECTORS if the vectors are stored")
    embedder, truncate_dim = _load(stored, inputs, truncate_dim, any_model)

    def encode(source: Texts, texts: list[str]) -> npt.NDArray[Any]:
        show = inputs.show_progress_bar
        vectors = embedder.encode_document(
            texts, show_progress_bar=show, truncate_dim=truncate_dim, **inputs.encoding
        )
        inputs.print_encoded(embedder, embedder.last_report, source.rows)
        return vectors

    rows = inputs.read(where, encode=encode)
    vectors = rows.vectors
    if not len(vectors):
        raise ValueError(f"{stored or where} holds no vectors")
    dim = truncate_dim or embedder.embedding_dimension
    if vectors.shape[1] != dim:
        raise ValueError(
            f"{stored} holds vectors of dim {vectors.shape[1]}, and {inputs.model} computes dim {dim}; "
            "pass the --model (and --truncate-dim) of the vectors"
        )
    started = time.perf_counter()
    index = VectorIndex(vectors)
    best = index.search(
        embedder.encode_query(asked, truncate_dim=truncate_dim, **inputs.encoding),
        min(k, len(vectors)),
    )
    seconds = time.perf_counter() - started
    results = _results(asked, best, rows, threshold, inputs.no_text)
    if output is None:
        _print(asked, results, len(vectors), inputs.say)
        return
    if output.suffix == ".jsonl":
        results["score"] = list(map(float, results["score"]))
    write_rows(results, output)
    inputs.say(
        f"Searched {counted(len(vectors), 'row')} for {counted(len(asked), 'query')} in "
        f"{seconds:.2f} s: {counted(len(results['row']), 'result')} -> {output}"
    )


def _read_queries(
    given: list[str], file: str | None, column: str | None, inputs: VectorInputs
) -> list[str]:
    """Return the queries of the command line, then those of --queries."""
    # In any locale.
    asked = [os.fsencode(query).decode(errors="surrogateescape") for query in given]
    if file is not None:
        asked += replace(inputs, column=column, id_column=None, kind=None).open(file).read()
    if not asked:
        raise ValueError("search requires a query, or --queries FILE")
    return asked


def _load(
    where: str | None, inputs: VectorInputs, truncate_dim: int | None, any_model: bool
) -> tuple[Embedder, int | None]:
    """Load the model, which must be that of the vectors if they tell theirs; return it and their dimension."""
    from onnxsim_embed.files.provenance import differences
    from onnxsim_embed.files.vectors import read_provenance
    from onnxsim_embed.runtime.options import EncodeOptions
    from onnxsim_embed.runtime.provenance import provenance_of

    provenance = None if where is None else read_provenance(where)
    if provenance is None or any_model:
        return inputs.load(), truncate_dim
    same = inputs.precision == "auto" and provenance.precision == "fp32"  # not the fastest one
    truncate_dim = truncate_dim or provenance.truncate_dim
    embedder = inputs.load(precision="fp32" if same else None)
    encoding = EncodeOptions(truncate_dim=truncate_dim)
    if found := differences(provenance, provenance_of(embedder, encoding)):
        raise ValueError(
            f"{where} holds vectors of another model than {inputs.model} ({', '.join(found)}): pass the --model "
            f"of the vectors (see: onnxsim-embed info {where}), or --any-model to search nevertheless"
        )
    return embedder, truncate_dim


def _results(
    queries: list[str], best: TopK, found: Rows, threshold: float | None, no_text: bool
) -> dict[str, list[Any]]:
    """Return the columns of the results, query by query, in descending order of scores."""
    from onnxsim_embed.cli.graph_files import digits

    kept = best.scores > np.float32(-np.inf if threshold is None else threshold)
    number, rank = np.nonzero(kept)
    rows = best.indices[kept].tolist()
    results: dict[str, list[Any]] = {
        "query": number.tolist(),
        "rank": (rank + 1).tolist(),
        "row": [found.names[row] for row in rows],
        "score": digits(best.scores[kept]),
        "query_text": [queries[at] for at in number],
    }
    if found.texts is not None and not no_text:
        results["text"] = [found.texts[row] for row in rows]
    return results


def _print(
    queries: list[str], results: dict[str, list[Any]], rows: int, say: Callable[[str], None]
) -> None:
    """Print rank, score, row and text of each result, query by query."""
    from onnxsim_embed.cli.graph_files import shorten

    texts = results.get("text")
    width = max(3, len(str(rows - 1)), *(len(str(row)) for row in results["row"]))
    header = f"rank    score  {'row':>{width}}{'' if texts is None else '  text'}"
    lines: list[list[str]] = [[] for _ in queries]
    for at, number in enumerate(results["query"]):
        text = "" if texts is None else shorten(texts[at])
        rank, score, row = (results[name][at] for name in ("rank", "score", "row"))
        lines[number].append(f"{rank:>4}  {float(score):>7.4f}  {row:>{width}}  {text}".rstrip())
    for query, found in zip(queries, lines, strict=True):
        say(f"\n{shorten(query)}: {len(found)} of {counted(rows, 'row')}")
        say(header if found else "none above the threshold")
        for line in found:
            typer.echo(line)
