"""Options that several commands share."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

from typer import Option
from typer.models import ArgumentInfo, OptionInfo

DEFAULT_MODEL = "all-MiniLM-L6-v2"
Model = Annotated[
    str, Option("--model", "-m", help="Recipe name, artifact, checkpoint directory or Hub id.")
]
Precision = Annotated[
    str, Option("--precision", help="Weight precision: auto, fp32, int8, bf16 or fp16.")
]
Threads = Annotated[
    int | None, Option("--threads", min=1, help="Default: all CPUs of this process.")
]
Device = Annotated[str, Option("--device", help="auto, cpu, cuda or cuda:N.")]
MaxSeqLength = Annotated[
    int | None, Option("--max-seq-length", help="Maximum tokens of a text; default: the model's.")
]
LongTexts = Annotated[
    str, Option("--long-texts", help="Beyond that length: truncate, or mean of windows.")
]
Stride = Annotated[
    int, Option("--stride", min=0, help="Tokens that windows of --long-texts mean share.")
]
Format = Annotated[
    str | None, Option("--format", help="csv, tsv, jsonl, parquet, txt; default: the suffix.")
]
Column = Annotated[str | None, Option("--column", "-c", help="Column of the texts.")]
IdColumn = Annotated[
    str | None, Option("--id-column", help="Ids that name rows in outputs; default: row numbers.")
]
Delimiter = Annotated[str | None, Option("--delimiter", help="Of csv and tsv; default: detected.")]
NoHeader = Annotated[bool, Option("--no-header", help="Columns have no names: 0, 1, ...")]
OnError = Annotated[str, Option("--on-error", help="Rows without a text: fail, skip or blank.")]
Force = Annotated[bool, Option("--force", help="Replace existing outputs.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print errors and results only.")]
Vectors = Annotated[
    str | None, Option("--vectors", help="Vectors of the rows, .npy or .parquet, if encoded.")
]
OldTexts = Annotated[str | None, Option("--texts", hidden=True)]  # before: VECTORS --texts FILE
NoText = Annotated[bool, Option("--no-text", help="Leave the texts out of tables.")]
Threshold = Annotated[
    float, Option("--threshold", "-t", min=-1, max=1, help="Keep scores above it.")
]
DropUnseen = Annotated[
    bool,
    Option("--drop-unseen", help="Drop rows that only differ where the model does not see it."),
]
MaxMemory = Annotated[
    str | None, Option("--max-memory", help="Such as 4GB; default: three quarters of free memory.")
]
MinFidelity = Annotated[
    str | None,
    Option(
        "--min-fidelity", metavar="MEAN,MIN", help="Minimum cosines of int8; default: 0.999,0.99."
    ),
]
Bar = Annotated[str | None, Option("--bar", hidden=True)]  # before: --min-fidelity
Token = Annotated[
    str | None,
    Option("--token", envvar="HF_TOKEN", show_envvar=True, help="Token of the Hugging Face Hub."),
]
Local = Annotated[bool, Option("--local-files-only", help="Use cached Hub models; no network.")]
Engine = Annotated[
    str,
    Option(
        "--engine",
        help="auto, onnxruntime or openvino; with encode and similarity also ray: a cluster, or this "
        "machine; writes a directory.",
    ),
]
Address = Annotated[
    str | None,
    Option("--address", envvar="RAY_ADDRESS", show_envvar=True, help="Of the cluster, or auto."),
]

Debug = Annotated[bool, Option("--debug", metavar=" ", help="Print tracebacks.")]

# Words for the values of options, by name or type.
METAVARS = {
    "device": "DEVICE", "model": "MODEL", "delimiter": "CHARACTER", "max_memory": "SIZE", "title": "TEXT",
    "prompt": "NAME=TEXT", "matryoshka_dims": "NUMBERS", "where": "FILE", "queries": "FILE", "texts": "FILE",
    "reference": "FILE", "vectors": "FILE", "address": "ADDRESS", "token": "TOKEN", "cases": "NAMES",
    "checkpoint": "DIRECTORY", Path: "FILE", bool: " ", int: "NUMBER", float: "NUMBER",
}  # fmt: skip


def prepare(command: Callable[..., None]) -> Callable[..., None]:
    """Name the values of a command's options in words, and add --debug, which prints all log messages.

    Stages of long work are logged as information, which --quiet leaves out.
    """
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    for name, parameter in parameters.items():
        annotation, *more = get_args(parameter.annotation)[:2] or [parameter.annotation]
        types = get_args(annotation) or (annotation,)
        for entry in (parameter.default, *more):
            if isinstance(entry, ArgumentInfo):
                entry.metavar = name.upper()
            elif isinstance(entry, OptionInfo):
                word = "COLUMN" if name.endswith("column") else METAVARS.get(types[0], "NAME")
                entry.metavar = entry.metavar or METAVARS.get(name, word)
    debugging = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )

    @wraps(command)
    def run(*, debug: bool, **values: Any) -> None:  # noqa: ANN401
        level = logging.WARNING if values.get("quiet") else logging.INFO
        logging.getLogger("onnxsim_embed").setLevel(
            logging.DEBUG if "--debug" in sys.argv else level
        )
        command(**values)

    signature = [p.replace(kind=p.KEYWORD_ONLY) for p in (*parameters.values(), debugging)]
    # Typer keeps the lines of a paragraph.
    run.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
    run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature}
    return run


def split(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_memory(text: str | None) -> int | None:
    """Parse --max-memory."""
    from onnxsim_embed.similarity.memory import MemoryBudget
    from onnxsim_embed.system.units import parse_bytes

    return None if text is None else MemoryBudget(parse_bytes(text)).max_bytes


def parse_min_fidelity(text: str | None) -> tuple[float, float] | None:
    """Parse MEAN,MIN of --min-fidelity."""
    if text is None:
        return None
    try:
        mean, least = map(float, text.split(","))
    except ValueError:
        mean = least = float("nan")
    if not (-1 <= mean <= 1 and -1 <= least <= 1):
        raise ValueError(f"--min-fidelity: expected two cosines such as 0.999,0.99, got {text!r}")
    return mean, least


def on_ray(engine: str, only_ray: Mapping[str, object], only_local: Mapping[str, object]) -> bool:
    """Return whether a command runs on Ray, after checking that its options fit.

    :param only_ray: values of the options that require Ray, by name; None and False are not set.
    :param only_local: values of the options that Ray does not support.
    """
    if engine not in (allowed := ("auto", "onnxruntime", "openvino", "ray")):
        raise ValueError(f"unknown engine {engine!r}; allowed are {', '.join(allowed)}")
    on_ray = engine == "ray"
    wrong, verb = (only_local, "cannot be combined with") if on_ray else (only_ray, "requires")
    for name, value in wrong.items():
        if value not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} {verb} --engine ray")
    return on_ray
