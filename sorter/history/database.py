"""A history that is open for reading: nothing is written to read it, whatever its version and SQLite's mode.

In: the path of the file, and queries. Out: rows, of whatever file has that path at the time.
"""

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sorter.errors import ConfigurationError
from sorter.files.photo import file_of
from sorter.history import schema
from sorter.history.store import BUSY_SECONDS, is_disk_error


class ReadOnlyDatabase:
    """An open history; an older one, or one on a full disk, is read from a temporary copy.

    Args:
        path: of the file.
        beside_writer: this process also has the history open as a `History`.

    Raises:
        ConfigurationError: the file does not exist, it cannot be read, or it is not a history that this sorter knows.
    """

    def __init__(self, path: Path, *, beside_writer: bool) -> None:
        self._path, self._beside_writer = path, beside_writer
        try:
            if not path.is_file():
                raise ConfigurationError(
                    f"there is no history {path}, so nothing was sorted there: if you sorted with --output or "
                    "--state-dir, pass them here too"
                )
            self._open()
        except (sqlite3.DatabaseError, OSError) as error:
            raise _unreadable(path, error) from None

    def _open(self) -> None:
        self._connection = self._connect()
        try:
            self._is_copy = schema.version_of(self._connection, self._path) < schema.NEWEST
            if self._is_copy:
                self._connection = _upgraded_copy(self._connection, self._path)
        except sqlite3.OperationalError as error:
            self._connection.close()
            # A copy of the files would close descriptors, see `_is_in_wal_mode`.
            if self._beside_writer or not is_disk_error(error):
                raise
            self._connection, self._is_copy = _copied_elsewhere(self._path), True
        except BaseException:
            self._connection.close()
            raise
        self._file = file_of(self._path)

    def _connect(self) -> sqlite3.Connection:
        # To read a history in WAL mode, SQLite creates its log and shared memory beside the file. If there is no log,
        # nobody has the history open, and SQLite need not: `immutable` says that nobody writes. In the mode with a
        # rollback journal, a missing log says nothing.
        has_log = self._path.with_name(f"{self._path.name}-wal").exists()
        at_rest = "" if has_log or self._beside_writer or not _is_in_wal_mode(self._path) else "&immutable=1"
        return sqlite3.connect(
            f"{self._path.as_uri()}?mode=ro{at_rest}", uri=True, timeout=BUSY_SECONDS, check_same_thread=False
        )

    def close(self) -> None:
        """Close the file; idempotent."""
        self._connection.close()

    def rows(self, query: str, values: Sequence[object]) -> list[Any]:
        """The rows that a query returns.

        Raises:
            ConfigurationError: the history cannot be read at present.
        """
        try:
            if self._is_stale():
                self._connection.close()
                self._file = None
                self._open()
            return self._connection.execute(query, values).fetchall()
        except (sqlite3.DatabaseError, OSError) as error:
            raise _unreadable(self._path, error) from None

    def _is_stale(self) -> bool:
        """Whether the open connection no longer shows the history at this path."""
        if self._file != file_of(self._path):  # removed, perhaps recreated, or its disk is back
            return True
        if not self._is_copy:
            return False
        try:
            with contextlib.closing(self._connect()) as connection:  # a sorter may have upgraded it since
                return schema.version_of(connection, self._path) == schema.NEWEST
        except sqlite3.OperationalError as error:
            if is_disk_error(error):  # still full, so nobody writes
                return False
            raise


def _unreadable(path: Path, error: sqlite3.DatabaseError | OSError) -> ConfigurationError:
    """The error to raise for a history that cannot be read."""
    if isinstance(error, OSError):
        return ConfigurationError(
            f"the history {path} cannot be read ({error.strerror}): give this user permission to read it"
        )
    return ConfigurationError(f"the history {path} cannot be read ({error})")


def _is_in_wal_mode(path: Path) -> bool:
    """Whether a history has a write-ahead log while it is open; never asked beside a writer.

    When a process closes any descriptor of a file, POSIX drops all locks that the process holds on that file. The
    writer's SQLite would not notice, and the next other process to close the history would delete the log in use
    (sqlite.org/howtocorrupt.html, 2.2).
    """
    with path.open("rb") as file:
        return file.read(20)[18:20] == b"\2\2"  # sqlite.org/fileformat.html: versions for writing and reading


def _copied_elsewhere(path: Path) -> sqlite3.Connection:
    """A temporary copy of a history whose disk has no space for the files that SQLite needs to read it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        for name in (path.name, f"{path.name}-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path.with_name(name), copy.with_name(name))
        return _upgraded_copy(sqlite3.connect(copy), path)


def _upgraded_copy(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """Copy an older history to a temporary database and upgrade that; closes the connection to the older one.

    So those who may only read can read it too, and a sorter of the older version may still be writing to it.
    """
    with contextlib.closing(connection):
        # SQLite keeps a database without a name in memory as long as it is small, and deletes its file at the end.
        copy = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            connection.backup(copy)
            schema.upgrade(copy, path)
        except BaseException:
            copy.close()
            raise
    return copy
