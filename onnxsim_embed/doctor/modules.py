"""Checks of what sentence-transformers and servers read: modules, pooling, length, architecture."""

from __future__ import annotations

import re
from typing import Any

from onnxsim_embed.artifact.manifest import Artifact, is_artifact
from onnxsim_embed.doctor.place import ST, TEI, Finding, Place
from onnxsim_embed.doctor.tokenizers import model_length, positions
from onnxsim_embed.export.checkpoint import TRANSFORMER_CONFIGS
from onnxsim_embed.export.modules import LEGACY_POOLING

LEGACY_TYPES = "sentence_transformers.models."
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
# Keys that every version wrote until 5.3; the later two are taken for false where they are missing.
FIRST_KEYS = ("word_embedding_dimension", "pooling_mode_cls_token", "pooling_mode_max_tokens",
              "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens")  # fmt: skip
POOLING_OF_TEI = ("cls", "mean", "lasttoken")


def check_modules(place: Place) -> None:
    """Find missing or new-style modules, and what servers leave out."""
    name = "modules.json"
    entries = [entry for entry in place.entries(name) if isinstance(entry, dict)]
    if not place.has(name):
        entries = _known_modules(place)
        effect = "pools with the mean and does not normalize, without a word"
        remedy = f"write it: {', '.join(_kind(entry) for entry in entries)}"
        change = (lambda _: entries) if entries else None
        place.findings.append(
            Finding(name, None, (ST,), effect, remedy if entries else _name_pooling(place), change)
        )
    kinds = [_kind(entry) for entry in entries]
    plain = len(entries) == len(place.entries(name))  # each is an object
    if (
        plain
        and any(not str(e.get("type")).startswith(LEGACY_TYPES) for e in entries)
        and all(kind in KINDS for kind in kinds)
    ):
        place.findings.append(
            Finding(
                name,
                "type",
                (ST,),
                "versions before 5.4 do not load it: they know no module of such a name",
                f"name modules {LEGACY_TYPES}Transformer and so on, which all versions read",
                lambda table: [e | {"type": LEGACY_TYPES + _kind(e)} for e in table],
            )
        )
    if "Dense" in kinds:
        effect = "leaves the Dense module out: vectors of another width and meaning"
        place.findings.append(
            Finding(name, "type", (TEI,), effect, "nothing helps but another reader")
        )
    where = next((str(e.get("path")) for e in entries if _kind(e) == "Pooling"), "1_Pooling")
    _check_pooling(place, f"{where}/config.json")


def _name_pooling(place: Place) -> str:
    return f"{place.export} --pooling MODE, with the mode that the model was trained with"


def _kind(entry: dict[str, Any]) -> str:
    return str(entry.get("type")).rpartition(".")[2]


def _known_modules(place: Place) -> list[dict[str, Any]]:
    """Return what a missing modules.json should say, if the directory leaves no doubt.

    Without a manifest it does so only if it holds a Normalize directory: empty ones get lost in copies.
    """
    found = {}
    for path in place.directory.iterdir():
        match = re.fullmatch(r"(\d+)_(Pooling|Dense|Normalize)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = (path.name, match[2])
    kinds = [kind for _, kind in found.values()]
    if is_artifact(place.directory):
        sure = ("Normalize" in kinds) == Artifact.open(place.directory).manifest.normalize
    else:
        sure = "Normalize" in kinds
    if not sure or "Pooling" not in kinds or sorted(found) != list(range(1, len(found) + 1)):
        return []
    modules = [("", "Transformer"), *(found[number] for number in sorted(found))]
    return [
        {"idx": i, "name": str(i), "path": path, "type": LEGACY_TYPES + kind}
        for i, (path, kind) in enumerate(modules)
    ]


def _check_pooling(place: Place, name: str) -> None:
    config = place.table(name)
    modes = _modes(config)
    if not place.has(name):
        effect = "does not start: it finds no pooling, and guesses none"
        place.findings.append(Finding(name, None, (TEI,), effect, _name_pooling(place)))
        return
    if not config:
        return  # damaged, which was found
    if not modes:
        place.findings.append(
            Finding(name, "pooling_mode", (ST, TEI), "no pooling is named", _name_pooling(place))
        )
        return
    legacy = {key: mode.value in modes for key, mode in LEGACY_POOLING.items()}
    width = config.get("word_embedding_dimension") or config.get("embedding_dimension")
    width = width or place.table("config.json").get("hidden_size")
    right = legacy | {"word_embedding_dimension": width}
    needed = {*FIRST_KEYS, *(key for key, chosen in legacy.items() if chosen)}
    if missing := [key for key in right if key in needed and key not in config]:
        place.findings.append(
            Finding(
                name,
                missing[0],
                (ST, TEI),
                f"{TEI} does not start, and {ST} before 5.4 takes the mean, whatever pooling_mode says",
                f"add the keys of both generations: {', '.join(missing)}",
                lambda table: right | table,
            )
        )
    if other := [mode for mode in modes if mode not in POOLING_OF_TEI] or modes[1:]:
        effect = f"does not start: it has no pooling by {other[0]} (with {', '.join(modes)})"
        place.findings.append(
            Finding(name, "pooling_mode", (TEI,), effect, "nothing helps but another reader")
        )


def _modes(config: dict[str, Any]) -> list[str]:
    stated = config.get("pooling_mode")
    if isinstance(stated, str):
        return stated.split("+")
    if isinstance(stated, list):
        return [str(mode) for mode in stated]
    return [mode.value for key, mode in LEGACY_POOLING.items() if config.get(key)]


def check_length(place: Place) -> None:
    """Find a length that servers and older sentence-transformers do not see."""
    name = next((name for name in TRANSFORMER_CONFIGS if place.has(name)), TRANSFORMER_CONFIGS[0])
    length = model_length(place)
    config = place.table(name)
    stated = config.get("max_seq_length")
    if length is None or stated == length:
        return
    if place.has(name) and stated is None:
        effect = "does not start: max_seq_length is missing in a file that is there"
    elif stated is not None:
        effect = f"accepts texts of {stated!r:.20} tokens; the model takes {length}"
    elif [length] == positions(place):
        return
    else:
        effect = f"accepts texts of any length that the model has positions for, not of {length}"
    lower = bool(config.get("do_lower_case", False))
    place.findings.append(
        Finding(
            name,
            "max_seq_length",
            (TEI, ST) if stated is not None else (TEI,),
            effect,
            f"set it to {length}",
            lambda table: (table or {}) | {"max_seq_length": length, "do_lower_case": lower},
        )
    )


def check_architecture(place: Place) -> None:
    """Find a name of an architecture that makes a server take the model for a classifier."""
    names = place.table("config.json").get("architectures")
    if isinstance(names, list) and any(str(name).endswith("Classification") for name in names):
        effect = f"takes it for a classifier ({names[0]!r:.60}), which has no vectors"
        remedy = "name the architecture without its head, such as BertModel"
        place.findings.append(Finding("config.json", "architectures", (TEI,), effect, remedy))
