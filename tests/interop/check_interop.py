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
FP32 = 0.99999  # least cosine of any text
# int8 products are exact, and so are the files' ranges; what is left are other float32 kernels around
# them, whose last bits move a value over a rounding boundary now and then.
INT8 = 0.999
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
    """An artifact and what its vectors must be.

    :param expected: float32 (texts, dim), our own fp32 vectors.
    """

    name: str
    checkpoint: Path
    artifact: Path
    expected: np.ndarray

    @property
    def pooling(self) -> str:
        return Embedder(self.artifact).artifact.manifest.pooling[0]


def as_model(name: str, checkpoint: Path, artifact: Path) -> Model:
    return Model(
        name, checkpoint, artifact, Embedder(artifact, precision="fp32").encode(TEXT_KINDS)
    )


@pytest.fixture(scope="session")
def minilm(request, real_checkpoint) -> Model:
    given = os.environ.get("INTEROP_ARTIFACT")
    artifact = Path(given) if given else request.getfixturevalue("real_artifact")
    return as_model("minilm", real_checkpoint, artifact)


@pytest.fixture(scope="session")
def bge_like(tmp_path_factory) -> Model:
    """BGE's layout, tiny and random: CLS pooling, Normalize, a query prompt, at most 48 tokens."""
    home = tmp_path_factory.mktemp("bge")
    checkpoint = write_checkpoint(
        home / "checkpoint", pooling="cls", prompts={"query": PROMPT}, seed=5
    )
    export_model(checkpoint, home / "artifact", pooled=True)
    return as_model("bge-like", checkpoint, home / "artifact")


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
    """Let a reader make vectors of the texts, and compare them."""

    def call(
        environment: str,
        script: Path,
        expected: np.ndarray,
        *,
        least: float = FP32,
        what: str,
        post=None,
        **job: Any,
    ) -> dict[str, Any]:
        defaults = {
            "directory": str(model.artifact),
            "texts": TEXT_KINDS,
            "file": "onnx/model.onnx",
            "pooling": model.pooling,
            "dim": model.expected.shape[1],
            "prompt": "",
            "prompt_name": None,
            "output": str(tmp_path / "vectors"),
        }
        facts = run_reader(environment, script, tmp_path, defaults | job)
        vectors = np.fromfile(tmp_path / "vectors", "<f4")
        vectors = vectors.reshape(-1, expected.shape[1]) if post is None else post(vectors)
        cosines = cosine(vectors, expected)
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
        assert cosines[worst] > least, f"{TEXT_KINDS[worst][:60]!r}: {cosines[worst]}"
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


def test_these_texts_tell_other_lengths_and_poolings_apart(model):
    """What follows could not fail otherwise."""
    embedder = Embedder(model.artifact, precision="fp32")
    embedder.max_seq_length -= 1
    assert cosine(embedder.encode(TEXT_KINDS), model.expected).min() < 0.9999
    other = np.stack([
        rows.mean(0) if model.pooling == "cls" else rows[0]
        for rows in embedder.encode(TEXT_KINDS, output_value="token_embeddings")
    ])  # fmt: skip
    assert np.median(cosine(other, model.expected)) < 0.99


# sentence-transformers

ST = READERS / "sentence_transformers_reader.py"


@pytest.mark.parametrize("environment", ["st-oldest", "st-newest"])
def test_sentence_transformers(read, model, environment):
    facts = read(environment, ST, model.expected, backend="onnx", what=f"{environment} onnx")
    assert facts["max_seq_length"] == Embedder(model.artifact).max_seq_length
    assert facts["modules"] == ["Transformer", "Pooling", "Normalize"]
    # Its own PyTorch on the checkpoint: what the artifact stands for.
    read(
        environment,
        ST,
        model.expected,
        backend="torch",
        directory=str(model.checkpoint),
        what=f"{environment} torch",
    )


@pytest.mark.parametrize("environment", ["st-oldest", "st-newest"])
def test_sentence_transformers_reads_int8(read, model, environment):
    expected = Embedder(model.artifact, precision="int8").encode(TEXT_KINDS)
    read(
        environment,
        ST,
        expected,
        least=INT8,
        backend="onnx",
        file="onnx/model_int8.onnx",
        what=f"{environment} onnx int8",
    )


