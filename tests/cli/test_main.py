"""The command line as a whole: commands and options that stay, exit codes, and words of errors."""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import typer

from onnxsim_embed import __version__, cli
from onnxsim_embed.cli import models
from onnxsim_embed.errors import ArtifactError

PROCESS = [sys.executable, "-m", "onnxsim_embed"]

# Published names: a command may get more of them, and loses none.
PROMISED = {
    "export": "MODEL --output -o --precision --via --pooling --revision --token --local-files-only "
    "--max-seq-length --prompt --matryoshka-dims --calibrate --column -c --bar --min-fidelity --force",
    "verify": "DIRECTORY --against --texts --column -c --bar --min-fidelity",
    "finetune": "FILE --output -o --model -m --epochs --batch-size --learning-rate --source-column "
    "--target-column --score-column --negative-column --hard-negatives --eval --held-out --patience "
    "--seed --force --quiet -q",
    "eval": "FILE --model -m --precision --threads",
    "info": "MODEL",
    "models": "--verify --token --local-files-only",
    "doctor": "DIRECTORY --reader --fix",
    "encode": "FILE --output -o --column -c --model -m --precision --threads --device "
    "--max-seq-length --prompt-name --dtype --ranges --truncate-dim --normalize --report --format "
    "--engine --address --id-column --strict --force --quiet -q",
    "similarity": "FILE --output -o --threshold -t --top-k -k --pairs --heatmap --show "
    "--drop-duplicates --estimate --max-memory --column -c --model -m --precision --threads --format "
    "--engine --address --force --quiet -q",
    "search": "QUERY --in --texts --column -c --queries --query-column --top-k -k --threshold -t "
    "--output -o --model -m --precision --threads --truncate-dim --any-model --force --quiet -q",
    "heatmap": "FILE --output -o --order --limit -n --title --texts --column -c --model -m "
    "--precision --threads --format --force --quiet -q",
    "dedupe": "FILE --output -o --threshold -t --groups --vectors --column -c --model -m --precision "
    "--threads --format --force --quiet -q",
    "cluster": "FILE --output -o --threshold -t --min-size --method --show --vectors --column -c "
    "--model -m --precision --threads --format --force --quiet -q",
    "bench": "--model -m --texts --column -c --against --peer-python --checkpoint --sts --cases "
    "--most --rounds --patience --output -o --threads --force --quiet -q",
    "cache": "",
}


