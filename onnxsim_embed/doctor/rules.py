"""The table of rules: file, key, readers, effect, fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.manifest import Artifact, is_artifact
from onnxsim_embed.doctor.directory import (
    FASTEMBED,
    JS,
    LEGACY_TYPES,
    MAIN,
    OTHERS,
    OURS,
    READERS,
    ROOT,
    ST,
    TEI,
    TOKENIZERS,
    Directory,
    Finding,
    OnnxFile,
    kind_of,
    token_text,
)  # fmt: skip
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system.hardware import onnxruntime_wheels

ALL = (ST, FASTEMBED, TEI, JS)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
JS_OUTPUTS = (OUTPUT, "logits", "token_embeddings")
KNOWN_MODULES = {"Transformer", "Pooling", "Dense", "Normalize"}
NO_FILE = "does not load: no such file"
EXPORT = "export the model: onnxsim-embed export {d.path} -o NEW_DIRECTORY"
POOLING = f"{EXPORT} --pooling MODE, with the mode that the model was trained with"
OTHER_READER = "use another reader; no file can fix it"


@dataclass(frozen=True)
class Rule:
    """A row of the table. Its texts are templates of the directory or ONNX file `d` and of `value`.

    :param value: returns the offending value, or a false one if there is none.
    :param change: returns the right content, given `d` and the present content.
    """

    file: str
    key: str | None
    readers: tuple[str, ...]
    effect: str
    fix: str
    value: Callable[[Any], Any]
    change: Callable[[Any, Any], Any] | None = None

    def apply(self, subject: Directory | OnnxFile) -> list[Finding]:
        """Return the finding, if there is one."""
        if not (value := self.value(subject)):
            return []
        texts = (self.file, self.key or "", self.effect, self.fix)
        file, key, effect, fix = (text.format(d=subject, value=value) for text in texts)
        change = self.change and partial(self.change, subject)
        return [Finding(file, self.key and key, self.readers, effect, fix, change)]


def _shown(value: object) -> str:
    return "" if value is None else f"{value!r:.60}"


def _unlike_length(d: Directory, key: str, default: str | None) -> str:
    """Return what tokenizer_config.json states in place of the model's length."""
    value = d.tokenizer_config.get(key, default)
    return _shown(value) if d.tokenizer_config and value != d.length else ""


def _no_pad_token(d: Directory) -> bool:
    return bool(d.tokenizer_config) and not token_text(d.tokenizer_config.get("pad_token"))


def _new_types(d: Directory) -> bool:
    legacy = all(str(entry.get("type")).startswith(LEGACY_TYPES) for entry in d.modules)
    return not legacy and set(d.kinds) <= KNOWN_MODULES and len(d.modules) == len(d.entries)


def _modes_beyond(d: Directory, *offered: str) -> str:
    modes = d.pooling_modes
    return ", ".join(modes) if len(modes) > 1 or not {*modes} <= {*offered} else ""


def _set_length(d: Directory, table: dict[str, Any] | None) -> dict[str, Any]:
    lower = bool((table or {}).get("do_lower_case", False))
    return (table or {}) | {"max_seq_length": d.length, "do_lower_case": lower}


def _classifier(d: Directory) -> object:
    names = d.config.get("architectures")
    names = names if isinstance(names, list) else []
    return next((name for name in names if str(name).endswith("Classification")), "")


