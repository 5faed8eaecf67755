#!/usr/bin/env python3
"""What does the gateway cost, beside others that do the same?  `python3 bench/bench.py` tells.

Between a load and a stand-in for Ollama, all on this machine, stand in turn: nothing ("direct"), the gateway,
the gateway on a free-threaded Python ("gateway-t"), nginx, HAProxy, Caddy, a Go reverse proxy and a naive one in
Python, each with TLS, a key check and a log of JSON lines; where --peers names them, also ollaguard and LiteLLM,
which is asked as one asks OpenAI and whose answer to the request of a new connection is its own.  Measured are

- small chats, by wrk: latency on 1 connection, requests/s on 16, CPU per request on both;
- new TLS connections, with a full handshake and one small request each, for half the time: CPU;
- token streams at 50 tokens/s each, every token checked: CPU per token, delay from the upstream's send to
  the client's read, time to first token (20 ms of which the upstream thinks), memory.

In each round the peers take turns in an order that rotates, so that what else runs here meets all alike; shown
are medians over the rounds.  CPU is that of a peer's whole process tree by the kernel's clocks, and hardly
depends on other load.  All else does: load and upstream share the cores with the gateway.

For Linux.  wrk is Debian's package of that name.  What is not installed is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Final, NamedTuple

import report
import streams
from peers import GATEWAY, HERE, KEY, RECIPES, BenchError, Peer, Site, find, free_port, last_line, output
from streams import Figures

Measure = Callable[[Peer], Figures]

FAILURES: Final = (BenchError, OSError, LookupError, ValueError, ArithmeticError, subprocess.SubprocessError)
GATEWAYS: Final = [name for name in RECIPES if name != "direct"]


class Plan(NamedTuple):
    """How often, how long each, how many streams, and which peers."""

    rounds: int
    seconds: int
    streams: Sequence[int]
    peers: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report.  0, or 1 where the gateway could not be measured without errors."""
    options, plan = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all that cleans up
    notes = [f"{machine()}; load average before: {os.getloadavg()[0]:.1f}"]
    try:
        peers = measure(plan, notes)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    text = describe(plan, peers, notes)
    print(text)
    most = max(n for n in plan.streams if n <= min(peer.recipe.streams for peer in peers))
    panels = [(f"cpu{n}", f"CPU per request, {n} connection{'s' * (n > 1)}") for n in (1, 16)]
    panels.append((f"token{most}", f"CPU per streamed token, {most} streams"))
    results = {peer.name: {"version": peer.version, "rounds": peer.figures, "errors": peer.errors} for peer in peers}
    for path, content in (
        (options.svg, report.picture([peer for peer in peers if peer.trust], panels)),
        (options.json, json.dumps({"plan": plan._asdict(), "notes": notes, "peers": results}, indent=1)),
    ):
        if path:
            Path(path).write_text(content + "\n", encoding="utf-8")
    return int(any(peer.errors for peer in peers if peer.name in ("direct", "gateway", "gateway-t")))


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    """The command line, and the plan that follows from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that all works, not how fast")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many; default 5")
    parser.add_argument("--seconds", type=int, metavar="S", help="how long each measurement is; default 2")
    large = "; litellm and ollaguard, large to install and slow to start, only where they are named"
    default = ",".join(name for name in GATEWAYS if not RECIPES[name].large)
    parser.add_argument("--peers", metavar="A,B,C", default=default, help=f"default %(default)s{large}")
    parser.add_argument("--svg", metavar="FILE.svg", help="write a picture of CPU per request and per token")
    parser.add_argument("--json", metavar="FILE.json", help="write the figures of every round")
    options = parser.parse_args(argv)
    rounds, seconds, counts = (1, 1, (16,)) if options.quick else (5, 2, (64, 256))
    names = [name for name in options.peers.split(",") if name != "direct"]
    plan = Plan(options.rounds or rounds, options.seconds or seconds, counts, ["direct", *names])
    if min(plan.rounds, plan.seconds) < 1 or not set(names) <= set(GATEWAYS):
        parser.error(f"--rounds and --seconds take a number from 1, --peers some of {','.join(GATEWAYS)}")
    return options, plan


# --- The rounds ---


def measure(plan: Plan, notes: list[str]) -> list[Peer]:
    """Start all, let them take turns, stop all."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        peers = start(plan, Path(folder), stack, notes)
        steps = measurements(plan, notes)
        for number in range(plan.rounds):
            print(f"round {number + 1} of {plan.rounds}", file=sys.stderr, flush=True)
            for peer in peers:
                peer.figures.append({"idle": peer.idle} if peer.trust else {})
            first = number % len(peers)
            for step in steps:
                for peer in peers[first:] + peers[:first]:
                    take_turn(peer, step)
            add_latencies(peers)
    return peers


def start(plan: Plan, folder: Path, stack: contextlib.ExitStack, notes: list[str]) -> list[Peer]:
    """The peers that there are, direct first.  Nothing can be measured without that, or the gateway if planned."""
    cert, key, upstream = str(folder / "cert.pem"), str(folder / "key.pem"), free_port()
    ensure = "import sys, gateway; gateway.ensure_certificate(*sys.argv[1:], [])"
    output([sys.executable, "-c", ensure, cert, key], cwd=GATEWAY.parent)
    peers = []
    for name in plan.peers:
        site = Site(folder / name, upstream if name == "direct" else free_port(), upstream, cert, key)
        site.folder.mkdir()
        try:
            peer = Peer(name, site)
            stack.callback(peer.stop)
            peer.wait_until_ready()
            peers.append(peer)
        except FAILURES as error:
            if name in ("direct", "gateway"):
                raise BenchError(f"{name}: {error}") from None
            notes.append(f"{name}: {error}")
    return peers


