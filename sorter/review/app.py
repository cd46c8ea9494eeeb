"""The page's routes: what it asks for, and what it sends.

In: requests that passed the `Guard`. Out: the page, cards of photos, their pictures, and corrections. No path ever
comes in: a photo is named by its row in the history. Everything waits in threads, and corrections wait for each other.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar

import jinja2
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from sorter.errors import SorterError
from sorter.review.corrections import Corrections, Outcome, Verdict, Version
from sorter.review.deck import Card, Deck, shown
from sorter.review.guard import Guard
from sorter.review.pictures import LARGE, THUMBNAIL, PictureError, Pictures
from sorter.review.spot_check import SpotCheck

MAX_BODY_BYTES = 1_000_000
MAX_VERDICTS = 500
_T = TypeVar("_T")
_STATIC = {"review.js": "text/javascript", "review.css": "text/css", "icon.svg": "image/svg+xml"}


class _Given(BaseModel):
    """One verdict as the page sends it; `version` is that of the card."""

    model_config = ConfigDict(extra="forbid", strict=True)

    photo: int = Field(ge=1, lt=1 << 63)
    version: str = Field(pattern=r"^[0-9]{1,19}-[0-9]{1,30}$")
    label: Annotated[str, Field(max_length=200)] | None
    how: Literal["corrected", "confirmed", "checked"]


_VERDICTS = TypeAdapter(Annotated[list[_Given], Field(min_length=1, max_length=MAX_VERDICTS)])
_PHOTOS = TypeAdapter(Annotated[list[Annotated[int, Field(ge=1, lt=1 << 63, strict=True)]], Field(max_length=500)])


@dataclass(frozen=True, slots=True)
class Review:
    """What one review works with.

    Attributes:
        title: of the page.
        folders: by label, in the order of the model's classes.
        keys: by label.
        check: the spot check; None in a plain review.
    """

    title: str
    folders: Mapping[str, str]
    keys: Mapping[str, str]
    deck: Deck
    corrections: Corrections
    pictures: Pictures
    check: SpotCheck | None = None


def build(review: Review, token: str, port: int) -> ASGIApp:
    """The application, below `/TOKEN/`, for a port of this machine."""
    routes = _Routes(review)
    inner = [
        Route("/", routes.page),
        Route("/static/{name}", routes.static),
        Route("/api/views", routes.views),
        Route("/api/deck", routes.deck),
        Route("/api/failed", routes.failed),
        Route("/api/card/{photo:int}", routes.card),
        Route("/api/check", routes.check),
        Route("/api/decide", routes.decide, methods=["POST"]),
        Route("/api/take-back", routes.take_back, methods=["POST"]),
        Route("/photo/{photo:int}/{side:int}", routes.photo),
    ]
    handlers: dict[Any, Callable[[Request, Any], Response]] = {HTTPException: _refused, SorterError: _not_now}
    app = Starlette(routes=[Mount(f"/{token}", routes=inner)], exception_handlers=handlers)
    return Guard(app, token, port)


def _refused(_request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


def _not_now(_request: Request, error: SorterError) -> Response:
    return JSONResponse({"error": str(error)}, 503)


class _Routes:
    """The handlers; those that are not `async` run in threads."""

    def __init__(self, review: Review) -> None:
        self._review = review
        self._one_at_a_time = threading.Lock()
        folder = files("sorter.review")
        self._static = {name: (folder / "static" / name).read_bytes() for name in _STATIC}
        template = (folder / "templates" / "page.html").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        labels = [
            {"label": label, "folder": folder, "key": review.keys.get(label, "")}
            for label, folder in review.folders.items()
        ]
        self._page = environment.from_string(template).render(
            title=review.title, labels=labels, check=0 if review.check is None else review.check.drawn
        )

    def page(self, _request: Request) -> Response:
        """The page itself."""
        return HTMLResponse(self._page)

    def static(self, request: Request) -> Response:
        """The page's script, style and icon."""
        name = request.path_params["name"]
        if name not in self._static:
            raise HTTPException(404, "no such file")
        return Response(self._static[name], media_type=_STATIC[name])

    def views(self, _request: Request) -> Response:
        """What can be looked at: the folders, and the last runs."""
        deck = self._review.deck
        runs = [{"id": run, "started": started} for run, started in deck.runs()]
        return JSONResponse({"folders": deck.folders(), "runs": runs})

    def deck(self, request: Request) -> Response:
        """A page of cards, and with the first one how many are left."""
        view, after = request.query_params.get("view", "least-sure"), request.query_params.get("after")
        if (check := self._review.check) is not None:
            cards = check.cards()
            return JSONResponse({"photos": [_hidden(card) for card in cards], "after": None, "left": len(cards)})
        try:
            cards, following = self._review.deck.page(view, after)
            answer: dict[str, Any] = {"photos": [_shown(card) for card in cards], "after": following}
            if after is None:
                answer["left"] = self._review.deck.left(view)
        except ValueError:
            raise HTTPException(400, f"there is no view {view[:60]!r} with such a page: reload the page") from None
        return JSONResponse(answer)

    def failed(self, request: Request) -> Response:
        """A page of what is in `failed/`, without pictures."""
        try:
            cards, following = self._review.deck.failed(request.query_params.get("after"))
        except ValueError:
            raise HTTPException(400, "this part of the list is unknown: reload the page") from None
        return JSONResponse({"photos": [{"name": shown(c.place), "why": c.why} for c in cards], "after": following})

    def card(self, request: Request) -> Response:
        """One card, for a photo that has changed since the page got it."""
        card = self._card(request.path_params["photo"])
        if card is None:
            raise HTTPException(404, "the photo is gone")
        return JSONResponse(_shown(card) if self._review.check is None else _hidden(card))

    def photo(self, request: Request) -> Response:
        """The picture of a photo, in the version that the page has the card of."""
        side = request.path_params["side"]
        if side not in (THUMBNAIL, LARGE):
            raise HTTPException(404, f"pictures have {THUMBNAIL} or {LARGE} pixels")
        card = self._card(request.path_params["photo"])
        if card is None or card.file is None:
            raise HTTPException(404, "the photo is gone")
        if version_of(card) != request.query_params.get("version"):
            raise HTTPException(409, "the photo has changed")
        try:
            content = self._review.pictures.jpeg(card.file, side)
        except PictureError as error:
            raise HTTPException(409 if error.is_changed else 422, str(error)) from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    def check(self, _request: Request) -> Response:
        """How the spot check stands."""
        if self._review.check is None:
            raise HTTPException(404, "this is no spot check: start sorter review with --check")
        return JSONResponse({"sentence": self._review.check.sentence()})

    async def decide(self, request: Request) -> Response:
        """Record verdicts, and move what is in another folder than it belongs to; done when this answers."""
        given = await _read(request, _VERDICTS)
        return await run_in_threadpool(self._decide, given)

    def _decide(self, given: Sequence[_Given]) -> Response:
        verdicts = [Verdict(one.photo, _version(one.version), one.label, one.how) for one in given]
        with self._one_at_a_time:
            outcomes = self._review.corrections.decide(verdicts)
        return self._answer(outcomes)

    async def take_back(self, request: Request) -> Response:
        """Take verdicts back, and move the photos to where they were."""
        photos = await _read(request, _PHOTOS)
        return await run_in_threadpool(self._take_back, photos)

    def _take_back(self, photos: Sequence[int]) -> Response:
        outcomes: list[Outcome] = []
        with self._one_at_a_time:
            for photo in photos:
                try:
                    outcomes.append(self._review.corrections.take_back(photo))
                except SorterError as error:
                    if not outcomes:
                        raise
                    # The page has to know which ones are back; the others would only wait for the same.
                    outcomes += [Outcome(other, "", str(error)) for other in photos[len(outcomes) :]]
                    break
        return self._answer(outcomes)

    def _answer(self, outcomes: Sequence[Outcome]) -> Response:
        answers = []
        for outcome in outcomes:
            card = self._card(outcome.photo)
            told = {"error": shown(outcome.error), "warning": shown(outcome.warning)}
            answer: dict[str, Any] = {"photo": outcome.photo, **told}
            if card is not None:
                hidden = self._review.check is not None and bool(outcome.error)
                answer["card"] = _hidden(card) if hidden else _shown(card)
            answers.append(answer)
        return JSONResponse({"outcomes": answers}, 409 if any(outcome.is_changed for outcome in outcomes) else 200)

    def _card(self, photo: int) -> Card | None:
        return self._review.deck.card(photo) if photo < 1 << 63 else None


