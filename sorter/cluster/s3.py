"""Amazon S3, and servers that speak its protocol, through boto3: a `Store`.

In: a bucket's name, and boto3's own configuration. Out: objects, bytes, and the answers of conditional requests.
The pace after `503 Slow Down` is botocore's. How often a request is repeated that the store fails at, or that is in the
way of another one, is decided here, as is what happens with connections and bodies that are cut off.
"""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlencode

import boto3
from botocore import exceptions
from botocore.config import Config

from sorter.cluster.stores import (
    ARCHIVED,
    ATTEMPTS,
    MARK,
    MODIFIED,
    Mode,
    Store,
    StoredObject,
    in_parts,
    pause,
    pause_seconds,
)
from sorter.errors import (
    ChangedError,
    ConfigurationError,
    FailingObjectError,
    ObjectError,
    StoreError,
    UnsafeStoreError,
)

CONNECTIONS = 64
UPLOAD_BYTES = 5 << 30
"""The most that one request writes."""

PART_BYTES = 1 << 30
"""The most that is copied by one request, which has to be answered within a minute."""

METADATA_BYTES = 2_048
"""S3's limit for the names and values of an object's metadata together."""

CHUNK_BYTES = 1 << 20
MEMORY_BYTES = 32 << 20

# A copy with metadata of its own keeps only those of these that are sent again.
_CARRIED = (
    "BucketKeyEnabled",
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "Expires",
    "SSEKMSKeyId",
    "ServerSideEncryption",
    "StorageClass",
    "WebsiteRedirectLocation",
)
_COMPLETE = "CompleteMultipartUpload"
"""After a collision, this needs an upload of its own."""

_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity"}
_NOT_CONFIGURED = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.CredentialRetrievalError,
    exceptions.ProfileNotFound,
    exceptions.NoRegionError,
    exceptions.InvalidRegionError,
    exceptions.ConfigParseError,
)


# While an object's bytes arrive; before that, botocore tries again.
_CUT_SHORT = (
    exceptions.ResponseStreamingError,
    exceptions.IncompleteReadError,
    exceptions.ReadTimeoutError,
    exceptions.FlexibleChecksumError,
)


