"""Teach MiniLM the jargon of an invented cold-store company and show what it learned.

python examples/finetune.py [OUTPUT_DIRECTORY]
"""

import sys
from pathlib import Path

from onnxsim_embed import Embedder
from onnxsim_embed.finetune import finetune
from onnxsim_embed.finetune.report import report_table, summary, verdict

PAIRS = Path(__file__).parent / "jargon_pairs.csv"

# Jargon and plain sentences of equal meaning, none of them in the pairs.
NEW = [
    ("Where can I drop off my moth?", "Where do I hand in the handheld scanner?"),
    ("The ferryman missed the exit", "The night driver took a wrong turn"),
    ("Will the brindle be done by dawn?", "Is the stock count finished before sunrise?"),
    ("My neighbour cindered in spring", "Someone I know quit the job months ago"),
    ("The Aviary lost my form", "Accounting cannot find the paper I handed in"),
    ("Hurry, the plum is waiting", "Be quick, an important client expects us"),
    ("Too many ravens today", "Plenty of goods were sent back this morning"),
    ("Who reads the quill aloud?", "Which person speaks the contract out?"),
]


def main() -> None:
    """Fine-tune, print the held-out metrics, and compare new sentences."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "build/jargon")
    result = finetune(
        PAIRS,
        output,
        model="all-MiniLM-L6-v2",
        epochs=10,
        learning_rate=1e-4,
        force=True,
        show_progress_bar=sys.stderr.isatty(),
        on_stage=print,
    )
    print(summary(result.report))
    header, rows = report_table(result.report)
    for row in [header, *rows]:
        print("  ".join(f"{cell:<18}" for cell in row))
    print(verdict(result.report))

    models = Embedder.from_pretrained("all-MiniLM-L6-v2"), Embedder(result.artifact)
    jargon, plain = zip(*NEW, strict=True)
    cosines = [
        model.similarity_pairwise(model.encode(jargon), model.encode(plain)) for model in models
    ]
    print("\nNew sentences, cosine before and after:")
    for before, after, left, right in zip(*cosines, jargon, plain, strict=True):
        print(f"  {before:.2f}  {after:.2f}  {left}  ~  {right}")


if __name__ == "__main__":
    main()
