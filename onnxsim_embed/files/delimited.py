"""Lines of csv and tsv -> cells, by RFC 4180; the delimiter and the quoting of a sample of lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

DELIMITERS = ",;\t|"

# A quoted cell above this size is an unclosed quote.
MAX_CELL = 1 << 24


def split_records(lines: Iterator[str], delimiter: str, quoting: bool) -> Iterator[list[str] | str]:
    """Yield the cells of each record, or what is wrong with it."""
    for line in lines:
        if quoting and '"' in line:
            yield _split_quoted(line, lines, delimiter)
        else:
            yield line.rstrip("\r\n").split(delimiter)


def _split_quoted(line: str, lines: Iterator[str], delimiter: str) -> list[str] | str:
    """Split a record by RFC 4180; a quoted cell may continue on the next lines."""
    cells, at = [], 0
    while True:
        if line.startswith('"', at):
            pieces, size, at = [], 0, at + 1
            while (end := line.find('"', at)) < 0 or line.startswith('"', end + 1):
                if end >= 0:  # a doubled quote
                    pieces.append(line[at : end + 1])
                    at = end + 2
                    continue
                pieces.append(line[at:])
                size += len(line) - at
                line, at = next(lines, ""), 0
                if not line or size > MAX_CELL:
                    return "has a quote that is not closed"
            cells.append("".join(pieces) + line[at:end])
            at = end + 1
            if line[at:].strip("\r\n") and line[at] != delimiter:
                return f"has a closing quote that {delimiter!r} does not follow"
        else:
            end = line.find(delimiter, at)
            cells.append(line[at:end] if end >= 0 else line[at:].rstrip("\r\n"))
            at = end if end >= 0 else len(line)
        if not line.startswith(delimiter, at):
            return cells
        at += 1


def detect_delimiter(sample: Sequence[str], usual: str) -> str:
    """Return the delimiter that splits most sampled rows like the header; the usual one if it does."""
    columns = {}
    for delimiter in (usual, *DELIMITERS):
        counts = _cell_counts(sample, delimiter, True)
        if counts and counts[0] > 1 and counts.count(counts[0]) > 0.8 * len(counts):
            columns[delimiter] = counts[0]
    return usual if usual in columns else max(columns, key=lambda d: columns[d], default=usual)


def tsv_is_quoted(sample: Sequence[str]) -> bool:
    """Return whether tsv follows the quoting rules of csv: header quoted, or all quotes as csv's.

    Where lines without quoting have the right number of cells, doubled quotes must prove it.
    """
    text, cell = "".join(sample), '"(?:[^"]|"")*"'
    if re.match(rf"{cell}(?:\t{cell})*(?:[\r\n]|$)", text):
        return True
    quoted = re.findall(rf"(?:^|(?<=[\t\r\n])){cell}(?=[\t\r\n]|$)", text)
    if not quoted or sum(part.count('"') for part in quoted) < text.count('"'):
        return False
    widths, plain = (set(_cell_counts(sample, "\t", quoting)) for quoting in (True, False))
    return len(widths) == 1 and (plain != widths or any('""' in part[1:-1] for part in quoted))


def _cell_counts(sample: Sequence[str], delimiter: str, quoting: bool) -> list[int]:
    """Return the number of cells of the header and of records neither blank nor malformed."""
    header, *records = [*split_records(iter(sample), delimiter, quoting)] or [""]
    if isinstance(header, str):
        return []
    return [len(cells) for cells in (header, *records) if isinstance(cells, list) and cells != [""]]
