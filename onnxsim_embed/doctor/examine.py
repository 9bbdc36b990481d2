"""All checks, in the order in which a user would mend things."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxsim_embed.artifact.manifest import Artifact, is_artifact
from onnxsim_embed.doctor.graphs import check_graphs
from onnxsim_embed.doctor.modules import check_architecture, check_length, check_modules
from onnxsim_embed.doctor.place import OURS, READERS, Finding, Place
from onnxsim_embed.doctor.tokenizers import check_files, check_tokenizer
from onnxsim_embed.errors import ArtifactError

CHECKS = (check_files, check_tokenizer, check_modules, check_length, check_architecture)


def diagnose(directory: str | Path, readers: Sequence[str] = READERS) -> list[Finding]:
    """Return what would break a reader of an artifact or checkpoint.

    :param readers: those that matter, of READERS.
    :raises FileNotFoundError: if there is no such directory.
    :raises ValueError: for an unknown reader.
    :raises ArtifactError: if it is an artifact whose manifest cannot be read.
    """
    directory = Path(directory)
    if unknown := [name for name in readers if name not in READERS]:
        raise ValueError(f"unknown reader {unknown[0]!r}; known are {', '.join(READERS)}")
    place = Place(directory)
    if is_artifact(directory):
        _check_integrity(place, Artifact.open(directory))
    for check in CHECKS:
        check(place)
    check_graphs(place)
    wanted = set(readers)
    return [finding for finding in place.findings if wanted.intersection(finding.readers)]


def _check_integrity(place: Place, artifact: Artifact) -> None:
    for name in artifact.manifest.files:
        try:
            artifact.file(name)
        except ArtifactError as error:
            remedy = "export the model again"
            place.findings.append(Finding(name, None, (OURS,), f"does not load: {error}", remedy))