# fmt: off
RULES: tuple[Rule, ...] = (
    Rule("config.json", None, ALL, NO_FILE, EXPORT, lambda d: not d.has("config.json", d.inner_config)),
    Rule("config.json", None, (FASTEMBED, TEI, JS), NO_FILE, EXPORT,
         lambda d: not d.has("config.json") and d.has(d.inner_config)),
    Rule("tokenizer.json", None, (FASTEMBED, TEI, JS), NO_FILE, EXPORT, lambda d: not d.has("tokenizer.json")),
    Rule("tokenizer_config.json", None, (FASTEMBED, JS), NO_FILE, EXPORT, lambda d: not d.has("tokenizer_config.json")),
    Rule("special_tokens_map.json", None, (FASTEMBED,),
         "version 0.8 fails: no such file (transformers 5 does not write it)", "write it: {d.special_tokens}",
         lambda d: not d.has("special_tokens_map.json") and d.special_tokens,
         lambda d, _: d.special_tokens),
    Rule("tokenizer.json", "padding", (FASTEMBED, TOKENIZERS),
         "pads each text as the file says ({value}); fastembed in version 0.8", "set it to null",
         lambda d: _shown(d.tokenizer.get("padding")), lambda _, table: table | {"padding": None}),
    Rule("tokenizer.json", "truncation", (TOKENIZERS,), "truncates texts by default ({value})",
         "set it to null",
         lambda d: _shown(d.tokenizer.get("truncation")), lambda _, table: table | {"truncation": None}),
    Rule("tokenizer_config.json", "model_max_length", (FASTEMBED, JS),
         "truncates texts to {value} tokens; the model's maximum is {d.length}", "set it to {d.length}",
         lambda d: d.length and _unlike_length(d, "model_max_length", "unlimited"), lambda d, table: table | {"model_max_length": d.length}),
    Rule("tokenizer_config.json", "max_length", (FASTEMBED,),
         "truncates texts to the smaller of this ({value}) and model_max_length", "remove the key",
         lambda d: _unlike_length(d, "max_length", None),
         lambda _, table: {k: v for k, v in table.items() if k != "max_length"}),
    Rule("tokenizer_config.json", "pad_token", (FASTEMBED,), "does not load: no token to pad a batch with",
         "set it to {value!r}", lambda d: _no_pad_token(d) and d.special_tokens.get("pad_token"),
         lambda d, table: table | {"pad_token": d.special_tokens["pad_token"]}),
    Rule("tokenizer_config.json", "pad_token", (FASTEMBED,), "does not load: no token to pad a batch with",
         "name the model's padding token",
         lambda d: _no_pad_token(d) and "pad_token" not in d.special_tokens),
    Rule("modules.json", None, (ST,), "pools with the mean and does not normalize, without a warning",
         "write it: {d.kinds}", lambda d: not d.has("modules.json") and d.modules,
         lambda d, _: d.modules),
    Rule("modules.json", None, (ST,), "pools with the mean and does not normalize, without a warning", POOLING,
         lambda d: not d.has("modules.json") and not d.modules),
    Rule("modules.json", "type", (ST,), "versions before 5.4 do not know modules of such names",
         f"name them {LEGACY_TYPES}Transformer and so on, which all versions read",
         _new_types,
         lambda _, entries: [entry | {"type": LEGACY_TYPES + kind_of(entry)} for entry in entries]),
    Rule("modules.json", "type", (TEI, FASTEMBED, JS),
         "ignores the Dense module: embeddings of another dimension and meaning", OTHER_READER,
         lambda d: "Dense" in d.kinds),
    Rule("modules.json", "type", (ST, TEI, FASTEMBED, JS),
         f"ignores {{value}}; {ST} loads modules of other packages only with trust_remote_code=True", OTHER_READER,
         lambda d: ", ".join(kind for kind in d.kinds if kind not in KNOWN_MODULES)),
    Rule("{d.pooling}", None, (TEI,), "does not start: no pooling mode is stated", POOLING,
         lambda d: not d.has(d.pooling)),
    Rule("{d.pooling}", "pooling_mode", (ST, TEI), "no pooling mode is set", POOLING,
         lambda d: d.pooling_config and not d.pooling_modes),
    Rule("{d.pooling}", "{value[0]}", (ST, TEI),
         f"{TEI} does not start, and {ST} before 5.4 pools with the mean, whatever pooling_mode says",
         "add the keys of both schemas: {value}", lambda d: d.pooling_modes and d.missing_pooling_keys,
         lambda d, table: d.legacy_pooling | table),
    Rule("{d.pooling}", "pooling_mode", (TEI,), "does not start: it has no pooling by {value}", OTHER_READER,
         lambda d: _modes_beyond(d, "cls", "mean", "lasttoken")),
    Rule("{d.pooling}", "pooling_mode", (FASTEMBED,), "pools by CLS or the mean only, not by {value}",
         OTHER_READER, lambda d: _modes_beyond(d, "cls", "mean")),
    Rule("{d.pooling}", "pooling_mode", (JS,), "pools by one of CLS, mean and last token only, not by {value}",
         OTHER_READER, lambda d: _modes_beyond(d, "cls", "mean", "lasttoken")),
    Rule("{d.transformer}", "max_seq_length", (TEI,), "does not start: the file does not state it",
         "set it to {d.length}",
         lambda d: d.length and d.has(d.transformer) and d.max_seq_length is None, _set_length),
    Rule("{d.transformer}", "max_seq_length", (TEI, ST),
         "accepts texts of {value} tokens; the model's maximum is {d.length}", "set it to {d.length}",
         lambda d: d.length and d.length != d.max_seq_length and _shown(d.max_seq_length), _set_length),
    Rule("{d.transformer}", "max_seq_length", (TEI,),
         "accepts texts as long as the position embeddings allow, not up to {d.length}", "set it to {d.length}",
         lambda d: d.length and not d.has(d.transformer) and [d.length] != d.positions, _set_length),
    Rule("config.json", "architectures", (TEI,), "takes it for a classifier ({value!r:.60}), without embeddings",
         "name the architecture without its head, for example BertModel", _classifier),
    Rule("onnxruntime", None, (OURS, FASTEMBED, ST),
         "{value} are installed together: they share one directory, and the last installed decides what runs",
         "uninstall all of them, then install one", lambda _: len(wheels := onnxruntime_wheels()) > 1 and ", ".join(wheels)),
    Rule(ROOT, None, (JS,), f"does not find it: it looks for {MAIN}", f"move it to {MAIN}, with its data file",
         lambda d: not d.has(MAIN) and d.has(ROOT)),
    Rule(MAIN, None, (ST, TEI, JS),
         f"{TEI} does not start, {JS} needs the dtype argument, and {ST} exports the model again with PyTorch, "
         "without a warning", "add the float32 file; a quantized one is not enough",
         lambda d: not d.has(MAIN, ROOT) and d.has(*OTHERS)),
    Rule(MAIN, None, ALL, f"there is no ONNX file ({ST} exports one with PyTorch, if it is set to use ONNX)",
         EXPORT, lambda d: not d.has(MAIN, ROOT, *OTHERS)),
)
ONNX_RULES: tuple[Rule, ...] = (
    Rule("{d.name}", None, ALL, "does not load: {value}", EXPORT, lambda d: d.error),
    Rule("{d.name}", "input {value}", ALL, f"fails: it passes only {', '.join(INPUTS)}", EXPORT,
         lambda d: ", ".join({*d.inputs} - {*INPUTS})),
    Rule("{d.name}", "input {value}", ALL, "fails: it passes int64, the file takes another type", EXPORT,
         lambda d: ", ".join(k for k, kind in d.inputs.items() if kind != "tensor(int64)")),
    Rule("{d.name}", "inputs", ALL, "fails: the file takes no input_ids", EXPORT,
         lambda d: not d.error and "input_ids" not in d.inputs),
    Rule("{d.name}", "outputs", (ST,), f"fails: no output is called {OUTPUT}", EXPORT,
         lambda d: not d.error and OUTPUT not in d.outputs),
    Rule("{d.name}", "outputs", (JS,), f"fails: no output is called {' or '.join(JS_OUTPUTS)}", EXPORT,
         lambda d: not d.error and not {*d.outputs} & {*JS_OUTPUTS}),
    Rule("{d.name}", "output {value}", (FASTEMBED,), "takes the first output, which is not 3-D hidden states",
         EXPORT, lambda d: d.first_axes != 3 and d.first_output),
    Rule("{d.name}", "output {value}", (TEI,), "fails: it reads float32, the file has another type", EXPORT,
         lambda d: (d.name in (MAIN, ROOT) and d.outputs.get(d.first_output, "tensor(float)") != "tensor(float)"
                    and d.first_output)),
)
# fmt: on


