"""The model card of an artifact: what it is, how faithful, how to load it."""

from __future__ import annotations

from pathlib import Path

from onnxsim_embed.artifact import Manifest

TEMPLATE = """---
library_name: onnxsim-embed
pipeline_tag: sentence-similarity
base_model: {source}
tags: [sentence-transformers, onnx, feature-extraction]
---

# {name}, exported by onnxsim-embed

ONNX files of `{source}` for sentence embeddings on ONNX Runtime: {dim} dimensions, {pooling} pooling,
{normalize}, at most {length} tokens a text.

| precision | file | made how |
|---|---|---|
{files}

## Fidelity
{fidelity}

## Use
```python
from onnxsim_embed import Embedder

model = Embedder("path/to/this/directory")
vectors = model.encode(["a text", "another"])
```
It also loads in sentence-transformers: `SentenceTransformer("path/to/this/directory", backend="onnx")`.
"""


def fidelity_table(manifest: Manifest) -> list[list[str]]:
    """Return the verification report as rows: precision, reference, texts, min, mean cosine, ..."""
    rows = []
    for precision, part in manifest.verification.items():
        cells = (f"{part[key]:.6f}" for key in ("min_cosine", "mean_cosine", "spearman"))
        rows.append(
            [
                precision,
                part["reference"],
                str(part["texts"]),
                *cells,
                f"{part['top10_overlap']:.3f}",
            ]
        )
    return rows


def write_card(manifest: Manifest, path: Path) -> None:
    """Write the model card from what the manifest says."""
    head = "| precision | compared with | texts | min cosine | mean cosine | Spearman of pairs | top-10 overlap |\n"
    head += "|---|---|---|---|---|---|---|\n"
    rows = "\n".join("| " + " | ".join(row) + " |" for row in fidelity_table(manifest))
    text = TEMPLATE.format(
        name=manifest.name,
        source=manifest.source,
        dim=manifest.dim,
        pooling=" + ".join(manifest.pooling),
        normalize="L2-normalized" if manifest.normalize else "not normalized",
        length=manifest.max_seq_length,
        files="\n".join(
            f"| {k} | `{e.file}` | {e.method} |" for k, e in manifest.precisions.items()
        ),
        fidelity=head + rows if rows else "Not verified.",
    )
    path.write_text(text, encoding="utf-8")
