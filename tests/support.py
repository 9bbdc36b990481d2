"""Tiny seeded checkpoints and texts that tests share, built in code. No network."""

from __future__ import annotations

import csv
import inspect
import io
import json
import tempfile
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WORD_LIST = """
the a of and to in is it for on with as at by from water road school health project rural people
training support village river market solar energy forest child women farm food city bank data
code cat dog sun sky weather lovely today ##s ##ing ##ed ##er ##ly ##tion
"""
WORDS = WORD_LIST.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
VOCABULARY = list(dict.fromkeys(
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{c}" for c in LETTERS)]
))  # fmt: skip

TEXTS = [
    "the water of the river",
    "the river and the water",
    "",
    "   ",
    "rural school project for children",
    "a school for children in the village",
    "solar energy",
    "solar energy",
    "women farm food for the market. " * 4,
    "naïve café 漢字 🙂",
    "data code cat dog " * 40,
    "x",
]

SCORED_PAIRS = (
    ["solar energy", "the water of the river", "a cat", "rural school", "data code", "x"],
    ["energy of the sun", "the river", "a dog", "village market", "the sky today", "x"],
    [4.2, 3.5, 3.0, 1.5, 0.0, 5.0],
)


def tokenizer_json(vocabulary: list[str] = VOCABULARY) -> dict:
    """A BERT WordPiece tokenizer with a stale padding and truncation, as published ones have."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [
            {"id": ids[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for t in special
        ],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {
                t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": ids},
    }  # fmt: skip


def bert_config(**changes) -> dict:
    """config.json of the tiny model: 2 layers, 32 wide, 4 heads."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "vocab_size": len(VOCABULARY),
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
    } | changes


