"""What was measured, as a Markdown table and as a picture.

A peer's figures are one dictionary per round; what is missing in it could not be measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from peers import Peer

# Name of a figure, heading, digits behind the point, and whether it is also shown as a multiple of the reference's.
Line = tuple[str, str, int, bool]
CHATS: Final[Sequence[Line]] = (
    ("added_p50", "**added latency, p50, µs**", 0, False),
    ("added_p99", "added latency, p99, µs", 0, False),
    ("p50", "latency, p50, µs", 0, False),
    ("p99", "latency, p99, µs", 0, False),
    ("cpu1", "**CPU per request, 1 connection, µs**", 0, True),
    ("cpu16", "**CPU per request, 16 connections, µs**", 0, True),
    ("rate16", "requests/s, 16 connections", 0, False),
    ("handshake", "**CPU per new TLS connection, µs**", 0, True),
    ("idle", "memory, idle, MB", 0, False),
)
STREAMS: Final[Sequence[Line]] = (
    ("token", "**CPU per token, {} streams, µs**", 1, True),
    ("pace", "tokens/s, {} streams", 0, False),
    ("delay_p50", "token delay, {} streams, p50, ms", 2, False),
    ("delay_p99", "token delay, {} streams, p99, ms", 2, False),
    ("first_p50", "time to first token, {} streams, p50, ms", 1, False),
    ("first_p99", "time to first token, {} streams, p99, ms", 1, False),
    ("memory", "memory, {} streams, MB", 0, False),
)


def table(peers: Sequence[Peer], counts: Sequence[int], reference: Peer) -> str:
    """One line per figure, one column per peer."""
    lines = list(CHATS)
    for count in counts:
        lines += [(f"{name}{count}", text.format(count), digits, multiple) for name, text, digits, multiple in STREAMS]
    rows = [["", *(peer.name for peer in peers)], ["---", *("---:" for _ in peers)]]
    for name, text, digits, multiple in lines:
        cells = [cell(peer, name, digits, reference if multiple else peer) for peer in peers]
        if set(cells) != {"-"}:
            rows.append([text, *cells])
    rows.append(["errors", *(str(sum(peer.errors.values())) for peer in peers)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(peer: Peer, name: str, digits: int, reference: Peer) -> str:
    """Median (least-most), and the median of the multiples of the reference's within a round."""
    found = [figures[name] for figures in peer.figures if name in figures]
    if not found:
        return "-"
    text = f"{statistics.median(found):,.{digits}f}"
    if len(found) > 1:
        text += f" ({min(found):,.{digits}f}-{max(found):,.{digits}f})"
    both = [(mine, its) for mine, its in zip(peer.figures, reference.figures) if name in mine and name in its]
    if peer is not reference and both:
        text += f" {statistics.median(mine[name] / its[name] for mine, its in both):.2f}x"
    return text


INK, OURS, THEIRS = "#768390", "#1f9d8f", "#8fa1b3"  # colours that read on white and on GitHub's dark
WIDTH, NAMES, VALUES, BAR = 720, 80, 145, 18


def picture(peers: Sequence[Peer], panels: Sequence[tuple[str, str]]) -> str:
    """An SVG of bars, cut at four times the median; a panel is (name of a figure, heading), less is better."""
    parts, top = ["<title>CPU per request and per token; less is better</title>"], 0
    for name, heading in panels:
        found = [(peer.name, [figures[name] for figures in peer.figures if name in figures]) for peer in peers]
        medians = [(peer, statistics.median(numbers)) for peer, numbers in found if numbers]
        values = [value for _, value in medians] or [1.0]
        longest = min(max(values), 4 * statistics.median(values))
        parts.append(f'<text y="{top + 18}" font-weight="600">{heading}</text>')
        top += 28
        for peer, median in medians:
            parts.append(bar(peer, median, median / longest, top))
            top += BAR + 8
        top += 12
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    font = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">\n' + "\n".join(parts) + "\n</svg>\n"


def bar(peer: str, value: float, share: float, top: int) -> str:
    """A bar, its name before and its value behind it."""
    length, weight, colour = round(min(share, 1) * (WIDTH - NAMES - VALUES)), "normal", THEIRS
    if peer in ("gateway", "gateway-t"):
        weight, colour = "600", OURS
    text = f'<text y="{top + 14}" font-weight="{weight}"'
    return (
        f'{text} x="{NAMES - 10}" text-anchor="end">{peer}</text>'
        f'<rect x="{NAMES}" y="{top}" width="{length}" height="{BAR}" rx="3" fill="{colour}"/>'
        f'{text} x="{NAMES + length + 8}">{value:,.0f} µs{", bar cut" * (share > 1)}</text>'
    )
