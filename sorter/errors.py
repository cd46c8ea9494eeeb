"""Every error that the sorter raises on purpose.

    SorterError                 one sentence for the user, and the exit code
    ├── ConfigurationError  2   a setting, a flag, the inbox or the output is wrong
    ├── ModelError          2   the model folder cannot be used
    ├── NotNowError         4   something else has the folder or the GPU, or the inbox is not there yet
    ├── NotBegunError       3   a signal came before anything was sorted
    ├── StorageError        1   the disk or the folder no longer accepts photos
    │   └── InboxGoneError  1   the inbox vanished while it was being sorted
    └── StoreError          1   the object store does not answer, or refuses
        ├── UnsafeStoreError 2  it ignores a condition that a safe move needs
        └── JobFileError    1   a file of a cluster's job cannot be read

    PhotoError                  one photo cannot be decoded; it never ends the program
    ObjectError                 one object cannot be read or moved; it never ends the program
    └── ChangedError            it is gone, or another version took its place

Exit codes: 0 done, 1 could not continue, 2 wrong configuration, model or usage, 3 done but photos failed or stayed, 4
not now: the same command may work later. A service manager restarts after 1 and 4, and not after 2.
"""

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """The process's exit codes."""

    DONE = 0
    STOPPED = 1
    USAGE = 2
    INCOMPLETE = 3
    NOT_NOW = 4


class SorterError(Exception):
    """Its message is one sentence: what is wrong, and what to do."""

    exit_code = ExitCode.STOPPED


class ConfigurationError(SorterError):
    """A setting is wrong; raised before any photo is touched."""

    exit_code = ExitCode.USAGE


class ModelError(SorterError):
    """The model folder cannot be used; raised before any photo is touched."""

    exit_code = ExitCode.USAGE


class NotNowError(SorterError):
    """Something is in the way that goes away by itself: the same command may work later."""

    exit_code = ExitCode.NOT_NOW


class NotBegunError(SorterError):
    """A signal asked for the end before anything was sorted."""

    exit_code = ExitCode.INCOMPLETE


class StorageError(SorterError):
    """The file system refuses a move: no space, read-only, gone. The photo is still where it was."""


class InboxGoneError(StorageError):
    """The inbox has vanished or can no longer be listed."""


class StoreError(SorterError):
    """An object store does not answer, or refuses. Every object is intact, under its old key, its new one or both."""


class FailingObjectError(StoreError):
    """An object store keeps failing at one object; whether at others as well is to be found out."""


class UnsafeStoreError(StoreError):
    """An object store ignores or lacks a condition without which a move could overwrite or lose an object."""

    exit_code = ExitCode.USAGE


class JobFileError(StoreError):
    """A file of the sorter's own in an object store is damaged, or may not be read."""


class ObjectError(Exception):
    """One object cannot be read or moved; its message says why, for a person. It is where it was."""


class ChangedError(ObjectError):
    """An object is gone, or another version took its place."""


class Reason(StrEnum):
    """Why a photo went to `failed/`. Stable: logs and history contain these values."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    NOT_A_PHOTO = "not-a-photo"
    TOO_MANY_PIXELS = "too-many-pixels"
    TOO_LARGE = "too-large"
    OUT_OF_MEMORY = "out-of-memory"
    DECODER_CRASH = "decoder-crash"
    DECODER_TIMEOUT = "decoder-timeout"


class PhotoError(Exception):
    """One photo cannot be decoded.

    Attributes:
        reason: a stable code.
        detail: the decoder's message, for a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
