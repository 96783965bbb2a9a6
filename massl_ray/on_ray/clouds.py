"""The metadata endpoints in which clouds announce that they take a machine back."""

import http.client
import json
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import ClassVar
from urllib.parse import urlsplit

from massl_ray.errors import UserError

MOST_S = 120.0  # the longest notice a spot machine gets anywhere
ANSWER_S = 2.0  # metadata endpoints are one hop away
FIRST_EVENTS_S = 130.0  # Azure switches scheduled events on at the first request and may take two minutes to answer it


class NoAnswer(Exception):
    """Nothing came back that can be used; worth asking again. One sentence."""


@dataclass(frozen=True)
class Notice:
    """The cloud takes this machine back: what it calls that, and how many seconds are left, in [0, 120]."""

    cloud: str
    what: str
    seconds_left: float


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, whatever its status."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    def seconds_until(self, when: str) -> float | None:
        """Seconds from the server's own Date to `when`; None if either cannot be read. The clock of this machine may jump."""
        now, then = _moment(self.headers.get("Date", "")), _moment(when)
        return (then - now).total_seconds() if now and then else None


class Source(ABC):
    """The metadata endpoint of one cloud.

    Subclasses say how to `probe` it and how to `ask` it for (what, seconds left or None where the answer names no time).
    """

    cloud: ClassVar[str]
    default_url: ClassVar[str] = "http://169.254.169.254"
    poll_s: ClassVar[float]
    promised_s: ClassVar[float]  # between notice and end

    def __init__(self, url: str | None = None, clock: Callable[[], float] = time.monotonic):
        self.url = (url or self.default_url).rstrip("/")
        self._clock = clock
        self._clear_at: float | None = None

    @abstractmethod
    def probe(self) -> None:
        """Raises NoAnswer unless this cloud's endpoint is there."""

    @abstractmethod
    def ask(self) -> tuple[str, float | None] | None:
        """What is announced, and in how many seconds if that is said; None where nothing is."""

    def look(self) -> Notice | None:
        """The notice, if there is one.

        Raises:
            NoAnswer: the endpoint is silent, or says what cannot be read.
        """
        asked_at = self._clock()
        try:
            found = self.ask()
        except NoAnswer:
            raise
        except Exception as error:  # JSON of any other shape: nothing that an endpoint says may end the watcher
            raise self._unreadable(repr(error)) from error
        if found is None:
            self._clear_at = asked_at
            return None
        what, seconds = found
        if seconds is None:  # it may have come right after the last look without one
            seconds = self.promised_s - (0.0 if self._clear_at is None else self._clock() - self._clear_at)
        return Notice(self.cloud, what, min(max(seconds, 0.0), MOST_S))

    def _fetch(
        self, path: str, headers: dict[str, str], method: str = "GET", statuses: Sequence[int] = (200,), timeout_s: float = ANSWER_S
    ) -> Reply:
        # http.client, since urllib would send this through the machine's web proxy, which cannot know about this machine
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout_s)
        late = threading.Event()  # the time-out above is between bytes: an endpoint that drips would hold the watcher

        def hang_up() -> None:
            late.set()
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(timeout_s, hang_up)
        try:
            connection.connect()
            watch.start()
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            reply = Reply(response.status, response.headers, response.read(1 << 20).decode("utf-8", "replace").strip())
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise NoAnswer(f"The {self.cloud} metadata endpoint at {self.url} does not answer ({error!r}).") from error
        finally:
            watch.cancel()
            connection.close()
        if late.is_set():
            raise NoAnswer(f"The {self.cloud} metadata endpoint at {self.url} takes longer than {timeout_s:g} s to answer.")
        if reply.status not in statuses or (reply.status == 200 and not reply.text):
            raise self._unreadable(f"{method} {path}: status {reply.status}, {len(reply.text)} characters")
        return reply

    def _unreadable(self, what: str) -> NoAnswer:
        return NoAnswer(f"The {self.cloud} metadata endpoint at {self.url} answers what cannot be read ({what[:200]}).")