def take_turn(peer: Peer, step: Measure) -> None:
    """One measurement of one peer.  What goes wrong is an error of that peer, and leaves this turn without figures."""
    before = sum(peer.errors.values())
    try:
        figures = step(peer)
        if sum(peer.errors.values()) == before:
            peer.figures[-1].update(figures)
    except FAILURES as error:
        ended = "" if peer.process.poll() is None else f"; it has ended, saying: {peer.last_words()}"
        peer.errors[f"{type(error).__name__}: {last_line(str(error))}{ended}"] += 1


def add_latencies(peers: Sequence[Peer]) -> None:
    """What each peer adds to direct access in the same round."""
    direct = peers[0].figures[-1]
    for mine in (peer.figures[-1] for peer in peers[1:]):
        for name in {"p50", "p99"} & set(mine) & set(direct):
            mine[f"added_{name}"] = mine[name] - direct[name]


# --- What is measured ---


def measurements(plan: Plan, notes: list[str]) -> list[Measure]:
    """The measurements of a round, in order."""
    steps: list[Measure] = [functools.partial(handshakes, plan.seconds)]
    steps += [functools.partial(stream, count, plan.seconds) for count in plan.streams]
    try:
        wrk = find("wrk", "Debian package wrk")
    except BenchError as error:
        notes.append(f"wrk, which asks for small chats: {error}")
        return steps
    return [*(functools.partial(chat, wrk, connections, plan.seconds) for connections in (1, 16)), *steps]


def chat(wrk: str, connections: int, seconds: int, peer: Peer) -> Figures:
    """Small chats, one after the other on each of the connections."""
    url = f"http{'s' if peer.trust else ''}://127.0.0.1:{peer.port}{peer.recipe.chat}"
    load = ["--threads=1", f"--connections={connections}", f"--duration={seconds}s", f"--script={HERE / 'chat.lua'}"]
    before = peer.cpu()
    said = output([wrk, *load, f"--header={peer.recipe.credential}{KEY}", url], timeout=seconds + 20)
    cpu, came = peer.cpu() - before, json.loads(last_line(said))
    peer.errors.update({f"wrk: {kind}": count for kind, count in came["errors"].items() if count})
    figures = {f"cpu{connections}": cpu / came["requests"] / 1e3} if peer.trust else {}
    if connections == 1:
        return {**figures, "p50": came["p50"], "p99": came["p99"]}
    return {**figures, f"rate{connections}": came["requests"] / came["microseconds"] * 1e6}


def handshakes(seconds: int, peer: Peer) -> Figures:
    """Connections, one after the other; not by wrk, which resumes its TLS sessions."""
    if not peer.trust:
        return {}
    until, before, count = time.monotonic() + seconds / 2, peer.cpu(), 0
    while time.monotonic() < until:
        status, count = peer.get(KEY), count + 1
        if status != 200:
            raise BenchError(f"status {status}")
    return {"handshake": (peer.cpu() - before) / count / 1e3}


def stream(count: int, seconds: int, peer: Peer) -> Figures:
    """Token streams, all at the same time."""
    if count > peer.recipe.streams:
        return {}
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(peer.connect()) for _ in range(count)]
        for connection in connections:
            connection.setblocking(False)
        path, credential = peer.recipe.chat, peer.recipe.credential + KEY
        figures, errors = streams.run(connections, seconds, path, credential, lambda: (peer.cpu(), peer.memory()))
    peer.errors.update(errors)
    unasked = () if peer.trust else ("token", "memory")  # the upstream's own are nobody's concern
    return {f"{name}{count}": value for name, value in figures.items() if name not in unasked}


# --- The report ---


def describe(plan: Plan, peers: Sequence[Peer], notes: Sequence[str]) -> str:
    """The report in Markdown."""
    reference = next(peer for name in ("go", "nginx", "gateway", "direct") for peer in peers if peer.name == name)
    unable = [peer for peer in peers if peer.recipe.streams < max(plan.streams)]
    remarks = [
        f"median (least-most) of {plan.rounds} round(s), {plan.seconds} s per measurement; "
        f"1.00x is what {reference.name} needs in the same round",
        "direct is load and upstream alone, without TLS, key and log: what it cannot reach here, nobody can",
        *notes,
        *(f"{peer.name}: too slow for {max(plan.streams)} streams, not measured with them" for peer in unable),
        ", ".join(f"{peer.name} {peer.version}" for peer in peers if peer.trust),
        *(f"{peer.name}: {error}, {count} times" for peer in peers for error, count in peer.errors.items()),
    ]
    return "\n".join([report.table(peers, plan.streams, reference), "", *(f"- {remark}" for remark in remarks)])


def machine() -> str:
    """What this runs on."""
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {models[0] if models else platform.machine()}, {system}"


if __name__ == "__main__":
    sys.exit(main())
