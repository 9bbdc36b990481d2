"""Systems as processes that take turns, so that the machine's moods fall on all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxsim_embed.benchmark.measure import CLEARED
from onnxsim_embed.errors import OnnxsimEmbedError

HERE = Path(__file__).parent

Request = dict[str, Any]


class SystemFailedError(OnnxsimEmbedError):
    """A system could not be loaded, or ended; the message says why, in one line."""


def clean_environment(threads: int) -> dict[str, str]:
    """Return this process's environment without what skews figures, and with the number of threads."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    # RAYON is what tokenizers counts its threads by.
    return kept | offline | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}


class Worker:
    """A process that holds one system.

    :param name: of the system; `file` has its `load`.
    :param python: the interpreter of its environment.
    :param file: `text_systems.py`, `similarity_systems.py` or `products.py`.
    :param log: a file for what it says.
    :raises SystemFailedError: if it cannot be loaded.
    """

    def __init__(
        self, name: str, python: str, file: str, settings: Mapping[str, Any], log: Path
    ) -> None:
        self.name = name
        self._log = log
        started = time.perf_counter()
        command = [python, str(HERE / "worker.py"), str(HERE / file), name, json.dumps(settings)]
        try:
            with log.open("w", encoding="utf-8") as stream:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                    text=True, encoding="utf-8", env=clean_environment(settings["threads"]),
                )  # fmt: skip
        except OSError as error:
            raise SystemFailedError(str(error)) from None
        self._read()
        self.seconds_to_first = time.perf_counter() - started

    def ask(self, request: Request) -> Request:
        """Send a request and return the answer.

        :raises SystemFailedError: if the process has ended.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # what it said before it ended is read below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> Request:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            code = self._process.returncode
            # 1 is Python's for an error that was not caught: its last line says which.
            reason = said[-1] if code == 1 and said else f"ended with code {code}"
            raise SystemFailedError(shortened(reason))
        answer: Request = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, which ends with its input."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def shortened(message: str, most: int = 200) -> str:
    """Return a message that fits into a table."""
    line = " ".join(message.split())
    return line if len(line) <= most else line[: most - 1] + "…"


class Crew:
    """The systems of one measurement, and why others take no part.

    :param file: see `Worker`.
    :param logs: a directory for what they say.
    :param say: called with a line of text for what happens.
    """

    def __init__(self, file: str, logs: Path, say: Callable[[str], None]) -> None:
        self.workers: list[Worker] = []
        self.failed: dict[str, str] = {}
        self._file = file
        self._logs = logs
        self._say = say
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()

    def start(
        self, name: str, python: str | None, settings: Mapping[str, Any], reason: str = ""
    ) -> Worker | None:
        """Let a system take part; return its worker, or None where it cannot.

        :param python: None where it has no environment, because of `reason`.
        """
        if python is None:
            self.fail(name, reason)
            return None
        try:
            worker = Worker(name, python, self._file, settings, self._logs / f"{name}.log")
        except SystemFailedError as error:
            self.fail(name, str(error))
            return None
        self.workers.append(worker)
        self._say(f"{name}: ready after {worker.seconds_to_first:.1f} s")
        return worker

    def fail(self, name: str, reason: str) -> None:
        """Leave a system out, for a reason."""
        self.failed[name] = reason
        self._say(f"{name}: cannot run: {reason}")

    def ask(self, worker: Worker, request: Request) -> Request | None:
        """Return a worker's answer; one that has ended takes no further part."""
        if worker not in self.workers:
            return None
        try:
            return worker.ask(request)
        except SystemFailedError as error:
            self.workers.remove(worker)
            self.fail(worker.name, str(error))
            return None

    def take_turns(
        self,
        request: Callable[[str], Request | None],
        rounds: int,
        before: Callable[[], object] = lambda: None,
    ) -> dict[str, list[Request]]:
        """Return every system's answers, one a round.

        Every other round goes backwards, so that no system always follows the same one.

        :param request: what a system is asked, by its name; None: it takes no part.
        :param before: called before each round.
        """
        answers: dict[str, list[Request]] = {worker.name: [] for worker in self.workers}
        for number in range(rounds):
            before()
            for worker in self.workers[:: 1 if number % 2 == 0 else -1]:
                asked = request(worker.name)
                answer = None if asked is None else self.ask(worker, asked)
                if answer is not None:
                    answers[worker.name].append(answer)
        alive = {worker.name for worker in self.workers}
        return {name: answer for name, answer in answers.items() if answer and name in alive}


class Roof:
    """The rates of matrix products, measured between the rounds of a measurement.

    :param seconds: for each product, each time.
    """

    def __init__(self, threads: int, logs: Path, seconds: float) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._seconds = seconds
        self._rates: list[dict[str, float]] = []
        self._worker = Worker(
            "products", sys.executable, "products.py", {"threads": threads}, logs / "products.log"
        )

    def measure(self) -> None:
        """Measure once more."""
        self._rates.append(self._worker.ask({"seconds": self._seconds})["rates"])

    def rates(self) -> dict[str, Any]:
        """Return the spread of each rate, 1e9 operations a second."""
        return {name: spread([rate[name] for rate in self._rates]) for name in self._rates[0]}

    def __enter__(self) -> Roof:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, least, most and all of the values."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "all": list(values),
    }


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return the spread of theirs / ours, round by round: how many times as fast ours are."""
    return spread([other / own for other, own in zip(theirs, ours, strict=False)])


def rounded(value: Any, digits: int = 6) -> Any:  # noqa: ANN401 - anything JSON holds
    """Return a value with every float in it rounded to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {name: rounded(inner, digits) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner, digits) for inner in value]
    return value
