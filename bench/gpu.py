"""A model on a GPU, and on all processors beside it: what is fast, what is faithful.

    python bench/gpu.py TEXTS [--column C] [--checkpoint DIR] [--sts FILE] [--device cuda]
        [--int8 ARTIFACT] [--only PARTS]

Needs this repository, numpy, tokenizers, onnx and an onnxruntime with CUDA; PyTorch and sentence-transformers
for the comparison. The checkpoint (all-MiniLM-L6-v2 by default) is exported to fp32, fp16 and int8, and a
seeded one of BERT-base's shape to fp32 and fp16. Writes bench/results/gpu.json, part by part.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from lab.conditions import machine, today
from lab.turns import RESULTS, in_turns, parser
from scipy.stats import spearmanr

from onnxsim_embed import Embedder, __version__
from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import ENCODER_FILES, Artifact, is_artifact
from onnxsim_embed.benchmark.measure import fidelity
from onnxsim_embed.export import export_model
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.runtime.batching import plan_batches
from onnxsim_embed.runtime.cuda import CudaSession
from onnxsim_embed.runtime.pipeline import WINDOW_TEXTS
from onnxsim_embed.system.hardware import available_cpus

BUDGETS = [2048 << step for step in range(7)]
PEER_BATCHES = (64, 256, 1024)
PARTS = ("fidelity", "layouts", "budgets", "texts", "query", "base", "threads")


def seconds_of(run: Callable[[], object], rounds: int = 3) -> float:
    """Return the median time of a call, after one that does not count."""
    run()
    return float(np.median(in_turns({"run": run}, rounds)[0]["run"]))


def ask_card(query: str, otherwise: str) -> str:
    """Return what nvidia-smi says of the card."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.check_output(command, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return otherwise


def gpu_memory() -> float:
    """Return the memory in use on the card in MB, or nan without one."""
    return float(ask_card("memory.used", "nan").split()[0])


def vectors_of(model: Embedder, session: Any, *batch: np.ndarray, pooled: bool) -> np.ndarray:  # noqa: ANN401
    """Run a batch, pooled by the session or here."""
    out = session.run(*batch, pooled)
    return out if out.ndim == 2 else model.head(out, batch[1])


