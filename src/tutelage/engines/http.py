"""Requests to a model's server: many at a time, sent again while that can help, and one clear end.

Owns retries, waiting, cancelling and the words for what went wrong; the key is sent and never
told. Knows no server's API: a reader is handed the JSON that came, and says what it lacks.

One event loop a batch of requests, because cancelling a coroutine closes its connection at once:
when one request fails for good, or on Ctrl-C, no other is waited for.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_exponential, wait_random

from tutelage.core.errors import EngineError
from tutelage.recipe.engines import Server

T = TypeVar("T")
CONNECT_SECONDS = 10.0
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 900.0
UNUSABLE_RETRIES = 2
"""A body that lacks what was asked may have been cut on its way; a server that never gives it
should not be asked for minutes."""
QUOTED_CHARACTERS = 300


class _Again(Exception):
    """What asking once more may mend."""

    def __init__(self, problem: str, *, after: float | None = None, unusable: bool = False) -> None:
        super().__init__(problem)
        self.after, self.unusable = after, unusable


class Http:
    """One server, as its table describes it.

    Raises EngineError when the variable that should hold the key is not set.
    """

    def __init__(self, table: Server, *, say: Callable[[str], None]) -> None:
        self.url = table.url.rstrip("/").removesuffix("/v1")
        self._table, self._say = table, say
        self._key = _key(table)
        # 1, 2, 4, ... s, and up to as much as the first again: many should not come back at once.
        doubling = wait_exponential(FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)
        self._backoff = doubling + wait_random(0, FIRST_WAIT_SECONDS)
        self._told = False

    def __repr__(self) -> str:
        return f"Http({self.url})"

    def run(self, jobs: Sequence[Callable[["Session"], Awaitable[T]]]) -> list[T]:
        """The results of all jobs, in their order; `concurrency` of them run at a time.

        Raises EngineError for the first that fails; the others are cancelled.
        """
        return asyncio.run(self._run(jobs))

    async def _run(self, jobs: Sequence[Callable[["Session"], Awaitable[T]]]) -> list[T]:
        table = self._table
        gate = asyncio.Semaphore(table.concurrency)
        timeout = httpx2.Timeout(
            table.timeout_seconds, connect=min(CONNECT_SECONDS, table.timeout_seconds), pool=None
        )
        limits = httpx2.Limits(max_connections=table.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client:
            session = Session(self, client)

            async def one(job: Callable[[Session], Awaitable[T]]) -> T:
                async with gate:
                    return await job(session)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(job)) for job in jobs]
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def ask(
        self, client: httpx2.AsyncClient, route: str, body: object, read: Callable[[Any], T],
        about: str,
    ) -> T:  # fmt: skip
        """What `read` makes of the answer; see `Session.post`."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Again), stop=self._enough, wait=self._pause,
            before_sleep=self._tell, reraise=True,
        )  # fmt: skip
        where = f"{self.url}{route}: {about}: " if about else f"{self.url}{route}: "
        try:
            return await retrying(self._once, client, route, body, read, where)
        except _Again as last:
            tries = retrying.statistics["attempt_number"]
            times = "once" if tries == 1 else f"{tries} times"
            raise EngineError(
                f"{where}{last}; tried {times}; finished shards are kept: see to the server and "
                "run again"
            ) from None

    async def _once(
        self, client: httpx2.AsyncClient, route: str, body: object, read: Callable[[Any], T],
        where: str,
    ) -> T:  # fmt: skip
        method = "GET" if body is None else "POST"
        try:
            reply = await client.request(method, self.url + route, json=body)
        except httpx2.TimeoutException:
            seconds = self._table.timeout_seconds
            raise _Again(f"no answer within {seconds:g} s (timeout_seconds)") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            words = self._line(str(error)) or type(error).__name__
            raise _Again(f"no connection ({words})") from None
        except httpx2.InvalidURL as error:
            raise EngineError(f"{where}not an address ({error}); mend url in [engines.*]") from None
        if reply.status_code == 429 or reply.status_code >= 500:
            problem = f"it answered {reply.status_code} ({self._said(reply)})"
            raise _Again(problem, after=_retry_after(reply))
        if reply.status_code != 200:
            raise EngineError(f"{where}it answered {reply.status_code}: {self._said(reply)}")
        try:
            content = reply.json()
        except (ValueError, RecursionError):
            raise _Again(f"no JSON came but {self._said(reply)!r}", unusable=True) from None
        try:
            return read(content)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            # Whatever a reader trips over is not there as the server's API has it.
            problem = f"its answer lacks what was asked for ({type(error).__name__}: {error})"
            raise _Again(self._line(problem), unusable=True) from None

    def _enough(self, state: RetryCallState) -> bool:
        error = _error(state)
        most = min(self._table.retries, UNUSABLE_RETRIES) if error.unusable else self._table.retries
        return state.attempt_number > most

    def _pause(self, state: RetryCallState) -> float:
        after = _error(state).after
        return self._backoff(state) if after is None else after

    def _tell(self, state: RetryCallState) -> None:
        """Once: a person who waits should know what for, and not a hundred times."""
        if not self._told:
            self._told = True
            again = f"asking again, up to {self._table.retries} times"
            self._say(f"  {self.url}: {_error(state)}; {again}")

    def _said(self, reply: httpx2.Response) -> str:
        """What the server says of it, in one line and without the key."""
        text = reply.text
        try:
            content = json.loads(text)
            error = content.get("error", content)
            found = error.get("message", error) if isinstance(error, dict) else error
            text = found if isinstance(found, str) else json.dumps(found)
        except (ValueError, AttributeError, RecursionError):
            pass
        return self._line(text) or "nothing"

    def _line(self, text: str) -> str:
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:QUOTED_CHARACTERS]


class Session:
    """The server, while a batch of requests is under way."""

    def __init__(self, http: Http, client: httpx2.AsyncClient) -> None:
        self._http, self._client = http, client

    async def post(
        self, route: str, body: object, read: Callable[[Any], T], *, about: str = ""
    ) -> T:
        """What `read` makes of the JSON that came; `about` stands before what an error says.

        `read` may trip (LookupError, TypeError, ValueError) over what is not there. Sent again: no
        connection, timeouts, 429, 5xx, bodies that are no JSON or that `read` trips over.
        Raises EngineError, for other refusals at once.
        """
        return await self._http.ask(self._client, route, body, read, about)

    async def get(self, route: str, read: Callable[[Any], T]) -> T:
        """The same without a body."""
        return await self._http.ask(self._client, route, None, read, "")


def _key(table: Server) -> str:
    if not table.key_env:
        return ""
    key = os.environ.get(table.key_env, "")
    if not key:
        raise EngineError(
            f"the environment variable {table.key_env} (key_env of {table.url}) is not set; "
            "put the server's API key there"
        )
    if not key.isascii() or not key.isprintable():
        raise EngineError(f"the environment variable {table.key_env} does not hold an API key")
    return key


def _error(state: RetryCallState) -> _Again:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _Again)
    return error


def _retry_after(reply: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait for; None where it does not say."""
    value = reply.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    if seconds != seconds:  # NaN
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)
