"""Peers: which there are, what they miss, what they are called."""

from __future__ import annotations

import sys

import pytest
from lab import peers
from lab.install_size import INSTALLS
from lab.peers import (
    ENVIRONMENTS,
    SIMILARITY_SYSTEMS,
    TEXT_SYSTEMS,
    TORCH,
    Environments,
    Peer,
    choose,
    missing_modules,
    title,
)

HERE = Peer("here", "here", ("json", "numpy"))
GONE = Peer("gone", "gone", ("json", "no_such_module", "no_such.inner"))


def test_names_are_chosen_in_the_order_of_the_registry():
    assert choose("st-onnx, torch", TEXT_SYSTEMS) == ["torch", "st-onnx"]
    assert choose("none", TEXT_SYSTEMS) == []
    assert choose("installed", TEXT_SYSTEMS) is None
    everything = choose("all", TEXT_SYSTEMS)
    assert "fastembed" in everything
    assert not {"ours-int8", "ours-fp32"} & set(everything)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'tensorflow' is not among the peers: torch, st-torch"):
        choose("torch,tensorflow", TEXT_SYSTEMS)


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


def test_a_given_interpreter_is_for_peers_alone():
    given = Environments("/no/python", None, print)
    assert given.find(Peer("ours"))[0] == sys.executable
    with pytest.raises(FileNotFoundError):
        given.find(HERE)


def test_an_environment_that_cannot_be_made_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ENVIRONMENTS", {"here": (("x",),)})
    monkeypatch.setattr(peers, "make_environment", lambda *_: "no such package")
    said = []
    made = Environments(None, tmp_path, said.append)
    assert made.find(HERE) == (None, "no such package")
    assert len(said) == 1


def test_titles_carry_the_version_of_what_is_measured():
    versions = {"sentence-transformers": "5.7.0", "torch": "2.13.0+cpu", "onnxsim-embed": "0.1.0"}
    assert title("st-onnx-O3", TEXT_SYSTEMS, versions) == "sentence-transformers 5.7, ONNX O3"
    assert title("torch", TEXT_SYSTEMS, versions) == "PyTorch 2.13, pooling by hand"
    assert title("ours-int8", TEXT_SYSTEMS, versions) == "onnxsim-embed int8"
    assert title("fastembed", TEXT_SYSTEMS, versions) == "fastembed"