def diagnose(directory: str | Path, readers: Sequence[str] = READERS) -> list[Finding]:
    """Return what would break a reader of an artifact or checkpoint, in the order to fix it.

    :param readers: those that matter, of READERS.
    :raises FileNotFoundError: if there is no such directory.
    :raises ValueError: for an unknown reader.
    :raises ArtifactError: if it is an artifact whose manifest cannot be read.
    """
    subject = Directory(Path(directory))
    if unknown := [name for name in readers if name not in READERS]:
        raise ValueError(f"unknown reader {unknown[0]!r}; allowed: {', '.join(READERS)}")
    findings = []
    if is_artifact(subject.path):
        artifact = Artifact.open(subject.path)
        for name in artifact.manifest.files:
            try:
                artifact.file(name)
            except ArtifactError as error:
                effect = f"does not load: {error}"
                findings.append(Finding(name, None, (OURS,), effect, "export the model again"))
    findings += subject.damaged
    damaged = {finding.file for finding in subject.damaged}
    found = (finding for rule in RULES for finding in rule.apply(subject))
    findings += [finding for finding in found if finding.file not in damaged]
    for name in (MAIN if subject.has(MAIN) else ROOT, *OTHERS):
        if subject.has(name):
            file = OnnxFile(subject.path, name)
            findings += [finding for rule in ONNX_RULES for finding in rule.apply(file)]
    return [finding for finding in findings if {*readers} & {*finding.readers}]
