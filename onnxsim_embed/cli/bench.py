"""bench: speed, fidelity and memory on one's own texts and machine, beside what else is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxsim_embed.cli.options import (
    DEFAULT_MODEL,
    ColumnOption,
    ForceOption,
    ModelOption,
    QuietOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from onnxsim_embed.benchmark.corpus import Corpus


def bench(
    model: ModelOption = DEFAULT_MODEL,
    texts: Annotated[
        str | None,
        typer.Option("--texts", help="Your texts; default: documentation of installed packages."),
    ] = None,
    column: ColumnOption = None,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="Comma-separated: torch, st-torch, st-onnx, st-onnx-O3, st-onnx-qint8, st-openvino, "
            "st-openvino-static, fastembed; or installed, all, none.",
        ),
    ] = "installed",
    peer_python: Annotated[
        str | None,
        typer.Option(
            "--peer-python", help="Interpreter of an environment with them; default: this one."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", help="What they load; default: what the model was exported from."
        ),
    ] = None,
    sts: Annotated[
        Path | None,
        typer.Option("--sts", help="Text, text, score: correlation with human scores."),
    ] = None,
    cases: Annotated[
        str, typer.Option("--cases", help="Beside throughput: latency, growth, start.")
    ] = "latency,start",
    most: Annotated[int, typer.Option("--most", min=8, help="Use at most so many texts.")] = 400,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternating rounds.")] = 5,
    patience: Annotated[
        float, typer.Option("--patience", min=0, help="Seconds to wait for a quiet machine.")
    ] = 60,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for text.json, tables and pictures."),
    ] = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure speed beside fidelity, on your texts and machine, and beside peers that are installed."""
    from onnxsim_embed.artifact.cache import cache_directory, locate_artifact
    from onnxsim_embed.benchmark import text_tables
    from onnxsim_embed.benchmark.peers import TEXT_SYSTEMS, Environments, choose
    from onnxsim_embed.benchmark.report import write_json, write_report
    from onnxsim_embed.benchmark.tables import joined, refused_table
    from onnxsim_embed.benchmark.text_bench import TextBench
    from onnxsim_embed.benchmark.text_plan import CASES, TextPlan
    from onnxsim_embed.files.atomic import check_output
    from onnxsim_embed.system.hardware import available_cpus

    chosen = tuple(name.strip() for name in cases.split(",") if name.strip())
    if unknown := set(chosen) - set(CASES):
        raise ValueError(f"{sorted(unknown)[0]!r} is not among the cases: {', '.join(CASES)}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        check_output(output / "text.json", force)

    def say(message: str) -> None:
        if not quiet:
            typer.echo(message, err=True)

    environments = Environments(peer_python, None, say)
    peers = choose(against, TEXT_SYSTEMS)
    corpora = _corpora(texts, column, most)
    plan = TextPlan(
        model=model,
        corpora=corpora,
        peers=tuple(environments.installed(TEXT_SYSTEMS) if peers is None else peers),
        threads=threads or available_cpus(),
        rounds=rounds,
        work=cache_directory() / "bench" / locate_artifact(model).directory.name,
        cases=chosen,
        patience=patience,
        checkpoint=checkpoint,
        sts=sts,
    )
    result = TextBench(plan, environments, say).run()
    made = (text_tables.speed_table, text_tables.latency_table, text_tables.start_table)
    typer.echo(
        joined(
            *(make(result) for make in made),
            refused_table(result),
            text_tables.text_conditions(result),
        )
    )
    if output is not None:
        write_json(output / "text.json", result)
        write_report(output, (), say)
        say(f"written to {output}")


def _corpora(texts: str | None, column: str | None, most: int) -> tuple[Corpus, ...]:
    from onnxsim_embed.benchmark.corpus import documentation, file_corpus
    from onnxsim_embed.files.texts import iter_texts

    if texts is not None:
        return (file_corpus(list(iter_texts(texts, column)), Path(texts).name, most),)
    counts = {"short": most, "descriptions": most, "long": max(8, most // 8)}
    return tuple(documentation(kind, count) for kind, count in counts.items())
