"""Every architecture that is built directly: PyTorch's numbers in both layouts, and whole exports."""

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import VOCABULARY, change_json, tokenizer_json, write_checkpoint, write_json

from onnxsim_embed.errors import ArtifactError, CheckpointError
from onnxsim_embed.export import export_model
from onnxsim_embed.export import verify as verification
from onnxsim_embed.export.architectures import ARCHITECTURES
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.encoder import Encoder, load_encoder, relative_bias
from onnxsim_embed.export.numpy_encoder import numpy_reference
from onnxsim_embed.export.onnx.encoder_graph import build_encoder
from onnxsim_embed.export.weights import read_tensors
from onnxsim_embed.runtime.session import Session

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

TOLERANCE = 2e-5  # max absolute difference of a hidden state from PyTorch's
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": len(VOCABULARY), "max_position_embeddings": 50,
}  # fmt: skip
DISTILBERT = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 50,
}  # fmt: skip
# The last number: tokens that the positions allow.
KINDS = {
    "bert": ("bert", SMALL | {"pad_token_id": 3}, 50),
    "roberta": ("roberta", SMALL | {"type_vocab_size": 1}, 48),
    "roberta, pad 9": ("roberta", SMALL | {"pad_token_id": 9, "hidden_act": "gelu_new"}, 40),
    "xlm-roberta": ("xlm-roberta", SMALL | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}, 48),
    "camembert": ("camembert", SMALL | {"pad_token_id": 0, "type_vocab_size": 1}, 49),
    "distilbert": ("distilbert", DISTILBERT, 50),
    "distilbert, relu": (
        "distilbert", DISTILBERT | {"activation": "relu", "sinusoidal_pos_embds": True}, 50,
    ),
    "mpnet": ("mpnet", SMALL | {"max_position_embeddings": 162, "layer_norm_eps": 1e-5}, 160),
    "mpnet, pad 4": ("mpnet", SMALL | {"pad_token_id": 4}, 48),  # its positions skip 1 all the same
    "electra": ("electra", SMALL | {"embedding_size": 32}, 50),
    "electra, projected": ("electra", SMALL | {"embedding_size": 16}, 50),
}  # fmt: skip


@dataclass
class Case:
    """A seeded tiny model: PyTorch's, its tensors, and our encoder with a session for each layout."""

    model: object
    config: dict
    tensors: dict[str, np.ndarray]
    encoder: Encoder
    portable: Session
    run: Session
    gpu: Session

    def hidden(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        import torch

        mask = np.ones_like(ids) if mask is None else mask
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
            )
        return output.last_hidden_state.numpy()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @cache
    def build(name: str) -> Case:
        import torch
        from transformers import AutoConfig, AutoModel

        kind, settings, _ = KINDS[name]
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **settings)).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                noise = torch.randn_like(value)
                if value.ndim == 1:
                    value.copy_(0.1 * noise + ("Norm" in key and key.endswith("weight")))
                else:  # of a size that makes attention uneven
                    value.copy_(
                        noise * (0.6 if "embedding" in key else 1.4 / value.shape[1] ** 0.5)
                    )
        config = model.config.to_dict()
        tensors = {key: value.detach().numpy() for key, value in model.named_parameters()}
        encoder, directory = load_encoder(config, tensors), tmp_path_factory.mktemp("graphs")
        layouts = ("portable", "run", "gpu")
        for layout in layouts:
            data = build_encoder(encoder, layout).SerializeToString()
            (directory / layout).write_bytes(data)
        sessions = [Session(directory / layout, "cpu") for layout in layouts]
        return Case(model, config, tensors, encoder, *sessions)

    return build


@pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed")
@pytest.mark.parametrize("name", KINDS)
def test_openvino_computes_the_same(case, tmp_path, name):
    from onnxsim_embed.runtime.openvino_engine import OpenVINOEngine

    file = case(name).portable._path
    ids = np.random.default_rng(0).integers(0, 60, (3, 30))
    hidden = OpenVINOEngine(file, 32, tmp_path, "fp32", 1).run(ids)
    np.testing.assert_allclose(hidden, case(name).run.run(ids), atol=TOLERANCE)


@pytest.mark.parametrize("name", KINDS)
def test_the_layout_of_gpus_computes_the_same(case, name):
    this = case(name)
    ids = np.random.default_rng(0).integers(0, 60, (3, 30))
    mask = (np.arange(30) < [[30], [17], [1]]).astype(np.int64)
    hidden, expected = (session.run(ids, mask)[mask == 1] for session in (this.gpu, this.portable))
    np.testing.assert_allclose(hidden, expected, atol=TOLERANCE)


def write_model(case: Case, directory: Path, pad: int) -> Path:
    """Write the model as a Sentence-Transformers directory whose padding has this id."""
    tokens = [token for token in VOCABULARY if token != "[PAD]"]
    tokens.insert(pad, "[PAD]")
    config = case.config | {"hidden_size": 32}
    write_checkpoint(directory, config=config, tensors=case.tensors, max_seq_length=40)
    (directory / "vocab.txt").unlink()
    write_json(directory / "tokenizer.json", tokenizer_json(tokens))
    change_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return directory


def padded_rows(case: Case, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded left, right, on both sides and not at all; any token, padding's too, may be real."""
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, len(VOCABULARY), (6, tokens))
    starts = rng.integers(0, tokens, 6) * [1, 0, 1, 0, 0, 1]
    ends = tokens - (rng.integers(0, tokens, 6) - starts).clip(0) * [0, 1, 1, 0, 1, 0]
    index = np.arange(tokens)
    mask = ((index >= starts[:, None]) & (index < ends[:, None])).astype(np.int64)
    ids[:4][mask[:4] == 0] = case.config["pad_token_id"]
    return ids, mask


