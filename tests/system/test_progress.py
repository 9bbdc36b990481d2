"""Progress bars."""

import io
import sys
import threading

import pytest

from onnxsim_embed.system.progress import progress_bar


class Interrupted(io.StringIO):
    def write(self, text):
        raise KeyboardInterrupt


def test_a_bar_shows_progress_on_standard_error(capsys):
    bar = progress_bar(desc="Comparing", unit=" pairs", total=4, initial=1)
    bar.update(3)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "Comparing: 100%" in err
    assert "4/4" in err
    with progress_bar(desc="Training", unit="step", total=4, disable=True) as bar:
        bar.update(4)
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_bar_releases_the_lock(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            progress_bar(desc="Encoding", unit=" texts", total=4)
    thread = threading.Thread(
        target=lambda: progress_bar(desc="Encoding", unit=" texts", total=4).close(), daemon=True
    )
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
