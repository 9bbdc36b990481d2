"""Whether cost and memory stay flat: ten passes over one file, then from 1,000 to 100,000 texts.

    python bench/steady.py FILE [--column C] [--passes 10]

Resident memory is read from the system after each pass, in a process that did nothing else before. The
growth part takes the first words of the texts, so that 100,000 of them fit into minutes, and repeats no text.
"""

from __future__ import annotations

import resource
from pathlib import Path

import onnxruntime
import psutil
from lab.turns import HERE, parser, save

from onnxsim_embed import Embedder
from onnxsim_embed.files.texts import iter_texts

SIZES = (1_000, 10_000, 100_000)


def resident_mb() -> float:
    """Return this process's resident memory in 1e6 bytes."""
    return psutil.Process().memory_info().rss / 1e6


def main() -> None:
    """Measure, print, and write bench/results/steady.json."""
    arguments = parser(__doc__, "file", "--column")
    arguments.add_argument("--passes", type=int, default=10)
    arguments.add_argument("--most", type=int, help="use so many texts in each pass")
    options = arguments.parse_args()
    texts = list(iter_texts(options.file, options.column))
    model = Embedder.from_pretrained("all-MiniLM-L6-v2", precision="int8")
    loaded = resident_mb()

    passes = []
    for number in range(options.passes):
        model.encode(texts[: options.most])
        report = model.last_report
        passes.append(
            {
                "texts_per_second": report.texts_per_second,
                "tokens_per_second": report.tokens_per_second,
                "resident_mb": resident_mb(),
                "share_of_pooling": report.seconds_pool
                / (report.seconds_run + report.seconds_pool),
                "seconds_tokenize": report.seconds_tokenize,
                "seconds": report.seconds,
            }
        )
        print(number + 1, {name: round(value, 4) for name, value in passes[-1].items()}, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3

    # Texts that fill the model must not leave their memory behind.
    model.encode([" ".join(texts[at : at + 20]) for at in range(200)])
    after_long = resident_mb()

    growth = {}
    words = [text.split() for text in texts]
    for size in SIZES:
        short = [f"{number} " + " ".join(words[number % len(words)][:8]) for number in range(size)]
        model.encode(short)
        growth[size] = 1e6 / model.last_report.tokens_per_second
        print(size, "texts:", round(growth[size], 1), "microseconds a token", flush=True)

    summary = {
        **HERE,
        "onnxruntime": onnxruntime.__version__,
        "texts": {"file": Path(options.file).name, "number": len(texts[: options.most])},
        "resident_mb_loaded": loaded,
        "passes": passes,
        "peak_resident_mb": peak,
        "resident_mb_after_200_long_texts": after_long,
        "microseconds_a_token_by_number_of_texts": growth,
    }
    save("steady", summary)
    print("resident MB: loaded", round(loaded), "peak", round(peak), "long", round(after_long))


if __name__ == "__main__":
    main()