class Bench:
    """The models under test, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.target = options.device, Path(options.output)
        self.rounds: int = options.rounds
        self.texts = list(islice(iter_texts(options.texts, options.column), options.rows))
        self.sts: list[list[str]] = []
        if options.sts:
            with open(options.sts, encoding="utf-8", newline="") as file:
                self.sts = list(csv.reader(file))
        self.work = Path(options.work)
        self.directory, _ = locate_checkpoint(options.checkpoint)
        precisions = ["fp32", "fp16"] if options.int8 else ["fp32", "fp16", "int8"]
        self.artifact = self.exported("model", self.directory, precisions)
        self.int8 = Artifact.open(Path(options.int8)) if options.int8 else self.artifact
        self.found: dict[str, Any] = {"machine": self.conditions()}

    def conditions(self) -> dict[str, Any]:
        """Name the card, the driver, the processors and the versions."""
        return {
            "card": ask_card("name,driver_version,memory.total", "none"),
            **machine(available_cpus()),
            "onnxruntime": onnxruntime.__version__,
            "onnxsim-embed": __version__,
            "providers": onnxruntime.get_available_providers(),
            "date": today(),
        }

    def exported(self, name: str, checkpoint: Path, precisions: list[str]) -> Artifact:
        """Export a checkpoint unless that was done before."""
        target = self.work / name
        if not is_artifact(target):
            export_model(checkpoint, target, precisions=precisions)
        return Artifact.open(target)

    def load(self, precision: str, device: str | None = None, **settings: Any) -> Embedder:  # noqa: ANN401
        """Load our model; on a GPU it has to run there."""
        artifact = self.int8 if precision == "int8" else self.artifact
        model = Embedder(artifact, precision=precision, device=device or self.device, **settings)
        wanted = "CPU" if (device or self.device) == "cpu" else "CUDA"
        if wanted not in model.provider:
            raise SystemExit(f"{precision} runs on {model.provider}, not on {wanted}")
        return model

    @property
    def precisions(self) -> list[str]:
        """Weight precisions of the device under test."""
        return ["fp32"] if self.device == "cpu" else ["fp32", "fp16"]

    def report(self, part: str, figures: Any) -> None:  # noqa: ANN401
        """Print a part's figures and write all that were found."""
        self.found[part] = figures
        print(part, json.dumps(figures, indent=1), flush=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def fidelity(self) -> None:
        """Compare with fp32 on the CPU: the first 2,000 texts, and pairs with known scores."""
        texts = self.texts[:2000]
        sentences = list(dict.fromkeys(text for row in self.sts for text in row[:2]))
        gold = [float(row[2]) for row in self.sts]
        figures: dict[str, Any] = {}
        reference: dict[str, np.ndarray] = {}
        for name, model in [
            ("cpu fp32", self.load("fp32", "cpu")),
            *((f"{self.device} {p}", self.load(p)) for p in self.precisions),
        ]:
            vectors = {"texts": model.encode(texts)}
            if sentences:
                vectors["sts"] = model.encode(sentences)
            reference = reference or vectors
            figures[name] = {key: fidelity(vectors[key], reference[key]) for key in vectors}
            figures[name]["card MB"] = gpu_memory()
            if sentences:
                row = dict(zip(sentences, vectors["sts"], strict=True))
                scores = [float(row[a] @ row[b]) for a, b, *_ in self.sts]
                figures[name]["sts spearman"] = float(spearmanr(scores, gold).statistic)
        self.report("fidelity", figures)

    def layouts(self) -> None:
        """Time batches of 16,384 tokens: files, and pooling here or on the device."""
        model = self.load(self.precisions[-1])
        engine = model._pipeline.engine
        files = {"own layout": engine}
        if self.device != "cpu":
            portable = self.artifact.open_file("fp16")
            files["portable"] = CudaSession(portable, self.device, head=model.head)
        figures: dict[str, Any] = {}
        for tokens in (16, 90, 256):
            ids = np.random.default_rng(0).integers(1000, 20000, (16384 // tokens, tokens))
            mask = np.ones_like(ids)
            mask[:, -2:] = int(self.device == "cpu")  # whose own layout has no padding
            for name, session in files.items():
                for where in ("here", "on the device"):
                    run = partial(vectors_of, model, session, ids, mask, pooled=where != "here")
                    rate = ids.size / seconds_of(run, 5)
                    figures[f"{tokens} tokens, {name}, pooled {where}"] = round(rate)
        self.report("layouts", {"tokens a second": figures})

    def tokenizer_rate(self, model: Embedder) -> float:
        """Return the tokens a second of the tokenizer alone, in windows as the pipeline has them."""
        started, count = time.perf_counter(), 0
        for first in range(0, len(self.texts), WINDOW_TEXTS):
            count += len(model._pipeline.tokenizer(self.texts[first : first + WINDOW_TEXTS]).ids)
        return count / (time.perf_counter() - started)

    def budgets(self) -> None:
        """Time token budgets and numbers of callers, and compare with the tokenizer alone."""
        model = self.load(self.precisions[-1])
        rate = self.tokenizer_rate(model)
        figures: dict[str, Any] = {"tokenizer, tokens a second": round(rate)}
        sample = self.texts[: 2 * WINDOW_TEXTS]
        counts = model._pipeline.tokenizer(sample[:WINDOW_TEXTS]).counts
        for budget in BUDGETS:
            batches = [counts[rows] for rows in plan_batches(counts, budget, padded=True)]
            filled = sum(len(rows) * -(-int(rows.max()) // 8) * 8 for rows in batches)
            entry: dict[str, Any] = {"padding": round(1 - counts.sum() / filled, 4)}
            for callers in (1, 2, 3):
                with model.settings(threads=callers, token_budget=budget):
                    seconds = seconds_of(partial(model.encode, sample), 2)
                report = model.last_report
                entry[f"{callers} callers, texts a second"] = round(len(sample) / seconds)
                entry[f"{callers} callers, seconds"] = [
                    round(v, 3) for v in (report.seconds_tokenize, report.seconds_run, seconds)
                ]
            entry["card MB"] = gpu_memory()
            figures[str(budget)] = entry
        self.report("budgets", figures)

    def peers(self, directory: Path) -> Iterable[tuple[str, Any]]:
        """Yield sentence-transformers on the same device, in float32 and float16."""
        import torch
        from sentence_transformers import SentenceTransformer

        for name, dtype in [("fp32", torch.float32), ("fp16", torch.float16)]:
            if name in self.precisions:
                model = SentenceTransformer(
                    str(directory), device=self.device, model_kwargs={"dtype": dtype}
                )
                yield name, partial(model.encode, show_progress_bar=False)

    def compare(self, texts: list[str], directory: Path, rounds: int) -> dict[str, Any]:
        """Time texts to vectors, ours and sentence-transformers at its best batch size, alternating."""
        runs: dict[str, Callable[[], np.ndarray]] = {}
        figures: dict[str, Any] = {}
        for precision in self.precisions:
            runs[f"ours {precision}"] = partial(self.load(precision).encode, texts)
        for name, encode in self.peers(directory):
            sample = texts[: len(texts) // 4]
            times = {
                size: seconds_of(partial(encode, sample, batch_size=size), 1)
                for size in PEER_BATCHES
            }
            best = min(times, key=times.__getitem__)
            runs[f"sentence-transformers {name}"] = partial(encode, texts, batch_size=best)
            figures[f"sentence-transformers {name}"] = {"batch size": best, "tried": times}
        first = {name: run() for name, run in runs.items()}
        for name in list(figures):
            figures[name]["cosine to ours"] = fidelity(first[name], first["ours fp32"])
        seconds, _ = in_turns(runs, rounds)
        for name, times in seconds.items():
            rate = len(texts) / np.median(times)
            figures.setdefault(name, {}).update(seconds=times, texts_a_second=round(rate, 1))
        for name in self.precisions:
            peer, own = seconds[f"sentence-transformers {name}"], seconds[f"ours {name}"]
            figures[f"ratio {name}"] = round(float(np.median(peer) / np.median(own)), 3)
        return figures

    def texts_to_vectors(self) -> None:
        """Time all texts to vectors."""
        self.report(
            "texts",
            {"rows": len(self.texts)} | self.compare(self.texts, self.directory, self.rounds),
        )

    def query(self) -> None:
        """Time one short query; on CUDA also as a graph of fixed shape."""
        text = "How do I cancel a subscription before the trial ends?"
        figures = {}
        for precision in self.precisions:
            model = self.load(precision)
            figures[f"ours {precision}"] = seconds_of(partial(model.encode, text), 300)
        figures["ours int8, CPU"] = seconds_of(partial(self.load("int8", "cpu").encode, text), 300)
        for name, encode in self.peers(self.directory):
            figures[f"sentence-transformers {name}"] = seconds_of(partial(encode, text), 100)
        figures = {name: round(1000 * value, 3) for name, value in figures.items()}
        if self.device != "cpu":
            try:
                figures |= self.graph_replay()
            except Exception as error:  # onnxruntime's exceptions share no base class
                figures["CUDA graph"] = f"not possible: {str(error)[:300]}"
        self.report("query", {"milliseconds, median": figures, "card MB": gpu_memory()})

    def graph_replay(self) -> dict[str, float]:
        """Time the encoder alone at (1, 16) with and without CUDA graphs."""
        path = str(self.artifact.file(ENCODER_FILES["fp16"]))
        ids, lengths = np.full((1, 16), 2000), np.array([16, 0, 16, 0, 16], np.int32)
        found = {}
        for name, options in [("encoder alone", {}), ("CUDA graph", {"enable_cuda_graph": "1"})]:
            session = onnxruntime.InferenceSession(
                path, providers=[("CUDAExecutionProvider", options)]
            )
            binding = session.io_binding()
            for key, array in [("input_ids", ids), ("key_lengths", lengths)]:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
                binding.bind_ortvalue_input(key, value)
            shape = (1, 16, self.artifact.manifest.hidden_size)
            output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
            binding.bind_ortvalue_output(session.get_outputs()[0].name, output)
            seconds = seconds_of(partial(session.run_with_iobinding, binding), 300)
            found[name] = round(1000 * seconds, 3)
        return found

    def base(self) -> None:
        """Time texts to vectors of a seeded checkpoint of BERT-base's shape."""
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling, Transformer
        from transformers import BertConfig, BertModel

        directory = self.work / "base"
        if not (directory / "modules.json").is_file():
            torch.manual_seed(0)
            plain = self.work / "base_plain"
            BertModel(BertConfig()).save_pretrained(plain)
            for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                if (self.directory / name).is_file():
                    (plain / name).write_bytes((self.directory / name).read_bytes())
            encoder = Transformer(str(plain), max_seq_length=256)
            SentenceTransformer(modules=[encoder, Pooling(768), Normalize()], device="cpu").save(
                str(directory)
            )
        small = self.artifact
        self.artifact = self.exported("base_onnx", directory, ["fp32", "fp16"])
        try:
            texts = self.texts[: len(self.texts) // 4]
            figures: dict[str, Any] = {"rows": len(texts), "card MB": gpu_memory()}
            figures |= self.compare(texts, directory, 2)
            model = self.load(self.precisions[-1])
            for budget in BUDGETS[2:6]:
                with model.settings(threads=2, token_budget=budget):
                    rate = len(texts) / seconds_of(partial(model.encode, texts), 1)
                figures[f"budget {budget}, texts a second"] = round(rate)
        finally:
            self.artifact = small
        self.report("base", figures)

    def threads(self) -> None:
        """Time the CPU with more and more threads; every vector has to be the same to the bit."""
        figures: dict[str, Any] = {}
        counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= available_cpus()]
        for precision, rows in (("int8", 500), ("fp32", 200)):
            rates, reference, different = {}, None, 0
            for threads in counts:
                model = self.load(precision, "cpu", threads=threads)
                texts = self.texts[: rows * max(2, threads)]
                model.encode(texts[:100])
                started = time.perf_counter()
                vectors = model.encode(texts)
                rates[threads] = len(texts) / (time.perf_counter() - started)
                reference = vectors if reference is None else reference
                shared = min(len(vectors), len(reference))
                different += int((vectors[:shared] != reference[:shared]).any(axis=1).sum())
            figures[precision] = {
                "texts a second": {n: round(rate, 1) for n, rate in rates.items()},
                "efficiency": {n: round(rate / rates[1] / n, 3) for n, rate in rates.items()},
                "vectors that differ": different,
            }
        self.report("threads", figures)


def main() -> None:
    """Run the parts that were asked for."""
    arguments = parser(__doc__, "texts", "--column")
    arguments.add_argument("--rows", type=int)
    arguments.add_argument("--checkpoint", default="all-MiniLM-L6-v2", help="directory or name")
    arguments.add_argument("--sts", help="CSV of text, text, score, without a header")
    arguments.add_argument("--int8", help="an artifact that holds int8, whose export takes longest")
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    arguments.add_argument("--work", default=tempfile.gettempdir() + "/onnxsim-gpu")
    arguments.add_argument("--output", default=str(RESULTS / "gpu.json"))
    options = arguments.parse_args()
    started, failed = time.perf_counter(), []
    bench = Bench(options)
    print(f"[export: {time.perf_counter() - started:.0f} s]", flush=True)
    for part in options.only.split(","):
        started = time.perf_counter()
        try:
            getattr(bench, "texts_to_vectors" if part == "texts" else part)()
        except Exception:  # the card's time is scarce: the other parts still run
            traceback.print_exc()
            failed.append(part)
        print(f"[{part}: {time.perf_counter() - started:.0f} s]", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
