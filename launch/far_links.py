"""A switch whose links take time: what stands between nodes of `netns` that are far apart. Linux, root.

A node's link is a TUN device; this process holds their other ends, as a cable would. A packet waits until the link to its
receiver has carried those before it, and then for the latency. (The kernel's own way is `tc netem`, which many kernels are
built without.)

python -m coterie.launch.far_links NAMESPACE=ADDRESS ... reads lines of JSON, {"bits_per_second": R, "seconds": S}, answers
each with a line, and ends with its standard input.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

NAMESPACES = Path("/var/run/netns")
DEVICE = b"eth0"
CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MOST_BYTES = 1 << 16
IPV4, RECEIVER = 4, slice(16, 20)  # in an IP header: the version, where the receiver's address stands
URGENT = -10  # niceness: a link is never busy with something else


def plugged(namespace: str) -> int:
    """The switch's end of a new device `eth0` in a namespace of `ip netns`; this thread stays in that namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open() as file:
        if library.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TUN | IFF_NO_PI))
    return end


class Switch:
    """ends: by a node's address, the file of its link. Packets to one node keep their order."""

    def __init__(self, ends: Mapping[bytes, int]) -> None:
        self.ends = ends
        self.waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends.values()}
        self.idle_from = dict.fromkeys(self.waiting, 0.0)  # when a link will have carried what it has
        self.bytes_per_second, self.seconds = 1e9, 0.0

    def run(self, orders: int) -> None:
        """Carry packets until the file `orders` ends."""
        heard = b""
        while True:
            due = min((queue[0][0] for queue in self.waiting.values() if queue), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            ready, _, _ = select.select([orders, *self.waiting], [], [], timeout)
            for end in ready:
                if end != orders:
                    self._take(end)
                    continue
                said = os.read(orders, MOST_BYTES)
                if not said:
                    return
                *lines, heard = (heard + said).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))
            self._deliver()

    def _obey(self, order: dict[str, float]) -> None:
        self.bytes_per_second, self.seconds = order["bits_per_second"] / 8, order["seconds"]
        print("done", flush=True)

    def _take(self, end: int) -> None:
        """All that a node has sent. What is for nobody here is dropped, as a switch would."""
        now = time.monotonic()
        while True:
            try:
                packet = os.read(end, MOST_BYTES)
            except BlockingIOError:
                return
            to = self.ends.get(packet[RECEIVER]) if packet[0] >> 4 == IPV4 else None
            if to is not None:
                self.idle_from[to] = max(now, self.idle_from[to]) + len(packet) / self.bytes_per_second
                self.waiting[to].append((self.idle_from[to] + self.seconds, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        for end, queue in self.waiting.items():
            while queue and queue[0][0] <= now:
                os.write(end, queue.popleft()[1])


def main() -> None:
    """As the module says."""
    pairs = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    switch = Switch({socket.inet_aton(address): plugged(namespace) for namespace, address in pairs})
    os.nice(URGENT)
    print("ready", flush=True)
    switch.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
