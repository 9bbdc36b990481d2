"""Tables, and the marked blocks of documents that they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.documents import MARKED, fill, pictures
from lab.tables import load_line, number, refused_table, table
from lab.text_tables import install_table, steady_line

ROOT = Path(__file__).parent.parent.parent
KNOWN = {"speed", "latency", "detail", "similarity", "similarity-growth", "refused", "install", "steady", "ahead",
         "picture-speed", "picture-growth", "picture-stages"}  # fmt: skip


def test_only_blocks_that_were_made_are_replaced():
    document = "\n".join(
        f"<!-- bench:{name} -->\n{name}\n<!-- /bench:{name} -->" for name in ("speed", "other-one")
    )
    filled = fill(document, {"speed": "| new |", "latency": "unused"})
    assert "<!-- bench:speed -->\n| new |\n<!-- /bench:speed -->" in filled
    assert "<!-- bench:other-one -->\nother-one\n<!-- /bench:other-one -->" in filled
    assert fill(filled, {"speed": "| new |"}) == filled


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_documents_have_blocks_that_are_made(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [match[2] for match in MARKED.finditer(text)]
    assert found
    assert set(found) <= KNOWN
    assert len(set(found)) == len(found)
    assert text.count("<!-- bench:") == text.count("<!-- /bench:") == len(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (152.2, "152"), (15.23, "15.2"), (4.465, "4.46"), (0.05, "0.0500"), (None, ""),
     (99.96, "100"), (3, "3.00")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_tables_are_aligned():
    assert table(["a", "bcdef"], [["longer", "x"]]).splitlines() == [
        "| a      | bcdef |",
        "| ------ | ----- |",
        "| longer | x     |",
    ]


def test_reasons_do_not_break_the_table():
    made = refused_table({"refused": {"a": "x | y"}}, None)
    assert made.splitlines()[-1] == "| a             | x \\| y |"
    assert refused_table(None) == ""


def test_the_load_line_names_the_cases_that_other_work_disturbed():
    quiet, busy = {"other_share": 0.02}, {"other_share": 0.345}
    assert load_line({"a": quiet}) == (
        "Other work took at most 2% of the processors during any case."
    )
    assert load_line({"a": quiet, "b": busy}) == (
        "Other work took more than 10% of the processors during: b (34%). Systems whose threads wait for "
        "each other lose most by that: on an idle machine expect smaller differences."
    )
    assert "not known" in load_line({"a": quiet, "b": {"other_share": None}})


def test_installed_sizes_say_which_torch_they_hold():
    result = {"date": "2030-01-02", "python": "3.12", "installs": {
        "onnxsim-embed": {"mb": 151.2, "packages": 5, "holds": ["numpy-2.3"]},
        "big": {"mb": 1234.5, "packages": 61, "holds": ["torch-2.13.0+cpu", "torchthing-1.0"]},
        "bigger": {"mb": 5e3, "packages": 2, "holds": ["nvidia_x-1", "torch-2.14.1"]},
    }}  # fmt: skip
    made = install_table(result)
    assert "| 151   | 5        |            " in made
    assert "| 1,234 | 61       | 2.13.0+cpu " in made
    assert "| 2.14.1, with CUDA |" in made
    assert "cannot install" not in made
    result["installs"]["gone"] = {"refused": "no such package"}
    assert "| no such package |" in install_table(result)


def test_the_steady_line_says_how_memory_went():
    result = {
        "threads": 2,
        "texts": {"file": "a.csv", "number": 3000},
        "passes": [{"resident_mb": mb} for mb in (190.1, 200.2, 205.0, 206.4)],
        "microseconds_a_token_by_number_of_texts": {"1000": 52.04, "100000": 45.1},
    }
    made = steady_line(result)
    assert "4 passes over 3,000 texts (a.csv)" in made
    assert (
        "190 MB resident after the first pass, 200 after half of them, 206 after the last." in made
    )
    assert made.endswith("Microseconds a token: 52.0 in 1,000 texts, 45.1 in 100,000 texts.")


def test_pictures_are_linked_from_where_the_document_is(tmp_path):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "speed.png").touch()
    for name, link in (("README.md", "bench/results"), ("bench/README.md", "results")):
        found = pictures(results, tmp_path / name)
        assert list(found) == ["picture-speed"]
        assert found["picture-speed"].endswith(f"({link}/speed.png)")
