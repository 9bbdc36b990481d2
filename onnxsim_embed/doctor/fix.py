"""Writes the changes of findings: JSON files only; all other keys stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, FileEntry, is_artifact, sha256
from onnxsim_embed.doctor.directory import Finding, check_inside, read_json
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.files.atomic import atomic_directory, json_bytes, write_json


def repair(directory: str | Path, findings: Sequence[Finding]) -> list[str]:
    """Write the changes of findings, each file atomically, an artifact as one.

    An artifact's manifest gets the digests of the changed files.

    :returns: names of the files that were written.
    :raises ArtifactError: if a file leads out of the directory, or its digest differs from an artifact's
        manifest.
    """
    directory = Path(directory)
    names = list(dict.fromkeys(f.file for f in findings if f.change is not None))
    if not names:
        return []
    contents = {}
    for name in names:
        try:
            contents[name] = _changed(directory, name, findings)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{directory / name} is not written: {error}") from None
    if not is_artifact(directory):
        for name, content in contents.items():
            write_json(directory / name, content)  # the target of a link in its place stays
        return names
    artifact = Artifact.open(directory)
    manifest = artifact.manifest
    for name in names:
        if name in manifest.files and (directory / name).exists():
            artifact.file(name)  # a new digest would hide that a file is damaged
    with atomic_directory(directory) as work:
        shutil.copytree(directory, work, copy_function=_link_or_copy, dirs_exist_ok=True)
        files = dict(manifest.files)
        for name, content in contents.items():
            write_json(work / name, content)
            files[name] = FileEntry(sha256(work / name), (work / name).stat().st_size)
        (work / MANIFEST).unlink()  # it may be a hard link of the artifact's
        manifest = replace(manifest, files=dict(sorted(files.items())))
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return names


def _changed(directory: Path, name: str, findings: Sequence[Finding]) -> object:
    check_inside(directory, name)
    check_inside(directory, str(Path(name).parent))
    content = read_json(directory, name, object) if (directory / name).is_file() else None
    for finding in findings:
        if finding.file == name and finding.change is not None:
            content = finding.change(content)
    json_bytes(content)  # a JSON file may hold what UTF-8 cannot: lone surrogates
    return content


def _link_or_copy(source: str, target: str) -> None:
    """Hard-link a file if the file system can, so that large weights are not copied."""
    try:
        if Path(source).is_symlink():
            raise OSError("a hard link of a symbolic link would be symbolic")
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
