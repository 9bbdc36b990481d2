"""The finetune command."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from onnxsim_embed.cli.options import DEFAULT_MODEL, Force, NoHeader, Quiet
from onnxsim_embed.cli.output import on_terminal, print_table


def finetune(
    file: Annotated[
        Path,
        typer.Argument(help="Pairs of texts: csv, tsv, jsonl or parquet."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Recipe name, checkpoint directory or Hub id."),
    ] = DEFAULT_MODEL,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the pairs.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pairs in a training step.")] = 64,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Maximum, after a tenth of the steps.")
    ] = 2e-5,
    source_column: Annotated[
        str | None, typer.Option("--source-column", help="Default: source_sentence.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option("--target-column", help="Default: target_sentence.")
    ] = None,
    score_column: Annotated[
        str | None,
        typer.Option(
            "--score-column", help="Numbers, higher for more similar pairs. Default: score."
        ),
    ] = None,
    negative_column: Annotated[
        str | None,
        typer.Option(
            "--negative-column",
            help="Hard negatives: texts that look like the target and are not. Default: a third column.",
        ),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="Of csv and tsv. Default: detected.")
    ] = None,
    no_header: NoHeader = False,
    on_error: Annotated[
        str,
        typer.Option("--on-error", help="fail, or skip rows without their texts or score."),
    ] = "fail",
    hard_negatives: Annotated[
        int, typer.Option("--hard-negatives", help="Number to mine for each pair.")
    ] = 0,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Evaluation pairs (default: a held-out split)."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out",
            help="Fraction not trained on: half for validation, half for evaluation.",
        ),
    ] = 0.2,
    patience: Annotated[
        int,
        typer.Option("--patience", help="Stop after this many evaluations without improvement."),
    ] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Equal seeds give equal models.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on pairs of texts, export it, and evaluate it on held-out pairs.

    After a kill the same command continues.
    """
    from onnxsim_embed.finetune import finetune as run
    from onnxsim_embed.finetune import read_pairs
    from onnxsim_embed.finetune.report import report_table, summary, verdict

    read = partial(
        read_pairs,
        source_column=source_column,
        target_column=target_column,
        negative_column=negative_column,
        score_column=score_column,
        delimiter=delimiter,
        header=not no_header,
        on_error=on_error,
    )
    started = time.perf_counter()
    try:
        result = run(
            read(file),
            output,
            model=model,
            evaluation=None if evaluation is None else read(evaluation),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            hard_negatives=hard_negatives,
            held_out=held_out,
            patience=patience,
            seed=seed,
            force=force,
            show_progress_bar=on_terminal() and not quiet,
            on_stage=None if quiet else typer.echo,
        )
    except KeyboardInterrupt:
        command = "the same command without --force" if force else "the same command"
        typer.echo(f"onnxsim-embed: interrupted; {command} continues", err=True)
        raise typer.Exit(130) from None
    if not quiet:
        typer.echo(summary(result.report))
        print_table(*report_table(result.report))
        typer.echo(f"Wrote {output} in {time.perf_counter() - started:.0f} s.")
    if result.worse or not quiet:
        conclusion = verdict(result.report)
        typer.echo(typer.style(conclusion, bold=True) if result.worse else conclusion, err=quiet)
