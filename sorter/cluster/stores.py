"""An object store as the sorter needs it: few operations, each of which either holds its condition or fails.

In: a URL. Out: a `Store`, and `StoredObject`s from it. What a store makes of its conditions is not taken on trust:
`probe` asks each one before anything is moved.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from sorter.errors import ConfigurationError, JobFileError, ObjectError
from sorter.extras import require

Read = TypeVar("Read")

ATTEMPTS = 8
"""At each request, with pauses that grow to 20 s: about half a minute in all."""

Mode = Literal["copy", "multipart", "upload"]
"""How a store copies an object to a free name only: in one request; as the last step of a multipart upload; or not at
all, so that the bytes have to come here and go back."""

MARK = "sorter-move"
"""The name in a copy's metadata of the token that says which move made it."""

MODIFIED = "sorter-modified"
"""The name in a copy's metadata of the time at which its first original was written: the store gives it another one."""

ARCHIVED = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Storage classes whose objects cannot be read until somebody pays for their restoration."""

_RESTORE = "restore an intact copy, or use another --output, which begins a new job"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One version of an object, as it was listed or looked at.

    Attributes:
        key: its full key in the bucket, whatever characters that has.
        size: in bytes.
        etag: with its quotation marks, as conditions need it. It differs between versions, and may also differ between
            copies of the same bytes.
        modified: when it was written, in UTC, to the second.
        storage_class: `STANDARD`, `GLACIER` …; None if the store does not say.
        metadata: the user's, and the sorter's marks; None in a listing, filled in by `head`.
    """

    key: str
    size: int
    etag: str
    modified: datetime
    storage_class: str | None
    metadata: Mapping[str, str] | None = None

    @property
    def is_in_parts(self) -> bool:
        """Whether it was uploaded in parts, as far as its ETag says."""
        return in_parts(self.etag)

    @property
    def is_archived(self) -> bool:
        """Whether it can neither be read nor moved as it is."""
        return self.storage_class in ARCHIVED


def in_parts(etag: str) -> bool:
    """Whether an ETag is that of an object which was uploaded in parts: it ends in their number."""
    return re.search(r"-\d+\"?$", etag) is not None


def pause_seconds(attempt: int) -> float:
    """How long to wait after an attempt, the first of which is 0, before the next one."""
    return random.uniform(0.5, 1.0) * min(0.3 * 2.0**attempt, 20.0)  # noqa: S311, no secret


def pause(attempt: int) -> None:
    """Wait after an attempt, before the next one."""
    time.sleep(pause_seconds(attempt))


class Store(Protocol):
    """One bucket. Any number of threads may use it at once; another process opens its own from the `url`.

    Every method raises `StoreError` if the store cannot be reached, refuses the whole operation or keeps failing after
    retries; that is a `FailingObjectError` if perhaps only this object fails. It raises `ObjectError` if the store
    refuses this one object (access denied, encrypted with a key of the owner's own).
    """

    url: str
    """Of the bucket, without a prefix: `open_store(store.url)` opens it again."""

    bucket: str

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """The objects whose keys begin with a prefix, in the order of their keys' UTF-8, page by page.

        Args:
            prefix: of keys; empty for all.
            after: only keys that come after this one.
        """
        ...

    def head(self, key: str) -> StoredObject | None:
        """The current version of an object with its metadata; None if there is none."""
        ...

    def read(self, key: str) -> bytes | None:
        """An object's bytes, all of them; None if there is none."""
        ...

    def download(self, item: StoredObject, path: Path) -> None:
        """Write exactly this version into a file, all of its bytes, or fail. The file may be left incomplete then.

        Raises:
            ChangedError: the key is gone, or has another version by now.
        """
        ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object if its key is free. False if it is taken."""
        ...

    def copy_new(
        self, item: StoredObject, source: "Store", key: str, token: str, mode: Mode, *, unlike: str | None = None
    ) -> str | None:
        """Copy exactly this version to a key of this bucket if that is free.

        Metadata, headers, tags, storage class and encryption are kept; `MARK` and `MODIFIED` are added to the metadata.

        Args:
            item: what to copy; its key is one of `source`.
            source: the bucket that has it, which may be this one.
            key: where to.
            token: of the move, for `MARK`.
            mode: what `probe` found.
            unlike: an ETag that the copy must not have, although its bytes do; empty objects have it all the same.

        Returns:
            The copy's ETag, or None if there was no copy to be made: the key is taken, or the version is gone.

        Raises:
            ObjectError: this object cannot be copied as it is.
        """
        ...

    def delete_exact(self, item: StoredObject) -> Literal["deleted", "gone", "changed"]:
        """Delete an object if it still is this version; `gone` if there is none, `changed` if there is another."""
        ...

    def remove_own(self, key: str) -> None:
        """Delete an object of the sorter's own, below a `.sorter/`, whatever version it is."""
        ...

    def now(self, prefix: str) -> datetime:
        """The time by the store's clock, which gives objects theirs; to the second.

        Args:
            prefix: of keys that may be listed.
        """
        ...


def open_store(url: str) -> tuple[Store, str]:
    """Open the bucket that a URL names.

    Endpoint, region and credentials are boto3's own matter: `AWS_ENDPOINT_URL`, `AWS_PROFILE`, `~/.aws/config`.

    Args:
        url: `s3://bucket/prefix`.

    Returns:
        The store, and the prefix: empty, or with a slash at its end.

    Raises:
        ConfigurationError: the URL names no bucket, the extra is not installed, or boto3's configuration is wrong.
    """
    parts = urlsplit(url, allow_fragments=False)
    if parts.scheme != "s3" or not parts.netloc:
        raise ConfigurationError(f"{url} names no bucket: write s3://bucket/prefix")
    require("boto3", "cluster", "An s3:// URL")
    from sorter.cluster.s3 import S3Store

    prefix = url.removeprefix(f"s3://{parts.netloc}").lstrip("/")
    return S3Store(parts.netloc), prefix if not prefix or prefix.endswith("/") else prefix + "/"


def read_own(store: Store, key: str, parse: Callable[[bytes], Read], remedy: str = _RESTORE) -> Read | None:
    """Read a file of the sorter's own; None if there is none.

    Args:
        store: the bucket that has it.
        key: of the file.
        parse: what makes something of its bytes; whatever it raises means that the file is damaged.
        remedy: what a person is to do about one that is.

    Raises:
        JobFileError: the file is damaged, or the store refuses it.
        StoreError: the store does not answer.
    """
    try:
        data = store.read(key)
    except ObjectError as error:
        raise JobFileError(f"{store.url}/{key} cannot be read, {error}: check the permissions") from error
    try:
        return None if data is None else parse(data)
    except Exception as error:  # whatever json and Arrow raise of bytes that are cut short
        raise JobFileError(f"{store.url}/{key} is damaged: {remedy}") from error