# Against PyTorch


@pytest.mark.parametrize("name", KINDS)
def test_hidden_states_equal_pytorch_s_at_every_length_and_padding(case, name):
    this, longest = case(name), KINDS[name][2]
    for tokens in range(1, longest + 1):
        ids, mask = padded_rows(this, tokens)
        difference = np.abs(this.portable.run(ids, mask) - this.hidden(ids, mask))[mask == 1]
        assert difference.max() < TOLERANCE, (tokens, "portable")
        assert np.abs(this.run.run(ids) - this.hidden(ids)).max() < TOLERANCE, (tokens, "run")
    for session in (this.portable, this.run):
        with pytest.raises(ArtifactError):
            session.run(np.full((2, longest + 1), 7))


@pytest.mark.parametrize("name", KINDS)
def test_the_numpy_reference_equals_pytorch(case, name):
    this = case(name)
    hidden = numpy_reference(this.config, this.tensors)
    for tokens in (1, 2, 9, KINDS[name][2]):
        ids = np.random.default_rng(tokens).integers(0, len(VOCABULARY), (1, tokens))
        assert hidden(ids).dtype == np.float32
        assert np.abs(hidden(ids) - this.hidden(ids)).max() < TOLERANCE


@pytest.mark.parametrize("name", KINDS)
def test_on_the_run_path_a_row_does_not_depend_on_its_batch(case, name):
    session = case(name).run
    for tokens in (1, 2, 17, 40):
        ids = np.random.default_rng(tokens).integers(0, len(VOCABULARY), (11, tokens))
        together = session.run(ids)
        assert np.array_equal(np.concatenate([session.run(row[None]) for row in ids]), together)
        assert np.array_equal(session.run(ids[::-1]), together[::-1])


def test_mpnet_s_buckets_are_transformers_own():
    import torch
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    expected = MPNetEncoder.relative_position_bucket(torch.arange(-511, 512)).numpy()
    table = relative_bias(np.arange(64, dtype=np.float32).reshape(32, 2), 512)
    assert np.array_equal(table, np.stack([2 * expected, 2 * expected + 1]))


# Exports


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("few_texts")
def test_fp32_and_int8_are_exported_and_verified(case, name, tmp_path, monkeypatch):
    kind, _, _ = KINDS[name]
    pad = case(name).config["pad_token_id"]
    directory = write_model(case(name), tmp_path / "c", pad)
    artifact = export_model(directory, tmp_path / "a")
    manifest = artifact.manifest
    assert (manifest.via, manifest.architecture, manifest.pad_token_id) == ("direct", kind, pad)
    assert (manifest.layers, manifest.hidden_size, manifest.max_seq_length) == (2, 32, 40)
    for precision, reference in (("fp32", "PyTorch"), ("int8", "fp32")):
        report = manifest.verification[precision]
        assert (report["reference"], report["problems"]) == (reference, [])
        assert report["batch_variant"] == 0
    assert manifest.verification["fp32"]["min_cosine"] > 0.99999
    assert manifest.verification["int8"]["mean_cosine"] > 0.995
    monkeypatch.setattr(verification.references, "has_torch", lambda: False)
    report = verification.verify_artifact(artifact, against=directory)["fp32"]
    assert (report["reference"], report["problems"]) == ("numpy", [])


# Weights and configuration


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "electra, projected"])
def test_prefixes_and_heads_are_ignored(case, name, tmp_path, caplog):
    this, prefix = case(name), ARCHITECTURES[KINDS[name][0]].prefix
    tensors = {f"{prefix}{key}": value for key, value in this.tensors.items()}
    head = {"lm_head.bias": np.ones(3, np.float32), "classifier.weight": np.ones(3, np.float32)}
    save_file(tensors | head, tmp_path / "model.safetensors")
    encoder = load_encoder(this.config, read_tensors(tmp_path))
    assert np.array_equal(encoder.words, this.encoder.words)
    assert not caplog.records


@pytest.mark.parametrize("key", ["embeddings.task_embeddings", "transformer.layer.2.ffn.lin1.bias"])
def test_weights_of_the_encoder_that_are_not_used_are_logged(case, key, caplog):
    this = case("distilbert")
    with caplog.at_level(logging.WARNING):
        load_encoder(this.config, this.tensors | {key: np.ones(3, np.float32)})
    assert key in caplog.text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("distilbert", {"dim": None}),
        ("distilbert", {"activation": "silu"}),
        ("roberta", {"position_embedding_type": "relative_key"}),
        ("roberta", {"pad_token_id": -1}),
        ("roberta", {"pad_token_id": "1"}),
        ("electra", {"embedding_size": 0}),
        ("mpnet", {"is_decoder": True}),
    ],
)
def test_an_invalid_configuration_names_the_architecture_s_own_key(case, name, change):
    [(key, value)] = change.items()
    with pytest.raises(CheckpointError, match=f"{key}.* {value!r}"):
        load_encoder(case(name).config | change, case(name).tensors)


def test_the_padding_that_config_json_does_not_state_is_the_architecture_s(case, tmp_path):
    directory = write_model(case("mpnet, pad 4"), tmp_path / "c", 1)
    change_json(directory / "config.json", pad_token_id=None)
    change_json(directory / "sentence_bert_config.json", max_seq_length=500)
    assert open_checkpoint(directory).max_seq_length == 48
    artifact = export_model(directory, tmp_path / "a", precisions=["fp32"])
    assert artifact.manifest.pad_token_id == 1
