"""A bar whose writing is interrupted does not stop the bars of other threads."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from onnxsim_embed.system.progress import progress_bar


class Broken(io.StringIO):
    def write(self, text):
        raise KeyboardInterrupt


def test_a_bar_says_what_is_done(capsys):
    bar = progress_bar(desc="Comparing", unit=" pairs", total=4, initial=1)
    bar.update(3)
    bar.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Comparing: 100%" in shown.err
    assert "4/4" in shown.err


def test_no_bar_is_shown_where_none_is_wanted(capsys):
    bar = progress_bar(desc="Training", unit="step", total=4, disable=True)
    bar.update(4)
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_bar_lets_go_of_the_lock(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Broken())
        with pytest.raises(KeyboardInterrupt):
            progress_bar(desc="Encoding", unit=" texts", total=4)
    thread = threading.Thread(
        target=lambda: progress_bar(desc="Encoding", unit=" texts", total=4).close(), daemon=True
    )
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
