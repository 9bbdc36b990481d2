"""Builds an artifact from a checkpoint: graphs, configuration, verification, manifest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import (
    CARD,
    ENCODER_FILES,
    MANIFEST,
    MODEL_FILES,
    Artifact,
    Manifest,
    PrecisionEntry,
    list_files,
)
from onnxsim_embed.artifact.recipes import Recipe
from onnxsim_embed.errors import VerificationError
from onnxsim_embed.export import verify
from onnxsim_embed.export.architectures import pad_token_id
from onnxsim_embed.export.card import write_card
from onnxsim_embed.export.checkpoint import AFTER_PADDING, Checkpoint
from onnxsim_embed.export.configs import write_configs
from onnxsim_embed.export.encoder import Encoder, load_encoder
from onnxsim_embed.export.graph_encoder import GraphEncoder, adopt, compare_sentence_embedding
from onnxsim_embed.export.onnx.builder import operator_counts, share_constants
from onnxsim_embed.export.onnx.encoder_graph import build_encoder
from onnxsim_embed.export.onnx.files import load_graph, save_graph
from onnxsim_embed.export.onnx.fp16 import METHOD as FP16_METHOD
from onnxsim_embed.export.onnx.fp16 import convert_to_fp16
from onnxsim_embed.export.onnx.pooled import write_pooled
from onnxsim_embed.export.onnx.trace import REQUIREMENTS, trace
from onnxsim_embed.export.quantization.calibration import (
    TokenIds,
    calibration_texts,
    collect_activations,
)
from onnxsim_embed.export.quantization.encoder import (
    METHOD,
    Quantizer,
    assemble,
    describe_layers,
    fit_encoder,
)
from onnxsim_embed.export.quantization.gptq import quantize_table
from onnxsim_embed.export.quantization.search import Choice, Search, held_out_loss, hold_out
from onnxsim_embed.export.verify import Report, verify_derived, verify_fp32
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.pooling import load_head
from onnxsim_embed.runtime.tokenization import Tokenizer
from onnxsim_embed.system.memory import release_memory

logger = logging.getLogger(__name__)

# Time that float32 parts of int8 may add by default, as a share of the time without them.
INT8_EFFORT = 0.05

# Where int8 misses its threshold, more and more is computed in float32, in the end all linears (1.6).
MORE_EFFORT, MAX_EFFORT = (1.5, 2, 4, 8, 16, 32), 1.7

# Facts of a checkpoint that the manifest repeats.
SHARED_FACTS = (
    "name", "source", "revision", "architecture", "max_seq_length", "dense", "normalize", "prompts",
    "default_prompt_name", "similarity_fn_name", "include_prompt",
)  # fmt: skip


@dataclass(frozen=True)
class DirectEncoder:
    """BERT, built from its weights."""

    encoder: Encoder
    via: str = "direct"

    @property
    def hidden(self) -> int:
        """Dim of the hidden states."""
        return self.encoder.hidden

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.encoder.layers)

    def write_fp32(self, work: Path) -> PrecisionEntry:
        """Write the fp32 files."""
        return _write_encoder(self.encoder, "fp32", "float32 throughout", work)

    def prepare_int8(
        self, work: Path, token_ids: TokenIds, file_loss: Callable[[Path], float]
    ) -> tuple[Search, Callable[[Choice], PrecisionEntry]]:
        """Run the calibration texts; return the search, and a function that writes a choice."""
        encoder = self.encoder
        assert isinstance(encoder.words, np.ndarray)
        seen = collect_activations(encoder, token_ids, work / MODEL_FILES["fp32"])
        release_memory()
        groups = fit_encoder(encoder, seen)
        quantize, words = Quantizer(groups), quantize_table(encoder.words)

        def int8(choice: Choice, final: bool) -> Encoder:
            return assemble(encoder, words, choice, quantize(choice, final))

        def loss(choice: Choice) -> float:
            path = work / ENCODER_FILES["int8"]
            onnx.save(build_encoder(int8(choice, final=False), "run"), path)
            return file_loss(path)

        def write(choice: Choice) -> PrecisionEntry:
            entry = _write_encoder(int8(choice, final=True), "int8", METHOD, work)
            return replace(entry, layers=describe_layers(groups, choice))

        return Search(groups, loss), write


def _write_encoder(encoder: Encoder, precision: str, method: str, work: Path) -> PrecisionEntry:
    """Write the portable file, and beside it the run-path graph that refers to its weights."""
    file, run_file = MODEL_FILES[precision], ENCODER_FILES[precision]
    model = build_encoder(encoder, "portable")
    onnx.checker.check_model(model)
    onnx.save(model, work / file)
    counts = operator_counts(model)
    del model  # as large as the encoder
    model = build_encoder(encoder, "run")
    onnx.checker.check_model(model)
    share_constants(model, work / file)
    onnx.save(model, work / run_file)
    return PrecisionEntry(file, run_file, method, counts)


class Builder:
    """Writes and verifies an artifact in an empty directory, one precision after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: Path,
        via: str,
        matryoshka_dims: Sequence[int] = (),
        output: str | None = None,
        pooled: bool = False,
    ) -> None:
        (work / "onnx").mkdir()
        self.checkpoint, self.work, self.pooled = checkpoint, work, pooled
        if pooled and not checkpoint.include_prompt:
            raise ValueError(
                "pooled=True is not possible for a model with include_prompt false: an ONNX file cannot "
                "tell the tokens of a prompt, which are not pooled"
            )
        logger.info("making the ONNX graph of %s (%s)", checkpoint.name, via)
        self.encoder: DirectEncoder | GraphEncoder
        if via == "direct":
            self.encoder = DirectEncoder(load_encoder(checkpoint.config, checkpoint.tensors()))
        elif via == "adopted":
            self.encoder = adopt(checkpoint, work / MODEL_FILES["fp32"], output)
        else:
            hidden, layers, data = trace(checkpoint, via, work / MODEL_FILES["fp32"])
            method = f"float32, traced from PyTorch by {via}"
            self.encoder = GraphEncoder(hidden, layers, method, via, data)
        dim = write_configs(checkpoint, self.encoder.hidden, work)
        if too_large := [n for n in matryoshka_dims if n > dim]:
            raise ValueError(f"matryoshka_dims: the model has {dim} dimensions, got {too_large[0]}")
        tools = ["onnx", "onnxruntime", "tokenizers", "numpy"]
        tools += REQUIREMENTS.get(via, ())
        self.manifest = Manifest(
            **{name: getattr(checkpoint, name) for name in SHARED_FACTS},
            hidden_size=self.encoder.hidden,
            layers=self.encoder.layers,
            dim=dim,
            do_lower_case=False,  # tokenizer.json does it
            pad_token_id=pad_token_id(
                checkpoint.config, int(checkpoint.architecture in AFTER_PADDING)
            ),
            pooling=tuple(mode.value for mode in checkpoint.pooling),
            precisions={},
            tools={name: version(name) for name in tools} | {"onnxsim-embed": __version__},
            via=via,
            matryoshka_dims=tuple(sorted(set(matryoshka_dims), reverse=True)),
        )

    def _publish(self, manifest: Manifest) -> Artifact:
        """Write the model card, and the manifest with the digest of every file."""
        release_memory()  # a stage has ended
        write_card(manifest, self.checkpoint.licence, self.work / CARD)
        manifest = replace(manifest, files=list_files(self.work))
        (self.work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return Artifact(self.work, manifest)

    def _with(self, precision: str, entry: PrecisionEntry) -> Manifest:
        precisions = {**self.manifest.precisions, precision: entry}
        return replace(self.manifest, precisions=precisions)

    def _draft(self, precision: str, entry: PrecisionEntry) -> tuple[PrecisionEntry, Artifact]:
        """Return an artifact with one more precision, and its pooled file if that was asked for."""
        if self.pooled:
            name = f"{entry.file.removesuffix('.onnx')}_pooled.onnx"
            head = load_head(self._publish(self.manifest))
            write_pooled(self.work / entry.file, self.work / name, head, self.manifest.dim)
            entry = replace(entry, pooled=name)
        return entry, self._publish(self._with(precision, entry))

    def add_fp32(self, recipe: Recipe | None) -> Report:
        """Write the fp32 files and return how they compare with the reference."""
        _, artifact = self._draft("fp32", self.encoder.write_fp32(self.work))
        report = verify_fp32(artifact, self.checkpoint, self.encoder.via == "direct", recipe)
        if self.encoder.via == "adopted":
            report["problems"] += compare_sentence_embedding(artifact)
        self.manifest = replace(artifact.manifest, verification={"fp32": report})
        self._publish(self.manifest)
        return report

    def add_fp16(self, skip_unfaithful: bool) -> None:
        """Write the fp16 file, if it is faithful."""
        logger.info("converting to fp16")
        file = MODEL_FILES["fp16"]
        model = convert_to_fp16(load_graph(self.work / MODEL_FILES["fp32"], weights=True))
        data = tuple(f"onnx/{name}" for name in save_graph(model, self.work / file))
        encoder = None
        if isinstance(self.encoder, DirectEncoder) and not data:
            encoder = ENCODER_FILES["fp16"]
            gpu = convert_to_fp16(build_encoder(self.encoder.encoder, "gpu"))
            share_constants(gpu, self.work / file)
            onnx.save(gpu, self.work / encoder)
        entry = PrecisionEntry(file, encoder, FP16_METHOD, operator_counts(model), data=data)
        entry, artifact = self._draft("fp16", entry)
        report = verify_derived("fp16", artifact)
        self._accept("fp16", entry, report, skip_unfaithful)

    def add_int8(
        self,
        calibration: Sequence[str] | None,
        min_fidelity: tuple[float, float] | None,
        skip_unfaithful: bool,
        effort: float,
    ) -> None:
        """Write the int8 files, with as much in float32 as makes them faithful."""
        texts = calibration_texts() if calibration is None else list(calibration)
        tokens = Tokenizer(self.work / "tokenizer.json", self.manifest.max_seq_length)(texts)
        provenance = {
            "source": "onnxsim-embed" if calibration is None else "user",
            "texts": len(texts),
            "tokens": len(tokens.ids),
            "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        }
        artifact = self._publish(self.manifest)
        reference = Embedder(artifact, precision="fp32", device="cpu").encode(
            verify.verification_texts(), prompt=""
        )
        rest, held_out = hold_out(np.split(tokens.ids, tokens.offsets[1:-1]))
        fp32 = self.manifest.precisions["fp32"]
        loss = held_out_loss(self.work / (fp32.encoder or fp32.file), held_out, load_head(artifact))
        logger.info("running %d calibration texts", len(texts))
        search, write = self.encoder.prepare_int8(self.work, rest, loss)
        release_memory()
        choice: Choice = {}
        budgets = [effort, *(more * max(effort, INT8_EFFORT) for more in MORE_EFFORT)]
        for budget in (budget for budget in budgets if budget <= max(effort, MAX_EFFORT)):
            last, choice = choice, search.choose(budget, linears=budget > effort)
            if choice == last:
                continue
            logger.info("quantizing to int8")
            record = provenance | search.describe(choice)  # may write a trial over the int8 files
            entry = replace(write(choice), calibration=record)
            entry, artifact = self._draft("int8", entry)
            report = verify_derived("int8", artifact, min_fidelity, reference=reference)
            if not report["problems"]:
                break
            logger.warning("%s", "; ".join(report["problems"]))
        if budget > effort and not report["problems"]:
            logger.warning(
                "int8 is faithful with float32 parts that add %.0f %% to its time (int8_effort allows "
                "%.0f %%)", 100 * search.share(choice), 100 * effort,
            )  # fmt: skip
        self._accept("int8", entry, report, skip_unfaithful)

    def _accept(
        self, precision: str, entry: PrecisionEntry, report: Report, skip_unfaithful: bool
    ) -> None:
        """Add a precision that is faithful; otherwise raise, or delete its files."""
        verification = {**self.manifest.verification, precision: report}
        if report["problems"]:
            if not skip_unfaithful:
                fail(report)
            for name in filter(None, (entry.file, entry.encoder, entry.pooled, *entry.data)):
                (self.work / name).unlink()
        else:
            self.manifest = self._with(precision, entry)
        self.manifest = replace(self.manifest, verification=verification)
        self._publish(self.manifest)


def fail(report: Report) -> NoReturn:
    """Raise the problems of a report as one error."""
    raise VerificationError("; ".join(report["problems"]) + ". Nothing was written")
