"""The finetune command."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import on_terminal, print_table


def finetune(
    file: Path = Argument(..., help="Pairs of texts: csv, tsv, jsonl or parquet."),
    output: Path = Option(..., "--output", "-o", help="Directory to write."),
    model: options.Model = options.DEFAULT_MODEL,
    epochs: float = Option(1, help="Passes over the pairs."),
    batch_size: int = Option(64, help="Pairs in a training step."),
    learning_rate: float = Option(2e-5, help="Maximum, after a tenth of the steps."),
    source_column: str | None = Option(None, help="Default: source_sentence."),
    target_column: str | None = Option(None, help="Default: target_sentence."),
    score_column: str | None = Option(
        None, help="Numbers, higher for more similar pairs; default: score."
    ),
    negative_column: str | None = Option(
        None, help="Texts that look like the target and are not; default: a third column."
    ),
    delimiter: options.Delimiter = None,
    no_header: options.NoHeader = False,
    on_error: str = Option("fail", help="fail, or skip rows without their texts or score."),
    hard_negatives: int = Option(0, help="Number to mine for each pair."),
    evaluation: Path | None = Option(
        None, "--eval", help="Evaluation pairs; default: a held-out split."
    ),
    held_out: float = Option(
        0.2, help="Fraction not trained on: half for validation, half for evaluation."
    ),
    patience: int = Option(3, help="Stop after this many evaluations without improvement."),
    seed: int = Option(0, help="Equal seeds give equal models."),
    force: options.Force = False,
    quiet: options.Quiet = False,
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