@pytest.mark.parametrize("environment", ["st-oldest", "st-newest"])
@pytest.mark.parametrize("model", ["bge_like"], indirect=True)  # the one with a prompt
def test_sentence_transformers_knows_the_prompts(read, model, environment):
    expected = Embedder(model.artifact, precision="fp32").encode_query(TEXT_KINDS)
    what = f"{environment} onnx, query prompt"
    read(environment, ST, expected, backend="onnx", prompt_name="query", what=what)


# fastembed

FASTEMBED = READERS / "fastembed_reader.py"


def test_fastembed(read, model):
    facts = read("fastembed", FASTEMBED, model.expected, what="fastembed")
    assert facts["max_seq_length"] == Embedder(model.artifact).max_seq_length


def test_fastembed_reads_int8(read, model):
    expected = Embedder(model.artifact, precision="int8").encode(TEXT_KINDS)
    read("fastembed", FASTEMBED, expected, least=INT8, file="onnx/model_int8.onnx", what="fastembed int8")  # fmt: skip


# JavaScript

TRANSFORMERS_JS = READERS / "transformers_reader.mjs"
ONNXRUNTIME_JS = READERS / "onnxruntime_reader.mjs"


def vectors_without_the_end(embedder: Embedder, precision: str) -> np.ndarray:
    """Return our vectors, of texts that are too long without their closing [SEP].

    transformers.js cuts token ids after special tokens were added, and so cuts off the last of
    them (4.3.1). No file of an artifact can tell it otherwise.
    """
    artifact, length = embedder.artifact, embedder.max_seq_length
    session = Session(artifact.file(artifact.manifest.precisions[precision].file), "cpu")
    tokenizer = Tokenizer.from_file(str(artifact.file("tokenizer.json")))
    vectors = embedder.encode(TEXT_KINDS)
    for row, text in enumerate(TEXT_KINDS):
        ids = tokenizer.encode(text).ids
        if len(ids) > length:
            ids = np.array([ids[:length]], np.int64)
            hidden = session.run(ids, np.ones_like(ids))
            vectors[row] = pool(hidden, np.ones_like(ids), artifact.manifest.pooling[0])[0]
    return vectors


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_transformers_js(read, model, precision):
    expected = vectors_without_the_end(Embedder(model.artifact, precision=precision), precision)
    least = FP32 if precision == "fp32" else INT8
    what = f"transformers.js {precision}"
    facts = read("js", TRANSFORMERS_JS, expected, least=least, dtype=precision, what=what)
    assert facts["max_seq_length"] == Embedder(model.artifact).max_seq_length


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnxruntime_js(read, model, runtime, precision):
    """The files alone: token ids in, hidden states out, pooled here."""
    embedder = Embedder(model.artifact, precision=precision)
    batches, rows = token_batches(embedder)

    def vectors_of(flat: np.ndarray) -> np.ndarray:
        vectors = np.empty_like(model.expected)
        start, width = 0, embedder.artifact.manifest.hidden_size
        for batch, numbers in zip(batches, rows, strict=True):
            mask = np.array(batch["attention_mask"])
            hidden = flat[start : start + mask.size * width].reshape(*mask.shape, width)
            start += hidden.size
            vectors[numbers] = pool(hidden, mask, model.pooling)
        return vectors

    read(
        "js",
        ONNXRUNTIME_JS,
        embedder.encode(TEXT_KINDS),
        least=FP32 if precision == "fp32" else INT8,
        runtime=runtime,
        file=embedder.artifact.manifest.precisions[precision].file,
        batches=batches,
        post=vectors_of,
        what=f"{runtime} {precision}",
    )


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("model", ["bge_like"], indirect=True)
def test_onnxruntime_js_reads_pooled_files(read, model, runtime, precision):
    """Token ids in, the vectors out."""
    embedder = Embedder(model.artifact, precision=precision)
    batches, rows = token_batches(embedder)
    assert np.concatenate(rows).tolist() == list(range(len(TEXT_KINDS)))
    facts = read(
        "js",
        ONNXRUNTIME_JS,
        embedder.encode(TEXT_KINDS),
        least=FP32 if precision == "fp32" else INT8,
        runtime=runtime,
        file=embedder.artifact.manifest.precisions[precision].pooled,
        batches=batches,
        what=f"{runtime} {precision}, pooled",
    )
    assert facts["outputs"][0] == "sentence_embedding"