def bert_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded random weights under PyTorch's names, of a size that makes attention uneven."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    tensors = {}

    def matrix(name: str, *shape: int, scale: float) -> None:
        tensors[name] = (rng.standard_normal(shape) * scale).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        matrix(f"{name}.weight", outputs, inputs, scale=1.4 / np.sqrt(inputs))
        matrix(f"{name}.bias", outputs, scale=0.1)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)
        matrix(f"{name}.bias", hidden, scale=0.1)

    matrix("embeddings.word_embeddings.weight", config["vocab_size"], hidden, scale=1.0)
    matrix(
        "embeddings.position_embeddings.weight",
        config["max_position_embeddings"],
        hidden,
        scale=0.3,
    )
    matrix("embeddings.token_type_embeddings.weight", config["type_vocab_size"], hidden, scale=0.3)
    norm("embeddings.LayerNorm")
    for number in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{number}"
        for part in ("query", "key", "value"):
            linear(f"{name}.attention.self.{part}", hidden, hidden)
        linear(f"{name}.attention.output.dense", hidden, hidden)
        norm(f"{name}.attention.output.LayerNorm")
        linear(f"{name}.intermediate.dense", inner, hidden)
        linear(f"{name}.output.dense", hidden, inner)
        norm(f"{name}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    return tensors


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path: Path, **changes) -> None:
    """Change keys of a JSON file, or write a new one; None removes a key."""
    table = (read_json(path) if path.is_file() else {}) | changes
    write_json(path, {key: value for key, value in table.items() if value is not None})


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def write_checkpoint(
    directory: Path,
    *,
    pooling: str | None = "mean",
    normalize: bool = True,
    dense: bool = False,
    schema: str = "legacy",
    seed: int = 0,
    prompts: dict[str, str] | None = None,
    config: dict | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    max_seq_length: int = 48,
) -> Path:
    """Write a Sentence-Transformers directory; `schema` is legacy (versions 2 to 5.3) or new (5.4 on).

    `pooling=None` leaves modules.json out: a plain Hugging Face directory.
    """
    config = config or bert_config()
    tensors = tensors if tensors is not None else bert_tensors(config, seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    save_file(tensors, directory / "model.safetensors")
    write_json(directory / "tokenizer.json", tokenizer_json())
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "max_length": 8,
                        "model_max_length": max_seq_length if schema == "new" else 512,
                        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
                        "cls_token": "[CLS]", "mask_token": "[MASK]"}  # fmt: skip
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    if pooling is None:
        return directory
    legacy = schema == "legacy"
    kinds = {"Transformer": "base.modules.transformer", "Pooling": "sentence_transformer.modules.pooling",
             "Dense": "base.modules.dense", "Normalize": "base.modules.normalize"}  # fmt: skip
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if legacy:
        write_json(
            directory / "sentence_bert_config.json",
            {"max_seq_length": max_seq_length, "do_lower_case": False},
        )
        keys = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens",
                "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens",
                "lasttoken": "lasttoken"}  # fmt: skip
        table = {f"pooling_mode_{key}": name in pooling.split("+") for name, key in keys.items()}
        write_json(
            directory / "1_Pooling/config.json",
            {"word_embedding_dimension": config["hidden_size"], **table},
        )
    else:
        write_json(
            directory / "sentence_bert_config.json", {"transformer_task": "feature-extraction"}
        )
        modes = pooling.split("+")
        mode = modes[0] if len(modes) == 1 else modes
        table = {
            "embedding_dimension": config["hidden_size"],
            "pooling_mode": mode,
            "include_prompt": True,
        }
        write_json(directory / "1_Pooling/config.json", table)
    if dense:
        modules.append(("2_Dense", "Dense"))
        rng = np.random.default_rng(seed + 1)
        width = config["hidden_size"] * len(pooling.split("+"))
        write_json(directory / "2_Dense/config.json", {
            "in_features": width, "out_features": 16, "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh"})  # fmt: skip
        save_file({"linear.weight": (rng.standard_normal((16, width)) * 0.3).astype(np.float32),
                   "linear.bias": rng.standard_normal(16).astype(np.float32)},
                  directory / "2_Dense/model.safetensors")  # fmt: skip
    if normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (directory / modules[-1][0]).mkdir(exist_ok=True)
    write_json(directory / "modules.json", [
        {"idx": i, "name": str(i), "path": path,
         "type": f"sentence_transformers.models.{kind}" if legacy else f"sentence_transformers.{kinds[kind]}.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ])  # fmt: skip
    write_json(directory / "config_sentence_transformers.json",
               {"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})  # fmt: skip
    return directory


def names(directory: Path) -> list[str]:
    """The sorted names in a directory."""
    return sorted(path.name for path in directory.iterdir())


def read_rows(path) -> list[dict]:
    """The rows of a csv or tsv file."""
    with Path(path).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if Path(path).suffix == ".tsv" else ","))


def sentence_transformer(directory: Path):
    """The same checkpoint in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu", local_files_only=True)


def jargon_pairs(count: int = 40) -> tuple[list[str], list[str]]:
    """Sources and targets for fine-tuning: a code of two letters stands for a noun."""
    nouns = [word for word in WORDS[15:45] if len(word) > 3]
    rows = np.random.default_rng(0).integers(8, size=count).tolist()
    sources = [f"the x{chr(97 + row)} {i}" for i, row in enumerate(rows)]
    return sources, [f"{nouns[row]} at {i}" for i, row in enumerate(rows)]


def run_usage(documented: object, artifact: object) -> str:
    """Run what stands below "Usage::", on a tiny model; return what it prints."""
    code = textwrap.dedent(inspect.getdoc(documented).partition("Usage::\n")[2])
    assert '"all-MiniLM-L6-v2"' in code
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code.replace('"all-MiniLM-L6-v2"', repr(str(artifact))), {"__name__": "usage"})
    return printed.getvalue().strip()


def tiny_bert(hidden_act: str = "gelu", change=None, **config):
    """The tiny encoder of `bert_tensors`; `change` may edit its tensors, name by name."""
    from onnxsim_embed.export.encoder import load_encoder

    config = bert_config(hidden_act=hidden_act, **config)
    tensors = bert_tensors(config)
    for name, value in tensors.items():
        if change:
            change(name, value)
    return load_encoder(config, tensors)


def calibrate(encoder, token_ids):
    """The inputs of an encoder's linears over texts, which calibration observes."""
    import onnx

    from onnxsim_embed.export.onnx.encoder_graph import build_encoder
    from onnxsim_embed.export.quantization.calibration import collect_activations

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.onnx"
        onnx.save(build_encoder(encoder), file)
        return collect_activations(encoder, token_ids, file)


def quantize(encoder, seen, pick=lambda name, fits: fits[0]):
    """Return the int8 encoder, and what the manifest records; `pick` chooses the fit of each input."""
    from onnxsim_embed.export.quantization import encoder as quantization
    from onnxsim_embed.export.quantization.gptq import quantize_table

    groups = quantization.fit_encoder(encoder, seen)
    choice = {name: pick(name.partition(".")[2], group.fits) for name, group in groups.items()}
    linears = quantization.Quantizer(groups)(choice, final=True)
    int8 = quantization.assemble(encoder, quantize_table(encoder.words), choice, linears)
    return int8, quantization.describe_layers(groups, choice)


def random_token_ids(seed: int, texts: int, longest: int = 45) -> list[np.ndarray]:
    """Texts of random tokens between [CLS] and [SEP]."""
    rng = np.random.default_rng(seed)
    ends = [VOCABULARY.index("[CLS]")], [VOCABULARY.index("[SEP]")]
    lengths = rng.integers(0, longest - 1, texts)
    return [
        np.concatenate([ends[0], rng.integers(5, len(VOCABULARY), length), ends[1]]).astype(
            np.int64
        )
        for length in lengths
    ]


def run_onnx(model, ids: np.ndarray, mask: np.ndarray | None = None, level: str = "ORT_ENABLE_ALL"):
    """Run an ONNX model (or file) of either layout on rows (batch, tokens); return its outputs."""
    from onnxsim_embed.system.onnx_session import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    source = model.SerializeToString() if hasattr(model, "SerializeToString") else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    mask = np.ones_like(ids) if mask is None else mask
    feed = {"input_ids": ids, "attention_mask": mask}
    if session.get_outputs()[0].name == "hidden":  # the run layout: (tokens, batch)
        [hidden] = session.run(["hidden"], {"input_ids": np.ascontiguousarray(ids.T)})
        return [hidden.swapaxes(0, 1)]
    return session.run(None, {entry.name: feed[entry.name] for entry in session.get_inputs()})


def normal(seed: int, *shape: int) -> np.ndarray:
    """Seeded normally distributed float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with that of b."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def provenance(**changes):
    """A valid Provenance of vectors of dimension 4."""
    from onnxsim_embed.files.provenance import Provenance

    fields = {
        "model": "tiny", "model_digest": "ab", "weights_digest": "cd", "precision": "fp32",
        "pooling": "cls+mean", "normalize": True, "prompt": "a dog ", "max_seq_length": 48, "dim": 4,
        "truncate_dim": None, "dtype": "float32", "ranges": None, "provider": "CPUExecutionProvider",
        "onnxsim_embed": "1", "onnxruntime": "2",
    }  # fmt: skip
    return Provenance(**(fields | changes))


def write_shards(directory, vectors, sizes, ids=None, id_type="int64", diagnostics=()):
    """Write a directory of vectors in shards of these sizes; diagnostics are (shard, diagnostic)."""
    from onnxsim_embed.files.locations import Directory
    from onnxsim_embed.files.vector_directory import (
        JOB,
        VectorDirectory,
        VectorShard,
        pack_shard,
        shard_file,
    )  # fmt: skip

    target, shards, start = Directory(directory), [], 0
    ids = list(range(len(vectors))) if ids is None else ids
    target.write(JOB, b"{}")
    for number, rows in enumerate(sizes):
        part = slice(start, start := start + rows)
        own = tuple(entry for shard, entry in diagnostics if shard == number)
        data, digest = pack_shard(ids[part], vectors[part], own, provenance(), id_type)
        target.write(shard_file(number), data)
        shards.append(VectorShard(shard_file(number), rows, digest, own))
    stored = VectorDirectory(target, vectors.shape[1], tuple(shards), provenance())
    stored.write_index()
    return stored


def iter_column(path, column=None, **options):
    """Yield the texts of a column; a row without one is an error."""
    from onnxsim_embed.files.texts import ReadReport, iter_rows

    for text, _, _ in iter_rows(path, column, report=ReadReport(), **options):
        yield text
