"""Under what conditions figures were made: the machine, its threads, and who else was at work."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil

from onnxsim_embed.benchmark.measure import MAX_BUSY, wait_for_quiet
from onnxsim_embed.system.hardware import available_cpus, cpu_flags, cpu_name

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
    return time.strftime("%F", time.gmtime())


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


def usage() -> tuple[float, float, float]:
    """Return busy, all, and own processor seconds; time that a hypervisor gave to others is busy."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
    own, process = 0.0, psutil.Process()
    for each in (process, *process.children()):
        with suppress(psutil.Error):  # ended meanwhile
            own += sum(each.cpu_times()[:4])  # of user and system, ended children included
    return total - times.idle - getattr(times, "iowait", 0), total, own


class Watch:
    """The machine before each case, and what others did during it.

    :param patience: seconds to wait for a quiet machine before each case.
    :param say: told what happens.
    """

    def __init__(self, patience: float, say: Callable[[str], None]) -> None:
        self._patience, self._say = patience, say
        self._load: dict[str, dict[str, Any]] = {}
        self._before = usage()

    def begin(self, case: str) -> None:
        """End the case before, wait for a quiet machine, and watch it from now on."""
        self.load()
        self._say(case)
        busy = wait_for_quiet(self._patience, self._say)
        load = [round(value, 2) for value in psutil.getloadavg()]  # includes earlier cases
        quiet = busy <= MAX_BUSY
        self._load[case] = {"busy_share": round(busy, 3), "load": load, "quiet": quiet}
        self._before = usage()

    def load(self) -> Mapping[str, dict[str, Any]]:
        """End the case; return for each: how the machine was before it, and `other_share`.

        That is the share of the processors that other work (other guests of the machine included) had
        during the case.
        """
        if self._load and "other_share" not in (last := self._load[list(self._load)[-1]]):
            busy, total, own = (new - old for new, old in zip(usage(), self._before, strict=True))
            last["other_share"] = round(max(0.0, busy - own) / max(0.01, total), 3)
        return self._load
