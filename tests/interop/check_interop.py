"""`make interop`: one artifact, read by other libraries, each in an environment of its own.

Not part of the default suite (its name is not test_*.py): it installs environments under build/interop,
which takes a package index, minutes and gigabytes. INTEROP_ARTIFACT names an artifact of
all-MiniLM-L6-v2 to check instead of a fresh export. Figures are printed, and kept in
build/interop/report.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from environments import BUILD, ROOT, interpreter, versions
from support import TEXTS, write_checkpoint
from tokenizers import Tokenizer

from onnxsim_embed import Embedder
from onnxsim_embed.export import export_model
from onnxsim_embed.export.fidelity import bundled_texts
from onnxsim_embed.runtime.session import Session

READERS = Path(__file__).parent / "readers"
# Least cosine of any text. int8 products are exact, and so are the files' ranges; what is left are other
# float32 kernels around them, whose last bits move a value over a rounding boundary now and then.
LEAST = {"fp32": 0.99999, "int8": 0.999}
PROMPT = "a dog "
MANY = "the committee of the valley repaired gravel roads, bridges and clinics after the rains. "
TEXT_KINDS = [
    *TEXTS,
    *bundled_texts("verification.jsonl")[:60],
    *(MANY * times for times in (6, 7, 8, 14, 15, 16, 40)),  # around 128 and 256 tokens, and beyond
    "ÅNGSTRÖM İstanbul straße ﬁne e\u0301te\u0301 \u200bzero\u00adwidth",
    "漢字かな交じり文 한국어 العربية हिन्दी ไทย",
    "👩‍👩‍👧 🇫🇷 ⅷ ½ ©",
    "tab\tnew\nline\r\nreturn\u00a0space \u0000 null",
    "[CLS] [SEP] [MASK] inside",
    "a" * 150,
    "https://example.org/a?b=c&d=e#f  user@example.org  $1,000.00 -- don't",
]


@dataclass(frozen=True)
class Model:
    """An artifact, and the checkpoint that it is made of."""

    name: str
    checkpoint: Path
    artifact: Path

    def embedder(self, precision: str = "fp32") -> Embedder:
        return Embedder(self.artifact, precision=precision)


@pytest.fixture(scope="session")
def minilm(request, real_checkpoint) -> Model:
    given = os.environ.get("INTEROP_ARTIFACT")
    artifact = Path(given) if given else request.getfixturevalue("real_artifact")
    return Model("minilm", real_checkpoint, artifact)


@pytest.fixture(scope="session")
def bge_like(tmp_path_factory) -> Model:
    """BGE's layout, tiny and random: CLS pooling, Normalize, a query prompt, at most 48 tokens."""
    home = tmp_path_factory.mktemp("bge")
    checkpoint = write_checkpoint(
        home / "checkpoint", pooling="cls", prompts={"query": PROMPT}, seed=5
    )
    export_model(checkpoint, home / "artifact", pooled=True)
    return Model("bge-like", checkpoint, home / "artifact")


@pytest.fixture(params=["minilm", "bge_like"])
def model(request) -> Model:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def report():
    rows: list[dict[str, Any]] = []
    yield rows
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def read(tmp_path, report, model):
    """Let a reader make vectors of the texts, and compare them with ours, of a precision."""

    def call(
        environment: str,
        script: str | Path,
        what: str,
        *,
        precision: str = "fp32",
        expected: np.ndarray | None = None,
        post=lambda flat, expected: flat.reshape(expected.shape),
        **job: Any,
    ) -> dict[str, Any]:
        embedder = model.embedder(precision)
        manifest = embedder.artifact.manifest
        defaults = {
            "directory": str(model.artifact),
            "texts": TEXT_KINDS,
            "file": manifest.precisions[precision].file,
            "pooling": manifest.pooling[0],
            "dim": embedder.embedding_dimension,
            "prompt_name": None,
            "output": str(tmp_path / "vectors"),
        }
        facts = run_reader(environment, READERS / script, tmp_path, defaults | job)
        expected = embedder.encode(TEXT_KINDS) if expected is None else expected
        cosines = cosine(post(np.fromfile(tmp_path / "vectors", "<f4"), expected), expected)
        worst = int(cosines.argmin())
        row = {
            "reader": what,
            "model": model.name,
            "versions": versions(environment),
            "least": float(cosines[worst]),
            "mean": float(cosines.mean()),
            "texts": len(cosines),
        }
        report.append(row)
        print(f"\n{what}, {model.name}: least {row['least']:.7f}, mean {row['mean']:.7f}", end=" ")
        assert cosines[worst] > LEAST[precision], f"{TEXT_KINDS[worst][:60]!r}: {cosines[worst]}"
        assert facts.get("max_seq_length", embedder.max_seq_length) == embedder.max_seq_length
        return facts

    return call


