"""Several hosts on one: nodes as network namespaces, joined by a switch with links of a chosen rate. Linux, root, iproute2.

Every node has one link, `eth0`, to a bridge that stands in a namespace of its own, so that nothing of the host's network is
touched. Both ends of a link are shaped by a token bucket (tc tbf): what a node sends and what it receives. Where links shall
take time, the bridge is a process of ours (`far_links`). Processes of one node reach each other by its loopback, unshaped, as
by shared memory.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.launch import far_links
from coterie.routing.errors import CoterieError, InputError, first_line, require

DEVICE = "eth0"
SENT = f"/sys/class/net/{DEVICE}/statistics/tx_bytes"  # as seen inside a node
ADDRESS = "10.77.0.{}"
MOST_NODES = 250
QUEUE_BYTES = 64 << 20  # of a link: more than is ever in flight here, so that nothing is dropped
FAR_MTU = 9000  # of links through a process: fewer packets to carry
BURST_SECONDS = 1e-3  # what a link may send at once, in its own time; seen: half of that loses a tenth of 1 Gbit/s,
LEAST_BURST = 4 << 10  # and a tenth of it loses half. In bytes: two packets
COMMAND_SECONDS = 20


@dataclass(frozen=True)
class Node:
    """One host. namespace: its name for `ip netns`; address: on the link."""

    namespace: str
    address: str

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """A process inside the node, in a session of its own; options as of Popen. The process id is the command's own."""
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], start_new_session=True, **options)

    def sent(self) -> int:
        """Bytes sent to other nodes since the node was made, with all headers."""
        return int(_run("ip", "netns", "exec", self.namespace, "cat", SENT))


@dataclass(frozen=True)
class Network:
    """Nodes and what joins them. switch: the bridge's namespace, with a port `p<n>` for node n; or the process in its place."""

    nodes: tuple[Node, ...]
    switch: str | subprocess.Popen[str]

    def shape(self, bits_per_second: float, seconds: float = 0.0) -> None:
        """Give every link another rate, in both directions, and latency, of nodes that are `far`. Connections stay."""
        require(bits_per_second >= 1e4, "rate", bits_per_second, "at least 10000 bits per second")
        least = LEAST_BURST if isinstance(self.switch, str) else 2 * FAR_MTU
        burst = max(least, int(bits_per_second / 8 * BURST_SECONDS))
        bucket = ("root", "tbf", "rate", f"{bits_per_second:.0f}bit", "burst", str(burst), "limit", str(QUEUE_BYTES))
        for node in self.nodes:
            _run("tc", "-n", node.namespace, "qdisc", "replace", "dev", DEVICE, *bucket)
        if isinstance(self.switch, str):
            require(seconds == 0, "latency", seconds, "0 s, or nodes that are far")
            for number in range(len(self.nodes)):
                _run("tc", "-n", self.switch, "qdisc", "replace", "dev", f"p{number}", *bucket)
        else:
            assert self.switch.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: why is told below
                print(json.dumps({"bits_per_second": bits_per_second, "seconds": seconds}), file=self.switch.stdin, flush=True)
            _hear(self.switch, "done")


def check_available() -> None:
    """Raises InputError, saying what to do, where namespaces cannot be made."""
    if os.geteuid() != 0:
        raise InputError(f"network namespaces: found user id {os.geteuid()}, expected 0 (root): run this under sudo")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise InputError(f"network namespaces: found no program {program!r}, expected iproute2: apt-get install iproute2")


@contextmanager
def network(nodes: int, bits_per_second: float, far: bool = False) -> Iterator[Network]:
    """`nodes` hosts, links of this rate; they and all processes in them are gone at the end, whatever happens.

    far: links that can be given latency; packets then go through a process, so that such a link carries a Gbit/s at most.
    """
    require(2 <= nodes <= MOST_NODES, "nodes", nodes, f"2 to {MOST_NODES}")
    check_available()
    name = f"coterie-{os.getpid()}-{secrets.token_hex(3)}"
    hosts = tuple(Node(f"{name}-{i}", ADDRESS.format(i + 1)) for i in range(nodes))
    switch: str | subprocess.Popen[str] = f"{name}-switch"
    try:
        with _stopping_on_sigterm():
            if far:
                switch = _plugged(hosts)
            else:
                _bridged(hosts, str(switch))
            made = Network(hosts, switch)
            made.shape(bits_per_second)
            yield made
    finally:
        for host in hosts:
            _remove(host.namespace)
        if isinstance(switch, str):
            _remove(switch)
        else:
            switch.kill()
            switch.communicate()


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds like ctrl-C, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bridged(hosts: Sequence[Node], switch: str) -> None:
    _add(switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for number, host in enumerate(hosts):
        port = f"p{number}"
        _add(host.namespace)
        _run("ip", "link", "add", DEVICE, "netns", host.namespace, "type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _connect(host)


def _plugged(hosts: Sequence[Node]) -> subprocess.Popen[str]:
    """The process that joins the hosts by links with latency."""
    for host in hosts:
        _add(host.namespace)
    ends = [f"{host.namespace}={host.address}" for host in hosts]
    command = [sys.executable, "-I", str(Path(far_links.__file__)), *ends]
    pipe = subprocess.PIPE
    switch = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        _hear(switch, "ready")
        for host in hosts:
            _run("ip", "-n", host.namespace, "link", "set", DEVICE, "mtu", str(FAR_MTU))
            _connect(host)
    except BaseException:
        switch.kill()
        switch.communicate()
        raise
    return switch


def _hear(switch: subprocess.Popen[str], expected: str) -> None:
    """Wait for a line of the switch. Raises CoterieError with its error if it has ended instead."""
    assert switch.stdout is not None and switch.stderr is not None
    if switch.stdout.readline().strip() != expected:
        raise CoterieError(f"links with latency: the switch has ended ({first_line(CoterieError(switch.stderr.read()))})")


def _add(namespace: str) -> None:
    try:
        _run("ip", "netns", "add", namespace)
    except CoterieError as error:
        hint = "run where root may make network namespaces (CAP_SYS_ADMIN; in a container: --privileged)"
        raise InputError(f"{error}: {hint}") from error


def _connect(host: Node) -> None:
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", DEVICE)
    for device in ("lo", DEVICE):
        _run("ip", "-n", host.namespace, "link", "set", device, "up")


def _remove(namespace: str) -> None:
    """End the processes of a namespace and delete it; its links go with it."""
    with suppress(CoterieError):
        for pid in _run("ip", "netns", "pids", namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for _ in range(50):
            if not _run("ip", "netns", "pids", namespace):
                break
            time.sleep(0.02)
        _run("ip", "netns", "delete", namespace)


def _run(*command: str) -> str:
    """Standard output of a command; raises CoterieError with its error. Out of reach of the terminal's ctrl-C."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CoterieError(f"{' '.join(command)}: no end within {COMMAND_SECONDS:g} s") from error
    if done.returncode:
        raise CoterieError(f"{' '.join(command)}: exit code {done.returncode} ({first_line(CoterieError(done.stderr))})")
    return done.stdout.strip()
