"""The tables of the history, and how a history of an older version becomes one of this version.

In: an open database. Out: the same database in the newest version, or a refusal of a file that is not ours to change.
"""

import sqlite3
from pathlib import Path

from sorter.errors import ConfigurationError

_APPLICATION_ID = 0x736F7274  # "sort": tells our file from another program's
_OLDEST_SQLITE = (3, 37)  # the first with STRICT tables

# One script for each version of the schema. A script that was released is never changed: add another.
_MIGRATIONS = (
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        started REAL NOT NULL, -- seconds since the epoch
        finished REAL,
        version TEXT NOT NULL,
        model TEXT NOT NULL
    ) STRICT;
    CREATE TABLE moves (
        id INTEGER PRIMARY KEY,
        token TEXT NOT NULL UNIQUE, -- in the hidden names that the move uses
        run TEXT NOT NULL REFERENCES runs (id),
        done REAL, -- seconds since the epoch; NULL is an intent
        root BLOB NOT NULL, -- the inbox; paths are bytes, they need not be UTF-8
        source BLOB NOT NULL, -- inside the inbox
        folder TEXT NOT NULL, -- inside the output
        name BLOB NOT NULL, -- inside the folder
        device INTEGER NOT NULL,
        inode INTEGER NOT NULL,
        size INTEGER NOT NULL, -- bytes
        mtime_ns TEXT NOT NULL, -- a number that may need more than 64 bits
        kind TEXT NOT NULL, -- sorted, unsure, failed
        label TEXT,
        confidence REAL,
        reason TEXT,
        detail TEXT
    ) STRICT;
    CREATE INDEX moves_unfinished ON moves (id) WHERE done IS NULL;
    """,
    """
    -- run, undo
    ALTER TABLE runs ADD COLUMN kind TEXT NOT NULL DEFAULT 'run';
    -- what the folder is inside of, where that is not the output
    ALTER TABLE moves ADD COLUMN target BLOB;
    ALTER TABLE moves ADD COLUMN undoes INTEGER REFERENCES moves (id);
    CREATE INDEX moves_source ON moves (source);
    CREATE INDEX moves_undone ON moves (target, name) WHERE undoes IS NOT NULL;
    CREATE UNIQUE INDEX moves_undone_once ON moves (undoes) WHERE undoes IS NOT NULL;
    """,
    """
    -- the photo that a companion went with
    ALTER TABLE moves ADD COLUMN follows INTEGER REFERENCES moves (id);
    CREATE INDEX moves_following ON moves (follows) WHERE follows IS NOT NULL;
    CREATE INDEX moves_companions ON moves (id) WHERE kind = 'companion';
    CREATE INDEX moves_place ON moves (name, folder);
    DROP INDEX moves_source;
    CREATE INDEX moves_source ON moves (root, source);
    """,
    """
    -- "sidecar" is the field's word for what was called a companion
    UPDATE moves SET kind = 'sidecar' WHERE kind = 'companion';
    DROP INDEX moves_companions;
    CREATE INDEX moves_sidecars ON moves (id) WHERE kind = 'sidecar';
    """,
    """
    -- 1 if the photo stays where it is, and a link to it or a copy is made or removed
    ALTER TABLE moves ADD COLUMN linked INTEGER NOT NULL DEFAULT 0;
    """,
    """
    -- for a correction, a move inside the output: the sorting move of the photo or sidecar
    ALTER TABLE moves ADD COLUMN corrects INTEGER REFERENCES moves (id);
    -- for a sorting move: its last correction that is done, and where that took the file
    ALTER TABLE moves ADD COLUMN corrected_by INTEGER REFERENCES moves (id);
    ALTER TABLE moves ADD COLUMN corrected_folder TEXT;
    ALTER TABLE moves ADD COLUMN corrected_name BLOB;
    -- where the file is now, or was until it was restored, and which move brought it there
    ALTER TABLE moves ADD COLUMN now_folder TEXT AS (coalesce(corrected_folder, folder));
    ALTER TABLE moves ADD COLUMN now_name BLOB AS (coalesce(corrected_name, name));
    ALTER TABLE moves ADD COLUMN placed_by INTEGER AS (coalesce(corrected_by, id));
    CREATE INDEX moves_corrections ON moves (corrects) WHERE corrects IS NOT NULL;
    CREATE INDEX moves_corrected ON moves (corrected_by) WHERE corrected_by IS NOT NULL;
    DROP INDEX moves_place;
    CREATE INDEX moves_place ON moves (now_name, now_folder);
    -- photos of a run, of a day, and of a folder with the least sure first
    CREATE INDEX moves_run ON moves (run);
    CREATE INDEX moves_done ON moves (done) WHERE done IS NOT NULL;
    CREATE INDEX moves_by_confidence ON moves (now_folder, confidence, id) WHERE target IS NULL AND kind <> 'sidecar';
    CREATE TABLE verdicts (
        id INTEGER PRIMARY KEY,
        move INTEGER NOT NULL REFERENCES moves (id), -- the photo's sorting move
        at REAL NOT NULL, -- seconds since the epoch
        label TEXT, -- the class that a person sees; NULL is none of them
        how TEXT NOT NULL, -- corrected, confirmed, checked
        digest BLOB NOT NULL, -- SHA-256 of the file
        label_was TEXT, -- what the model said
        confidence REAL,
        model TEXT NOT NULL,
        -- the move that carries it out; NULL if the photo is in the right folder already
        correction INTEGER REFERENCES moves (id) ON DELETE CASCADE,
        -- the move that takes it back; once that is done, the verdict is deleted
        reversal INTEGER REFERENCES moves (id) ON DELETE SET NULL
    ) STRICT;
    CREATE INDEX verdicts_move ON verdicts (move);
    CREATE INDEX verdicts_correction ON verdicts (correction) WHERE correction IS NOT NULL;
    CREATE INDEX verdicts_reversal ON verdicts (reversal) WHERE reversal IS NOT NULL;
    """,
)
NEWEST = len(_MIGRATIONS)
"""The version of the schema that this sorter reads and writes."""


def version_of(connection: sqlite3.Connection, path: Path) -> int:
    """The version of the schema that a database has; 0 if it is empty. Changes nothing.

    Args:
        connection: to the database.
        path: of the database, for messages.

    Raises:
        ConfigurationError: the database is another program's or a newer sorter's, or this SQLite is too old for it.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise ConfigurationError(
            f"the history needs SQLite 3.37 or newer, and this Python has {sqlite3.sqlite_version}: install sorter "
            "with another Python"
        )
    # Tables first: if another process creates them meanwhile, the file is ours when its owner is read.
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if owner != _APPLICATION_ID and tables:
        raise ConfigurationError(f"{path} is another program's database: move it elsewhere and restart sorter")
    if version > NEWEST:
        raise ConfigurationError(f"the history {path} was written by a newer sorter: upgrade this one")
    return int(version)


def upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a database to the newest version of the schema.

    The caller is in a transaction that holds the lock for writing, or has the database to itself: otherwise another
    process could upgrade it after its version was read here.

    Raises:
        ConfigurationError: as `version_of`.
    """
    version = version_of(connection, path)
    if version == NEWEST:
        return
    for script in _MIGRATIONS[version:]:
        for statement in script.split(";\n"):  # executescript would commit first
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {NEWEST}")
