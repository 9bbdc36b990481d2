"""encode on the command line: what it writes, what it says, and that a stopped run is continued."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from support import TEXTS, names

from onnxsim_embed import Embedder
from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
from onnxsim_embed.files.vectors import read_vectors
from onnxsim_embed.runtime import pipeline as runner

BLOCK = 8
LINES = [f"{text.strip()} {number}" for number, text in enumerate(TEXTS * 6)]  # 72
PROGRAM = f"""
from onnxsim_embed.runtime import pipeline as runner
runner.WINDOW_TEXTS = {BLOCK}
from onnxsim_embed.cli import main
main()
"""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(runner, "WINDOW_TEXTS", BLOCK)


def write_lines(path, lines=LINES):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def lines_txt(tmp_path):
    return write_lines(tmp_path / "lines.txt")


def pipe(monkeypatch, lines):
    data = "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# what is written and said


def test_encode_writes_the_vectors_of_the_api(succeed, tmp_path, artifact, texts_csv):
    output = tmp_path / "vectors.npy"
    out = succeed("encode", texts_csv, "--column", "text", "-m", artifact, "-o", output)
    assert f"Encoded {len(TEXTS)} texts (11 distinct, " in out
    assert re.search(
        r" Of that, tokenize \d+\.\d\d s; summed over threads, run \d.* s and pool \d.* s\.", out
    )
    assert "Truncated to 48 tokens: 1 text, row 10." in out
    assert f"Wrote {output}: {len(TEXTS)} x 32 float32." in out
    np.testing.assert_array_equal(np.load(output), Embedder(artifact).encode(TEXTS))


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_number_format_width_and_length_are_those_asked_for(
    succeed, tmp_path, artifact, texts_csv, name
):
    arguments = ["--dtype", "ubinary", "--truncate-dim", 16, "--normalize", "--max-seq-length", 9]
    arguments += ["--precision", "fp32", "--threads", 1, "--prompt-name", "query"]
    output = tmp_path / name
    out = succeed("encode", texts_csv, "-m", artifact, "-o", output, "--device", "cpu", *arguments)
    assert "Truncated to 9 tokens: " in out
    assert out.endswith(f"Wrote {output}: 12 x 2 uint8.\n")
    assert "1 thread, fp32." in out
    model = Embedder(artifact, precision="fp32")
    model.max_seq_length = 9
    expected = model.encode(
        TEXTS, prompt_name="query", precision="ubinary", truncate_dim=16, normalize_embeddings=True
    )
    np.testing.assert_array_equal(read_vectors(output), expected, strict=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_ranges_are_computed_saved_and_read_from_a_file(
    run, succeed, reject, tmp_path, artifact, texts_csv, monkeypatch, dtype
):
    vectors = Embedder(artifact).encode(TEXTS)
    arguments = ["encode", texts_csv, "-m", artifact, "--dtype", dtype, "-o"]
    saving = ["--save-ranges", tmp_path / "ranges.npy"]
    code, out, err = run(*arguments, tmp_path / "computed.npy", *saving)
    assert (code, err, "ranges from 12 of 12 texts." in out) == (0, "", True)
    ranges = np.load(tmp_path / "ranges.npy")
    np.testing.assert_array_equal(ranges, [vectors.min(axis=0), vectors.max(axis=0)], strict=True)
    np.save(tmp_path / "half.npy", ranges / 2)
    for name, given in (("ranges.npy", ranges), ("half.npy", ranges / 2)):
        succeed(*arguments, tmp_path / f"v-{name}", "--ranges", tmp_path / name)
        expected = Embedder(artifact).encode(TEXTS, precision=dtype, ranges=given)
        np.testing.assert_array_equal(np.load(tmp_path / f"v-{name}"), expected, strict=True)
    computed = np.load(tmp_path / "computed.npy")
    np.testing.assert_array_equal(computed, np.load(tmp_path / "v-ranges.npy"), strict=True)
    monkeypatch.setattr("onnxsim_embed.cli.encode.RANGE_TEXTS", 5)
    assert "from 5 of 12 texts" in run(*arguments, tmp_path / "sampled.npy")[1]
    assert (np.load(tmp_path / "sampled.npy") != computed).any()
    assert "ranges.npy exists" in reject(*arguments, tmp_path / "n.npy", *saving)
    (tmp_path / "one.txt").write_text("a road\n")
    assert "at least 2 texts" in reject(
        "encode", tmp_path / "one.txt", *arguments[2:], tmp_path / "n.npy"
    )


def test_the_report_says_what_the_run_did(succeed, reject, tmp_path, artifact, texts_csv):
    report, output = tmp_path / "report.json", tmp_path / "v.npy"
    arguments = ["encode", texts_csv, "-m", artifact, "--precision", "int8", "--report", report]
    succeed(*arguments, "-o", output)
    table = json.loads(report.read_text())
    assert (table["texts"], table["distinct"], table["truncated"]) == (12, 11, 1)
    assert (table["rows"], table["rows_found"], table["dtype"]) == (12, 0, "float32")
    assert (table["precision"], table["provider"]) == ("int8", "CPUExecutionProvider")
    assert 0 < table["seconds_tokenize"] < table["seconds"]
    for unit in ("texts", "tokens"):
        assert table[f"{unit}_per_second"] == pytest.approx(table[unit] / table["seconds"])
    assert "report.json exists" in reject(*arguments, "-o", tmp_path / "w.npy")
    assert "target of two outputs" in reject(*arguments[:-1], output, "-o", output, "--force")
    beside = tmp_path / "v.npy.json"  # the sidecar
    assert "two outputs" in reject(*arguments[:-1], beside, "-o", output, "--force")
    assert names(tmp_path) == ["report.json", "texts.csv", "v.npy", "v.npy.json"]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "code", "message"),
    [
        ("a.csv", b"id,title\n1,road\n", ["-c", "text"], 2, "no column 'text'; it has: id, title"),
        ("a.csv", b"", [], 1, "holds no texts"),
        ("a.jsonl", b'{"text": null}\n', [], 1, "row 0 has no text (null)"),
        ("a.xyz", b"road\n", [], 2, "'xyz'"),
        ("a.txt", b"road\n", ["--format", "doc"], 2, "'doc'"),
    ],
)
def test_broken_input_is_one_line(
    reject, tmp_path, artifact, name, content, arguments, code, message
):
    (tmp_path / name).write_bytes(content)
    arguments = [tmp_path / name, "-m", artifact, "-o", tmp_path / "v.npy", *arguments]
    assert message in reject("encode", *arguments, code=code)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp64"], "precision 'fp64' is not in"),
        (["--prompt-name", "x"], "--prompt-name 'x'"),
        (["--dtype", "int4"], "'int4'"),
        (["--save-ranges", "r.npy"], "requires --dtype int8 or uint8"),
        (["--ranges", "none.npy"], "'float32'"),
        (["--truncate-dim", 33], "--truncate-dim must be from 1 to 32, got 33"),
        (["--max-seq-length", 49], "at most 48"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--engine", "spark"], "unknown engine 'spark'"),
        (["--strict"], "--strict requires --engine ray"),
    ],
)
def test_a_wrong_setting_is_one_line(reject, tmp_path, artifact, texts_csv, arguments, message):
    arguments = [texts_csv, "-m", artifact, "-o", tmp_path / "v.npy", *arguments]
    assert message in reject("encode", *arguments)
    assert names(tmp_path) == ["texts.csv"]


# a run that was stopped


@pytest.fixture(scope="module")
def whole(artifact, tmp_path_factory):
    """The bytes of files of LINES that were written without a stop, by name."""
    from onnxsim_embed.runtime.encode_to_file import encode_to_file

    directory = tmp_path_factory.mktemp("whole")
    for name in ("v.npy", "v.parquet"):
        encode_to_file(Embedder(artifact), LINES, directory / name)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("source", ["a.jsonl", "-"])
def test_rows_before_a_broken_one_are_kept(
    succeed, reject, tmp_path, artifact, whole, small_blocks, monkeypatch, source
):
    monkeypatch.chdir(tmp_path)

    def provide(lines):
        pipe(monkeypatch, lines) if source == "-" else write_lines(tmp_path / source, lines)

    rows = [json.dumps(line) for line in LINES]
    arguments = ["encode", source, "--format", "jsonl", "-m", artifact, "-o", "v.npy"]
    provide([*rows[:21], '{"text": null}', *rows[22:]])
    message = reject(*arguments, code=1)
    assert "row 21 has no text (null)" in message
    assert message.endswith("; 21 rows kept: the same command continues\n")
    provide(rows)
    out = succeed(*arguments)
    assert "Found 21 rows of an earlier run.\nEncoded 51 texts (" in out
    assert "Wrote v.npy: 72 x 32 float32." in out
    assert (tmp_path / "v.npy").read_bytes() == whole["v.npy"]


def test_only_the_same_job_is_continued_and_its_report_replaced(
    succeed, reject, tmp_path, artifact
):
    broken = write_lines(tmp_path / "lines.jsonl", ['"a road"', "{"])
    report = tmp_path / "report.json"
    arguments = ["encode", broken, "-m", artifact, "-o", tmp_path / "v.npy", "--report", report]
    message = reject(*arguments, code=1)
    assert message.endswith("; 1 row kept: the same command continues\n")
    write_lines(broken, ['"a road"', '"the sun"'])
    got = reject(*arguments, "--max-seq-length", 20)
    assert "(--max-seq-length: 48, now 20)" in got
    assert got.endswith("or start over with --force\n")
    report.write_text("of the first run")
    succeed(*arguments)
    table = json.loads(report.read_text())
    assert (table["texts"], table["rows"], table["rows_found"]) == (1, 2, 1)
    succeed(*arguments, "--max-seq-length", 20, "--force")


def test_after_force_the_way_on_is_without_it(succeed, reject, tmp_path, artifact):
    (tmp_path / "v.npy").write_text("mine")
    broken = write_lines(tmp_path / "lines.jsonl", ['"a road"', '"the sun"', "{"])
    arguments = ["encode", broken, "-m", artifact, "-o", tmp_path / "v.npy"]
    assert "replace it with --force" in reject(*arguments)
    message = reject(*arguments, "--force", code=1)
    assert message.endswith("; 2 rows kept: the same command without --force continues\n")
    assert (tmp_path / "v.npy").read_text() == "mine"
    write_lines(broken, ['"a road"', '"the sun"'])
    succeed(*arguments)
    assert np.load(tmp_path / "v.npy").shape == (2, 32)


# as a process of its own


def start(artifact, output, source="-", program=PROGRAM, **streams):
    arguments = ["encode", source, "--format", "txt", "-m", artifact, "-o", output]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, **{"stderr": subprocess.PIPE} | streams
    )


def wait_for_rows(process, output, rows):
    while process.poll() is None:
        with suppress(TableError):
            journal = EmbeddingCheckpoint(output).read()
            if journal is not None and journal["rows"] >= rows:
                return
        time.sleep(0.02)
    pytest.fail(f"it ended with {process.returncode}: {process.stderr.read().decode()}")


@contextmanager
def fed_until(artifact, output, lines, rows):
    """Give a process that has kept so many rows and waits for more lines."""
    with start(artifact, output, stdin=subprocess.PIPE) as process:
        try:
            process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            process.stdin.flush()
            wait_for_rows(process, output, rows)
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(("how", "name"), [("SIGKILL", "v.parquet"), ("SIGINT", "v.npy")])
def test_a_stopped_run_is_continued_and_no_byte_differs(
    succeed, reject, tmp_path, artifact, whole, lines_txt, how, name
):
    output = tmp_path / name
    arguments = ["encode", lines_txt, "-m", artifact, "-o", output]
    with fed_until(artifact, output, LINES[:44], 32) as process:
        assert f"another process is writing {output}" in reject(*arguments, code=1)
        process.send_signal(signal.Signals[how])
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (-9 if how == "SIGKILL" else 130, b"")
    # The last block may be on the disk, and the signal there before the program knows.
    notes = [f"interrupted; {rows} rows kept: the same command continues" for rows in (24, 32)]
    assert err.decode() in (f"onnxsim-embed: {n}\n" for n in notes) if how == "SIGINT" else not err
    assert names(tmp_path) == [f".{name}.partial", "lines.txt"]
    out = succeed(*arguments)
    assert "Found 32 rows of an earlier run.\nEncoded 40 texts (" in out
    assert output.read_bytes() == whole[name]
    beside = [] if name == "v.parquet" else ["v.npy.json"]
    assert names(tmp_path) == ["lines.txt", name, *beside]


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_a_full_disk_keeps_what_fits(run, tmp_path, artifact, whole, lines_txt):
    output = tmp_path / "v.npy"
    bytes_that_fit = 128 + 3 * BLOCK * 32 * 4 + 500
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_that_fit},) * 2)\n"
    with start(artifact, output, lines_txt, program=limit + PROGRAM) as process:
        out, err = process.communicate(timeout=60)
    note = "24 rows kept: the same command continues"
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == f"onnxsim-embed: cannot write {output}: File too large; {note}\n"
    assert run("encode", lines_txt, "-m", artifact, "-o", output)[1].startswith("Found 24 rows")
    assert output.read_bytes() == whole["v.npy"]


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_there_is_progress_and_an_interruption_is_one_line(tmp_path, artifact):
    import fcntl
    import struct
    import termios

    lines = write_lines(tmp_path / "lines.txt", (f"project {n} in the village" for n in range(150_000)))  # fmt: skip
    output = tmp_path / "v.npy"
    terminal, other_end = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = start(artifact, output, lines, stderr=other_end)
    os.close(other_end)
    shown = b""
    while b" tokens/s" not in shown:
        shown += os.read(terminal, 4096)
    wait_for_rows(process, output, 2 * BLOCK)  # the first are known to the command by then
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # what Linux raises at the end of a terminal
        while read := os.read(terminal, 4096):
            shown += read
    os.close(terminal)
    process.communicate(timeout=60)
    assert re.search(rb"Encoding: +0%", shown)  # of a total
    assert process.returncode == 130
    assert b"Traceback" not in shown
    assert b"\nonnxsim-embed: interrupted; " in shown
    assert names(tmp_path) == [".v.npy.partial", "lines.txt"]
