"""Report of a fine-tuning job: report.json, table, conclusion, model card, and loss plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsim_embed.artifact.manifest import CARD
from onnxsim_embed.files.atomic import atomic_file

if TYPE_CHECKING:
    from onnxsim_embed.export.fidelity import Fidelity
    from onnxsim_embed.finetune.evaluation import Evaluation

# Rows of the table, in order.
MODELS = {
    "before": "before, PyTorch",
    "after": "after, PyTorch",
    "fp32": "after, ONNX fp32",
    "int8": "after, ONNX int8",
}
METRICS = {
    "accuracy_at_1": "accuracy@1",
    "mrr_at_10": "MRR@10",
    "ndcg_at_10": "NDCG@10",
    "spearman": "Spearman",
}
COSINES = ("mean_cosine", "min_cosine")


def held_out_report(
    targets: int, evaluations: Mapping[str, Evaluation], fidelity: Mapping[str, Fidelity]
) -> dict[str, Any]:
    """Return what report.json says of the held-out pairs; evaluations are by the keys of MODELS, in order.

    :param targets: number of targets searched.
    :param fidelity: to the fine-tuned PyTorch model on the evaluated texts, by precision.
    """
    before, after = evaluations["before"].first_hits, evaluations["after"].first_hits
    models: dict[str, dict[str, float | None]] = {}
    for name, evaluation in evaluations.items():
        metrics = evaluation.metrics.items()
        models[name] = {k: None if v is None else round(v, 4) for k, v in metrics}
        for cosine in COSINES if name in fidelity else ():
            models[name][cosine] = round(getattr(fidelity[name], cosine), 6)
    changes = {"gained": int((after & ~before).sum()), "lost": int((before & ~after).sum())}
    return {"queries": len(after), "targets": targets, "models": models, **changes}


def report_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the held-out metrics as a header and rows."""
    models = report["held_out"]["models"]
    metrics = [name for name in METRICS if models["before"][name] is not None]
    header = ["held out", *(METRICS[name] for name in metrics), "cosine to PyTorch: mean", "min"]
    rows = []
    for name, values in models.items():
        cells = [f"{values[key]:.4f}" for key in metrics]
        cells += [f"{values[key]:.5f}" if key in values else "" for key in COSINES]
        rows.append([MODELS[name], *cells])
    return header, rows


def verdict(report: Mapping[str, Any]) -> str:
    """Return one sentence on what fine-tuning changed."""
    held_out = report["held_out"]
    main = main_metric(report)
    before, after = (held_out["models"][name][main] for name in ("before", "after"))
    change = (
        f"{METRICS[main]} from {before:.4f} to {after:.4f}; of {held_out['queries']} sources "
        f"{held_out['gained']} gained a correct first result, {held_out['lost']} lost it"
    )
    if report["worse"]:
        return (
            f"The model got worse on the held-out pairs: {change}. It was written nevertheless; more pairs, "
            "a lower learning rate or fewer epochs may help."
        )
    return f"{'Better' if after > before else 'No change'}: {change}."


def main_metric(report: Mapping[str, Any]) -> str:
    """Return the key of the metric that models are compared by."""
    scored = report["held_out"]["models"]["before"]["spearman"] is not None
    return "spearman" if scored else "ndcg_at_10"


def summary(report: Mapping[str, Any]) -> str:
    """Return one line about the training."""
    training = report["training"]
    stopped = training["steps"] < training["planned"]
    early = f" (stopped early, {training['planned']} were planned)" if stopped else ""
    return (
        f"{training['loss']}: {training['steps']} steps{early} on {training['pairs']:,} pairs; best on the "
        f"validation pairs: the checkpoint of step {training['best_step']}."
    )


def add_to_card(report: Mapping[str, Any], directory: Path) -> None:
    """Append the training and its effect to an artifact's model card."""
    header, rows = report_table(report)
    conclusion = f"**{verdict(report)}**" if report["worse"] else verdict(report)
    lines = [
        "\n## Fine-tuned",
        f"From `{report['model']}`. {summary(report)}\n",
        conclusion,
        f"Evaluated on {report['pairs']['held_out']:,} held-out pairs, among "
        f"{report['held_out']['targets']:,} targets.\n",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        '\n`model.safetensors` holds the PyTorch weights: `SentenceTransformer("path/to/this/directory")`.',
        "`report.json` has all metrics, `loss.png` the loss by step.",
    ]
    with (directory / CARD).open("a", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")


def draw_losses(report: Mapping[str, Any], path: Path) -> None:
    """Plot the loss, and below it the metric on the validation pairs, by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = report["training"]
    loss, validation = (np.array(training["log"][k]).reshape(-1, 2) for k in ("loss", "validation"))
    figure = Figure(figsize=(7, 5.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(*loss.T, color="#2a6f97", marker="." if len(loss) < 40 else "")
    upper.set(title=training["loss"].split(",")[0], ylabel="training loss", ylim=(0, None))
    lower.plot(*validation.T, color="#b5651d", marker="o", markersize=4)
    lower.axvline(training["best_step"], color="grey", linestyle=":", label="best checkpoint")
    lower.legend(frameon=False)
    lower.set(xlabel="step", ylabel=f"{METRICS[main_metric(report)]}, validation pairs")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as work:
        figure.savefig(work, format="png")
