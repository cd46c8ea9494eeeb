"""Run as a program: moto's S3 on a port of 127.0.0.1, and with `strict` also the conditions of Amazon's CopyObject.

moto ignores those. With `strict`, CopyObject looks at `x-amz-copy-source-if-match` and `If-None-Match: *`,
UploadPartCopy at the former, and one lock around each request makes a condition and what depends on it one step, as at
Amazon.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from moto.s3.exceptions import PreconditionFailed
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

ONE_AT_A_TIME = threading.RLock()


def conditional(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def copy(self: Any) -> Any:
        bucket, _, key = self.headers["x-amz-copy-source"].lstrip("/").partition("/")
        source = self.backend.get_object(unquote(bucket), unquote(key.partition("?versionId=")[0]))
        expected = self.headers.get("x-amz-copy-source-if-match", "").strip('"')
        if source is not None and expected not in ("", source.etag.strip('"')):
            raise PreconditionFailed("x-amz-copy-source-If-Match")
        is_taken = self.backend.get_object(self.bucket_name, self.parse_key_name()) is not None
        if self.headers.get("If-None-Match") == "*" and is_taken:
            raise PreconditionFailed("If-None-Match")
        return original(self)

    return copy


def alone(original: Callable[..., Any]) -> Callable[..., Any]:
    def handle(self: Any, *arguments: Any, **named: Any) -> Any:
        with ONE_AT_A_TIME:
            return original(self, *arguments, **named)

    return handle


if "strict" in sys.argv[2:]:
    for name in ("copy_object", "upload_part_copy"):
        setattr(S3Response, name, conditional(getattr(S3Response, name)))
    for name in ("_key_response_put", "_key_response_post", "_key_response_delete"):
        setattr(S3Response, name, alone(getattr(S3Response, name)))

server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
threading.Event().wait()
