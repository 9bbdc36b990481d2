"""The model card of an artifact: facts, fidelity and usage."""

from __future__ import annotations

import json
from pathlib import Path

from onnxsim_embed.artifact.manifest import Manifest
from onnxsim_embed.export.fidelity import FIDELITY_HEADER, fidelity_table, token_ids_note

TEMPLATE = """---
library_name: onnxsim-embed
pipeline_tag: sentence-similarity
base_model: {quoted_source}
{licence}tags: [sentence-transformers, onnx, feature-extraction]
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


def write_card(manifest: Manifest, licence: str | None, path: Path) -> None:
    """Write the model card from the manifest."""
    head = "| " + " | ".join(FIDELITY_HEADER) + " |\n" + "|---" * len(FIDELITY_HEADER) + "|\n"
    rows = "\n".join("| " + " | ".join(row) + " |" for row in fidelity_table(manifest.verification))
    note = token_ids_note(manifest.verification)
    text = TEMPLATE.format(
        name=manifest.name,
        source=manifest.source,
        licence=f"license: {licence}\n" if licence else "",
        quoted_source=json.dumps(manifest.source, ensure_ascii=False),
        dim=manifest.dim,
        pooling=" + ".join(manifest.pooling),
        normalize="L2-normalized" if manifest.normalize else "not normalized",
        length=manifest.max_seq_length,
        files="\n".join(
            f"| {k} | `{e.file}` | {e.method} |" for k, e in manifest.precisions.items()
        )
        + "".join(
            f"\n| {k} | `{e.pooled}` | the same, pooled: its output `sentence_embedding` is the vector |"
            for k, e in manifest.precisions.items()
            if e.pooled
        ),
        fidelity=head + rows + (f"\n\n{note}" if note else "") if rows else "Not verified.",
    )
    path.write_text(text, encoding="utf-8")