def run_reader(environment: str, script: Path, place: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a script in an environment on a job; return the facts that it prints."""
    program = interpreter(environment)
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "HOME": job.get("home", str(Path.home())),
    }
    done = subprocess.run(
        [program, str(script), str(place / "job.json"), str(BUILD / environment)],
        capture_output=True, text=True, check=False, encoding="utf-8", cwd=place,
        env={**os.environ, **offline},
    )  # fmt: skip
    assert done.returncode == 0, f"{script.name} in {environment}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def pool(hidden: np.ndarray, mask: np.ndarray, pooling: str) -> np.ndarray:
    """Return one vector a row, as the README's lines do."""
    if pooling == "cls":
        return hidden[:, 0]
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosines of rows."""
    assert left.shape == right.shape
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(1) / norms


either_precision = pytest.mark.parametrize("precision", ["fp32", "int8"])
with_a_prompt = pytest.mark.parametrize("model", ["bge_like"], indirect=True)

# sentence-transformers

ST = "sentence_transformers_reader.py"
either_version = pytest.mark.parametrize("environment", ["st-oldest", "st-newest"])


@either_version
@either_precision
def test_sentence_transformers(read, environment, precision):
    what = f"{environment} onnx {precision}"
    facts = read(environment, ST, what, precision=precision, backend="onnx")
    assert facts["modules"] == ["Transformer", "Pooling", "Normalize"]


@either_version
def test_sentence_transformers_on_pytorch(read, model, environment):
    """On the checkpoint: what the artifact stands for."""
    checkpoint = str(model.checkpoint)
    read(environment, ST, f"{environment} torch", backend="torch", directory=checkpoint)


@either_version
@with_a_prompt
def test_sentence_transformers_knows_the_prompts(read, model, environment):
    expected = model.embedder().encode_query(TEXT_KINDS)
    what = f"{environment} onnx, query prompt"
    read(environment, ST, what, expected=expected, backend="onnx", prompt_name="query")


# fastembed


@either_precision
def test_fastembed(read, precision):
    read("fastembed", "fastembed_reader.py", f"fastembed {precision}", precision=precision)


# JavaScript


def vectors_without_the_end(embedder: Embedder) -> np.ndarray:
    """Return our vectors, of texts that are too long without their closing [SEP].

    transformers.js cuts token ids after special tokens were added, and so cuts off the last of
    them (4.3.1). No file of an artifact can tell it otherwise.
    """
    artifact, length = embedder.artifact, embedder.max_seq_length
    file = artifact.manifest.precisions[embedder.precision].file
    session = Session(artifact.file(file), "cpu")
    tokenizer = Tokenizer.from_file(str(artifact.file("tokenizer.json")))
    vectors = embedder.encode(TEXT_KINDS)
    for row, text in enumerate(TEXT_KINDS):
        ids = tokenizer.encode(text).ids
        if len(ids) > length:
            ids = np.array([ids[:length]], np.int64)
            hidden = session.run(ids, np.ones_like(ids))
            vectors[row] = pool(hidden, np.ones_like(ids), artifact.manifest.pooling[0])[0]
    return vectors


@either_precision
def test_transformers_js(read, model, precision):
    expected = vectors_without_the_end(model.embedder(precision))
    what = f"transformers.js {precision}"
    script = "transformers_reader.mjs"
    read("js", script, what, precision=precision, expected=expected, dtype=precision)


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
@either_precision
@pytest.mark.parametrize(
    ("model", "pooled"), [("minilm", False), ("bge_like", False), ("bge_like", True)], indirect=["model"]
)  # fmt: skip
def test_onnxruntime_js(read, model, runtime, precision, pooled):
    """The files alone: token ids in, hidden states out, pooled here, or the vectors."""
    embedder = model.embedder(precision)
    manifest = embedder.artifact.manifest
    entry = manifest.precisions[precision]
    tokenizer = Tokenizer.from_file(str(embedder.artifact.file("tokenizer.json")))
    tokenizer.enable_truncation(embedder.max_seq_length)
    tokenizer.enable_padding()
    batches = []
    for start in range(0, len(TEXT_KINDS), 7):
        encodings = tokenizer.encode_batch(TEXT_KINDS[start : start + 7])
        names = {"input_ids": "ids", "attention_mask": "attention_mask"}
        batches.append({k: [getattr(e, v) for e in encodings] for k, v in names.items()})

    def pooled_here(flat: np.ndarray, expected: np.ndarray) -> np.ndarray:
        masks = [np.array(batch["attention_mask"]) for batch in batches]
        ends = np.cumsum([mask.size * manifest.hidden_size for mask in masks])
        parts = zip(np.split(flat, ends[:-1]), masks, strict=True)
        return np.concatenate(
            [pool(part.reshape(*mask.shape, -1), mask, manifest.pooling[0]) for part, mask in parts]
        )

    options = {"file": entry.pooled} if pooled else {"file": entry.file, "post": pooled_here}
    what = f"{runtime} {precision}{', pooled' if pooled else ''}"
    options |= {"runtime": runtime, "batches": batches, "precision": precision}
    facts = read("js", "onnxruntime_reader.mjs", what, **options)
    assert (facts["outputs"][0] == "sentence_embedding") == pooled


# the adapters, against the real libraries

TESTS = ROOT / "tests" / "integrations"


@pytest.mark.parametrize(
    "environment",
    ["langchain", "llama-index", "haystack", "chroma", "sklearn", "sentence-transformers",
     "sentence-transformers-oldest"],
)  # fmt: skip
def test_adapters(environment, report):
    """The adapter's tests of the default suite, where its library is installed: none is skipped."""
    name = environment.removesuffix("-oldest").replace("-", "_")
    chosen = f"{name} or {name.replace('_', '')}"
    # A module of another library counts as skipped, whatever is chosen in it.
    own = f"test_{name}.py" if (TESTS / f"test_{name}.py").exists() else "test_adapters.py"
    files = map(str, (TESTS / "test_loading.py", TESTS / own))
    done = subprocess.run(
        [interpreter(environment), "-m", "pytest", *files, "-k", chosen],
        capture_output=True, text=True, check=False, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary
    assert "skipped" not in summary, done.stdout
    found = versions(environment)
    report.append({"reader": f"adapter {environment}", "versions": found, "tests": summary})
    print(f"\n{environment} {found}: {summary}", end=" ")


@pytest.mark.parametrize("library", ["keybert", "bertopic"])
@pytest.mark.parametrize("model", ["minilm"], indirect=True)
def test_libraries_that_take_a_sentence_transformer(read, library):
    script = "sentence_transformers_users.py"
    print(read("sentence-transformers-users", script, library, library=library), end=" ")


# Chroma's default embedding function, and the recipes


@pytest.fixture(scope="session")
def home(real_checkpoint, tmp_path_factory) -> Path:
    """A home directory with the model of Chroma's default function, traced by PyTorch.

    Chroma downloads one where these six files are not there.
    """

    home = tmp_path_factory.mktemp("home")
    target = home / ".cache/chroma/onnx_models/all-MiniLM-L6-v2/onnx"
    target.mkdir(parents=True)
    for name in ("config", "special_tokens_map", "tokenizer_config", "tokenizer"):
        shutil.copy(real_checkpoint / f"{name}.json", target)
    shutil.copy(real_checkpoint / "vocab.txt", target)
    export_model(real_checkpoint, home / "traced", via="torch", precisions=["fp32"])
    graph = onnx.load(home / "traced/onnx/model.onnx")
    types = onnx.helper.make_tensor_value_info(
        "token_type_ids", onnx.TensorProto.INT64, [None, None]
    )
    graph.graph.input.append(types)  # all 0 in Chroma, as in the traced graph
    onnx.save(graph, target / "model.onnx")
    return home


@pytest.mark.parametrize("model", ["minilm"], indirect=True)
def test_chroma_default(read, model, home, tmp_path):
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(model.artifact)
    print(read("chroma", "chroma_reader.py", "Chroma's default", home=str(home)), end=" ")


HOSTS = {"bertopic": "sentence-transformers-users"}  # environments of other names


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/recipes").glob("*.md")), ids=lambda page: page.stem
)
def test_recipes(page, minilm, home, tmp_path, report):
    environment = HOSTS.get(page.stem, page.stem)
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(minilm.artifact)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    job = {"page": str(page), "home": str(home)}
    run_reader(environment, READERS / "recipe.py", tmp_path, job)
    report.append({"reader": f"recipe {page.stem}", "versions": versions(environment)})


# the server, through the clients of others


@pytest.fixture
def server(model, tmp_path):
    """A server of the model in a process of its own; what clients need to know."""
    (tmp_path / "key").write_text("s3cret", encoding="utf-8")
    command = [interpreter("serve"), "-m", "onnxsim_embed", "serve", "--port", "0", "-m"]
    command += [str(model.artifact), "--precision", "fp32", "--api-key-file", str(tmp_path / "key")]
    with subprocess.Popen(
        [*command, "--served-model-name", "m"], stdout=subprocess.PIPE
    ) as process:
        line = process.stdout.readline().decode()
        yield {"url": re.search(r"http://[\d.:]+", line)[0], "name": "m", "key": "s3cret"}
        process.terminate()


@pytest.mark.parametrize("client", ["openai", "langchain-openai", "huggingface-hub"])
def test_clients_of_the_server(read, model, server, client):
    facts = read(
        "serve", "serve_reader.py", f"serve, {client}", client=client, post=exactly, **server
    )
    if client == "openai":
        assert facts["models"] == ["m"]
        assert facts["tokens"] == sum(map(len, model.embedder().token_ids(TEXT_KINDS)))
        assert facts["dimensions"]
        assert "'m'" in facts["error"]
    else:
        assert facts["query"]
    assert facts.get("scores", 5) == 5


def exactly(flat: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return vectors that must be ours, bit for bit."""
    vectors = flat.reshape(expected.shape)
    np.testing.assert_array_equal(vectors, expected)
    return vectors