class S3Store:
    """One bucket. boto3's clients may be used by many threads.

    Args:
        bucket: its name.

    Raises:
        ConfigurationError: boto3's configuration is wrong.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket, self.url = bucket, f"s3://{bucket}"
        config = Config(
            retries={"mode": "adaptive", "total_max_attempts": ATTEMPTS},
            max_pool_connections=CONNECTIONS,
            connect_timeout=10,
            read_timeout=60,
        )
        with self._answering():
            try:
                self._client: Any = boto3.session.Session().client("s3", config=config)
            except ValueError as error:  # of an endpoint that is no URL
                raise ConfigurationError(f"{self.url} cannot be used: {error}; see boto3's configuration") from error
        self._client.meta.events.register_first("needs-retry.s3", _pause_before_retry)

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """See `Store.list`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=prefix, **({"StartAfter": after} if after else {})
        )
        with self._answering():
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield _listed(entry)

    def head(self, key: str) -> StoredObject | None:
        """See `Store.head`."""
        found = self._head(key)
        return None if found is None else _looked_at(key, found)

    def read(self, key: str) -> bytes | None:
        """See `Store.read`."""
        data = io.BytesIO()
        try:
            self._fetch(key, data)
        except _MissingError:
            return None
        return data.getvalue()

    def download(self, item: StoredObject, path: Path) -> None:
        """See `Store.download`."""
        try:
            with path.open("wb") as file:
                self._fetch(item.key, file, IfMatch=item.etag)
        except (_MissingError, _RefusedError):
            raise ChangedError("it was replaced or deleted after it was listed") from None

    def put_new(self, key: str, data: bytes) -> bool:
        """See `Store.put_new`."""
        try:
            with self._answering():
                self._client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
        except (_MissingError, _RefusedError):
            return False
        return True

    def copy_new(
        self, item: StoredObject, source: Store, key: str, token: str, mode: Mode, *, unlike: str | None = None
    ) -> str | None:
        """See `Store.copy_new`."""
        assert isinstance(source, S3Store), "a copy is made inside one store"
        found = source._head(item.key)
        if found is None:
            return None
        properties = _properties(found, token)
        origin = {"CopySource": {"Bucket": source.bucket, "Key": item.key}, "CopySourceIfMatch": item.etag}
        # Parts give the same bytes another ETag. What was restored and is sorted again must not get the one of its
        # first copy, which an undo may be about to delete: so the form of the original decides, and undo changes it.
        if unlike is not None:
            as_parts = not in_parts(unlike)
        else:
            as_parts = mode != "upload" and item.is_in_parts == (mode == "copy")
        as_parts = item.size > 0 and (as_parts or (mode == "copy" and item.size > PART_BYTES))
        part_bytes = PART_BYTES if unlike is None else PART_BYTES // 2
        try:
            with self._answering(item.key):
                if mode == "copy" and not as_parts:
                    arguments = {**origin, **properties, "MetadataDirective": "REPLACE", "IfNoneMatch": "*"}
                    answer = self._client.copy_object(Bucket=self.bucket, Key=key, **arguments)
                    return str(answer["CopyObjectResult"]["ETag"])
                if tags := source._tags(item.key):
                    properties["Tagging"] = tags
                if as_parts and mode != "upload":
                    return self._copy_in_parts(item, origin, key, properties, part_bytes)
                return self._copy_through_here(item, source, key, properties, as_parts)
        except (_MissingError, _RefusedError):
            return None

    def delete_exact(self, item: StoredObject) -> Literal["deleted", "gone", "changed"]:
        """See `Store.delete_exact`."""
        try:
            with self._answering(item.key):
                self._client.delete_object(Bucket=self.bucket, Key=item.key, IfMatch=item.etag)
        except _MissingError:
            return "gone"
        except _RefusedError:
            return "changed"
        return "deleted"

    def remove_own(self, key: str) -> None:
        """See `Store.remove_own`."""
        assert ".sorter/" in key, "everything else is deleted on a condition only"
        with self._answering(), suppress(_MissingError):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def now(self, prefix: str) -> datetime:
        """See `Store.now`."""
        with self._answering():
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
        try:
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.url} sends no Date with its answers: use a store that has a clock") from error

    def _copy_through_here(
        self, item: StoredObject, source: "S3Store", key: str, properties: dict[str, Any], as_parts: bool
    ) -> str:
        """Download an object and upload it, as one part if it is to be in parts."""
        if item.size > UPLOAD_BYTES:
            raise ObjectError("it has more than 5 GiB, which this store does not copy")
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as file:
            source._fetch(item.key, file, IfMatch=item.etag)
            file.seek(0)
            # With its length, a request whose body does not begin at the beginning fails, and writes nothing.
            body = {"Body": file, "ContentLength": item.size}
            if as_parts:
                return self._in_parts(key, properties, [lambda part: self._client.upload_part(**part, **body)])
            answer = self._client.put_object(Bucket=self.bucket, Key=key, IfNoneMatch="*", **properties, **body)
            return str(answer["ETag"])

    def _copy_in_parts(
        self, item: StoredObject, origin: dict[str, Any], key: str, properties: dict[str, Any], part_bytes: int
    ) -> str:
        def copy(part: dict[str, Any], first: int) -> Any:
            last = min(first + part_bytes, item.size) - 1
            span = {"CopySourceRange": f"bytes={first}-{last}"} if item.size > part_bytes else {}
            return self._client.upload_part_copy(**part, **origin, **span)["CopyPartResult"]

        starts = range(0, item.size, part_bytes)
        return self._in_parts(key, properties, [partial(copy, first=first) for first in starts])

    def _in_parts(self, key: str, properties: dict[str, Any], write: Sequence[Callable[[dict[str, Any]], Any]]) -> str:
        """Create an object by a multipart upload, whose last step has the condition.

        Args:
            key: of the object.
            properties: of the object.
            write: writes a part, for each.
        """
        upload = self._client.create_multipart_upload(Bucket=self.bucket, Key=key, **properties)["UploadId"]
        target = {"Bucket": self.bucket, "Key": key, "UploadId": upload}
        parts = []
        try:
            for number, write_part in enumerate(write, 1):
                parts.append({"PartNumber": number, "ETag": write_part({**target, "PartNumber": number})["ETag"]})
        except (exceptions.ClientError, exceptions.BotoCoreError):
            self._abort(target)
            raise
        try:
            answer = self._client.complete_multipart_upload(**target, IfNoneMatch="*", MultipartUpload={"Parts": parts})
        except exceptions.ClientError as error:
            # Only an upload that was certainly not completed may be aborted: a server that completed it, and whose
            # answer was lost, may remove the parts of the finished object.
            if _status(error) in (409, 412) and error.response["ResponseMetadata"].get("RetryAttempts", 1) == 0:
                self._abort(target)
            raise
        return str(answer["ETag"])

    def _abort(self, target: dict[str, str]) -> None:
        with suppress(exceptions.ClientError, exceptions.BotoCoreError):  # a lifecycle rule removes what remains
            self._client.abort_multipart_upload(**target)

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            with self._answering(key):
                found = dict(self._client.head_object(Bucket=self.bucket, Key=key))
        except _MissingError:
            return None
        # They were headers, and some servers write these with capitals.
        return found | {"Metadata": {name.lower(): value for name, value in found["Metadata"].items()}}

    def _tags(self, key: str) -> str:
        """An object's tags as a query string."""
        try:
            tags = self._client.get_object_tagging(Bucket=self.bucket, Key=key)["TagSet"]
        except exceptions.ClientError as error:
            if _status(error) in (404, 405, 501):  # there are none, or the store does not know any
                return ""
            raise
        return urlencode([(tag["Key"], tag["Value"]) for tag in tags])

    def _fetch(self, key: str, file: IO[bytes], **condition: str) -> None:
        """Write an object's bytes into an empty file, all of them, from the start again after each interruption."""
        for attempt in range(ATTEMPTS):
            with self._answering(key):
                answer = self._client.get_object(Bucket=self.bucket, Key=key, **condition)
            with suppress(*_CUT_SHORT):
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    file.write(chunk)
                if file.tell() == answer["ContentLength"]:
                    return
            file.seek(0)
            file.truncate()
            pause(attempt)
        raise FailingObjectError(f"{self.url} ends its answers early, {ATTEMPTS} times for {key!r}: check its state")

    @contextmanager
    def _answering(self, key: str | None = None) -> Iterator[None]:
        """Turn boto3's exceptions into ours.

        Args:
            key: the object that may be refused or fail alone; None if that concerns the whole bucket.
        """
        try:
            yield
        except exceptions.ClientError as error:
            raise self._meant(error, key) from error
        except _NOT_CONFIGURED as error:
            raise ConfigurationError(f"{self.url} cannot be used: {error}; see boto3's configuration") from error
        except exceptions.ParamValidationError as error:
            raise ConfigurationError(f"{self.url} is not a bucket's name: check the URL") from error
        except exceptions.BotoCoreError as error:
            raise StoreError(f"{self.url} does not answer: {error}; start again once it does") from error

    def _meant(self, error: exceptions.ClientError, key: str | None) -> Exception:
        status, operation = _status(error), error.operation_name
        code = str(error.response.get("Error", {}).get("Code", ""))
        said = f"{code or status}: {error.response.get('Error', {}).get('Message', '')}".rstrip(": ")
        if code == "NoSuchBucket" or (status == 404 and operation == "ListObjectsV2"):
            return ConfigurationError(f"There is no bucket {self.bucket!r}: check the URL")
        if code in _BAD_CREDENTIALS:
            return ConfigurationError(f"{self.url} refuses the credentials ({said}): check boto3's configuration")
        if status == 404:
            return _MissingError()
        if status == 501 and (key is None or operation == "DeleteObject"):
            return UnsafeStoreError(f"{self.url} has no conditional {operation} ({said})")
        if status == 412 or (status == 409 and operation == _COMPLETE):
            return _RefusedError()
        if key is not None and status in (400, 403, 405, 501):
            return ObjectError(f"the store refuses it ({said})")
        if key is not None and status >= 500:
            return FailingObjectError(f"{self.url} fails at {key!r} again and again ({said}): check its state")
        return StoreError(f"{self.url} refuses {operation} ({said}): check its state and permissions")