async def _read(request: Request, kind: TypeAdapter[_T]) -> _T:
    """The body of a request, checked."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request has at most {MAX_BODY_BYTES // 1000} kB")
    try:
        return kind.validate_json(bytes(body))
    except ValidationError as error:
        raise HTTPException(400, f"the request is wrong ({error.errors()[0]['msg']}): reload the page") from None


def version_of(card: Card) -> str:
    """The version of a card's file, as the page sends it back; mtimes need more than a JavaScript number."""
    assert card.file is not None, "called only for photos that are there"
    return f"{card.file.identity.size}-{card.file.identity.mtime_ns}"


def _version(text: str) -> Version:
    size, mtime_ns = map(int, text.split("-"))
    return Version(size, mtime_ns)


def _hidden(card: Card) -> dict[str, Any]:
    """A card that does not tell what the model says."""
    name = shown(card.place.partition("/")[2])
    return {"id": card.id, "name": name, "version": None if card.file is None else version_of(card)}


def _shown(card: Card) -> dict[str, Any]:
    return {
        **_hidden(card),
        **({"said": card.said} if card.is_corrected else {}),
        "folder": shown(card.place.partition("/")[0]),
        "label": card.label,
        "confidence": card.confidence,
        "why": card.why,
        "sorted": card.sorted,
    }
