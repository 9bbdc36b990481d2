"""Checks of what readers need of a tokenizer: its files, lengths, padding and special tokens."""

from __future__ import annotations

from typing import Any

from onnxsim_embed.doctor.place import FASTEMBED, JS, ST, TEI, TOKENIZERS, Finding, Place
from onnxsim_embed.export.checkpoint import AFTER_PADDING, LONGEST_SEQUENCE, TRANSFORMER_CONFIGS
from onnxsim_embed.export.tokenizer import SPECIAL_TOKENS


def check_files(place: Place) -> None:
    """Find missing files; sentence-transformers looks in the Transformer module's own directory."""
    kinds = [entry for entry in place.entries("modules.json") if isinstance(entry, dict)]
    inner = next((e.get("path") for e in kinds if str(e.get("type")).endswith("Transformer")), "")
    for name, readers in {
        "config.json": (ST, FASTEMBED, TEI, JS),
        "tokenizer.json": (FASTEMBED, TEI, JS),
        "tokenizer_config.json": (FASTEMBED, JS),
        "special_tokens_map.json": (FASTEMBED,),
    }.items():
        if inner and place.has(f"{inner}/{name}"):
            readers = tuple(reader for reader in readers if reader != ST)
        if place.has(name) or (name == "special_tokens_map.json" and special_tokens(place)):
            continue
        place.findings.append(
            Finding(name, None, readers, "does not load: no such file", place.export)
        )
    if not place.has("special_tokens_map.json") and (tokens := special_tokens(place)):
        place.findings.append(
            Finding(
                "special_tokens_map.json",
                None,
                (FASTEMBED,),
                "does not load: no such file (transformers 5 no longer writes it)",
                f"write it: {', '.join(f'{k} {v!r}' for k, v in tokens.items())}",
                lambda _: tokens,
            )
        )


def check_tokenizer(place: Place) -> None:
    """Find padding, lengths and special tokens that readers stumble over."""
    tokenizer, config = place.table("tokenizer.json"), place.table("tokenizer_config.json")
    if tokenizer.get("padding") is not None:
        strategy = tokenizer["padding"]
        strategy = strategy.get("strategy") if isinstance(strategy, dict) else strategy
        effect = f"pads each text as the file says ({strategy!r:.40}), whatever its length"
        place.findings.append(
            _set("tokenizer.json", "padding", (FASTEMBED, TOKENIZERS), effect, None)
        )
    if tokenizer.get("truncation") is not None:
        cut = tokenizer["truncation"]
        cut = cut.get("max_length") if isinstance(cut, dict) else cut
        effect = f"cuts texts at {cut!r:.20} tokens, unless told otherwise"
        place.findings.append(_set("tokenizer.json", "truncation", (TOKENIZERS,), effect, None))
    if not config:
        return
    name, length = "tokenizer_config.json", model_length(place)
    stated = config.get("model_max_length")
    if length is not None and stated != length:
        effect = f"cuts texts at {stated!r:.40} tokens; the model takes {length}"
        if stated is None:
            effect = f"does not know that the model takes {length} tokens"
        readers = (FASTEMBED, JS)
        place.findings.append(_set(name, "model_max_length", readers, effect, length))
    other = config.get("max_length")
    if other is not None and other != length:
        effect = f"cuts texts at {other!r:.20} tokens: the smaller of this and model_max_length"
        place.findings.append(
            Finding(
                name,
                "max_length",
                (FASTEMBED,),
                effect,
                "remove the key",
                lambda table: {k: v for k, v in table.items() if k != "max_length"},
            )
        )
    if _content(config.get("pad_token")) is None:
        token = special_tokens(place).get("pad_token")
        effect = "does not load: it has no token to fill up a batch with"
        found = _set(name, "pad_token", (FASTEMBED,), effect, token)
        if token is None:
            found = Finding(name, "pad_token", (FASTEMBED,), effect, "name the model's pad token")
        place.findings.append(found)


def _set(file: str, key: str, readers: tuple[str, ...], effect: str, value: Any) -> Finding:  # noqa: ANN401
    shown = "null" if value is None else repr(value)
    return Finding(
        file, key, readers, effect, f"set it to {shown}", lambda table: (table or {}) | {key: value}
    )


def special_tokens(place: Place) -> dict[str, str]:
    """Return the special tokens that the directory names; the padding's by its id, at the last."""
    config, stated = place.table("tokenizer_config.json"), place.table("special_tokens_map.json")
    tokens = {}
    for key in SPECIAL_TOKENS:
        token = _content(config.get(key)) or _content(stated.get(key))
        if token is not None:
            tokens[key] = token
    added = place.table("tokenizer.json").get("added_tokens")
    for entry in added if isinstance(added, list) and "pad_token" not in tokens else []:
        if isinstance(entry, dict) and entry.get("id") == place.table("config.json").get(
            "pad_token_id", 0
        ):
            token = _content(entry)
            if token is not None:
                tokens["pad_token"] = token
    return tokens


def _content(token: Any) -> str | None:  # noqa: ANN401
    """Return a special token's text; configurations hold it bare or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def model_length(place: Place) -> int | None:
    """Return how many tokens the model takes, or None where nothing says it."""
    stated = [
        place.table(name).get("max_seq_length") for name in TRANSFORMER_CONFIGS if place.has(name)
    ]
    stated.append(place.table("tokenizer_config.json").get("model_max_length"))
    known = [n for n in stated if type(n) is int and 2 < n <= LONGEST_SEQUENCE][:1]
    return min([*known, *positions(place)], default=None)


def positions(place: Place) -> list[int]:
    """Return how many tokens the position embeddings are for, if there are some."""
    config = place.table("config.json")
    count = config.get("max_position_embeddings")
    if type(count) is not int or not 2 < count <= LONGEST_SEQUENCE:
        return []
    pad = config.get("pad_token_id")
    after = config.get("model_type") in AFTER_PADDING
    return [count - (1 + (pad if type(pad) is int else 0) if after else 0)]
