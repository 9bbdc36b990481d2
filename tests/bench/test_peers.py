"""Peers: which there are, what they miss, what they are called."""

from __future__ import annotations

import sys

from lab.install_size import INSTALLS
from lab.peers import (
    ENVIRONMENTS,
    SIMILARITY_SYSTEMS,
    TEXT_SYSTEMS,
    TORCH,
    Environments,
    Peer,
    missing_modules,
)

HERE = Peer("here", "here", ("json", "numpy"))
GONE = Peer("gone", "gone", ("json", "no_such_module", "no_such.inner"))


def test_every_peer_has_an_environment_that_can_be_made():
    for systems in (TEXT_SYSTEMS, SIMILARITY_SYSTEMS):
        assert {peer.environment for peer in systems.values()} - {""} <= set(ENVIRONMENTS)


def test_no_call_of_pip_may_change_the_build_of_torch():
    for installs in (*ENVIRONMENTS.values(), *INSTALLS.values()):
        if TORCH in installs:
            assert all(set(TORCH) <= set(call) for call in installs)


def test_missing_modules_are_named():
    assert missing_modules(sys.executable, HERE) == []
    assert missing_modules(sys.executable, GONE) == ["no_such_module", "no_such.inner"]


def test_environments_find_or_give_the_reason(tmp_path):
    here = Environments(None, None, print)
    assert here.find(HERE) == (sys.executable, "")
    assert here.find(GONE) == (None, "not installed: no_such_module, no_such.inner")
    assert here.find(Peer("ours")) == (sys.executable, "")
    assert here.installed({"here": HERE, "gone": GONE, "ours": Peer("ours")}) == ["here"]