class Aws(Source):
    """EC2, IMDSv2: every request carries a token."""

    cloud = "aws"
    poll_s = 5.0  # what AWS advises; two minutes are left
    promised_s = 120.0
    _token: str | None = None

    def probe(self) -> None:
        token = self._fetch("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, "PUT").text
        if not (token.isascii() and token.isprintable()):
            raise self._unreadable("a token that fits in no header")
        self._token = token

    def ask(self) -> tuple[str, float | None] | None:
        if self._token is None:
            self.probe()
        reply = self._action(200, 401, 404)
        if reply.status == 401:  # the token has expired
            self.probe()
            reply = self._action(200, 404)
        if reply.status == 404:
            return None
        answer = json.loads(reply.text)
        action = answer["action"]
        if action not in ("terminate", "stop", "hibernate"):
            raise ValueError(action)
        # hibernation begins with its notice, whatever time it names
        return action, 0.0 if action == "hibernate" else reply.seconds_until(str(answer.get("time")))

    def _action(self, *statuses: int) -> Reply:
        headers = {"X-aws-ec2-metadata-token": self._token or ""}
        return self._fetch("/latest/meta-data/spot/instance-action", headers, statuses=statuses)


class Gcp(Source):
    """Compute Engine."""

    cloud = "gcp"
    default_url = "http://metadata.google.internal"
    poll_s = 1.0  # of 30 seconds, and the notice does not say when it came
    promised_s = 30.0

    def probe(self) -> None:
        self.ask()

    def ask(self) -> tuple[str, float | None] | None:
        reply = self._fetch("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        if reply.headers.get("Metadata-Flavor") != "Google" or reply.text not in ("TRUE", "FALSE"):
            raise self._unreadable(reply.text)
        return ("preempted", None) if reply.text == "TRUE" else None


class Azure(Source):
    """Scheduled events. They go to all machines of a scale set or availability set, so only those that name this one count."""

    cloud = "azure"
    poll_s = 1.0  # as little as 30 seconds are left
    promised_s = 30.0
    _name: str | None = None
    _events_s = FIRST_EVENTS_S

    def probe(self) -> None:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        self._name = self._fetch(path, {"Metadata": "true"}).text

    def ask(self) -> tuple[str, float | None] | None:
        if self._name is None:
            self.probe()
        reply = self._fetch("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"}, timeout_s=self._events_s)
        self._events_s = ANSWER_S
        found = [
            # no NotBefore: it has started
            (event["EventType"], reply.seconds_until(event["NotBefore"]) if event.get("NotBefore") else 0.0)
            for event in json.loads(reply.text)["Events"]
            # Terminate is a scale set's own notice before it deletes a machine
            if event["EventType"] in ("Preempt", "Terminate") and self._name in event["Resources"]
        ]
        return min(found, key=lambda each: MOST_S if each[1] is None else each[1], default=None)


SOURCES: dict[str, type[Source]] = {source.cloud: source for source in (Aws, Gcp, Azure)}


def find_source(cloud: str, url: str | None) -> Source:
    """The metadata endpoint of `cloud`, or for "auto" the first that answers; `url` in place of the cloud's own address.

    Raises:
        UserError: none answers.
    """
    if cloud != "auto":
        return SOURCES[cloud](url)
    for kind in SOURCES.values():
        source = kind(url)
        try:
            source.probe()
            return source
        except NoAnswer:
            continue
    raise UserError(
        f"no metadata endpoint of {', '.join(SOURCES)} answers{f' at {url}' if url else ' on this machine'}: "
        "name yours with --cloud, or leave this watcher out where machines are not taken back."
    )


def check_base_url(url: str) -> None:
    """Raises UserError where it is none."""
    try:
        parts = urlsplit(url)
        good = parts.scheme == "http" and parts.hostname and parts.port != 0 and not parts.path.strip("/")
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise UserError(f"--metadata-url {url} is no base address: give http://HOST or http://HOST:PORT.")


def _moment(text: str) -> datetime | None:
    """The point in time that an ISO 8601 or an HTTP date names, in UTC where it names no zone."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = read(text)
        except ValueError:
            continue
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None
