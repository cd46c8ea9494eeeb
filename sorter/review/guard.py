"""Who may talk to the page: everything that is checked before a request reaches it.

In: requests from whatever reaches this machine's loopback: the page, other pages in the same browser, other programs
and users. Out: the requests of the page alone, and the headers that keep its answers to itself. There is no cookie:
cookies are not separated by port, so every other server on this machine would get it.
"""

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses what is not from the page; wraps the application behind it.

    Args:
        app: the application; its routes are below `/TOKEN/`.
        token: the secret part of the address.
        port: on this machine.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token.encode()
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        """Why a request is refused; None if it is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # A name that leads to this machine by an attacker's DNS is in no list (DNS rebinding).
        if host not in self._hosts:
            return PlainTextResponse("This server answers to 127.0.0.1 and localhost only.\n", 403)
        given = scope["path"].split("/", 2)[1] if scope["path"].startswith("/") else ""
        if not hmac.compare_digest(given.encode(errors="replace"), self._token):
            return PlainTextResponse("Use the address that sorter review printed: it is new at each start.\n", 404)
        if scope["method"] != "POST":
            return None
        # Other pages cannot send this type, nor this origin, without being asked first by the browser, and are refused.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return PlainTextResponse("Requests that change something are JSON.\n", 403)
        if headers.get("origin") != f"http://{host}" or headers.get("sec-fetch-site") != "same-origin":
            return PlainTextResponse("Requests that change something come from the page itself.\n", 403)
        return None
