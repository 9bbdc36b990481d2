"""Progress bars."""

from __future__ import annotations

from functools import cache
from typing import Any


def progress_bar(**options: Any) -> Any:  # noqa: ANN401 - tqdm is untyped
    """Return a tqdm progress bar on standard error."""
    return _bar_class()(**{"smoothing": 0.3, **options})


@cache
def _bar_class() -> Any:  # noqa: ANN401
    from tqdm.auto import tqdm  # one bar in a notebook

    class Bar(tqdm):  # type: ignore[misc]  # tqdm is untyped
        def refresh(self, nolock: bool = False, lock_args: tuple[Any, ...] | None = None) -> bool:
            # tqdm's own keeps the lock that all bars share when writing is interrupted (Ctrl-C, a
            # closed stream): bars of other threads would wait for ever.
            with self.get_lock():
                return bool(super().refresh(nolock=True))

    return Bar
