"""What the routes share: the client's connections, the callers' tokens, and how much may be in flight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from starlette.requests import Request

from aisle.client import TLS, AsyncClassifier, ClassifierError, InvalidText, Overloaded, Prediction
from aisle.client.protocol import CALLS, IN_FLIGHT
from aisle.client.tracing import continued
from aisle.client.wire import Wanted, with_row
from aisle.deploy.rest.access import CLIENT
from aisle.deploy.rest.bodies import token_of
from aisle.deploy.rest.errors import UNHEALTHY, Fault, overloaded

REQUESTS = 4 * CALLS  # requests in flight of one process; more would only wait longer
STREAMS = CALLS // IN_FLIGHT  # streams in flight of one process: as many as can all send
RETRIES = 2  # fewer than a client of its own has: the caller hears soon, and decides itself
TOKENS = 1024  # callers whose view of the connection is kept


@dataclass(frozen=True)
class Upstream:
    """Where the server or the gateway is, and how to reach it."""

    url: str
    timeout: float = 10.0  # seconds
    tls: TLS | None = None
    token: str = ""  # this front's own, for its health checks: callers bring theirs

    def connect(self) -> AsyncClassifier:
        return AsyncClassifier(self.url, timeout=self.timeout, retries=RETRIES, tls=self.tls, token=self.token)


class Limit:
    """Counts what is in flight, and refuses more."""

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what, self._now = most, what, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one within the context.

        Raises:
            Fault: 429, the limit is reached.
        """
        if self._now >= self._most:
            raise overloaded(f"{self._what} are in flight already; try again later")
        self._now += 1
        try:
            yield
        finally:
            self._now -= 1


class Front:
    """The connections to the server, for one process."""

    def __init__(self, upstream: Upstream) -> None:
        self.category_counts: dict[int, int] = {}  # of each version, as far as it was asked
        self.requests = Limit(REQUESTS, f"{REQUESTS} requests")
        self.streams = Limit(STREAMS, f"{STREAMS} streams")
        self._own = upstream.connect()
        self._bulk = upstream.connect()  # a connection of its own, so that streams take no turn from requests
        self._encrypted = upstream.tls is not None
        self._views = lru_cache(TOKENS)(self._view)

    async def close(self) -> None:
        await self._own.close()
        await self._bulk.close()

    def client(self, request: Request, *, bulk: bool = False) -> AsyncClassifier:
        """Return the connection for a request's caller, with its token.

        Without TLS there is no gateway that could check a token, and none is sent.

        Raises:
            Fault: 401, the token has a wrong form.
        """
        token = token_of(request) if self._encrypted else ""
        request.scope[CLIENT] = token.partition(":")[0] or None
        return self._views(token, bulk)

    def _view(self, token: str, bulk: bool) -> AsyncClassifier:
        return (self._bulk if bulk else self._own).with_token(token)

    async def probe(self) -> int | None:
        """Classify one word with this front's own token; return the version that answered, None if the queue is full.

        Raises:
            Fault: 503, the gateway does not know the token.
            ClassifierError: the server does not answer, or refuses.
        """
        try:
            (answer,) = await self._own.classify(["probe"])
        except Overloaded:  # a server that is busy is well
            return None
        except ClassifierError as error:
            if error.status != "UNAUTHENTICATED":
                raise
            message = "the gateway refuses this front's own token; set AISLE_TOKEN"
            raise Fault(503, message, UNHEALTHY, why=str(error)) from None
        return answer.version


async def classify(client: AsyncClassifier, request: Request, texts: list[object], wanted: Wanted) -> list[Prediction]:
    """Classify the texts of one request, as one request to the server, in the caller's trace.

    Raises:
        Fault: 413, there are more texts than the server takes at once.
        InvalidText, ClassifierError: as `AsyncClassifier.classify`.
    """
    most = await client.max_batch()
    if len(texts) > most:
        message = f"{len(texts)} texts, over the limit of {most}; send several requests, or a stream of NDJSON"
        raise Fault(413, message)
    with continued(request.headers):
        try:
            return await client.classify(
                texts,  # type: ignore[arg-type]
                wanted.top_k,
                decisions=wanted.decisions,
                attributes=wanted.attributes,
            )
        except InvalidText as error:
            raise with_row(error, 0) from None
