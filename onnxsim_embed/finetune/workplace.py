"""The hidden directory beside the output that keeps a job's work, so that it can go on after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.manifest import check_target
from onnxsim_embed.errors import TrainingError
from onnxsim_embed.files.atomic import atomic_file

JOB = "job.json"


def digest(value: object) -> str:
    """Return a short digest of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Return what a file written by `write_json` holds, or None where there is none."""
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as work:
        work.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def workplace_of(output: Path) -> Path:
    """Return the hidden directory of an output."""
    output = output.absolute()
    return output.parent / f".{output.name}.finetune"


def check_output(output: Path, force: bool) -> None:
    """Refuse, before any work, an output that could not be written after it.

    A job that was begun with `force` may finish without it.

    :raises FileExistsError: with the next step.
    """
    job = read_json(workplace_of(output) / JOB)
    check_target(output, force or bool(job and job["replaces"]))


@contextmanager
def workplace(output: Path, job: Mapping[str, Any], force: bool) -> Iterator[Path]:
    """Give the hidden directory of an output, which holds the work on this very job or nothing.

    It is removed when the block ends well, and kept otherwise.

    :param job: what the result depends on.
    :param force: drop what is kept.
    :raises FileExistsError: if it holds the work on another job, naming what differs.
    :raises TrainingError: if another process is at work.
    """
    from filelock import FileLock, Timeout

    directory = workplace_of(output)
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_name(directory.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"another process is fine-tuning into {output}") from None
    try:
        if force:
            shutil.rmtree(directory, ignore_errors=True)
        begun = read_json(directory / JOB)
        if begun is not None and begun["job"] != job:
            names = [name for name in job if begun["job"].get(name) != job[name]]
            raise FileExistsError(
                f"{output} is half done with other {', '.join(names)}: finish with the command it began "
                "with, or start over with --force"
            )
        directory.mkdir(exist_ok=True)
        if begun is None:
            write_json(directory / JOB, {"job": dict(job), "replaces": force})
        yield directory
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        lock.release()
        if not directory.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