def process(*arguments):
    command = [*PROCESS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", PROMISED)
def test_commands_and_options_stay(command):
    found = typer.main.get_command(cli.app).commands[command]
    names = {name for parameter in found.params for name in parameter.opts}
    names |= {p.name.upper() for p in found.params if p.param_type_name == "argument"}
    assert set(PROMISED[command].split()) <= names
    assert not any(name.startswith("--no-") for p in found.params for name in p.secondary_opts)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_help_fits_the_terminal(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in ([], ["-h"], *([command, "--help"] for command in PROMISED)):
        out = process(*arguments).stdout if not arguments else run(*arguments)[1]
        assert "Usage:" in out
        assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_the_terminal(run, artifact, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for arguments, count in ((["models"], 1), (["info", artifact], 2), (["verify", artifact], 1)):
        _, out, _ = run(*arguments)
        tables = [part.strip("\n").splitlines() for part in out.split("\n\n") if "─" in part]
        assert len(tables) == count
        for table in tables:
            assert max(map(len, table)) <= width, "\n".join(table)


def test_options_have_values_in_words_and_no_help_is_missing():
    group = typer.main.get_command(cli.app)
    commands = {**group.commands, **group.commands["cache"].commands}
    for command in commands.values():
        for parameter in getattr(command, "params", []):
            assert parameter.metavar or parameter.name == "help"
            assert getattr(parameter, "hidden", False) or parameter.help


def test_the_command_reference_is_that_of_the_commands():
    docs = Path(__file__).parents[2] / "docs"
    written = (docs / "reference/commands.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(docs / "commands.py"))["reference"]() == written, (
        "python docs/commands.py"
    )


def test_shell_completion_is_on(monkeypatch):
    monkeypatch.setenv("_ONNXSIM_EMBED_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "onnxsim-embed simil")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert process().stdout == "similarity\n"


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"onnxsim-embed {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["encode"],
        ["encode", "a.csv"],
        ["similarity", "v.npy", "-t", "2"],
        ["encode", "a.csv", "-o", "v.npy", "--threads", "0"],
        ["models", "--no-such-option"],
    ],
)
def test_a_wrong_call_exits_with_two_and_shows_the_usage(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


def raise_from_numpy(*_):
    np.zeros(3).reshape(2)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda *_: models.print_table(1, 2), 70),  # TypeError of a builtin
        (raise_from_numpy, 70),
        (lambda *_: 1 / 0, 70),
        (lambda *_: np.load("no-such-file"), 1),
        (lambda *_: (_ for _ in ()).throw(ArtifactError("damaged")), 1),
        (lambda *_: (_ for _ in ()).throw(MemoryError), 1),
        (lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), 130),
        (lambda *_: cli.options.parse_min_fidelity("x"), 2),  # a ValueError of this package
    ],
)
def test_only_errors_raised_on_purpose_are_wrong_calls(run, monkeypatch, fault, code):
    monkeypatch.setattr(models, "print_table", fault)
    monkeypatch.setattr(models, "_verify", fault)
    got, out, err = run("models", "--verify")
    assert (got, out) == (code, "")
    assert ("internal fault" in err) == ("--debug" in err) == (code == 70)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "none.csv", "-o", "v.npy"],
        ["similarity", "none.npy"],
        ["search", "x", "--in", "none.npy"],
        ["dedupe", "none.csv", "-o", "out.csv"],
        ["eval", "none.csv"],
        ["verify", "none"],
        ["doctor", "none"],
        ["info", "none.npy"],
        ["info", "none"],
        ["export", "none"],
        ["search", "x", "--in", "texts.txt", "-m", "none"],
        ["dedupe", "texts.txt", "-o", "none/out.csv"],
    ],
)
def test_what_is_missing_has_one_code_in_every_command(reject, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a road\n")
    assert "none" in reject(*arguments, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a.npy exists; pass force=True to replace it", "a.npy exists; pass --force to replace it"),
        ("max_memory must be positive, got 0", "--max-memory must be positive, got 0"),
        ("pass column='text'", "pass --column text"),
        ("pass on_error='skip' or header=False", "pass --on-error skip or --no-header"),
        ("pass on_rows=print", "pass on_rows=print"),
        ("no file /tmp/max_memory.csv", "no file /tmp/max_memory.csv"),
        ("no column 'top_k'; it has: a", "no column 'top_k'; it has: a"),
        ("the threshold and the column", "the threshold and the column"),
    ],
)
def test_arguments_of_the_library_are_printed_as_options(message, expected):
    assert cli.name_options(message) == expected


def test_a_failure_shows_a_traceback_only_for_debugging(tmp_path):
    missing = tmp_path / "none.npy"
    plain = process("similarity", missing)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr == f"onnxsim-embed: there is no file {missing}\n"
    for arguments in (["--debug", "similarity", missing], ["similarity", missing, "--debug"]):
        debug = process(*arguments)
        assert (debug.returncode, debug.stdout, "Traceback" in debug.stderr) == (1, "", True)
        assert debug.stderr.endswith(plain.stderr)


def test_output_cut_short_by_a_reader_is_no_traceback():
    with subprocess.Popen(
        [*PROCESS, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as piped:
        piped.stdout.close()
        assert b"Traceback" not in piped.stderr.read()


def test_the_script_is_installed():
    (script,) = entry_points(group="console_scripts", name="onnxsim-embed")
    assert script.load() is cli.main


def test_cached_models_are_listed_and_removed(
    run, succeed, reject, tmp_path, monkeypatch, checkpoint
):
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path))
    (tmp_path / "t.txt").write_text("a road\n")
    succeed("encode", tmp_path / "t.txt", "-m", checkpoint, "-o", tmp_path / "v.npy")
    code, out, _ = run("cache", "list")
    assert (code, "1 model, " in out, "tiny" in out) == (0, True, True)
    assert "tiny" in reject("cache", "clear", "other")
    assert run("cache", "clear")[1].startswith("Removed 1 model, ")
    assert run("cache", "list")[1] == f"0 models, 0.0 MB in {tmp_path}\n"
