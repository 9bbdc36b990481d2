"""Memory of the process."""

from __future__ import annotations

from onnxsim_embed.system import memory


def test_memory_is_released_where_much_was_taken_since_the_last_time(monkeypatch):
    collected = []
    monkeypatch.setattr(memory.gc, "collect", lambda: collected.append(1))
    monkeypatch.setattr(memory, "_held", 0)
    monkeypatch.setattr(memory, "RELEASE_BYTES", 1 << 20)
    memory.release_memory()
    memory.release_memory()
    assert collected == [1]
