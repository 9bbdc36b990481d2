"""bench: speed beside fidelity on the user's texts and machine, ours and peers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer import Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import TextInputs


def bench(
    inputs: TextInputs,
    model: options.Model = options.DEFAULT_MODEL,
    texts: str | None = Option(
        None, help="Your texts; default: documentation of installed packages."
    ),
    against: str = Option(
        "installed",
        help="Peers: torch, st-torch, st-onnx[-O3|-qint8], st-openvino[-static], fastembed, ctranslate2, chroma; or installed, all, none.",
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
        None, "--output", "-o", help="Directory for text.json, tables.md and speed.png."
    ),
    threads: options.Threads = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure speed beside fidelity of our precisions and engines, and of installed peers, on your machine."""
    from onnxsim_embed.benchmark import measure
    from onnxsim_embed.files.atomic import check_output, write_json
    from onnxsim_embed.system.hardware import available_cpus

    chosen = options.split(cases)
    if unknown := sorted(set(chosen) - set(measure.CASES)):
        raise ValueError(f"unknown case {unknown[0]!r}; allowed are {', '.join(measure.CASES)}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        check_output(output / "text.json", force)
    python = peer_python or sys.executable
    peers = measure.choose_peers(against, python)
    read = measure.documentation() if texts is None else inputs.read_texts(texts)
    known = list(dict.fromkeys(read))
    result = measure.run(
        model, known[:: max(1, len(known) // most)][:most], peers, python, chosen, checkpoint, sts,
        threads or available_cpus(), rounds, patience,
        say=lambda message: None if quiet else typer.echo(message, err=True),
    )  # fmt: skip
    result["source"] = "documentation of numpy and scipy" if texts is None else Path(texts).name
    table = _markdown(result, "start" in chosen)
    typer.echo(table)
    if output is not None:
        write_json(output / "text.json", result)
        (output / "tables.md").write_text(table + "\n", encoding="utf-8")
        if find_spec("matplotlib") is not None:
            _draw(result, output / "speed.png")


def _markdown(result: Mapping[str, Any], start: bool) -> str:
    """Return one table with a row for each system, fastest first, the conditions, and our fastest."""
    from onnxsim_embed.benchmark.measure import recommendation

    rows = []
    for name, row in sorted(result["systems"].items(), key=lambda item: item[1]["seconds"]):
        cells = {
            "system": f"**{row['title']}**" if name.startswith("ours") else row["title"],
            "texts/s": f"{result['texts'] / row['seconds']:,.0f}",
            "first system is ... times as fast": "{:.2f} ({:.2f} to {:.2f})".format(
                *row["lead_is"]
            ),
            "mean / min cosine": f"{row['mean_cosine']:.5f} / {row['min_cosine']:.4f}",
        }
        if "sts_spearman" in row:
            cells["STS Spearman"] = f"{row['sts_spearman']:.2f}"
        for size, (p50, p90, p99) in row["calls_ms"].items():
            cells[f"{size} texts, ms p50 / p90 / p99"] = f"{p50:.3g} / {p90:.3g} / {p99:.3g}"
        if start:
            cells["first vector after, s"] = f"{row['start_seconds']:.2f}"
            cells["peak memory, MB"] = f"{row['peak_mb']:,.0f}"
        rows.append(cells)
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
    lines += ["", *(f"{name} did not run: {why}" for name, why in result["failed"].items())]
    lines.append(
        f"{result['date']}, {result['processor']}, {result['threads']} threads. "
        f"{result['model']}, {result['texts']:,} texts ({result['source']}), {result['rounds']} "
        f"alternating rounds. Cosines are to {result['systems'][result['reference']]['title']}."
    )
    lines.append(recommendation(result))
    return "\n".join(lines)


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw one point per system: texts per second against the error of cosines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for row in result["systems"].values():
        point = (result["texts"] / row["seconds"], max(1e-7, 1 - row["mean_cosine"]))
        axes.plot(*point, "o")
        axes.annotate(row["title"], point, xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="texts per second", ylabel="1 - mean cosine (better: up)")
    axes.invert_yaxis()
    figure.savefig(path)
