"""Every measurement in one run: results/*.json, the tables of both READMEs, and the pictures.

    python bench/run.py [--peers installed|all|none|NAMES] [--texts FILE --column C] [--vectors FILE.npy]

`make bench` measures ours and what is installed in this environment, in minutes. `make bench-full` is
`--peers all --make-environments`: every peer in an environment of its own under build/bench. Texts of
your own are measured beside the documentation; --kinds texts leaves that out. With --out, nothing but
that directory is written. `make bench-check` compares the ratios of a fresh run with results/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from lab import install_size, report
from lab.corpus import Corpus, documentation, file_corpus
from lab.peers import SIMILARITY_SYSTEMS, TEXT_SYSTEMS, Environments
from lab.similarity_bench import SimilarityBench, SimilarityPlan
from lab.text_bench import TextBench
from lab.text_plan import CASES, TextPlan

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.cache import locate_artifact
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.system.hardware import available_cpus

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUILD = ROOT / "build" / "bench"
DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md")
MEASURED = ("text", "similarity", "install")
PEERS = ("installed", "all", "none", *TEXT_SYSTEMS, *SIMILARITY_SYSTEMS)

# Kinds of texts, and how many: about equal shares of the time.
COUNTS = {"short": 1000, "descriptions": 128, "long": 16, "texts": 200}


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--only", default=",".join(MEASURED), help=f"of {', '.join(MEASURED)}")
    parser.add_argument("--peers", default="installed", help="names, or installed, all, none")
    parser.add_argument("--peer-python", help="interpreter of an environment with all peers")
    parser.add_argument("--make-environments", action="store_true", help="one for each peer")
    parser.add_argument("--kinds", default=",".join(COUNTS), help="of texts")
    parser.add_argument("--texts", help="texts of your own, beside documentation")
    parser.add_argument("--column")
    parser.add_argument("--checkpoint", type=Path, help="what peers load in place of --model")
    parser.add_argument("--sts", type=Path, help="csv: text, text, score")
    parser.add_argument("--vectors", type=Path, help=".npy; default: sentences of documentation")
    parser.add_argument("--rows", type=int, default=10_000, help="vectors made of documentation")
    parser.add_argument("--large", type=int, default=0, help="rows of the large top-k of ours")
    parser.add_argument("--share", type=float, default=1.0, help="of the texts, for a trial")
    parser.add_argument("--cases", default=",".join(CASES), help="of texts, beside throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--out", type=Path, help="write here alone; default: bench/results")
    parser.add_argument("--check", action="store_true", help="compare with results/, write nothing")
    parser.add_argument("--report", action="store_true", help="only tables and pictures, from JSON")
    return parser.parse_args()


def say(message: str) -> None:
    """Tell what happens."""
    print(message, flush=True)


def corpora(given: argparse.Namespace) -> tuple[Corpus, ...]:
    """Return the texts, the documentation's first."""
    kinds = [kind for kind in given.kinds.split(",") if kind]
    counts = {kind: max(8, int(COUNTS[kind] * given.share)) for kind in kinds}
    found = [documentation(kind, n) for kind, n in counts.items() if kind != "texts"]
    if given.texts and "texts" in counts:
        texts = list(iter_texts(given.texts, given.column))
        found.append(file_corpus(texts, Path(given.texts).name, counts["texts"]))
    if not found:
        sys.exit("no texts: --kinds texts needs --texts FILE")
    return tuple(found)


def vectors(given: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Return the vectors whose similarities are measured, and where they come from."""
    if given.vectors:
        return np.load(given.vectors), given.vectors.name
    sentences = documentation("short", given.rows)
    say(f"encoding {len(sentences.texts)} sentences")
    model = Embedder.from_pretrained(given.model, precision="fp32")
    source = f"sentences of the {sentences.source}, by {model.artifact.manifest.name}"
    return model.encode(list(sentences.texts)), source


def measure(given: argparse.Namespace, directory: Path) -> None:
    """Measure what is asked for and write the JSON."""
    made = BUILD / "environments" if given.make_environments else None
    environments = Environments(given.peer_python, made, say)
    names, only = given.peers.split(","), given.only.split(",")
    how = {"threads": given.threads, "rounds": given.rounds, "patience": given.patience}
    if "text" in only:
        plan = TextPlan(
            model=given.model,
            corpora=corpora(given),
            peers=environments.choose(names, TEXT_SYSTEMS),
            work=BUILD / "models" / locate_artifact(given.model).directory.name,
            cases=tuple(case for case in given.cases.split(",") if case),
            checkpoint=given.checkpoint,
            sts=given.sts,
            **how,
        )
        report.write_json(directory / "text.json", TextBench(plan, environments, say).run())
    if "similarity" in only:
        values, source = vectors(given)
        similarity = SimilarityPlan(
            vectors=values,
            source=source,
            peers=environments.choose(names, SIMILARITY_SYSTEMS),
            work=BUILD / "similarity",
            large=given.large,
            **how,
        )
        result = SimilarityBench(similarity, environments, say).run()
        report.write_json(directory / "similarity.json", result)
    if "install" in only:
        others = install_size.INSTALLS if given.peers == "all" else {}
        ours = f"onnxsim-embed[cpu] @ {ROOT.as_uri()}"
        report.write_json(directory / "install.json", install_size.install_sizes(ours, others, say))


def main() -> None:
    """Measure, write, report; or compare."""
    given = options()
    tables = {"only": MEASURED, "cases": CASES, "kinds": COUNTS, "peers": PEERS}
    for name, known in tables.items():
        unknown = set(getattr(given, name).split(",")) - {*known, ""}
        if unknown:
            sys.exit(f"--{name} takes {', '.join(known)}, got {sorted(unknown)[0]!r}")
    directory = BUILD / "check" if given.check else (given.out or RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    if not given.report:
        measure(given, directory)
    if given.check:
        sys.exit(0 if report.compare(RESULTS, directory, say) else 1)
    report.write_report(directory, DOCUMENTS if given.out is None else (), say)
    say(f"written to {directory}")


if __name__ == "__main__":
    main()
