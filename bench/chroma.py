"""Chroma's default embedding function and this package's, on 1, 32 and 1,000 short texts.

    python bench/chroma.py FILE [--column C] [--rounds 3] [--model all-MiniLM-L6-v2]

Texts are the first words of the file's, at most 16 each. Both run in turn in one process, with chromadb
installed; Chroma's function reads its model from ~/.cache/chroma, and downloads it there once.
"""

from __future__ import annotations

import statistics
from functools import partial
from importlib.metadata import version

import numpy as np
from chromadb.utils.embedding_functions import DefaultEmbeddingFunction
from lab.turns import HERE, in_turns, parser, save

from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.integrations.chroma import OnnxsimEmbeddingFunction

SIZES = (1, 32, 1_000)
WORDS = 16


def main() -> None:
    """Measure, print, and write bench/results/chroma.json."""
    arguments = parser(__doc__, "file", "--column")
    arguments.add_argument("--model", default="all-MiniLM-L6-v2")
    options = arguments.parse_args()
    words = (text.split()[:WORDS] for text in iter_texts(options.file, options.column))
    texts = list(dict.fromkeys(map(" ".join, words)))[: max(SIZES)]
    functions = {
        "chroma": DefaultEmbeddingFunction(),
        "fp32": OnnxsimEmbeddingFunction(options.model, precision="fp32"),
        "int8": OnnxsimEmbeddingFunction(options.model, precision="int8"),
    }
    vectors = {name: np.array(function(texts[:32])) for name, function in functions.items()}
    rows = []
    for size in SIZES:
        jobs = {name: partial(function, texts[:size]) for name, function in functions.items()}
        seconds, _ = in_turns(jobs, options.rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {"texts": size, "seconds": medians}
            | {f"{name}_times": medians["chroma"] / medians[name] for name in ("fp32", "int8")}
        )
        print(rows[-1], flush=True)
    summary = {
        **HERE,
        "versions": {name: version(name) for name in ("chromadb", "onnxruntime")},
        "rounds": options.rounds,
        "mean_words": statistics.mean(len(text.split()) for text in texts),
        "max_difference_fp32": float(np.abs(vectors["chroma"] - vectors["fp32"]).max()),
        "min_cosine_int8": float((vectors["chroma"] * vectors["int8"]).sum(axis=1).min()),
        "rows": rows,
    }
    save("chroma", summary)


if __name__ == "__main__":
    main()
