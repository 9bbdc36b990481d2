"""Where others are faster is found in the ratios, and for fp32 in the speeds of those as faithful."""

from __future__ import annotations

from lab.ahead import ahead_table


def system(title, speed, cosine):
    fidelity = {"mean_cosine": cosine, "min_cosine": cosine}
    cell = {"texts_per_second": speed, "fidelity": fidelity}
    return {"title": title, "throughput": {"short": cell}}


TEXT = {
    "corpora": {"short": {"source": "docs"}},
    "systems": {
        "ours-int8": system("Ours int8", 100, 0.999),
        "ours-fp32": system("Ours fp32", 40, 1.0),
        "rough": system("CandidateScorer", 80, 0.99),
        "exact": system("Exact", 50, 0.99999),
        "hasty": system("Hasty", 200, 0.5),
    },
    "ratios": {
        "start: ours-int8 over rough": {"value": 0.5, "of": "x"},
        "start: ours-int8 over ours-fp32": {"value": 0.9, "of": "x"},
        "latency of 1: ours-int8 over exact": {"value": 2.0, "of": "x"},
        "share of the roofline, short: ours-int8": {"value": 0.4, "of": "x"},
    },
}
SIMILARITY = {
    "systems": {"ours": {"title": "Ours"}, "faiss": {"title": "Faiss"}},
    "ratios": {
        "best, 10 rows: ours over faiss": {"value": 0.8, "of": "x"},
        "cost per pair, 10 over 200 rows": {"value": 0.9, "of": "x"},
    },
}


def test_every_case_is_listed_where_another_is_faster():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in ahead_table(TEXT, None, SIMILARITY).splitlines()[2:]]  # fmt: skip
    assert rows == [
        ["start", "Ours int8", "CandidateScorer", "2.00"],
        ["throughput, short", "Ours int8", "Hasty", "2.00"],
        ["throughput, short", "Ours fp32", "Exact", "1.25"],
        ["best, 10 rows", "Ours", "Faiss", "1.25"],
    ]
