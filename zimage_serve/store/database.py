"""The database beside the pictures: jobs, pictures and training runs. A row is written after the file that it names."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import JsonObject

_VERSION = 1  # of the tables
_TABLES = (
    "CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, client TEXT NOT NULL, state TEXT NOT NULL, "
    "asked TEXT NOT NULL, error TEXT, created REAL NOT NULL, finished REAL)",
    "CREATE INDEX IF NOT EXISTS jobs_by_time ON jobs (created)",
    "CREATE TABLE IF NOT EXISTS pictures (id TEXT PRIMARY KEY, job TEXT NOT NULL, place INTEGER NOT NULL, "
    "prompt TEXT NOT NULL, record TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, "
    "created REAL NOT NULL)",
    "CREATE INDEX IF NOT EXISTS pictures_by_job ON pictures (job)",
    "CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY, name TEXT NOT NULL, config TEXT NOT NULL, "
    "state TEXT NOT NULL, step INTEGER NOT NULL, total INTEGER NOT NULL, error TEXT, created REAL NOT NULL, "
    "finished REAL)",
)
Row: TypeAlias = JsonObject  # of a table, by column
Value: TypeAlias = str | int | float | None


class Database:
    """The tables of a server. Any thread may use them."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the database in `path`. Raises ConfigError if it cannot be used."""
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        try:
            self._prepare(path)
        except sqlite3.Error as error:
            self._connection.close()
            raise ConfigError(f"{path}: cannot be used as the server's database: {error}") from error

    def _prepare(self, path: Path) -> None:
        """Makes the tables that are missing."""
        if int(self._run("PRAGMA user_version")[0]["user_version"]) > _VERSION:
            self._connection.close()
            raise ConfigError(f"{path}: was written by a newer zimage: update, or give another `folder`")
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
        for statement in _TABLES:
            self._run(statement)
        self._run(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._connection.close()

    def _run(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        with self._lock:
            return [dict(row) for row in self._connection.execute(statement, values).fetchall()]

    # jobs

    def add_job(self, id: str, client: str, asked: Mapping[str, object]) -> None:
        """A new job that waits."""
        values = (id, client, "queued", json.dumps(asked), time.time())
        self._run("INSERT INTO jobs (id, client, state, asked, created) VALUES (?, ?, ?, ?, ?)", values)

    def end_job(self, id: str, state: str, error: str | None, pictures: Sequence[Row] = ()) -> None:
        """The job has ended in `state`, and `pictures` are in their files. All of it is written, or none."""
        with self._lock, self._connection:
            self._run("BEGIN")
            for picture in pictures:
                self.add_picture(picture)
            self._run(
                "UPDATE jobs SET state = ?, error = ?, finished = ? WHERE id = ?", (state, error, time.time(), id)
            )

    def forget_job(self, id: str) -> None:
        """Deletes a job that was refused."""
        self._run("DELETE FROM jobs WHERE id = ?", (id,))

    def job(self, id: str) -> Row | None:
        """The job `id`, with its pictures."""
        found = self._run("SELECT * FROM jobs WHERE id = ?", (id,))
        return self._with_pictures(found[0]) if found else None

    def jobs(self, limit: int) -> list[Row]:
        """The last `limit` jobs, the newest first."""
        found = self._run("SELECT * FROM jobs ORDER BY created DESC, id DESC LIMIT ?", (limit,))
        return [self._with_pictures(row) for row in found]

    def interrupt_jobs(self, error: str) -> None:
        """Ends all jobs that had not ended."""
        open_jobs = "state IN ('queued', 'running')"
        self._run(f"UPDATE jobs SET state = 'failed', error = ?, finished = ? WHERE {open_jobs}", (error, time.time()))

    def _with_pictures(self, row: Row) -> Row:
        ids = self._run("SELECT id FROM pictures WHERE job = ? ORDER BY place", (row["id"],))
        return {**row, "asked": json.loads(row["asked"]), "pictures": [each["id"] for each in ids]}

    # pictures

    def add_picture(self, picture: Row) -> None:
        """A picture that is in its file."""
        names = ("id", "job", "place", "prompt", "record", "width", "height", "created")
        values = [json.dumps(picture[name]) if name == "record" else picture[name] for name in names]
        marks = ", ".join("?" * len(names))
        self._run(f"INSERT OR REPLACE INTO pictures ({', '.join(names)}) VALUES ({marks})", values)

    def picture(self, id: str) -> Row | None:
        """The picture `id`."""
        found = self._run("SELECT * FROM pictures WHERE id = ?", (id,))
        return _decoded(found[0]) if found else None

    def pictures(self, search: str, before: str, limit: int) -> list[Row]:
        """At most `limit` pictures, the newest first, with all words of `search` in the prompt.

        before: the id of a picture; only older ones are given. "" gives the newest.
        """
        conditions, values = ["1"], list[Value]()
        for word in search.split():
            conditions.append(r"prompt LIKE ? ESCAPE '\'")
            values.append("%" + "".join(f"\\{c}" if c in r"\%_" else c for c in word) + "%")
        if before:
            conditions.append("id < ?")
            values.append(before)
        statement = f"SELECT * FROM pictures WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?"
        return [_decoded(row) for row in self._run(statement, (*values, limit))]

    def picture_ids(self) -> set[str]:
        """The ids of all pictures."""
        return {row["id"] for row in self._run("SELECT id FROM pictures")}

    def remove_picture(self, id: str) -> None:
        """Forgets the picture `id`."""
        self._run("DELETE FROM pictures WHERE id = ?", (id,))

    # training runs

    def add_run(self, id: str, name: str, config: Mapping[str, object]) -> None:
        """A new run that waits."""
        values = (id, name, json.dumps(config), "queued", 0, 0, time.time())
        self._run(
            "INSERT INTO runs (id, name, config, state, step, total, created) VALUES (?, ?, ?, ?, ?, ?, ?)", values
        )

    def update_run(self, id: str, state: str, step: int, total: int, error: str | None = None) -> None:
        """The state of the run `id` after `step` of `total` steps."""
        ended = None if state in ("queued", "running", "paused") else time.time()
        values = (state, step, total, error, ended, id)
        self._run("UPDATE runs SET state = ?, step = ?, total = ?, error = ?, finished = ? WHERE id = ?", values)

    def runs(self) -> list[Row]:
        """All runs, the newest first."""
        rows = self._run("SELECT * FROM runs ORDER BY created DESC, id DESC")
        return [{**row, "config": json.loads(row["config"])} for row in rows]


def _decoded(row: Row) -> Row:
    return {**row, "record": json.loads(row["record"])}
