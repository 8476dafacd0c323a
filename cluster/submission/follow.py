"""Follow: a job's log as it is written, each line once, in order, over connections that drop, to the final status."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from cluster.submission.client import Job, JobServer, ServerLost
from cluster.submission.told import is_told

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0  # a connection on which no answer comes for so long has gone
PATIENCE_S = 30.0  # of a server that answers nothing, then it is given up
AGAIN_S = 0.5
PENDING_S = 10.0  # after which it is said why a job does not begin


def follow(server: JobServer, job: str, show: Callable[[str], None], *, patience_s: float = PATIENCE_S) -> Job:
    """Give each line of the job's log to `show` until it has its final status, which is returned.

    Logs why a job that waits does so.

    Raises UserError where there is no such job, ServerLost where the server has answered nothing for `patience_s`.
    """
    found = server.job(job)
    lines = Lines(show)
    lost_at: float | None = None
    tell_at: float | None = time.monotonic() + PENDING_S
    while True:
        waits = found.status == "PENDING"
        if waits and tell_at is not None and time.monotonic() >= tell_at:
            logger.info("%s is pending: %s", job, " ".join(found.message.split()))
            tell_at = None
        dropped = not waits and not asyncio.run(_take(server, job, lines))
        try:
            found = server.job(job)
            if found.over or dropped:  # some proxies let no such connection through
                lines.whole(server.log(job, missing_ok=found.over))
            if found.over:
                lines.end()
                return found
            lost_at = None
        except ServerLost:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > patience_s:
                raise ServerLost(
                    f"the job server at {server.url} has not answered for {patience_s:.0f} s; the job {job} may go on: "
                    f"`manta jobs status {job} --address {server.url}`"
                ) from None
        time.sleep(AGAIN_S)


class _Dropped(Exception):
    """A connection has ended before the log did."""


class Lines:
    """The whole lines of a text of which any stretch may come again, from its beginning."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._num_taken = 0  # characters
        self._rest = ""

    def restarted(self) -> Callable[[str], None]:
        """Takes the text from its beginning, piece by piece: what was taken before is left out."""
        place = 0

        def take(piece: str) -> None:
            nonlocal place
            new = piece[max(0, self._num_taken - place) :]
            place += len(piece)
            self._num_taken = max(self._num_taken, place)
            self._add(new)

        return take

    def whole(self, text: str) -> None:
        """Take all of the text."""
        self.restarted()(text)

    def _add(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if not is_told(line):
                self._show(line)

    def end(self) -> None:
        """Show the last line, which has no end."""
        if self._rest and not is_told(self._rest):
            self._show(self._rest)
        self._rest = ""


async def _take(server: JobServer, job: str, lines: Lines) -> bool:
    """Take the log until the server says that there is no more; False where the connection dropped before."""
    take = lines.restarted()
    try:
        async for piece in _tail(server, job):
            take(piece)
    except _Dropped as error:
        logger.debug("%s", error)
        return False
    return True


async def _tail(server: JobServer, job: str) -> AsyncIterator[str]:
    """The log from its beginning, until the server says that there is no more. Raises _Dropped.

    As Ray's client does it, which would wait for ever on a connection whose other end has gone.
    """
    import aiohttp

    client = server.client
    url = f"{server.url}/api/jobs/{job}/logs/tail"
    trust = True if client._ssl_context is None else client._ssl_context
    # reading: of the server's first answer; once that is there the heartbeat tells
    waiting = aiohttp.ClientTimeout(total=None, sock_connect=HEARTBEAT_S, sock_read=HEARTBEAT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=client._headers, cookies=client._cookies, timeout=waiting) as session,
            session.ws_connect(url, ssl=trust, heartbeat=HEARTBEAT_S, max_msg_size=0) as connection,
        ):
            async for message in connection:
                if message.type == aiohttp.WSMsgType.TEXT:
                    yield message.data
            if connection.close_code != aiohttp.WSCloseCode.OK:
                raise _Dropped(f"closed with {connection.close_code}")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _Dropped(f"{type(error).__name__}: {error}") from None
