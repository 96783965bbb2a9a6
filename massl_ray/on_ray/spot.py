"""Watch this machine's cloud for a spot notice and drain its Ray node when one comes, so that training saves and leaves.

`python -m massl_ray.on_ray.spot`, once on every node after `ray start`. It ends with exit code 0 after the drain (a machine gets
one notice), with 1 if Ray no longer has this node, and with 2 for a mistake in what was asked for.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from massl_ray.errors import UserError
from massl_ray.on_ray.clouds import MOST_S, SOURCES, NoAnswer, Notice, Source, check_base_url, find_source

T = TypeVar("T")

GCS_S = 5.0
ALIVE = 0  # GcsNodeInfo.ALIVE
PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION: a node cannot refuse it


class Undrainable(Exception):
    """Ray does not have this node, or will not drain it. One sentence."""


def watch(
    look: Callable[[], Notice | None],
    drain: Callable[[Notice], None],
    poll_s: float,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Notice:
    """Look every `poll_s` seconds until there is a notice, drain the node, and return the notice as it was drained with.

    While `look` or `drain` raise NoAnswer they are asked again, and one sentence says so for each outage.

    Raises:
        Undrainable: from `drain`.
    """
    while (notice := _until_answered(look, poll_s, say, sleep)) is None:
        sleep(poll_s)
    ends_at = clock() + notice.seconds_left
    say(f"{notice.cloud} takes this machine back ({notice.what}) in {notice.seconds_left:.0f} s.")

    def drain_now() -> Notice:
        left = replace(notice, seconds_left=max(0.0, ends_at - clock()))
        drain(left)
        return left

    return _until_answered(drain_now, min(poll_s, 1.0), say, sleep)


def _until_answered(ask: Callable[[], T], pause_s: float, say: Callable[[str], None], sleep: Callable[[float], None]) -> T:
    silent = False
    while True:
        try:
            answer = ask()
        except NoAnswer as error:
            if not silent:
                say(f"{error} Asking again every {pause_s:g} s.")
            silent = True
            sleep(pause_s)
        else:
            if silent:
                say("It answers again.")
            return answer


class RayNode:
    """The Ray node on this machine.

    Raises:
        UserError: there is no Ray here, `address` is none, or the cluster has no such node.
    """

    def __init__(self, address: str | None, node_id: str | None):
        from ray._private.services import get_ray_address_from_environment  # late: --help answers at once

        self._wanted = node_id
        try:
            self.address = address or get_ray_address_from_environment("auto", None)
            host, _, port = self.address.rpartition(":")
            if not (host and port.isdecimal()) or "/" in host:
                raise UserError(f"{self.address} is no address of a Ray's head: give HOST:PORT with --ray-address or RAY_ADDRESS.")
            with self._gcs() as gcs:
                self.node_id = self._find(gcs)
        except ConnectionError as error:
            raise UserError("no Ray runs on this machine: run `ray start` first, or name it with --ray-address.") from error
        except (NoAnswer, Undrainable) as error:
            raise UserError(str(error)) from error

    def drain(self, notice: Notice) -> None:
        """Have Ray take work off this node before the notice's time is up, as `ray drain-node` does.

        Raises:
            NoAnswer: Ray does not answer.
            Undrainable: Ray no longer has this node.
        """
        ends_at_ms = int((time.time() + notice.seconds_left) * 1000)  # Ray wants wall-clock time
        message = f"{notice.cloud} takes the machine back ({notice.what})"
        with self._gcs() as gcs:
            self.node_id = self._find(gcs)  # anew: Ray may have been started again since
            accepted, why = gcs.drain_node(self.node_id, PREEMPTION, message, ends_at_ms, timeout=GCS_S)
        if not accepted:
            raise Undrainable(f"the Ray at {self.address} refuses to drain node {self.node_id}: {why}.")

    def _find(self, gcs: Any) -> str:
        """The id of the living node; Ray accepts the drain of any id, so we look."""
        from ray._private.services import find_node_ids

        here = {self._wanted} if self._wanted else find_node_ids()
        alive = here & {node.node_id.hex() for node in gcs.get_all_node_info(timeout=GCS_S).values() if node.state == ALIVE}
        if len(alive) > 1:
            raise Undrainable(f"{len(alive)} nodes of the Ray at {self.address} run on this machine: choose with --node-id.")
        if not alive:
            which = f"node {self._wanted}" if self._wanted else "node on this machine"
            raise Undrainable(f"the Ray at {self.address} has no living {which}.")
        return alive.pop()

    @contextmanager
    def _gcs(self) -> Iterator[Any]:
        """A client for one use: an idle one need not outlive a restart of Ray's head."""
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
        from ray.exceptions import RayError

        try:
            yield GcsClient(address=self.address)
        except RayError as error:
            raise NoAnswer(f"The Ray at {self.address} does not answer ({error}).") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the watcher; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m massl_ray.on_ray.spot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cloud", choices=[*SOURCES, "auto"], default="auto", help="whose notices; auto: who answers [auto]")
    parser.add_argument("--metadata-url", metavar="URL", help="base address of the metadata endpoint [the cloud's own]")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="of Ray's head [of the Ray on this machine]")
    polls = ", ".join(f"{source.poll_s:g} for {cloud}" for cloud, source in SOURCES.items())
    parser.add_argument("--poll", type=float, metavar="SECONDS", help=f"between two looks [{polls}]")
    parser.add_argument("--node-id", metavar="HEX", help="the node to drain [the one on this machine]")
    arguments = parser.parse_args(argv)
    try:
        check_base_url(arguments.metadata_url or Source.default_url)
        if arguments.poll is not None and not 0 < arguments.poll <= MOST_S:
            raise UserError(f"--poll {arguments.poll:g} does not lie between 0 and {MOST_S:g} seconds.")
        source = find_source(arguments.cloud, arguments.metadata_url)
        node = RayNode(arguments.ray_address, arguments.node_id)
        poll_s = arguments.poll or source.poll_s
        _say(f"Watching {source.cloud} every {poll_s:g} s for node {node.node_id} of the Ray at {node.address}.")
        left = watch(source.look, node.drain, poll_s, say=_say)
        _say(f"Node {node.node_id} drains, {left.seconds_left:.0f} s before its end.")
        return 0
    except UserError as error:
        _say(str(error))
        return 2
    except Undrainable as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def _say(sentence: str) -> None:
    print(f"massl-ray: {sentence}", file=sys.stderr, flush=True)  # flushed: it goes into a log file


if __name__ == "__main__":
    sys.exit(main())
