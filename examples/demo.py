"""From a CSV of texts to a similarity graph: what `make demo` runs.

python examples/demo.py [OUTPUT_DIRECTORY]
"""

import csv
import sys
import time
from pathlib import Path

import numpy as np
from scipy.sparse import save_npz

from onnxsim_embed import Embedder, cos_sim, similarity_matrix
from onnxsim_embed.export import export_model
from onnxsim_embed.plot import heatmap
from onnxsim_embed.similarity.clustering import communities
from onnxsim_embed.similarity.compare import closest_pairs

THRESHOLD = 0.5
HERE = Path(__file__).parent


def is_english(text: str) -> bool:
    """Return whether a text holds words that hardly any other language has."""
    return len({"the", "and", "of", "for", "with", "are"} & set(text.lower().split())) > 1


def name(row: dict[str, str]) -> str:
    """Return id, country and title of a project, in a line of a terminal."""
    return f"{row['id']} {row['country']}: {row['title']}"[:70]


def main() -> None:
    """Export, embed, compare, draw; print what each stage took."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")
    output.mkdir(parents=True, exist_ok=True)
    with (HERE / "projects.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    texts = [row["title_and_description"] for row in rows]
    titles = [row["title"] or "(empty)" for row in rows]
    seconds = {}

    started = time.perf_counter()
    artifact = export_model("all-MiniLM-L6-v2", output / "model", force=True)
    seconds["export to ONNX, fp32 and int8, and verify"] = time.perf_counter() - started

    started = time.perf_counter()
    model = Embedder(artifact)
    seconds["load"] = time.perf_counter() - started

    started = time.perf_counter()
    vectors = model.encode(texts)
    seconds[f"embed {len(texts)} texts"] = time.perf_counter() - started
    np.save(output / "vectors.npy", vectors)

    started = time.perf_counter()
    matrix = similarity_matrix(vectors, threshold=THRESHOLD)
    save_npz(output / "similarities.npz", matrix)
    seconds["compare all with all"] = time.perf_counter() - started

    started = time.perf_counter()
    heatmap(cos_sim(vectors, vectors), output / "heatmap.png", labels=titles, order=True,
            title=f"{len(texts)} project descriptions, {artifact.manifest.name}")  # fmt: skip
    seconds["draw the heatmap"] = time.perf_counter() - started

    english = np.array([row for row, text in enumerate(texts) if is_english(text)])
    print("\nProjects that are probably the same, or phases of one:")
    for left, right, score in zip(*closest_pairs(vectors[english], 8), strict=True):
        print(f"  {score:.2f}  {name(rows[english[left]])}\n        {name(rows[english[right]])}")
    print("\nThe largest groups of related projects:")
    for group in communities(vectors[english], threshold=0.55, min_size=4)[:3]:
        print(
            "\n".join(
                f"  {'-' if rank else '*'} {name(rows[english[row]])}"
                for rank, row in enumerate(group)
            )
        )
    print(f"\n{len(texts) - len(english)} texts are too short to tell or in other languages, which this English model\n"
          "hardly tells apart: left out here; a multilingual model compares them.")  # fmt: skip
    print("\nWhere the time went:")
    for stage, value in seconds.items():
        print(f"  {value:7.2f} s  {stage}")
    report = model.last_report
    print(f"\n{report.texts} texts, {report.tokens:,} tokens; {report.truncated} texts were longer than "
          f"{model.max_seq_length} tokens and were cut there.")  # fmt: skip
    print(f"{matrix.nnz:,} of {len(texts) ** 2:,} scores are above {THRESHOLD}.")
    print(f"Wrote vectors.npy, similarities.npz, heatmap.png and model/ to {output}.")


if __name__ == "__main__":
    main()
