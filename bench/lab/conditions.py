"""Under what conditions figures were made: the machine, its threads, and who else was at work."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from onnxsim_embed.system.hardware import available_cpus, cpu_flags, cpu_name

STAT = Path("/proc/stat")

# Other work up to this share of the processors counts as none: a desktop's own needs.
QUIET_SHARE = 0.1

# What decides how fast int8 and float32 products are.
TELLING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)


def today() -> str:
    """Return the date that figures were made on, universal time."""
    return datetime.now(timezone.utc).date().isoformat()


def machine(threads: int) -> dict[str, Any]:
    """Return what a reader of figures needs to know of this machine."""
    flags = cpu_flags()
    return {
        "processor": cpu_name(),
        "instructions": [flag for flag in TELLING_FLAGS if flag in flags],
        "processors": available_cpus(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "virtual": "hypervisor" in flags,
    }


def _ticks() -> tuple[int, int]:
    """Return busy and all ticks of all processors since the start of the machine."""
    values = [int(word) for word in STAT.read_text(encoding="utf-8").split("\n")[0].split()[1:9]]
    return sum(values) - values[3] - values[4], sum(values)


def _own_ticks() -> int:
    """Return the ticks that this process and its children have used, ended ones included."""
    ticks, own = 0, str(os.getpid())
    for file in STAT.parent.glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if own in (file.parent.name, fields[1]):
            ticks += sum(map(int, fields[11:15]))
    return ticks


def usage() -> tuple[float, float, float] | None:
    """Return busy, all, and own ticks since the start of the machine; None where it does not say."""
    try:
        return *_ticks(), _own_ticks()
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def busy_share(seconds: float = 1.0) -> float | None:
    """Return the share of the processors that is at work while this process sleeps.

    Time that a hypervisor gave to others counts as work. None where the system does not say.
    """
    try:
        busy, total = _ticks()
        time.sleep(seconds)
        busy_then, total_then = _ticks()
    except (OSError, ValueError, IndexError):
        return None
    return (busy_then - busy) / max(1, total_then - total)


def wait_for_quiet(patience: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Wait until the machine does nothing else, at most so many seconds; return how it was.

    :param patience: seconds.
    :returns: `busy_share`, `load` (of one, five and fifteen minutes; includes earlier cases) and
        `quiet`.
    """
    started, told = time.monotonic(), False
    while (busy := busy_share()) is not None and busy > QUIET_SHARE:
        if time.monotonic() - started >= patience:
            say(f"the machine is {busy:.0%} busy with other work: figures will be uncertain")
            break
        if not told:
            say(f"the machine is {busy:.0%} busy with other work; waiting up to {patience:.0f} s")
            told = True
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "busy_share": busy if busy is None else round(busy, 3),
        "load": load,
        "quiet": busy is not None and busy <= QUIET_SHARE,
    }


class Watch:
    """The machine before each case, and what others did during it.

    :param patience: seconds to wait for a quiet machine before each case.
    :param say: told what happens.
    """

    def __init__(self, patience: float, say: Callable[[str], None]) -> None:
        self._patience, self._say = patience, say
        self._load: dict[str, dict[str, Any]] = {}
        self._before: tuple[float, float, float] | None = None

    def begin(self, case: str) -> None:
        """End the case before, wait for a quiet machine, and watch it from now on."""
        self.load()
        self._say(case)
        self._load[case] = wait_for_quiet(self._patience, self._say)
        self._before = usage()

    def load(self) -> Mapping[str, dict[str, Any]]:
        """End the case; return for each: how the machine was before it, and `other_share`.

        That is the share of the processors that other work (other guests of the machine included) had
        during the case; None where the system does not say.
        """
        if self._load and "other_share" not in (last := self._load[list(self._load)[-1]]):
            last["other_share"] = None
            if self._before is not None and (now := usage()) is not None:
                busy, total, own = (new - old for new, old in zip(now, self._before, strict=True))
                last["other_share"] = round(max(0.0, busy - own) / max(1.0, total), 3)
        return self._load