class _MissingError(Exception):
    """No object has that key."""


class _RefusedError(Exception):
    """A condition does not hold."""


def _pause_before_retry(
    attempts: int, operation: Any, response: Any, caught_exception: Exception | None = None, **_: Any
) -> float | None:
    """The seconds after which botocore is to repeat a request; None leaves that to botocore's own rules.

    These have one quota for all threads, and no second attempt for anybody once some have used it up: a store that
    fails for a second, or cuts connections off, would fail for good. They do not know either that 409 means that two
    conditional requests collided.
    """
    status = 0 if response is None else response[1]["ResponseMetadata"]["HTTPStatusCode"]
    is_collision = status == 409 and operation.name != _COMPLETE
    is_cut_off = isinstance(caught_exception, exceptions.HTTPClientError)
    if attempts < ATTEMPTS and (is_cut_off or is_collision or (status >= 500 and status != 501)):
        return pause_seconds(attempts - 1)
    return None


def _status(error: exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _listed(entry: dict[str, Any]) -> StoredObject:
    modified = _second(entry["LastModified"])
    return StoredObject(entry["Key"], entry["Size"], entry["ETag"], modified, entry.get("StorageClass"))


def _looked_at(key: str, found: dict[str, Any]) -> StoredObject:
    return StoredObject(
        key,
        found["ContentLength"],
        found["ETag"],
        _second(found["LastModified"]),
        found.get("StorageClass"),
        found["Metadata"],
    )


def _second(moment: datetime) -> datetime:
    """Listings have fractions of seconds that headers lack."""
    return moment.astimezone(UTC).replace(microsecond=0)


def _properties(found: dict[str, Any], token: str) -> dict[str, Any]:
    """What a copy has to be given so that it is like its original, and marked.

    Raises:
        ObjectError: it could not be like it.
    """
    if found.get("StorageClass") in ARCHIVED or "ArchiveStatus" in found:
        raise ObjectError("it is archived: restore it to another storage class first")
    if "ObjectLockMode" in found or found.get("ObjectLockLegalHoldStatus") == "ON":
        raise ObjectError("it is locked, by a retention period or a legal hold")
    if "ExpiresString" in found and "Expires" not in found:
        raise ObjectError("its Expires header is not a date, and would be lost")
    written = _second(found["LastModified"]).isoformat()
    metadata = {MODIFIED: written, **found["Metadata"], MARK: token}
    if found.get("MissingMeta") or not all(text.isascii() for pair in metadata.items() for text in pair):
        raise ObjectError("its metadata has characters that cannot be sent again")
    if sum(len(name) + len(value) for name, value in metadata.items()) > METADATA_BYTES:
        raise ObjectError("its metadata has no room for the sorter's mark, of about 120 bytes")
    return {**{name: found[name] for name in _CARRIED if name in found}, "Metadata": metadata}
