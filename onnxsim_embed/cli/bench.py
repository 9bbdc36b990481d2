"""bench: speed beside fidelity on the user's texts and machine, ours and peers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer import Option

from onnxsim_embed.cli import options


def bench(
    model: options.Model = options.DEFAULT_MODEL,
    texts: str | None = Option(
        None, help="Your texts; default: documentation of installed packages."
    ),
    column: options.Column = None,
    against: str = Option(
        "installed",
        help="Comma-separated: torch, st-torch, st-onnx, st-onnx-O3, st-onnx-qint8, st-openvino, st-openvino-static, fastembed; or installed, all, none.",
    ),
    peer_python: str | None = Option(
        None, help="Python interpreter of the peers; default: this one."
    ),
    checkpoint: Path | None = Option(
        None, help="What peers load; default: what the model was exported from."
    ),
    sts: Path | None = Option(None, help="Text, text, score: correlation with human scores."),
    cases: str = Option("latency,start", help="Beside throughput: latency, growth, start."),
    most: int = Option(400, min=8, help="Maximum number of texts."),
    rounds: int = Option(5, min=1, help="Alternating rounds."),
    patience: float = Option(60, min=0, help="Seconds to wait for an idle machine."),
    output: Path | None = Option(
        None, "--output", "-o", help="Directory for text.json, tables and pictures."
    ),
    threads: options.Threads = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure speed beside fidelity, on your texts and machine, and beside installed peers."""
    from onnxsim_embed.benchmark import measure
    from onnxsim_embed.files.atomic import atomic_file, check_output
    from onnxsim_embed.files.texts import iter_texts, read_scored_pairs
    from onnxsim_embed.system.hardware import available_cpus

    chosen = [name.strip() for name in cases.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(measure.CASES)):
        raise ValueError(f"unknown case {unknown[0]!r}; allowed are {', '.join(measure.CASES)}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        check_output(output / "text.json", force)
    python = peer_python or sys.executable
    peers = measure.choose_peers(against, python)
    corpus = measure.documentation() if texts is None else list(iter_texts(texts, column))
    different = list(dict.fromkeys(corpus))
    result = measure.run(
        model,
        different[:: max(1, len(different) // most)][:most],
        peers,
        python=python,
        threads=threads or available_cpus(),
        rounds=rounds,
        cases=chosen,
        patience=patience,
        checkpoint=checkpoint,
        sts=None if sts is None else read_scored_pairs(sts),
        say=lambda message: None if quiet else typer.echo(message, err=True),
    )
    result["source"] = "documentation of numpy and scipy" if texts is None else Path(texts).name
    table = _markdown(result, chosen)
    typer.echo(table)
    if output is not None:
        with atomic_file(output / "text.json") as work:
            work.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (output / "tables.md").write_text(table + "\n", encoding="utf-8")
        _draw(result, output / "speed.png")


def _markdown(result: Mapping[str, Any], cases: Sequence[str]) -> str:
    """Return one table with a row for each system, fastest first, and the conditions below it."""
    rows = []
    for name, row in sorted(result["systems"].items(), key=lambda item: item[1]["seconds"]):
        cells = {
            "system": f"**{row['title']}**" if name.startswith("ours") else row["title"],
            "texts/s": f"{result['texts'] / row['seconds']:,.0f}",
            "first row is ... times as fast": "{:.2f} ({:.2f} to {:.2f})".format(*row["lead_is"]),
            "mean / min cosine": f"{row['mean_cosine']:.5f} / {row['min_cosine']:.4f}",
        }
        if "sts_spearman" in row:
            cells["STS Spearman"] = f"{row['sts_spearman']:.2f}"
        for size, (p50, p90, p99) in row["latency_ms"].items():
            cells[f"{size} texts, ms p50 / p90 / p99"] = f"{p50:.3g} / {p90:.3g} / {p99:.3g}"
        for size, (p50, *_) in row["growth_ms"].items():
            cells[f"s a call of {size}"] = f"{p50 / 1e3:.3g}"
        if "start" in cases:
            cells["first vector after, s"] = f"{row['start_seconds']:.2f}"
            cells["peak memory, MB"] = f"{row['peak_mb']:,.0f}"
        rows.append(cells)
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
    lines += ["", *(f"{name} did not run: {why}" for name, why in result["failed"].items())]
    machine = result["machine"]
    return "\n".join([*lines, (
        f"{result['date']}, {machine['processor']}, {machine['threads']} threads. {result['model']}, "
        f"{result['texts']:,} texts ({result['source']}), {result['rounds']} alternating rounds, "
        f"medians. Cosines are to {result['systems'][result['reference']]['title']}."
    )])  # fmt: skip


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw one point per system: texts per second against the error of cosines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        typer.echo("no picture: pip install 'onnxsim-embed[plot]'", err=True)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="texts per second", ylabel="1 - mean cosine"
    )
    for row in result["systems"].values():
        speed, error = result["texts"] / row["seconds"], max(1e-7, 1 - row["mean_cosine"])
        axes.plot([speed], [error], "o")
        axes.annotate(row["title"], (speed, error), xytext=(6, 4), textcoords="offset points")
    axes.invert_yaxis()  # better is up, and right
    figure.savefig(path)