def token_batches(embedder: Embedder, size: int = 7) -> tuple[list[dict], list[list[int]]]:
    """Return the texts as padded batches, and the rows of each."""
    tokenizer = Tokenizer.from_file(str(embedder.artifact.file("tokenizer.json")))
    tokenizer.enable_truncation(embedder.max_seq_length)
    tokenizer.enable_padding()
    rows = [
        list(range(start, min(start + size, len(TEXT_KINDS))))
        for start in range(0, len(TEXT_KINDS), size)
    ]
    found = [tokenizer.encode_batch([TEXT_KINDS[row] for row in numbers]) for numbers in rows]
    batches = [
        {
            "input_ids": [e.ids for e in encodings],
            "attention_mask": [e.attention_mask for e in encodings],
        }
        for encodings in found
    ]
    return batches, rows


# onnxruntime alone, as the README shows it


def readme_lines() -> str:
    """Return the README's block that uses onnxruntime alone."""
    readme = Path(os.environ.get("INTEROP_README", ROOT / "README.md")).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if "onnxruntime.InferenceSession(" in block]
    return found


def test_onnxruntime_as_the_readme_shows_it(read, model, tmp_path):
    lines = readme_lines()
    assert len([line for line in lines.splitlines() if line.strip()]) <= 15
    if model.pooling == "cls":  # as its comment says
        lines, changed = re.subn(
            r"^pooled = .*$", "pooled = hidden[:, 0]", lines, flags=re.MULTILINE
        )
        assert changed == 1
    script = tmp_path / "readme.py"
    script.write_text(
        "import json, sys\n"
        "job = json.load(open(sys.argv[1], encoding='utf-8'))\n"
        "texts = job['texts']\n"
        f"{lines}\n"
        "vectors.astype('<f4').tofile(job['output'])\n"
        "print(json.dumps({}))\n",
        encoding="utf-8",
    )
    (tmp_path / "model").symlink_to(model.artifact)
    read("onnxruntime", script, model.expected, what="onnxruntime, README")


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


USERS = READERS / "sentence_transformers_users.py"


@pytest.mark.parametrize("library", ["keybert", "bertopic"])
@pytest.mark.parametrize("model", ["minilm"], indirect=True)
def test_libraries_that_take_a_sentence_transformer(read, model, library):
    environment = "sentence-transformers-users"
    facts = read(environment, USERS, model.expected, library=library, what=library)
    print(facts, end=" ")


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


CHROMA = READERS / "chroma_reader.py"


@pytest.mark.parametrize("model", ["minilm"], indirect=True)
def test_chroma_default(read, model, home, tmp_path):
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(model.artifact)
    print(read("chroma", CHROMA, model.expected, home=str(home), what="Chroma's default"), end=" ")


RECIPE = READERS / "recipe.py"
HOSTS = {"bertopic": "sentence-transformers-users"}  # environments of other names


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/recipes").glob("*.md")), ids=lambda page: page.stem
)
def test_recipes(page, minilm, home, tmp_path, report):
    environment = HOSTS.get(page.stem, page.stem)
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(minilm.artifact)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    run_reader(environment, RECIPE, tmp_path, {"page": str(page), "home": str(home)})
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
    script = READERS / "serve_reader.py"
    embedder = Embedder(model.artifact, precision="fp32")
    facts = read("serve", script, model.expected, client=client, what=f"serve, {client}", **server,
                 post=lambda flat: exactly(flat, model.expected))  # fmt: skip
    if client == "openai":
        assert facts["models"] == ["m"]
        assert facts["tokens"] == sum(map(len, embedder.token_ids(TEXT_KINDS)))
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
