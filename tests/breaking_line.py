"""A line between a client and an S3 server, on which a test breaks what it wants, before or after any request."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from object_stores import Server

Fault = Literal["cut before", "cut after", "cut body", "slow down", "conflict", "failure", "denial"]
REFUSALS: dict[Fault, tuple[int, str]] = {
    "slow down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "failure": (500, "InternalError"),
    "denial": (403, "AccessDenied"),
}


@dataclass(frozen=True)
class Request:
    """What a client asks for, with its number on the line, from 0 on."""

    number: int
    method: str
    path: str
    headers: dict[str, str]

    @property
    def operation(self) -> str:
        """Its name in S3, of those that the sorter uses."""
        query, copies = parse_qs(urlsplit(self.path).query, keep_blank_values=True), "x-amz-copy-source" in self.headers
        match self.method:
            case "PUT" if "partNumber" in query:
                return "UploadPartCopy"
            case "PUT":
                return "CopyObject" if copies else "PutObject"
            case "POST":
                return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
            case "DELETE":
                return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
            case "GET" if "list-type" in query:
                return "ListObjectsV2"
            case "GET":
                return "GetObjectTagging" if "tagging" in query else "GetObject"
            case _:
                return "HeadObject"


@dataclass
class Line:
    """What passes over it, and what happens to that.

    Attributes:
        before: called before a request is handed on; may return a fault.
        after: called when it was carried out, before its answer is handed back.
    """

    server: Server
    before: Callable[[Request], Fault | None] = lambda request: None
    after: Callable[[Request], object] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        self.before, self.after = lambda request: None, lambda request: None
        self.requests.clear()

    def operations(self) -> list[str]:
        return [request.operation for request in self.requests]


@contextmanager
def breaking_line(server: Server) -> Iterator[Line]:
    """A line to a server; `line.server` is the address at this end of it."""
    target = urlsplit(server.endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):  # the client was killed
                self.close_connection = True

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with line.lock:
                request = Request(len(line.requests), self.command, self.path, headers)
                line.requests.append(request)
            fault = line.before(request)
            if fault == "cut before":
                self.cut()
                return
            if fault in REFUSALS:
                self.refuse(*REFUSALS[fault])
                return
            answer, data = self.ask(body)
            line.after(request)
            if fault == "cut after":
                self.cut()
                return
            self.answer(answer, data, cut=fault == "cut body" and len(data) > 1)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on  # noqa: N815, http.server's names

        def ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
            connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=120)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value.encode("latin-1"))
            connection.putheader("Connection", "close")
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer, data

        def answer(self, answer: http.client.HTTPResponse, data: bytes, *, cut: bool) -> None:
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if cut:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.cut()
            elif self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, status: int, code: str) -> None:
            data = f"<Error><Code>{code}</Code><Message>by the test</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def cut(self) -> None:
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    line = Line(server.through(f"http://127.0.0.1:{listener.server_port}"))
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
