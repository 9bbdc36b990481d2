"""Options that several commands share."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

from typer import Option
from typer.models import ArgumentInfo, OptionInfo

DEFAULT_MODEL = "all-MiniLM-L6-v2"
Model = Annotated[
    str, Option("--model", "-m", help="Recipe name, artifact, checkpoint directory or Hub id.")
]
Threads = Annotated[
    int | None, Option("--threads", min=1, help="Default: all CPUs of this process.")
]
Device = Annotated[str, Option("--device", help="auto, cpu, cuda or cuda:N.")]
MaxSeqLength = Annotated[
    int | None, Option("--max-seq-length", help="Maximum tokens of a text; default: the model's.")
]
Delimiter = Annotated[str | None, Option("--delimiter", help="Of csv and tsv; default: detected.")]
NoHeader = Annotated[bool, Option("--no-header", help="Columns have no names: 0, 1, ...")]
Force = Annotated[bool, Option("--force", help="Replace existing outputs.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print errors and results only.")]
OldTexts = Annotated[str | None, Option("--texts", hidden=True)]  # before: VECTORS --texts FILE
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
    """Add the options of the class of its argument `inputs` to a command, if it has one, and --debug.

    --debug prints all log messages. Stages of long work are logged as information, which --quiet leaves
    out. The values of options are named in words.
    """
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    inputs = parameters.pop("inputs").annotation if "inputs" in parameters else None
    shared = inspect.signature(inputs, eval_str=True).parameters if inputs else {}
    parameters |= shared
    for name, parameter in parameters.items():
        annotation, *more = get_args(parameter.annotation)[:2] or [parameter.annotation]
        types = get_args(annotation) or (annotation,)
        for entry in (parameter.default, *more):
            if isinstance(entry, ArgumentInfo):
                entry.metavar = name.upper()
            elif isinstance(entry, OptionInfo):
                word = "COLUMN" if name.endswith("column") else METAVARS.get(types[0], "NAME")
                entry.metavar = entry.metavar or METAVARS.get(name, word)

    @wraps(command)
    def run(*, debug: bool, **values: Any) -> None:  # noqa: ANN401
        level = logging.WARNING if values.get("quiet") else logging.INFO
        logging.getLogger("onnxsim_embed").setLevel(
            logging.DEBUG if "--debug" in sys.argv else level
        )
        if inputs is not None:
            values["inputs"] = inputs(**{name: values.pop(name) for name in shared})
        command(**values)

    kind = inspect.Parameter.KEYWORD_ONLY
    signature = [parameter.replace(kind=kind) for parameter in parameters.values()]
    signature.append(inspect.Parameter("debug", kind, default=False, annotation=Debug))
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
