"""Amazon S3, and servers that speak its protocol, through boto3: a `Store`.

In: a bucket's name, and boto3's own configuration. Out: objects, bytes, and the answers of conditional requests.
Retries, backoff and the pace after `503 Slow Down` are botocore's; conflicts and bodies that are cut short are retried
here.
"""

import io
import random
import tempfile
import time
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

from sorter.cluster.stores import ARCHIVED, MARK, MODIFIED, Mode, Store, StoredObject, in_parts
from sorter.errors import ChangedError, ConfigurationError, ObjectError, StoreError, UnsafeStoreError

ATTEMPTS = 8
"""At each request, with pauses that grow to 20 s: about half a minute in all."""

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
        return self._put(key, data, {"IfNoneMatch": "*"})

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
                    answer = _settled(lambda: self._client.copy_object(Bucket=self.bucket, Key=key, **arguments))
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
            with self._answering():
                _settled(lambda: self._client.delete_object(Bucket=self.bucket, Key=item.key, IfMatch=item.etag))
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

    def now(self) -> datetime:
        """See `Store.now`."""
        with self._answering():
            answer = self._client.head_bucket(Bucket=self.bucket)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])

    def _copy_through_here(
        self, item: StoredObject, source: "S3Store", key: str, properties: dict[str, Any], as_parts: bool
    ) -> str:
        """Download an object and upload it, as one part if it is to be in parts."""
        if item.size > UPLOAD_BYTES:
            raise ObjectError("it has more than 5 GiB, which this store does not copy")
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as file:
            source._fetch(item.key, file, IfMatch=item.etag)
            # With its length, a request whose body does not begin at the beginning fails, and writes nothing.
            body = {"Body": file, "ContentLength": item.size}

            def put() -> Any:
                file.seek(0)
                target = {"Bucket": self.bucket, "Key": key, "IfNoneMatch": "*"}
                return self._client.put_object(**target, **properties, **body)

            def put_part(part: dict[str, Any]) -> Any:
                file.seek(0)
                return self._client.upload_part(**part, **body)

            return self._in_parts(key, properties, [put_part]) if as_parts else str(_settled(put)["ETag"])

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

    def _put(self, key: str, data: bytes, condition: dict[str, str]) -> bool:
        try:
            with self._answering():
                _settled(lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **condition))
        except (_MissingError, _RefusedError):
            return False
        return True

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
            _pause(attempt)
        raise StoreError(f"{self.url} ends its answers early, {ATTEMPTS} times for {key!r}: check it and start again")

    @contextmanager
    def _answering(self, key: str | None = None) -> Iterator[None]:
        """Turn boto3's exceptions into ours.

        Args:
            key: the object whose owner may refuse it; None if a refusal concerns the whole bucket.
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
        status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
        said = f"{code or status}: {error.response.get('Error', {}).get('Message', '')}".rstrip(": ")
        if code == "NoSuchBucket" or (status == 404 and error.operation_name == "ListObjectsV2"):
            return ConfigurationError(f"There is no bucket {self.bucket!r}: check the URL")
        if code in _BAD_CREDENTIALS:
            return ConfigurationError(f"{self.url} refuses the credentials ({said}): check boto3's configuration")
        if status == 404:
            return _MissingError()
        if status == 501 and key is None:
            return UnsafeStoreError(f"{self.url} has no conditional {error.operation_name} ({said})")
        if status in (409, 412):
            return _RefusedError()
        if key is not None and (
            status in (400, 403, 405, 501) or (status == 500 and error.operation_name == "GetObject")
        ):
            return ObjectError(f"the store refuses it ({said})")
        return StoreError(f"{self.url} refuses {error.operation_name} ({said}): check its state and permissions")


class _MissingError(Exception):
    """No object has that key."""


class _RefusedError(Exception):
    """A condition does not hold."""


def _settled(request: Callable[[], Any]) -> Any:
    """What a request answers once no other one is in its way: 409 means that two conditional requests collided."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except exceptions.ClientError as error:
            if _status(error) != 409 or attempt == ATTEMPTS - 1:
                raise
        _pause(attempt)
    raise AssertionError("the last attempt returns or raises")


def _pause(attempt: int) -> None:
    time.sleep(random.random() * min(0.1 * 2**attempt, 5.0))  # noqa: S311, no secret


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
