"""Write docs/reference/commands.md from the commands themselves.

python docs/commands.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from onnxsim_embed import cli

TARGET = Path(__file__).parent / "reference" / "commands.md"
NAME = "onnxsim-embed"


def reference() -> str:
    """Return the reference of all commands as Markdown, the same on every machine and terminal."""
    group: Any = typer.main.get_command(cli.app)
    lines = ["# Command line", "", group.help, "", *group.epilog.split("\n"), ""]
    lines += ["Options of all commands come before or after its name: `--debug` prints tracebacks. "
              f"`{NAME} --install-completion` completes commands and options in your shell.", ""]  # fmt: skip
    for name, command in group.commands.items():
        nested = getattr(command, "commands", {})
        for inner, entry in (nested or {"": command}).items():
            lines += _describe(f"{name} {inner}".strip(), entry)
    return "\n".join(lines).rstrip() + "\n"


def _describe(path: str, command: Any) -> list[str]:  # noqa: ANN401 - click's or typer's
    parameters = [p for p in command.params if not getattr(p, "hidden", False)]
    words = [_argument(p) for p in parameters if p.param_type_name == "argument"]
    usage = " ".join([NAME, path, "[OPTIONS]", *words])
    lines = [f"## {path}", "", command.help.strip(), "", "```text", usage, "```", ""]
    lines += ["| | | default |", "|---|---|---|"]
    for p in parameters:
        if p.name in ("help", "debug"):
            continue
        named = f"`{p.metavar}`"
        if p.param_type_name == "option":
            named = ", ".join(f"`{option}`" for option in p.opts)
            named += f" {p.metavar}" if p.metavar.strip() else ""
        default = "required" if p.required else p.default
        shown = "" if default in (None, False, "", ()) else default
        lines.append(f"| {named} | {p.help.replace('|', chr(92) + '|')} | {shown} |")
    return [*lines, "", *([command.epilog, ""] if command.epilog else [])]


def _argument(parameter: Any) -> str:  # noqa: ANN401
    word = parameter.metavar + ("..." if parameter.nargs == -1 else "")
    return word if parameter.required else f"[{word}]"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
