#!/usr/bin/env python3
"""Zero-Trust LLM Gateway: TLS, API keys and an audit log in front of any Ollama server.

Run it:   python3 gateway.py            (nothing to configure; --demo where there is no Ollama)
Use it:   curl --cacert cert.pem https://localhost:8443/api/tags -H "X-Api-Key: YOUR-KEY"

A request without a valid key is answered 403 and goes no further.  With one, the client sees the
upstream's own answer, piece by piece as it arrives.  Either way gateway.log grows by one JSON line:

    timestamp        when the request began, RFC 3339, UTC
    key              the key's name, or sha256: and 8 hex digits of its digest; null without a valid key
    path             the request's path, without its query
    prompt_tokens    as counted by the upstream; null when it did not say
    response_tokens  likewise
    status           what the client was answered; 499 when it left first, 502 when the upstream broke off
    method, model, client (address), duration_ms
    refused          the rule that refused it: key, role, model, rate, tokens, ...; else null
    charged, flags   the tokens that count towards the key's limit; what --scan found in the prompt
    prev             SHA-256 of the line before, so that verify-log finds a line that was changed

A key's options in keys.txt say who may do what: role=user, models=..., rate=..., tokens=..., and others.

It does not protect against: a stolen key (revoke it in keys.txt; a second later it is void), what a
key's holder asks of a model that it may use, somebody who reaches the upstream's own port, or a
client that skips the certificate check.

Reading map: the sections from top to bottom, each of which uses only what stands above it.
Settings - API keys - Certificates - HTTP rules - Access rules (roles, models, the scan of prompts, limits) - Token
counts - Audit log - Usage report - Metrics - Sockets (blocking, with deadlines that the watchman enforces) - Relay
(running streams) - Forwarding (to the upstream and back) - Handler (the way of a request through all of that) - Server
(connections, their number, the end; the status port) - Demo - Check (what is wrong before the start) - Command line.
"""

from __future__ import annotations

import _thread
import argparse
import base64
import contextlib
import errno
import fnmatch
import functools
import gc
import hashlib
import html
import http.client
import http.server
import io
import ipaddress
import json
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import ssl
import stat
import string
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Callable, Final, Generic, NamedTuple, NoReturn, TypeVar, get_type_hints

__version__ = "1.0.0"

# --- Settings ---
# What can be configured, how its text is read, and what other sections need before anything else: the two errors
# that are meant for the operator, files that are followed while the gateway runs and that it creates, and waiting.

# Limits that nobody should have to change, each with its unit and with the reason or the precedent for its value.
MAX_HEAD: Final = 32 * 1024  # bytes of a message head: nginx allows 4 x 8 KiB, Node.js 16 KiB
MAX_TARGET: Final = 8 * 1024  # bytes of a request target: RFC 9112, 3 asks for 8000, nginx allows 8 KiB
MAX_FIELDS: Final = 100  # fields in a head: the limit of http.client and of Apache
MAX_INTERIM: Final = 8  # 1xx answers before the final one
MAX_KEPT_LINES: Final = 5_000  # audit lines kept in memory while the log cannot be written, about 1.5 MB
MAX_LOGGED: Final = 128  # characters of a client's text in the log, up to 12 bytes each; a line fits in PIPE_BUF
READ_SIZE: Final = 64 * 1024  # bytes in a read of bulk data; larger reads make free-threaded Pythons hold on to memory
TLS_RECORD: Final = 16 * 1024  # bytes of plaintext in the largest TLS record: RFC 8446, 5.1
MAX_JUDGED: Final = 32 * 1024 * 1024  # bytes of a body that is read whole and judged before it is forwarded
MAX_HELD: Final = 256 * 1024 * 1024  # bytes of all such bodies together
MAX_VALUES: Final = 2_000_000  # in such a body, as far as commas and brackets tell; one may take 200 bytes when parsed
MIN_PROGRESS: Final = 4 * 1024  # bytes of a request's body that start --body-timeout anew
CONNECT_TIMEOUT: Final = 5.0  # seconds to connect to the upstream
POOL_SIZE: Final = 64  # idle upstream connections that are kept
POOL_SECONDS: Final = 4.0  # seconds for which they are kept: uvicorn and llama.cpp close theirs after 5
LINGER: Final = 15.0  # seconds in which a refused client may finish sending and read why: nginx waits 5 to 30
NOTICE: Final = 3.0  # seconds from a signal to the end of accepting, where --status tells a balancer to go elsewhere
TICK: Final = 0.25  # seconds between two checks of files, pool and deadlines
NO_ROOM: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # shortages that may pass, so we wait


class Settings(NamedTuple):
    """All options: what each takes, its default (None if it may be given several times), and its purpose."""

    demo: Annotated[Switch, "off", "answer from a built-in stand-in, for want of an Ollama"]
    listen: Annotated[Place, ":8443", "where to listen, like [::1]:8443; without HOST on all addresses"]
    upstream: Annotated[Url, "http://127.0.0.1:11434", "the Ollama or other server, like https://gpu:11434"]
    keys: Annotated[File, "keys.txt", "the API keys; where there is none, it is made with one fresh key"]
    cert: Annotated[File, "cert.pem", "the certificate, with its chain; where there is none, it is made"]
    cert_key: Annotated[File, "key.pem", "its private key"]
    log: Annotated[File, "gateway.log", "the audit log; - is standard output"]
    scan: Annotated[Mode, "off", "about secrets in prompts: flag logs them, block refuses them"]
    name: Annotated[Names, None, "one more host name or address in a certificate that is made"]
    cors_origin: Annotated[Origins, None, "whose web pages may use the gateway, like https://a.example; * for all"]
    trusted_proxy: Annotated[Nets, None, "a network, like 10.0.0.0/8, whose proxies tell the address of the client"]
    status: Annotated[Status, "off", "where to serve /healthz, /readyz and /metrics, over plain HTTP"]
    max_connections: Annotated[Count, "1024", "clients at a time, while others wait"]
    handshake_timeout: Annotated[Seconds, "10", "seconds for a TLS handshake"]
    header_timeout: Annotated[Seconds, "15", "seconds for the whole head of a request"]
    body_timeout: Annotated[Seconds, "30", "seconds for every 4 KiB of a request's body"]
    write_timeout: Annotated[Seconds, "60", "seconds for a client to take the next 16 KiB"]
    idle_timeout: Annotated[Seconds, "75", "seconds between two requests on a connection"]
    upstream_timeout: Annotated[Seconds, "600", "seconds of silence from the upstream"]
    grace: Annotated[Seconds, "30", "seconds for running requests to finish, at the end"]


class Upstream(NamedTuple):
    """The server that requests are forwarded to: http(s)://authority/prefix."""

    tls: bool
    host: str
    port: int
    authority: str  # host[:port], as the URL spells it
    prefix: str  # goes before every request target; "" or "/like/this"


class OperatorError(Exception):
    """A mistake that the person who runs the gateway can fix.  Its text says what and how; the exit status is 2."""


class Unable(OperatorError):
    """An OperatorError for settings that are valid but that the system refuses at the moment.  The exit status is 1."""


def read(pattern: str, convert: Callable[..., Any], text: str) -> Any:
    """Match the whole text, and return what `convert` makes of the pattern's groups.  Raises ValueError."""
    [match] = re.finditer(rf"\A(?:{pattern})\Z", text)  # unpacking raises the ValueError if there is no match
    return convert(*match.groups())


def upstream_url(tls: str, netloc: str, host: str, port: str | None, prefix: str) -> Upstream:
    """Make an Upstream from the parts of its URL.  Raises ValueError for a host name that DNS cannot hold."""
    host.encode("idna")  # is what connecting does first, and raises a UnicodeError, which is a ValueError
    return Upstream(bool(tls), host.strip("[]").lower(), int(port or (443 if tls else 80)), netloc, prefix.rstrip("/"))


def origin_pattern(scheme: str | None, host: str, port: str | None) -> re.Pattern[str]:
    """Make the pattern of the Origin headers to accept.  Browsers write them in lower case and omit a default port."""
    if not scheme:
        return re.compile(".+")  # the origin was *
    default_port = {"http": "80", "https": "443"}.get(scheme.lower())
    if default_port and re.search(r"\]$|(^|\.)[0-9]+$", host):  # an IP address, which browsers write in canonical form
        host = re.sub("(.*:.*)", r"[\1]", str(ipaddress.ip_address(host.strip("[]"))))
    end = {"*": "(:[0-9]+)?", None: "", default_port: ""}.get(port, f":{port}")
    host = re.escape(host).replace(r"\*\.", r"([0-9a-z_-]+\.)+").replace(r"\*", "[0-9a-z._-]*")
    return re.compile(f"{re.escape(scheme)}://{host}{end}", re.IGNORECASE | re.ASCII)


HOST_NAME: Final = r"(?:\*\.)?[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)*"  # names of Docker's services may contain _
NAME: Final = rf"({HOST_NAME})|([0-9A-Fa-f:.]+)"  # or an IP address
IPV6: Final = r"\[[0-9A-Fa-f:.]+\]"
PORT: Final = "0|[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"  # up to 65535
URL: Final = rf"(?=[!-~]+\Z)(?i:http(s?))://(({IPV6}|[^][/?#@:]+)(?::({PORT})?)?)((?:/[^?#]*)?)"
# The lookahead rejects http://* and https://*, which would allow every page of the web; to mean that, one writes *.
ORIGIN: Final = rf"\*|(?!(?i:https?)://\*(?::|\Z))([A-Za-z][A-Za-z0-9+.-]*)://(\*|{IPV6}|{HOST_NAME})(?::(\*|{PORT}))?"
PLACE: Final = rf"({IPV6}|[0-9A-Za-z._-]*):({PORT})"

# The kinds of values: the type, the placeholder in the help text, the pattern of one value, and how it is read.
Switch = Annotated[bool, "", "(?i:(1|t|true|y|yes|on)|0|f|false|n|no|off)", bool]
Place = Annotated[tuple[str, int], "HOST:PORT", PLACE, lambda host, port: (host, int(port))]
Status = Annotated[tuple[Any, ...], "HOST:PORT", f"off|{PLACE}", lambda host, port: (host, int(port)) if port else ()]
Url = Annotated[Upstream, "URL", URL, upstream_url]
File = Annotated[str, "FILE", "(?s:(.+))", str]
Mode = Annotated[str, "MODE", "(off|flag|block)", str]
Names = Annotated[Sequence[str], "HOST", NAME, lambda name, ip: name or str(ipaddress.ip_address(ip))]
Nets = Annotated[Sequence[ipaddress.IPv4Network], "NET", "(.+)", ipaddress.ip_network]
Origins = Annotated[Sequence[re.Pattern[str]], "ORIGIN", ORIGIN, origin_pattern]
Count = Annotated[int, "N", "([1-9][0-9]{0,5})", int]
Seconds = Annotated[float, "S", r"((?!0*\.?0*$)[0-9]{1,6}(?:\.[0-9]{1,3})?)", float]


def fault(error: BaseException) -> str:
    """Describe a bug of the gateway in one line.  The error's own text is left out, since it may quote an API key."""
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    return f"internal error: {type(error).__name__} in line {where.tb_lineno if where else 0} of the gateway"


@contextlib.contextmanager
def explained(failure: str, remedy: str, kind: type[OperatorError] = OperatorError) -> Iterator[None]:
    """Turn an error of the system into an OperatorError that says what failed, why, and what to do about it."""
    try:
        yield
    except (OSError, ValueError, LookupError, EOFError, zlib.error) as error:  # ssl.SSLError is an OSError
        # str(error) is not used, since it may quote what could not be read, such as an API key.
        reason = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or "")
        # socket.create_server() appends "(while attempting to bind on address ...)", but `failure` names the address.
        raise kind(": ".join(filter(None, (failure, reason.partition(" (while")[0]))) + f"; {remedy}") from None


T = TypeVar("T")


class Watched(Generic[T]):
    """A value loaded from files, and loaded again when their content changes.  After an error the old value stays.

    It compares content instead of modification times, because two edits within one tick of the file system's clock
    have the same time.  A change is acted upon once two consecutive looks have seen the same new content, because a
    single look may catch a file that is still being written.
    """

    def __init__(self, load: Callable[[], T], *paths: str) -> None:
        self._load, self._paths = load, paths
        self._seen = self._used = self._look()
        self.value = load()

    def refresh(self) -> str | None:
        """Look at the files again.  Returns a message for the operator, or None if there is nothing to say."""
        before, self._seen = self._seen, self._look()
        if self._seen != before or self._seen in (None, self._used):
            return None
        self._used = self._seen
        try:
            self.value = self._load()
        except OperatorError as error:
            return f"{error} (until then the last good version stays in force)"
        return f"{' and '.join(self._paths)} changed; the new version is in force"

    def _look(self) -> list[str] | None:
        """Return the digests of the files' content, or None if the process is too short of resources to read them."""
        try:
            return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self._paths]
        except OSError as error:
            return None if error.errno in NO_ROOM else [type(error).__name__]


def create_file(path: str, content: bytes, mode: int) -> bool:
    """Create a file that is complete as soon as it exists.  If it exists already, leave it alone and return False."""
    remedy = "start in a directory that you may write to, or name others with --keys, --cert, --cert-key and --log"
    with explained(f"cannot make {path}", remedy), tempfile.TemporaryDirectory(".new", dir=Path(path).parent) as folder:
        whole = Path(folder, "whole")  # only we can read a temporary directory, so it may hold a private key
        whole.write_bytes(content)
        whole.chmod(mode)
        try:
            os.link(whole, path)  # never replaces a file, as renaming would
        except OSError:  # the file exists, or the file system has no hard links
            if os.path.lexists(path):
                return False
            whole.rename(path)
    return True


READ: Final = getattr(select, "POLLIN", 1)
WRITE: Final = getattr(select, "POLLOUT", 4)
GONE: Final = getattr(select, "POLLRDHUP", 0)  # Linux: the peer has left, even behind unread bytes; elsewhere POLLHUP


def ready(wanted: dict[int, int], seconds: float | None) -> set[int]:
    """The descriptors for which one of their events (READ, WRITE, GONE) happens within that time; None is for ever."""
    if hasattr(select, "poll"):
        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        return {descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)}
    # Windows, where only sending to a client tells that it has left
    reading, writing = ([each for each, events in wanted.items() if events & event] for event in (READ, WRITE))
    return set().union(*(select.select(reading, writing, [], seconds) if reading or writing else ()))


# --- API keys ---
# The key file holds one key per line: the key itself, or sha256: and its digest, and then its options.  Blank lines and
# comments, which begin with #, are skipped.  Only digests are kept in memory, so a look-up takes the same time no
# matter how much of a key was guessed right.

Models = tuple[str, ...]


def canonical(model: str) -> str | None:
    """The one spelling of a model's name or of a glob, of all that Ollama takes for the same; None for no such name."""
    if not re.fullmatch(r"[A-Za-z0-9_*][A-Za-z0-9_.:/@*-]{0,399}", model) or "://" in model:
        return None
    model = model.lower().removesuffix(":local").removeprefix("registry.ollama.ai/").removeprefix("library/")
    return model if re.search("[:*]", model.rpartition("/")[2]) else model + ":latest"


def model_globs(globs: str) -> Models:
    """The canonical globs of a list; "" for a lone *, which is everything, and "/" for one that matches no name."""
    return tuple("" if glob == "*" else canonical(glob) or "/" for glob in globs.split(","))


def per(number: str, unit: str) -> tuple[int, int]:
    """A rate: requests, and the nanoseconds in which they may come."""
    return int(number), {"s": 1, "min": 60, "h": 3600, "day": 86400}[unit] * 10**9


def times(number: str, unit: str) -> int:
    """A number of thousands or millions."""
    return int(number) * {"": 1, "k": 1000, "M": 10**6}[unit]


class Key(NamedTuple):
    """What the key file says about a key, without the key itself.

    Annotated are the options: how each is written, the pattern of what follows its name, and how that is read.
    """

    digest: bytes  # SHA-256
    weak: bool
    # What the audit log calls it.  Its limits belong to the name, so that a key can be replaced.
    name: Annotated[str, "name=NAME", r"=(\S+)", str]
    expires: Annotated[date, "expires=YYYY-MM-DD", "=([0-9]{4}-[0-9]{2}-[0-9]{2})", date.fromisoformat] = date.max
    role: Annotated[str, "role=admin|user", "=(admin|user)", str] = "admin"
    # Empty means all models, and no limit in what follows.
    models: Annotated[Models, "models=GLOB,GLOB", r"=((?a:[\w.:/@*-]+,)*(?a:[\w.:/@*-]+))", model_globs] = ()
    rate: Annotated[tuple[int, ...], "rate=N/s|min|h|day", "=([1-9][0-9]{0,8})/(s|min|h|day)", per] = ()
    tokens: Annotated[int, "tokens=N[k|M]/day", "=([1-9][0-9]{0,11})([kM]?)/day", times] = 0
    parallel: Annotated[int, "parallel=N", "=([1-9][0-9]{0,5})", int] = 0
    path: Annotated[bool, "path=yes", "=(yes)", bool] = False  # whether it may stand in a path: /k/SECRET/api/tags
    trap: Annotated[bool, "trap", "()", lambda _: True] = False  # it was laid out for thieves, and admits nobody


class Keys(dict[bytes, Key]):
    """All keys, by digest."""

    paths = False  # whether any of them may stand in a path


# The first two fields, digest and weak, are no options.
_KEY_OPTIONS: Final = {n: kind.__metadata__ for n, kind in [*get_type_hints(Key, include_extras=True).items()][2:]}
_KEY_HELP: Final = f"after the key, these may stand: {', '.join(form for form, _, _ in _KEY_OPTIONS.values())}"
WELL_KNOWN: Final = {"demo-key", "demo-key-0123456789", "replace-me-with-keygen", "your-api-key-here"}


def find_key(keys: Keys, presented: Iterable[bytes], today: date, path: bytes = b"") -> tuple[Key | None, str | None]:
    """The key that counts of those presented, the last of them in the path, and the reason if it does not admit.

    A trap comes before a valid key, which comes before an expired one; of two alike the first counts.
    """
    known = [key for secret in presented if (key := keys.get(hashlib.sha256(secret).digest()))]
    if path and (key := keys.get(hashlib.sha256(path).digest())) and (key.path or key.trap):
        known.append(key)
    flaws = ["trap" if key.trap else "expired" if key.expires < today else None for key in known]
    flaw = "trap" if "trap" in flaws else None if None in flaws else "expired" if flaws else "key"
    return known[flaws.index(flaw)] if known else None, flaw


def load_keys(path: str) -> Keys:
    """Read the key file; a missing file has no keys.  An OperatorError names the line, but never quotes it."""
    keys, text = Keys(), ""
    with explained(f"cannot read {path}", "it must be readable text in UTF-8"), contextlib.suppress(FileNotFoundError):
        content = Path(path).read_bytes()  # in UTF-8, or in UTF-16 as PowerShell's `echo` writes it
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if words := re.sub(r"(^|\s)#.*", "", line).split():
            key = _parse_key(f"{path}:{number}", *words)
            if keys.setdefault(key.digest, key) is not key:
                raise OperatorError(f"{path}:{number}: this key is in the file already; delete one of the lines")
            keys.paths |= key.path
    return keys


def _parse_key(where: str, secret: str, *words: str) -> Key:
    """Parse a line's words: the key, and its options in any order."""
    options: dict[str, Any] = {}
    for word in words:
        option = word.partition("=")[0]
        # A word that is no option is not quoted, since it may be a key.
        with explained(f"{where}: {option if option in _KEY_OPTIONS else 'a word'} is not understood", _KEY_HELP):
            _, pattern, convert = _KEY_OPTIONS[option]
            options[option] = read(pattern, convert, word[len(option) :])
    if len(options) < len(words) or ("trap" in options and options.keys() - {"trap", "name"}):
        raise OperatorError(f"{where}: each option may stand once, and beside trap only name=")
    hashed = secret.startswith("sha256:")
    with explained(f"{where}: the digest is not understood", "behind sha256: there must be 64 hexadecimal digits"):
        digest = read(r"(\w{64})", bytes.fromhex, secret[7:]) if hashed else hashlib.sha256(secret.encode()).digest()
    if "ztg_" in " ".join((secret[1:], *words)):  # it would be a part of a name, too, which is logged
        raise OperatorError(f"{where}: a key begins in the middle of the line; a line break is missing before ztg_")
    weak = not hashed and "trap" not in options and (len(secret) < 16 or secret in WELL_KNOWN)  # it can be guessed
    return Key(digest, weak, **{"name": f"sha256:{digest.hex()[:8]}", **options})


def key_line(*words: str) -> str:
    """A line for the key file: a fresh key and its options, or role=user; a word that is no option is its name."""
    options = [f"name={word}" if re.fullmatch("(?!trap$)[^=-][^=]*", word) else word for word in words]
    if not any(option == "trap" or option.startswith("role=") for option in options):
        options.append("role=user")
    key = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(43))  # 256 bits
    _parse_key("keygen", key, *options)
    return f"ztg_{key}  " + " ".join(options)  # the prefix lets secret scanners find a leaked key


# --- Certificates ---
# The gateway makes a self-signed certificate on P-256 that curl, Python 3.13, Go, Node.js, Bun and rustls all accept as
# a trust anchor.  It has a subject, since curl rejects an empty issuer.  Addresses are IP names in it, not DNS names.
# It has CA:FALSE, since rustls rejects a CA as a server, and serverAuth.  It has a subject and an authority key
# identifier, which Python 3.13 requires, but no keyUsage: Bun rejects a trust anchor that has only digitalSignature.

ISSUER: Final = "Zero-Trust LLM Gateway"
DAYS: Final = 397  # one day less than what Apple allows public certificates (support.apple.com/HT211025)


def tls_context(cert: str, cert_key: str) -> ssl.SSLContext:
    """TLS 1.2 and 1.3 with forward-secret AEAD suites only; OperatorError if the files are no usable pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # 0x80 is OP_IGNORE_UNEXPECTED_EOF, which has no name before Python 3.10.  Without it, OpenSSL 3 treats an end
    # without close_notify as fatal, and a client that only closed its sending side would not even get the 408.  The
    # framing tells whether a request was complete.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | 0x80
    # By default OpenSSL 3.0 also agrees on finite-field groups.  A few ffdhe8192 handshakes a second, which anybody may
    # ask for, keep a core busy (CVE-2002-20001).  Every client must support P-256 (RFC 8446, 9.1).
    context.set_ecdh_curve("prime256v1")
    context.set_alpn_protocols(["http/1.1"])
    context.num_tickets = 1  # one is enough to resume a session, and a second one costs 15 % of a handshake
    remedy = "put an unencrypted PEM pair there that belongs together, or move both away to have a new one made"
    with explained(f"{cert} and {cert_key} are no usable pair of files", remedy):
        context.load_cert_chain(cert, cert_key, password=lambda: b"")  # or OpenSSL would ask on the terminal
    return context


def ensure_certificate(cert: str, cert_key: str, names: Iterable[str]) -> None:
    """Make the pair if there is none.  If two instances start at once, one makes it for both."""
    if not os.path.lexists(cert) and not os.path.lexists(cert_key):
        here = re.findall(rf"\A{HOST_NAME}\Z", socket.gethostname())  # if it is a name at all
        certificate, key = make_certificate([*dict.fromkeys(("localhost", "127.0.0.1", "::1", *here, *names))])
        if create_file(cert_key, key, 0o600):
            create_file(cert, certificate, 0o644)
    if not os.path.lexists(cert):
        time.sleep(2)  # another instance may be about to make it
    for there, missing in ((cert, cert_key), (cert_key, cert)):
        if not os.path.lexists(missing):
            raise OperatorError(f"{there} is there, but not {missing}; put it back, or move {there} away")


def describe_certificate(cert: str, names: Iterable[str]) -> tuple[str, datetime, list[str]]:
    """Return the SHA-256 fingerprint, the end of validity, and those of the names that it does not cover."""
    with explained(f"cannot read the certificate in {cert}", "see that it is there, in PEM"):
        der = base64.b64decode(Path(cert).read_bytes().partition(b"BEGIN CERTIFICATE-----")[2].partition(b"-")[0])
        # The standard library has no public function that parses a certificate from a file, so this looks for the
        # two things that are needed.  The validity is the only pair of times in it (RFC 5280, 4.1.2.5).
        expiry = re.findall(rb"(?:\x17\r|\x18\x0f)(\d{12}|\d{14})Z", der)[1].decode()
        until = datetime.strptime(("20" + expiry)[-14:] + "+0000", "%Y%m%d%H%M%S%z")
    return hashlib.sha256(der).digest().hex(":").upper(), until, [name for name in names if not _covers(der, name)]


def certificate_flaw(cert: str, names: Iterable[str]) -> str:
    """What is wrong with the certificate, or will be within 30 days; empty if nothing is."""
    _, until, missing = describe_certificate(cert, names)
    days = (until - datetime.now(timezone.utc)).days
    lacks = f"does not cover {', '.join(missing)}" if missing else ""
    return "has expired" if days < 0 else f"expires in {days} days" if days < 30 else lacks


def _covers(der: bytes, name: str) -> bool:
    """Whether a certificate names this host in its subjectAltName extension (RFC 5280, 4.2.1.6)."""
    # After the extension's OID, 2.5.29.17, each name is a tag, its length, and its text or address.  Searching for tag
    # and length as well finds whole names only, since these tags are bytes above 127, which occur in no name.
    names = der.partition(b"\x06\x03\x55\x1d\x11")[2]
    if address := _address(name):
        return b"\x87%c%b" % (len(address.packed), address.packed) in names
    wanted = (name, "*." + name.partition(".")[2])  # a * stands for exactly one label (RFC 6125, 6.4.3)
    patterns = (rb"\x82\x81?%b(?i:%b)" % (re.escape(b"%c" % len(text)), re.escape(text.encode())) for text in wanted)
    return any(re.search(pattern, names) for pattern in patterns)


def make_certificate(names: Sequence[str]) -> tuple[bytes, bytes]:
    """Make a certificate and its private key, in PEM, with `cryptography` or else the openssl command."""
    try:
        from cryptography import x509  # noqa: PLC0415 - needed once in the life of an installation
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    except ImportError:
        return _certificate_by_openssl(names)
    key = ec.generate_private_key(ec.SECP256R1())
    public, subject = key.public_key(), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
    start = datetime.now(timezone.utc) - timedelta(minutes=5)  # for clients whose clocks are slow
    alternatives = [x509.IPAddress(found) if (found := _address(name)) else x509.DNSName(name) for name in names]
    certificate = (x509.CertificateBuilder(issuer_name=subject, subject_name=subject, public_key=public)
        .serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(start + timedelta(DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256()))  # fmt: skip
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def _certificate_by_openssl(names: Sequence[str]) -> tuple[bytes, bytes]:
    import subprocess  # noqa: PLC0415 - needed once, and it would raise idle memory above 30 MB

    alternatives = ",".join(f"{'IP' if _address(name) else 'DNS'}:{name}" for name in names)
    # This replaces the system's configuration, which may add CA:TRUE.
    configuration = f"""[req]\nprompt = no\ndefault_keyfile = key\nencrypt_key = no\ndistinguished_name = dn
x509_extensions = v3\n[dn]\nCN = {ISSUER}\n[v3]\nbasicConstraints = critical,CA:FALSE\nextendedKeyUsage = serverAuth
subjectAltName = {alternatives}\nsubjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid:always\n"""
    command = f"openssl req -x509 -config conf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -out cert -days {DAYS}"
    remedy = "install the Python package cryptography or the openssl command, or put a cert.pem and key.pem here"
    with explained("no certificate can be made here", remedy), tempfile.TemporaryDirectory() as folder:
        Path(folder, "conf").write_text(configuration)
        # If it fails, there are no files to be read.
        subprocess.run(command.split(), cwd=folder, capture_output=True, check=False)  # noqa: S603 - the line above
        return Path(folder, "cert").read_bytes(), Path(folder, "key").read_bytes()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)
    return None


# --- HTTP rules ---
# How HTTP/1.1 messages are read and rewritten (RFC 9110 and RFC 9112), for requests and answers alike.
# These functions take bytes and return decisions; none of them touches a socket.
#
# Where the RFCs allow a recipient to repair or to refuse a message, it is refused.  If two programs in a row read the
# same bytes differently, a request can be smuggled past the first one inside another request.


class Refusal(Exception):
    """An error that the gateway itself answers: the status, the reason, the rule that refused, fields of its own."""

    def __init__(self, status: int, reason: str, rule: str | None = None, *lines: bytes) -> None:
        super().__init__(reason)
        self.status, self.rule, self.lines = status, rule, lines


class ClientError(Refusal):
    """The request is malformed, ambiguous, too slow, or has no valid key."""


class Fields(dict[bytes, bytes]):
    """The fields of a head: a dict from names in lower case to values, and the lines as they came.

    Messages are forwarded from the lines, since a dict keeps neither their order nor their repetitions.  The
    values of a repeated field are joined with ", " (RFC 9110, 5.3).  Fields that may come only once, such as
    Content-Length and Host, are checked with patterns that do not match ", ".
    """

    lines: Sequence[tuple[bytes, bytes]] = ()  # pairs of the name in lower case and the whole line

    def drop(self, *unwanted: bytes) -> None:
        """Do not forward the lines with these names."""
        self.lines = [(name, line) for name, line in self.lines if name not in unwanted]


# A body's framing is its length in bytes, or one of these.
CHUNKED: Final = -1  # the body comes in chunks, and the last one ends it
UNTIL_CLOSE: Final = -2  # the body ends when the connection does


class Head(NamedTuple):
    """The head of a request or of an answer; what only the other kind has keeps its default."""

    version: bytes  # b"1.0" or b"1.1"
    fields: Fields
    framing: int
    method: bytes = b""
    target: bytes = b""  # begins with a slash
    path: bytes = b""  # the target without its query
    secret: bytes = b""  # a key that stood in the target
    status: int = 0
    reason: bytes = b""


# These fields describe one connection only, so they are removed from requests and from answers:
# - connection, upgrade, and in old clients keep-alive and proxy-connection, say what becomes of the connection
#   (RFC 9110, 7.6.1 and 7.8; RFC 9112, C.2.2).
# - te, trailer and transfer-encoding belong to the framing, which the gateway chooses anew for each side (RFC 9110,
#   6.6.2 and 10.1.4; RFC 9112, 6.1).
# - proxy-authenticate would make the client send its password for a proxy (RFC 9110, 11.7.1).
HOP_BY_HOP: Final = {b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"te", b"trailer",
                     b"transfer-encoding", b"proxy-authenticate"}  # fmt: skip
# These are removed from requests as well:
# - authorization, x-api-key and proxy-authorization may hold a key of the gateway, or a password for the first proxy
#   (RFC 9110, 11.7.2).
# - content_length can pass for Content-Length, see _spellings(), but nobody has checked it.
# - expect is answered by the gateway, once the key is checked (RFC 9110, 10.1.1).
# - forwarded_head() replaces host and the X-Forwarded fields.
_REQUEST_ONLY: Final = {b"authorization", b"x-api-key", b"proxy-authorization", b"content_length", b"expect",
                        b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"}  # fmt: skip


def _spellings(name: bytes) -> set[bytes]:
    """The name with each "-" as it is or as "_", since CGI and WSGI servers read both alike (RFC 3875, 4.1.18)."""
    first, dash, rest = name.partition(b"-")
    return {first + sign + more for sign in (b"-", b"_") for more in _spellings(rest)} if dash else {name}


# All spellings are computed in advance, so that each field of a request needs only one look-up.
NOT_FORWARDED: Final = {spelling for name in HOP_BY_HOP | _REQUEST_ONLY for spelling in _spellings(name)}
IDEMPOTENT: Final = {b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"}  # may be sent twice: RFC 9110, 9.2.2

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([^\x00-\x20\x7f]+) HTTP/([0-9]\.[0-9])" % _TOKEN)
_TARGET = re.compile(rb"(?i:https?://[^/?#@]+)?(/.*)?")
_TEXT = rb"[\t\x20-\x7e\x80-\xff]"
# 101 is refused, since it changes the protocol, which nobody asked for.
_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) (?!101)([1-5][0-9][0-9])(?: (%b*))?" % _TEXT)
_FIELDS = re.compile(rb"(?:(?:\A|\r\n)%b:%b*)*" % (_TOKEN, _TEXT))
_LOCAL_PAGES = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]+)?")
_HOST = re.compile(rb"[0-9A-Za-z._~!$&'()*+,;=:%\[\]-]+")
# The end of one chunk and the line with the size of the next, or an incomplete line that may become one.
_CHUNK_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})(?:[ \t]*;%b{0,1000})?\r\n|(?:\r?|\r\n[^\n]{0,1023})\Z" % _TEXT)
BETWEEN_CHUNKS: Final = b"\r\n"  # ends a chunk's content, and is parsed together with the size of the next chunk


def split_head(data: bytes) -> tuple[bytes, bytes] | None:
    """Split a head from what follows its empty line; return None while that line has not arrived.

    Raises ClientError 400, 414 or 431 as soon as the data cannot become a valid head.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end or len(head) > MAX_TARGET:
        require(head.count(b"\n") == head.count(b"\r\n"), 400, "a line of the head does not end in CRLF")
        require(len(head.partition(b"\r\n")[0]) <= MAX_TARGET, 414, "the request line is longer than 8 KiB")
        require(len(head) <= MAX_HEAD, 431, "the head, or the trailers, are longer than 32 KiB")
    return (head, rest) if end else None


def parse_request(head: bytes, keys_in_paths: bool = False) -> Head:
    """Parse the head of a request (RFC 9112, 3 to 6).  Raises ClientError 400, 431, 501 or 505."""
    first, _, lines = head.partition(b"\r\n")
    method, target, version = require(_REQUEST_LINE.fullmatch(first), 400, "the request line is malformed").groups()
    require(version in (b"1.0", b"1.1"), 505, "only HTTP/1.0 and HTTP/1.1 are supported")
    require(method != b"CONNECT", 501, "CONNECT is not supported")
    # Some servers cut a target at "#" and others do not, and they decode raw bytes above 0x7F in several ways.
    # Either difference could make the upstream serve another path than the one that the gateway saw.
    require(target.isascii() and b"#" not in target, 400, "the request target holds a # or a byte that is not ASCII")
    # An absolute target is reduced to its path (RFC 9112, 3.2.2).
    target = require(_TARGET.fullmatch(target), 400, "the request target must be a path")[1] or b"/"
    fields = parse_fields(lines)
    if b"host" in fields or version == b"1.1":
        require(_HOST.fullmatch(fields.get(b"host", b"")), 400, "there must be one valid Host field")
    secret, target = key_in_path(target, keys_in_paths)
    return Head(version, fields, body_framing(fields, version), method, target, target.partition(b"?")[0], secret)


def parse_answer(head: bytes, method: bytes) -> Head:
    """Parse the head of an answer to a request with that method.  Raises ClientError 400, 431 or 501."""
    first, _, lines = head.partition(b"\r\n")
    version, code, reason = require(_STATUS_LINE.fullmatch(first), 400, "the status line is malformed").groups()
    fields, status = parse_fields(lines), int(code)
    return Head(version, fields, body_framing(fields, version, status, method), status=status, reason=reason or b"")


def require(found: T | None, status: int, message: str, rule: str | None = None, *lines: bytes) -> T:
    """Return what was found, such as a match; raise ClientError if it is None or false."""
    if not found:
        raise ClientError(status, message, rule, *lines)
    return found


def parse_fields(lines: bytes) -> Fields:
    """Parse field lines that are separated by CRLF (RFC 9112, 5).  Raises ClientError 400 or 431."""
    require(lines.count(b"\n") < MAX_FIELDS, 431, "there are more than 100 fields")
    # The pattern refuses folded lines, a space before the colon, names that are no tokens, and control characters.
    # So CRLF is the only line end that is left, and blanks and tabs are the only white space.
    require(_FIELDS.fullmatch(lines), 400, "a field line is malformed")
    fields = Fields()
    fields.lines = found = []
    for line in lines.splitlines():
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip()
        found.append((name, line))
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def body_framing(fields: Fields, version: bytes, status: int = 0, answers: bytes = b"") -> int:
    """Tell how the end of a body is found: its length, CHUNKED, or UNTIL_CLOSE.  Raises ClientError 400 or 501.

    For an answer, `status` is its status and `answers` is the method of its request.  The steps are numbered as in
    RFC 9112, 6.3.
    """
    length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    # 1. These answers have no body, whatever their fields say.
    if answers == b"HEAD" or 100 <= status < 200 or status in (204, 304):
        return 0
    # 2. This step is about answers to CONNECT, which parse_request refuses.
    if coding is not None:
        # 3. Two framings in one message are an attempt at smuggling.  In HTTP/1.0 the coding is an error (6.1).
        require(length is None and version != b"1.0", 400, "Transfer-Encoding beside Content-Length or in HTTP/1.0")
        # 4. Chunks tell where they end.  Other codings, alone or before chunked, are not supported.
        require(coding.lower() == b"chunked", 501, "the only supported transfer coding is chunked, once")
        return CHUNKED
    if length is not None:
        # 5. A length that is not a number, or that came twice, is refused.  isdigit() accepts ASCII digits only.
        require(length.isdigit() and len(length) <= 18, 400, "Content-Length must be one decimal number")
        # 6. A valid length is the body's length.
        return int(length)
    # 7. A request without either field has no body.
    # 8. An answer without either field ends with its connection.
    return UNTIL_CLOSE if status else 0


def requested(data: bytes, keys_in_paths: bool = False) -> tuple[str | None, str | None]:
    """The method and the path, without its query, as the log shows them; the request need not be valid."""
    line = _REQUEST_LINE.match(data)
    target = line and _TARGET.fullmatch(line[2])
    path = key_in_path((target and target[1]) or b"/", keys_in_paths)[1]
    return line and logged(line[1]), target and logged(path.partition(b"?")[0])


def key_in_path(target: bytes, keys_in_paths: bool) -> tuple[bytes, bytes]:
    """Split the target /k/SECRET/rest into SECRET and /rest, if keys may stand there; else the first is empty."""
    match = keys_in_paths and re.match(rb"/k/([^/?]+)(?:/|(?=\?)|\Z)", target)
    return (urllib.parse.unquote_to_bytes(match[1]), b"/" + target[match.end() :]) if match else (b"", target)


def logged(text: bytes | str) -> str:
    """Shorten what a client sent, for the log, and blot out keys of keygen's that stand in the wrong place.

    Bytes that are not UTF-8 are shown as \\xNN.
    """
    shown = text if isinstance(text, str) else text.decode("utf-8", "backslashreplace")
    shown = re.sub(r"ztg_[\w-]+", "ztg_...", shown) if "ztg_" in shown else shown
    return shown[:MAX_LOGGED]


def list_members(fields: Fields, name: bytes) -> set[bytes]:
    """The members of a field that is a comma-separated list (RFC 9110, 5.6.1), in lower case."""
    return {member.strip().lower() for member in fields[name].split(b",")} if name in fields else set()


def keeps_alive(head: Head) -> bool:
    """Whether the sender allows another request on its connection (RFC 9112, 9.3); never in HTTP/1.0."""
    return head.version == b"1.1" and b"close" not in list_members(head.fields, b"connection")


def forwarded_head(request: Head, upstream: Upstream, peer: str) -> bytes:
    """The head for the upstream: without credentials, with the client's address and Host.

    Host names the upstream, since Ollama on loopback refuses other names.  Web frameworks build links from the
    X-Forwarded fields, so a client cannot set them, except that addresses in X-Forwarded-For are kept before its own.
    """
    fields, before = request.fields, request.fields.get(b"x-forwarded-for")
    first = b"%b %b%b HTTP/1.1" % (request.method, upstream.prefix.encode(), request.target)
    added = [b"X-Forwarded-For: " + (before + b", " if before else b"") + peer.encode(), b"X-Forwarded-Proto: https"]
    added += [b"X-Forwarded-Host: " + fields[b"host"]] if b"host" in fields else []  # HTTP/1.0 does not require it
    added += [b"Transfer-Encoding: chunked"] if request.framing == CHUNKED else []
    return _head(first + b"\r\nHost: " + upstream.authority.encode(), fields, NOT_FORWARDED, added)


def answer_head(answer: Head, upstream: Upstream, added: Iterable[bytes] = ()) -> bytes:
    """The head for the client: the upstream's own lines, followed by the lines `added`."""
    # Content-Length is forbidden in 1xx and 204 answers (RFC 9110, 8.6).
    dropped = HOP_BY_HOP | {b"content-length"} if answer.status < 200 or answer.status == 204 else HOP_BY_HOP
    head = _head(b"HTTP/1.1 %d %b" % (answer.status, answer.reason), answer.fields, dropped, added)
    return _reachable(head, upstream) if b"location" in answer.fields else head


def _head(first: bytes, fields: Fields, dropped: set[bytes], added: Iterable[bytes]) -> bytes:
    """A head to send: without the fields in `dropped` and those that Connection names."""
    # RFC 9110, 7.6.1.  Without Content-Length, the upstream would take the body for another request, so that one stays.
    named = list_members(fields, b"connection") - {b"content-length"} if b"connection" in fields else ()
    kept = [line for name, line in fields.lines if not (name in dropped or name in named)]
    return b"\r\n".join([first, *kept, *added, b"", b""])


def _reachable(head: bytes, upstream: Upstream) -> bytes:
    """Turn a Location that names the upstream, which clients cannot reach, into a path on the gateway.

    Web frameworks build redirects from the Host that they see, which is the upstream's, with the scheme http, or
    https if they believe X-Forwarded-Proto.  The path must not lead to another host: a client would read
    //evil.example as one, and browsers take "\\" for "/" and ignore tabs.  A Location with such a path, or outside
    of the prefix in --upstream, is left unchanged.  So is Content-Location, since no client follows it.
    """
    host = re.escape(re.sub(":(80|443)$", "", upstream.authority).encode())
    own = rb"(?i:(location:[\t ]*)https?://%b(?::80|:443)?)%b" % (host, re.escape(upstream.prefix.encode()))
    return re.sub(rb"(?m)^%b(?:/(?![/\\\t])|(?=[?#]|[\t ]*\r))" % own, rb"\1/", head)


def presented_keys(fields: Fields) -> list[bytes]:
    """The keys that a request presents, in the order in which they count, without empty ones.

    All are returned, because SDKs send a dummy Authorization beside the real X-Api-Key.  The values of a
    repeated field were joined, and the result is no valid key.
    """
    keys = [fields.get(b"x-api-key", b"")]
    for name in (b"authorization", b"proxy-authorization"):
        scheme, _, secret = fields.get(name, b"").partition(b" ")
        if scheme.lower() == b"bearer" and name == b"authorization":  # RFC 6750, 2.1
            keys.append(secret.strip())
        elif scheme.lower() == b"basic":  # the password is the key: RFC 7617, 2
            with contextlib.suppress(ValueError):
                keys.append(base64.b64decode(secret.strip(), validate=True).partition(b":")[2])
    return [key for key in keys if key]


def may_share(origin: bytes, allowed: Iterable[re.Pattern[str]]) -> bool:
    """Whether web pages of this origin may use the gateway: those of this machine, as in Ollama, and those allowed."""
    return any(pattern.fullmatch(origin.decode("latin-1")) for pattern in (_LOCAL_PAGES, *allowed))


def client_of(fields: Fields, peer: str, trusted: Iterable[ipaddress.IPv4Network]) -> str:
    """The address of a client: the one that a trusted proxy appended to X-Forwarded-For, or else the peer's."""
    told, near = fields.get(b"x-forwarded-for", b"").rpartition(b",")[2].strip().decode("latin-1"), _address(peer)
    is_one = "%" not in told and _address(told)  # behind the % of an IPv6 address anything may stand
    return told if near and is_one and any(near in net for net in trusted) else peer


def preflight_lines(request: Head) -> list[bytes]:
    """The answer to a preflight (CORS), by which a browser asks, without a key, if a page may send a request."""
    lines = b"Access-Control-Allow-Methods: GET, HEAD, POST, PUT, PATCH, DELETE", b"Access-Control-Max-Age: 86400"
    return [*lines, b"Access-Control-Allow-Headers: " + request.fields.get(b"access-control-request-headers", b"")]


# The type and the code in OpenAI's API, by the status and the rule, or by the status alone; the type in Anthropic's.
_OPENAI: Final = {
    (400, "guard"): ("invalid_request_error", "invalid_json"), (429, None): ("requests", "rate_limit_exceeded"),
    (400, "scan"): ("invalid_request_error", "content_filter"), (403, None): ("permission_error", "permission_denied"),
    (403, "model"): ("invalid_request_error", "model_not_found"), (429, "tokens"): ("insufficient_quota",) * 2,
}  # fmt: skip
_ANTHROPIC: Final = {403: "permission_error", 413: "request_too_large", 429: "rate_limit_error"}


def error_body(path: str, status: int, message: str, rule: str | None = None) -> bytes:
    """An error in the JSON of the API that the path belongs to: Anthropic's, OpenAI's, or else Ollama's."""
    usual = "api_error" if status >= 500 else "invalid_request_error"
    anthropic = {"type": "error", "error": {"type": _ANTHROPIC.get(status, usual), "message": message}}
    kind, code = _OPENAI.get((status, rule)) or _OPENAI.get((status, None)) or (usual, None)
    openai = {"error": {"message": message, "type": kind, "code": code}}
    apis = {"/v1/messages": anthropic, "/v1/": openai, "": {"error": message}}
    return json.dumps(next(body for prefix, body in apis.items() if path.startswith(prefix))).encode()


_decode = json.JSONDecoder().raw_decode  # json.loads() would guess the encoding, and refuse what follows the document


def _parsed(document: bytes, decode: Callable[[str], Any] = _decode) -> Any:
    """The value of a document, None if it has none."""
    try:
        return decode(document.decode(errors="replace").lstrip())[0]
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    """A value that should be an object, or an empty one in its place."""
    return value if isinstance(value, dict) else {}


class BodyReader:
    """Finds the end of a body in the bytes of a connection, without touching the connection.

    `chunked` and `note` are for pass_on(): whether the other side gets the body in chunks, and a function that is
    called with the content.  Once the body is `done`, `rest` holds the bytes that follow it, and `trailers` the fields
    after its last chunk.
    """

    def __init__(self, framing: int, chunked: bool = False, note: Callable[[bytes], object] = len) -> None:
        self.framing, self.chunked, self.note = framing, chunked, note
        self.done, self.rest, self.trailers = framing == 0, b"", Fields()
        # How many bytes are missing from the body, or from the chunk that is being read.  A body that ends with its
        # connection has no known length, so this is more than will ever come.
        self._missing = sys.maxsize if framing == UNTIL_CLOSE else max(framing, 0)
        # Bytes of a chunked body that came before they could be parsed.  Every chunk's size is read together with the
        # CRLF that ends the chunk before it, so the first chunk needs one, too.
        self._held = BETWEEN_CHUNKS if framing == CHUNKED else b""

    def pass_on(self, data: bytes) -> bytes:
        """Turn the connection's next bytes into what the other side gets.  Raises ClientError 400 or 431."""
        if self.chunked and self._held == BETWEEN_CHUNKS and data.endswith(b"\r\n"):
            size, _, content = data[:-2].partition(b"\r\n")
            if content and size == b"%x" % len(content):
                self.note(content)  # exactly one chunk, as most tokens come, is passed on unchanged
                return data
        content = self.feed(data)
        self.note(content)
        return self.framed(content)

    def framed(self, content: bytes) -> bytes:
        """The content that feed() returned last, as the other side gets it."""
        end = last_chunk(self.trailers) if self.chunked and self.done else b""
        return (chunk(content) if self.chunked else content) + end

    def feed(self, data: bytes) -> bytes:
        """Return the content in the connection's next bytes.  Raises ClientError 400 or 431."""
        if self.framing != CHUNKED:
            content, self.rest = data[: self._missing], data[self._missing :]
            self._missing -= len(content)
            self.done = self.done or not self._missing
            return content
        # The position `at` moves on instead of the data being cut, which would copy the rest for every one-byte chunk.
        # Each round takes what there is of a chunk's content, none at first, and then the line with the next size.
        pieces, data, at = [], self._held + data, 0
        while not self.done:
            pieces.append(data[at : at + self._missing])
            at, self._missing = at + len(pieces[-1]), self._missing - len(pieces[-1])
            line = require(_CHUNK_LINE.match(data, at), 400, "a chunk's size is malformed, or wrong")
            if line[1] and (size := int(line[1], 16)):
                self._missing, at = size, line.end()
            elif line[1] and (end := split_head(data[line.start(1) :])):
                # The last chunk and its trailers have the form of a head (RFC 9112, 7.1).
                self.trailers = parse_fields(end[0].partition(b"\r\n")[2])
                self.done, self.rest = True, end[1]
            else:
                break  # the rest of the line, or of the trailers, has not arrived yet
        self._held = data[at:]
        return b"".join(pieces)


def chunk(content: bytes) -> bytes:
    """Make a chunk of the content, or nothing if it is empty, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""


def last_chunk(trailers: Fields) -> bytes:
    """The end of a chunked body: the last chunk, and those of the trailers that may be passed on."""
    return _head(b"0", trailers, NOT_FORWARDED | {b"content-length"}, added=())


# --- Access rules ---
# Who may do what, how often, and with which model.  These functions decide; a refusal is a ClientError with its rule.
# What is forwarded is the bytes that were judged, so nothing here changes a request.

INFERENCE: Final = frozenset(
    b"/api/generate /api/chat /api/embed /api/embeddings /v1/chat/completions /v1/completions /v1/embeddings /v1/rerank"
    b" /v1/responses /v1/messages /v1/messages/count_tokens /v1/audio/transcriptions".split()
)
# llama.cpp's own names for the same.
_NATIVE = {*b"/completion /completions /chat/completions /infill /embedding /embeddings /rerank /reranking".split()}
# What a key with role=user may do, and GET /v1/models/NAME.
_FOR_USERS: Final = {
    *((method, path) for method in (b"GET", b"HEAD") for path in (b"/", b"/api/version", b"/api/tags")),
    *((b"GET", path) for path in (b"/api/status", b"/api/ps", b"/v1/models", b"/health", b"/v1/health")),
    *((b"POST", path) for path in (b"/api/show", *INFERENCE)),
}
_LISTS: Final = {b"/api/tags", b"/api/ps", b"/v1/models", b"/models"}  # of models
FREE: Final = {b"GET", b"HEAD", b"OPTIONS"}  # of limits, since user interfaces poll lists
_NAMING: Final = {"model", "name", "source", "destination", "from"}  # members that name models in Ollama's API


def check_role(role: str, method: bytes, path: bytes) -> None:
    """Refuse what the role may not do.  The path is compared as it came, since Ollama decodes /api/%70ull to pull."""
    allowed = role == "admin" or (method, path) in _FOR_USERS or (method == b"GET" and _model_in_path(path))
    require(allowed, 403, "this key may use models and list them, and nothing else", "role")


def asks_a_model(request: Head) -> bool:
    """Whether this is a request for inference."""
    return request.method not in FREE and (_read_as(request.path) in INFERENCE or _read_as(request.path) in _NATIVE)


def lists_models(request: Head) -> bool:
    """Whether the answer is a list of models."""
    return _read_as(request.path) in _LISTS


def _read_as(path: bytes) -> bytes:
    """A path as lenient servers read it: Ollama decodes it, others forgive another case, or a slash too many."""
    return re.sub(rb"//+", b"/", urllib.parse.unquote_to_bytes(path)).rstrip(b"/").lower()


def check_way(request: Head, models: Models) -> None:
    """Refuse a request that could name a model past the check of its body: by its coding, path, query or form."""
    path, fields = request.path, request.fields
    # The answer says what is possible: RFC 9110, 12.5.3.
    require(not _is_coded(fields), 415, "this key may use no Content-Encoding", "guard", b"Accept-Encoding: identity")
    plain = not re.search(rb"[%;\\]|//|/\.\.?(?:/|\Z)", path)
    if path.startswith(b"/v1/models/"):  # where a name may be encoded
        plain = may_use(models, _model_in_path(path))
    query = request.target.partition(b"?")[2].replace(b";", b"&").decode("latin-1")  # some servers take ; for &
    names = [name.strip().casefold() for name, _ in urllib.parse.parse_qsl(query, True)]
    plain = plain and not _is_form(fields) and "model" not in names
    require(plain, 403, "this key may use some models only, and must name them plainly", "model")


def _is_coded(fields: Fields) -> bool:
    return fields.get(b"content-encoding", b"identity").lower() not in (b"", b"identity")


def _is_form(fields: Fields) -> bool:
    return fields.get(b"content-type", b"").lower().startswith(b"multipart/")


def _model_in_path(path: bytes) -> str | None:
    """The model of /v1/models/NAME, decoded once; None for another path, or where decoding leaves any doubt."""
    match = re.fullmatch(rb"/v1/models/([A-Za-z0-9._:@/%-]+)", path)
    name = urllib.parse.unquote(match[1].decode()) if match else "/"
    return None if re.search(r"%|\.\.|//|\A/|(?:\A|/)\.(?:/|\Z)", name) else name


def may_use(models: Models, name: str | None) -> bool:
    """Whether a model of this name is among those that a key may use."""
    known = canonical(name) if name and "*" not in name else None
    return known is not None and any(_matches(known, glob) for glob in models)


def _matches(name: str, glob: str) -> bool:
    """Whether a canonical name matches a canonical glob, in which a * is anything but a slash.

    A name that ends in cloud, behind : or -, runs at ollama.com at the owner's cost, so its glob must end so, too.
    """
    parts, wanted = name.split("/"), glob.split("/")
    alike = not glob or (len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)))
    return alike and (glob.endswith("cloud") or not name.endswith((":cloud", "-cloud")))


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.  Raises ValueError where a member comes twice, since servers differ on which one counts."""
    if len(found := dict(members)) < len(members):
        raise ValueError
    return found


# A member of a form, each of whose characters may be encoded.
_MODEL_IN_FORM = re.compile(rb"(?i)[&;](m|%[46]d)(o|%[46]f)(d|%[46]4)(e|%[46]5)(l|%[46]c)=")
_strict = json.JSONDecoder(object_pairs_hook=_once, parse_int=float, parse_constant=int)  # NaN is no JSON, and no int


def parse_strictly(body: bytes, request: Head) -> dict[str, Any]:
    """Parse a body that every server reads alike; only a request for inference needs one.  ClientError 400.

    Go takes members in any case, and the last of several, so a member that is like `model` only in another case could
    be what Ollama takes.
    """
    try:
        value = _strict.decode(body.decode()) if body or asks_a_model(request) else {}
    except (ValueError, RecursionError):
        value = None
    clear = isinstance(value, dict) and all(each in _NAMING or each.casefold() not in _NAMING for each in value)
    if b"form" in request.fields.get(b"content-type", b"").lower():  # as curl says of all; but some read it as a form
        pieces = (body[at : at + PIECE + 20] for at in range(0, len(body), PIECE))  # see the scan of prompts, below
        clear = clear and not any(map(_MODEL_IN_FORM.search, pieces))
    require(clear, 400, "this key's requests must be one JSON object, without repeated members", "guard")
    return _object(value)


def check_names(body: dict[str, Any], request: Head, models: Models) -> None:
    """Refuse a request that names a model that the key may not use, or none where it should."""
    naming = _NAMING if request.path.startswith(b"/api/") else ()
    named = [each for member, each in body.items() if "model" in member.casefold() or member in naming]
    allowed = all(isinstance(each, str) and (not each or may_use(models, each)) for each in named)
    allowed = allowed and "fallbacks" not in map(str.casefold, body) and (any(named) or not asks_a_model(request))
    require(allowed, 403, "this key may not use that model", "model")


def visible(content: bytes, models: Models) -> bytes | None:
    """A list of models without those that the key may not use; None if it is no list that can be read."""
    value = _object(_parsed(content))
    for member in value.keys() & {"models", "data"}:
        entries = value[member] if isinstance(value[member], list) else []
        value[member] = [entry for entry in entries if _is_visible(entry, models)]
    return json.dumps(value).encode() if value else None


def _is_visible(entry: Any, models: Models) -> bool:
    names = [name for member in ("name", "model", "id") if (name := _object(entry).get(member))]
    return bool(names) and all(isinstance(name, str) and may_use(models, name) for name in names)


def _all_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; where a member comes twice, all values are kept, since a server may take any of them."""
    found = dict(members)
    return found if len(found) == len(members) else {**found, "": [value for _, value in members]}


# Servers skip numbers that they do not need, so one of 5,000 digits must not end the parsing, as it would for int().
_lenient = json.JSONDecoder(object_pairs_hook=_all_members, parse_int=float, strict=False).raw_decode


def prompt_of(body: bytes, scan: str) -> Any:
    """What a body says, for the scan: None if it is no JSON, its text if it is nested too deeply to be parsed.

    Raises ClientError 400 for the latter with --scan block.
    """
    text = body.decode(json.detect_encoding(body), "replace").lstrip()  # some servers read UTF-16, and skip a BOM
    try:
        return _lenient(text)[0]
    except ValueError:
        return None
    except RecursionError:
        require(scan == "flag", 400, "the prompt is nested too deeply to be looked at", "scan")
        return text


def may_be_scanned(fields: Fields, scan: str) -> bool:
    """Whether a prompt is looked at: not a form, nor a compressed one, which --scan block refuses."""
    passes, identity = scan == "flag" or not _is_coded(fields), b"Accept-Encoding: identity"
    require(passes, 415, "prompts must come without a Content-Encoding", "scan", identity)
    return not (_is_coded(fields) or _is_form(fields))


# The scan of prompts finds secrets by forms that nothing else has: a prefix, a checksum, or the digest of a key.
#
# A regex holds the interpreter's lock while it runs, so the text is cut into pieces, and other threads run between
# them.  No regex takes long for a piece, whatever the text: every quantifier has a bound, and where a match could begin
# at each of many characters in a row, it must begin a word.
#
# `re` finds a literal ten times as fast as a class of characters, so each regex begins with a literal, if it has one.
# What may not stand before it comes after it: in (?<![^\\][\w-].{4}), .{4} is the literal again.  [^\\] is there since
# a text may itself be JSON, in which the n of \nAKIA... belongs to a line break.

PIECE, OVERLAP = 16 * 1024, 1100  # characters of a piece, and how many of the next it has, too: more than a match
_BASE62: Final = (string.digits + string.ascii_uppercase + string.ascii_lowercase).encode()
_TWICE: Final = bytes.maketrans(b"0123456789", b"0246813579")  # the sum of the digits of 2 * digit
# fmt: off
_PATTERNS: Final = {name: re.compile(regex) for name, regex in {
    "private-key": rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----",
    "aws": rb"A[KS]IA(?<![^\\][\w-].{4})(?!.{9}EXAMPLE)[A-Z2-7]{16}(?![\w-])",
    "github": rb"g(?:h[pousr]_[0-9A-Za-z]{36}|ithub_pat_\w{82})", "gitlab": rb"glpat-[\w-]{20}",
    "slack": rb"xox[abprs]-[0-9][\w-]{9}", "stripe": rb"k_live_(?<=[sr]k_live_)(?<![^\\]\w.{8})[0-9A-Za-z]{10}",
    "anthropic": rb"sk-ant-api03-[\w-]{93}AA", "openai": rb"sk-(?<![^\\][\w-].{3})[\w-]{20,100}T3BlbkFJ[\w-]{20}",
    "google": rb"AIza(?<![^\\][\w-].{4})[\w-]{35}(?![\w-])", "npm": rb"npm_[0-9A-Za-z]{36}",
    "pypi": rb"pypi-AgEI[\w-]{50}", "jwt": rb"eyJ(?<![^\\][\w-].{3})[\w-]{8,1000}\.(?=\.?[\w-]{10})",
    "card": rb"[2-6](?<![^\\][\w+].)(?<!\d\..)\d{12,18}(?!\w|\.\d)", "gateway-key": rb"ztg_[\w-]{1,300}"}.items()}
# fmt: on


_PAUSE: Final = functools.partial(time.sleep, 0)  # lets other threads run


def find_secrets(value: Any, known: Container[bytes], pause: Callable[[], object] = _PAUSE) -> list[str]:
    """Name the patterns that occur in the strings of a JSON value.

    `known` holds the digests of the gateway's own keys.  pause() is called every few milliseconds.
    """
    checks = {**_CHECKS, "gateway-key": lambda word: hashlib.sha256(word).digest() in known}
    found: set[str] = set()
    for text in _pieces(value):
        for name in _PATTERNS.keys() - found:
            tokens = set(filter(checks.get(name, bool), {*_PATTERNS[name].findall(text, 2)}))
            matches = _PATTERNS[name].finditer(text, 2) if tokens else ()
            # What touches the edge of a piece stands inside another one.
            if any(match[0] in tokens and match.end() <= len(text) - 2 for match in matches):
                found.add(name)
        pause()
    return [name for name in _PATTERNS if name in found]


def _pieces(value: Any) -> Iterator[bytes]:
    """The strings of a JSON value, without images and sound, in pieces: short strings share one.

    A match depends on up to two bytes before and two behind it, so two line breaks stand around each string.
    """
    texts, size, values = [""], 0, [value]  # no recursion, since JSON may be nested as deep as Python can parse
    while values:
        each = values.pop()
        if isinstance(each, str):
            if not each.startswith(("data:image/", "data:audio/")):
                texts.append(each)
                size += len(each)
        elif isinstance(each, dict):
            values += each
            values += map(_without_images, each, each.values()) if "images" in each else each.values()
        elif isinstance(each, list):
            values += each
        size += 2  # for a number, too, so that many of them end a piece
        if size > PIECE or not values:
            text = "\n\n".join([*texts, ""])
            for at in range(0, len(text), PIECE):
                yield text[at : at + PIECE + OVERLAP].encode(errors="replace")
            texts, size = [""], 0


def _without_images(name: str, value: Any) -> Any:
    """A member's value; if that is a list and called images, without its strings."""
    return [each for each in value if not isinstance(each, str)] if (name, type(value)) == ("images", list) else value


def _has_crc(token: bytes) -> bool:
    """Whether the last 6 characters are the CRC-32 of the 30 before, in base 62; a github_pat_ token has none."""
    crc = zlib.crc32(token[4:34])
    return token[:4] == b"gith" or all(_BASE62[crc // 62**n % 62] == token[39 - n] for n in range(6))


def _is_jwt(header: bytes) -> bool:
    """Whether it is the header of a JSON Web Token and the dot behind it (RFC 7515, 4.1.1 and 7.1)."""
    # The decoder skips the dot.  It needs groups of four characters; "A" adds only NULs behind the object.
    return "alg" in _object(_parsed(base64.urlsafe_b64decode(header + b"A" * ((1 - len(header)) % 4))))


def _is_card(digits: bytes) -> bool:
    """Whether the last digit is right by Luhn's rule (ISO/IEC 7812-1).  What begins with 20 is mostly a date."""
    luhn = sum(digits[-1::-2] + digits[-2::-2].translate(_TWICE)) - len(digits) * ord("0")
    return luhn % 10 == 0 and len(set(digits)) > 1 and not digits.startswith(b"20")


_CHECKS: Final = {"github": _has_crc, "npm": _has_crc, "jwt": _is_jwt, "card": _is_card}


class Limits:
    """What has been used of all limits.  All threads share it, and use it under the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # By the names of keys: when the rate is fresh again (ns, monotonic), the requests that run, and tokens by day,
        # of which more than one is kept, since a clock may be set back.
        self.fresh, self.running, self.charged = Counter[str](), Counter[str](), dict[date, Counter[str]]()
        self.held, self.large = 0, threading.Lock()  # bytes of bodies that are read whole; who judges a large one

    def enter(self, key: Key, today: date, now: int) -> None:
        """Admit a request, or refuse it with 429, which consumes nothing.  `now` is monotonic, in nanoseconds."""
        with self.lock:
            used, running = self.charged.get(today, Counter[str]())[key.name], self.running[key.name]
            # GCRA: each request moves the time at which the rate is fresh again by a step, up to `count` steps ahead.
            count, period = key.rate or (0, 0)
            step = -(-period // max(count, 1))
            fresh = now
            if step:
                fresh = self.fresh[key.name] = min(self.fresh[key.name], now + count * step)
            wait = max(fresh, now) + step - count * step - now
            midnight = 86_400 - time.time() % 86_400  # seconds until then, UTC
            told = _told("requests", count, (now + count * step - max(fresh, now)) // step, fresh - now) if step else []
            told += _told("tokens", key.tokens, max(0, key.tokens - used), midnight * 1e9) if key.tokens else []
            for full, rule, seconds, reason in (
                (key.tokens and used >= key.tokens, "tokens", midnight, "the key's tokens of today are used up"),
                (key.parallel and running >= key.parallel, "parallel", 1, "the key's requests are too many at a time"),
                (wait > 0, "rate", wait / 1e9, "the key's requests come too fast"),
            ):
                if full:
                    # SDKs sleep for as long as Retry-After says, to midnight if need be, unless told not to.
                    told += [b"x-should-retry: false"] if seconds > 60 else []
                    raise ClientError(429, reason, rule, b"Retry-After: %d" % max(1, -(-seconds // 1)), *told)
            self.running[key.name] += 1
            if step:
                self.fresh[key.name] = max(fresh, now) + step

    def leave(self, key: Key, today: date, charged: int) -> None:
        """A request that was admitted on that day has ended, and costs so many tokens."""
        with self.lock:
            self.running[key.name] -= 1
            self.charged.setdefault(today, Counter())[key.name] += charged
            while len(self.charged) > 3:
                del self.charged[min(self.charged)]

    def hold(self, size: int) -> None:
        """Count bytes of bodies that are held, or no longer held if negative.  Raises ClientError 503."""
        with self.lock:
            room = size <= 0 or self.held + size <= MAX_HELD
            require(room, 503, "too many large requests at a time; try again", "size", b"Retry-After: 1")
            self.held += size


def _told(unit: str, limit: int, remaining: int, nanoseconds: float) -> list[bytes]:
    """A limit as OpenAI tells it; the time until it is fresh again looks like 6m0s."""
    left = max(0, int(-(-nanoseconds // 10**9)))
    reset = f"{left // 3600}h" * (left >= 3600) + f"{left % 3600 // 60}m" * (left >= 60) + f"{left % 60}s"
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return [f"x-ratelimit-{name}-{unit}: {value}".encode() for name, value in values.items()]


# --- Token counts ---
# An answer says its counts, and a request its model, in members of a JSON document: the only one of a body, a
# line of NDJSON, or the data of an event.  They are found in little memory, and never in a model's text:
# - A stream is split into documents without being parsed: valid JSON has neither "\ndata:" nor "}\n{" in it,
#   since line breaks inside strings are escaped.  The first and the last documents are kept.
# - A long document is pruned: {"data":[[0.1,0.2],[0.3]],"text":"10 KB of text","usage":{"prompt_tokens":8}}
#   becomes {"data":[],"text":"","usage":{"prompt_tokens":8}}.
# - The JSON parser reads what is kept, and a member counts only in its own place.

BODY_KEPT: Final = 16 * 1024  # bytes of a body; a longer one is cut down to half of that, or given up
LONG: Final = 512  # bytes; longer documents are pruned, and longer strings in them, or parts of a form, are left out

_LEGIBLE = re.compile(rb"[\[{]|(?:data|event|id|retry)?:")  # how JSON and server-sent events begin
_BETWEEN = re.compile(rb"\n(?:data:|(?<=}\n)(?={))")
# A bracket, with a name or the colon before it, or a string; and the numbers behind it, to be fast with vectors.
_MARK = re.compile(rb'("(?:usage|timings|response|message)" ?: ?{|"[^"]*"|:\s*[{[]|\[|{|]|})[-+0-9.,eE\s]*')
_MODEL_PART = rb'(?i)\r\n(?:.+\r\n){,4}?content-disposition: *form-data; *name="?model"?\r\n(?:.+\r\n){,4}\r\n(.*)'
_TAKE_A_NAME = (b"/api/delete", b"/api/pull", b"/api/push", b"/api/show", b"/api/create")
_LAST_EVENTS = ("message_stop", "response.completed", "response.incomplete", "response.failed")
# The first of these that an answer has is its count; to those of the prompt, the others in a line are added.
_PROMPT = (("prompt_tokens",), ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
           ("prompt_eval_count",), ("tokens_evaluated",), ("cache_n", "prompt_n"))  # fmt: skip
_RESPONSE = ("completion_tokens", "output_tokens", "eval_count", "tokens_predicted", "predicted_n")
_OUTSIDE = {"prompt_eval_count", "eval_count", "tokens_evaluated", "tokens_predicted"}  # of Ollama and llama.cpp
_INSIDE = {*_RESPONSE, *sum(_PROMPT, ())} - _OUTSIDE  # which stand in an object, usage or timings


class Excerpt(bytearray):
    """What is kept of a body: all of a short one; of a long one, what may name a model or say counts."""

    size = lines = events = 0  # which only a Meter counts

    def add(self, content: bytes) -> None:
        """Take note of the next bytes; a NUL stands for a body that was given up."""
        if self != b"\0":
            self.extend(content)
        if len(self) > BODY_KEPT:
            kept = bytes.join(*_split(self))
            self[:] = kept if len(kept) <= BODY_KEPT // 2 else b"\0"


class Meter(Excerpt):
    """An Excerpt that also measures, for an estimate of the tokens where nobody counts them."""

    _end = b""

    def add(self, content: bytes) -> None:
        """Take note of the next bytes."""
        super().add(content)
        self.size, self.lines = self.size + len(content), self.lines + content.count(b"\n")
        text = self._end + content.replace(b"\r", b"")
        self.events, self._end = self.events + len(re.findall(rb"[^\n]\n\n", text)), text[-2:]


def estimate(answer: Fields, sent: Excerpt, received: Excerpt) -> int:
    """The tokens of a request and its answer, where the answer does not say: four bytes each, or one for each event."""
    events = {b"text/event-stream": received.events, b"application/x-ndjson": received.lines}
    kind = answer.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return min(sent.size // 4, 32_768) + events.get(kind, received.size // 4)


def token_counts(answer: Excerpt) -> tuple[int | None, int | None]:
    """(prompt tokens, response tokens), each None where the answer does not say."""
    _, documents = _split(answer)
    for prompt, response in map(_counts, map(_parsed, reversed(documents))):
        if prompt is None and response:  # llama.cpp counts an Anthropic prompt in message_start, and nowhere else
            return _counts([_object(_parsed(event)).get("message") for event in documents])[0], response
        if prompt or response:  # Ollama's /v1/completions says 0 and 0 until it knows
            return prompt, response
    return None, None


def has_said_all(answer: Excerpt) -> bool:
    """Whether a stream has said its last word, on which clients leave without awaiting the body's end."""
    last = _split(answer)[1][-1]
    said = _object(_parsed(last))
    return last.split()[:1] == [b"[DONE]"] or said.get("done") is True or said.get("type") in _LAST_EVENTS


def model_name(target: bytes, content_type: bytes, request: Excerpt) -> str | None:
    """The model that a request names; where it names several, the one that Ollama takes."""
    separator, documents = _split(request)
    if separator == b"\r\n--" + content_type.partition(b"boundary=")[2].partition(b";")[0].strip(b' "'):
        found = [match[1] for part in documents[:-1] if (match := re.fullmatch(_MODEL_PART, part))]
        return logged(found[0].decode(errors="replace")) if found else None
    asked = _object(_parsed(documents[0], _decode_as_go))
    if not asked:  # perhaps it was broken off; up to the last comma there are mostly whole members
        asked = _object(_parsed(_pruned(documents[0]).rpartition(b",")[0] + b"}", _decode_as_go))
    return model_among(asked, target)


def model_among(asked: dict[str, Any], target: bytes) -> str | None:
    """The model that a request names in its members, whose names are in lower case."""
    path = urllib.parse.unquote_to_bytes(target.partition(b"?")[0])  # Ollama serves /api/%70ull, too
    model = asked.get("source" if path == b"/api/copy" else "model") or (path in _TAKE_A_NAME and asked.get("name"))
    return logged(model) if model and isinstance(model, str) else None


def _split(excerpt: Excerpt) -> tuple[bytes, list[bytes]]:
    """What separates the documents of a body, or the parts of a form, and what is kept of them.

    The first may be what stands before an event's data; the last may be unfinished.
    """
    body = bytes(excerpt).lstrip()
    if body.startswith(b"--"):  # multipart/form-data; a long part ends in what may be the beginning of a separator
        separator = b"\r\n" + body.partition(b"\r\n")[0]
        parts = (b"\r\n" + body).split(separator)
        return separator, [part if len(part) <= LONG else b"\r\n\n" + part[-len(separator) :] for part in parts]
    documents = _BETWEEN.split(b"\n" + body.replace(b"\r", b"")) if _LEGIBLE.match(body) else [b"\0"]
    documents = documents[:3] + documents[3:][-8:]  # message_start is among the first; few events follow the counts
    return b"\ndata:", [_pruned(each.lstrip()) if len(each) > LONG else each for each in documents]


def _pruned(document: bytes) -> bytes:
    """A document without its long strings, and without what stands in the arrays and objects inside it.

    Kept are the objects that _MARK names, and those of an array that is the document itself.  If the document is
    unfinished, so is what is returned, and its rest can be added: it is in as many brackets, and in a string or not.
    """
    masked = re.sub(rb"(?s)\\.", b"__", document)  # now each quote begins or ends a string
    end = masked.rfind(b'"') if masked.count(b'"') % 2 else len(masked)  # where an unfinished string begins
    kept, at, hidden = bytearray(), 0, 0  # hidden: how many brackets are open in what is left out
    for token in _MARK.finditer(masked, 0, end):
        text = token[1]
        if hidden:
            hidden += (text[-1:] in b"[{") - (text[-1:] in b"]}")
            at = token.start()
        elif len(text) > LONG or (text[:1] in b":[" and token.start()):
            hidden = int(text[:1] != b'"')
            kept += document[at : token.start()] + (text if hidden else b'""')
            at = token.end(1)
    filler = b"_" * LONG  # what is too long stays so, and what is hidden is no JSON until it has been pruned again
    rest = filler + b"[" * (hidden - 1) if hidden else document[at:end]
    string = b'"' + filler + masked[-1:] if len(masked) - end > LONG else document[end:]
    return bytes(kept + rest + string)


_decode_as_go = json.JSONDecoder(  # names in any case, the last wins, null says nothing, numbers may be of 5000 digits
    parse_int=float, object_pairs_hook=lambda pairs: {name.casefold(): each for name, each in pairs if each is not None}
).raw_decode


def _counts(value: Any) -> tuple[int | None, int | None]:
    """What a document counts; llama.cpp answers several prompts with an array of documents, which are added up."""
    told: dict[str, int] = {}
    for document in map(_object, value if isinstance(value, list) else [value]):
        usage = document.get("usage") or _object(document.get("response")).get("usage")
        timings = _object(document.get("timings"))
        for members, names in ((document, _OUTSIDE), (_object(usage), _INSIDE), (timings, _INSIDE)):
            for name in names.intersection(members):
                if type(members[name]) is int and 0 <= members[name] < 2**53:
                    told[name] = told.get(name, 0) + members[name]
    prompts = (sum(told.get(name, 0) for name in names) for names in _PROMPT if names[0] in told)
    return next(prompts, None), next((told[name] for name in _RESPONSE if name in told), None)


# --- Audit log ---
# Every request produces one line, which is appended in one write, so that the lines of several threads never mix.
# If a line cannot be written, it is kept in memory, and requests are answered 503 until it has been written.


class LogFile:
    """The audit log as it is open now, and the lines that wait to be written.  Raises OperatorError if it cannot open.

    All threads share it, so its attributes are changed only while holding the lock.
    """

    may_block: bool  # whether it is a pipe, a terminal or the like, whose reader may stop reading

    def __init__(self, path: str) -> None:
        self.path, self.lock = path, threading.RLock()
        self.kept, self.written = deque[bytes](), 0  # the lines that wait, and how many bytes of the first were written
        self.whole = True  # what log_news() told the operator last
        self.head, self.lines = b"null", 0  # the last line's digest, as the next one says it, and the number of lines
        with explained(f"cannot write to {path}", "choose another --log"):
            self.file: io.FileIO | None = _open_file(self)


def new_record(client: str, flags: list[str] | None = None, status: int = 500) -> dict[str, Any]:
    """What the audit log says about a request, except when it began, in the order of the line."""
    return {
        "key": None, "path": None, "prompt_tokens": None, "response_tokens": None, "status": status, "method": None,
        "model": None, "client": client, "duration_ms": 0, "refused": None, "charged": None, "flags": flags,
    }  # fmt: skip


def audit_line(began: datetime, record: dict[str, Any]) -> bytes:
    """The line, in ASCII JSON, for a request that began then (in UTC), but for its end, which append_line() adds."""
    # The time is put before the JSON of the record, since making another dict for all of it takes a fifth longer.
    return f'{{"timestamp": "{began.isoformat("T", "milliseconds")[:23]}Z", {json.dumps(record)[1:-1]}'.encode()


def digest_of(line: bytes) -> bytes:
    """The SHA-256 of a line, but for its line break, in JSON."""
    return b'"%b"' % hashlib.sha256(line.rstrip(b"\n")).hexdigest().encode()


def append_line(log: LogFile, *lines: bytes) -> bool:
    """Append the lines after those that wait, each with the digest of the one before; False if some still wait."""
    with log.lock, contextlib.suppress(OSError):
        for line in lines:
            whole = b'%b, "prev": %b}' % (line, log.head)
            log.head, log.lines = digest_of(whole), log.lines + 1
            log.kept.append(whole + b"\n")
        file = log.file or _open_file(log)
        # A write that blocks would hold the lock, and so stop every connection, until somebody reads the pipe.
        while log.kept and (not log.may_block or takes_a_line(file.fileno(), patience=0)):
            log.written += file.write(log.kept[0][log.written :]) or 0
            if log.written == len(log.kept[0]):
                log.kept.popleft()
                log.written = 0
        return not log.kept
    return False


def is_writable(log: LogFile, tolerated: int = 0) -> bool:
    """Whether no line waits, or fewer than `tolerated`, or all that wait can be written now, which this then does."""
    return (log.file is not None and not log.kept) or len(log.kept) < tolerated or append_line(log)


def takes_a_line(descriptor: int, patience: float) -> bool:
    """Whether a write of up to 4096 bytes, PIPE_BUF, would not block, now or within that many seconds."""
    return not hasattr(select, "poll") or bool(ready({descriptor: WRITE}, patience))  # Windows asks sockets only


def log_head(log: LogFile) -> str:
    """The number of lines and the last one's digest: who knows it can tell later whether a line was changed."""
    last = f", the last with SHA-256 {log.head[1:-1].decode()}" if log.head != b"null" else ""
    return f"{log.lines} line{'s' * (log.lines != 1)}{last}"


def log_news(log: LogFile) -> list[str]:
    """Follow a log that was renamed or deleted, and write what waits; returns news for the operator."""
    news = []
    with log.lock:
        if log.file and _was_moved(log.path, log.file):
            news.append(f"the audit log was moved away; it has {log_head(log)}")
            log.file.close()
            log.file = None
    before, log.whole = log.whole, append_line(log)
    state = "the audit log is whole again" if log.whole else f"cannot write to {log.path}: nothing is forwarded"
    return [*news, state] if log.whole != before else news


def charged_on(path: str, day: date) -> Counter[str]:
    """The tokens that the requests of that day were charged, by the names of their keys, as the log says."""
    charged, begins = Counter[str](), b'{"timestamp": "' + day.isoformat().encode()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for record in (_object(_parsed(line)) for line in file if line.startswith(begins)):
            if isinstance(record.get("charged"), int) and isinstance(record.get("key"), str):
                charged[record["key"]] += record["charged"]
    return charged


def verify_log(paths: Sequence[str], head: str | None) -> Iterator[str]:
    """Check that each line names the digest of the line before it; the files are given oldest first.

    Yields what to tell.  Raises Unable, which names the file and line, for the first that does not fit.
    """
    from fileinput import hook_compressed as opened  # noqa: PLC0415 - is needed here and in sum_up() only

    last, lines, older, seen, stray = b"null", 0, 0, head is None, ""
    for path in paths:
        with explained(f"cannot read {path}", "see that it is there, and whole"), opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                prev = re.search(rb', "prev": (null|"[0-9a-f]{64}")}\s*\Z', line)
                if prev and prev[1] != b"null" and not lines:
                    yield f"{path} begins in the middle of a log"
                elif prev and prev[1] != last:
                    raise Unable(f"{path}:{number} does not follow the line before it: one of the two was changed")
                older += not prev and lines == older
                # A line that a crash cut off names none; the next one names it, or it has no newline.
                stray = f"{path}:{number}" if not prev and lines > older and line.endswith(b"\n") else ""
                last, lines = digest_of(line), lines + 1
                seen = seen or last[1:-1].decode() == head
    if stray:
        raise Unable(f"{stray} names no line before it: the gateway did not write it")
    if not seen:
        raise Unable(f"{paths[-1]}: no line has SHA-256 {head}, so its end was cut off, or it is another log")
    unlinked = f", {older} of them from before lines were linked" * bool(older)
    yield f"{lines} lines{unlinked}" + f"; the last has SHA-256 {last[1:-1].decode()}" * bool(lines)


def _open_file(log: LogFile) -> io.FileIO:
    """Open the file that has the log's name now; a line that was begun in another file is written anew."""
    # Only its owner may read a new file.  Opening a FIFO that nobody reads must fail, rather than wait for a reader.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = io.FileIO(1 if log.path == "-" else os.open(log.path, flags, 0o600), "a", closefd=log.path != "-")
    log.may_block = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    if not log.may_block:
        _lock(file)
    log.file, log.written = file, 0
    if not log.may_block:
        with contextlib.suppress(OSError), open(log.path, "rb") as old:
            log.lines, last = 0, b"\n"
            for log.lines, last in enumerate(old, 1):  # noqa: B007
                pass
            if not last.endswith(b"\n"):  # a crash cut it off, and the next one must not be joined to it
                log.kept.appendleft(b"\n")
            log.head = digest_of(last) if log.lines and log.head == b"null" else log.head
            log.lines += sum(line != b"\n" for line in log.kept)  # which will stand in it soon
    return file


def _lock(file: io.FileIO) -> None:
    """Keep other gateways from this log, or neither's lines would follow each other.  Raises BlockingIOError."""
    try:
        import fcntl  # noqa: PLC0415 - does not exist on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another gateway writes there") from None
    except (ImportError, OSError):  # or a file system without locks
        pass


def _was_moved(path: str, file: io.FileIO) -> bool:
    """Whether the file that is open has lost its name, as when a log is rotated."""
    try:
        return path != "-" and not os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError as error:
        return isinstance(error, FileNotFoundError)


# --- Usage report ---
# Who used what, from nothing but the audit log.  Its lines may hold anything, so nothing in them is trusted.  A report
# is a list of rows: first the names of the columns, then what was used, and last the total.

DIMENSIONS: Final = ("day", "key", "model", "client")
COLUMNS: Final = ("requests", "refused", "failed", "prompt", "response", "total", "share")  # behind the dimensions
MAX_GROUPS: Final = 100_000  # of requests with the same day, key, model and client, which take about 50 MB
COUNTS: Final = ("status", "prompt_tokens", "response_tokens", "charged")  # that a line has
Sums = dict[tuple[str, ...], list[int]]  # by the values of dimensions: the first five columns, and what was charged


def sum_up(paths: Iterable[str], since: str, until: str, progress: Callable[[str], object]) -> tuple[Sums, int]:
    """The requests of these days, both included, by all dimensions, and how many lines of the logs are none."""
    from fileinput import hook_compressed as opened  # noqa: PLC0415 - is needed here only

    sums, others = Sums(), 0
    for path in paths:
        # A file that is still being compressed ends with an EOFError.
        with explained(f"cannot read {path}", "name another"), contextlib.suppress(EOFError), opened(path, "rb") as log:
            for number, line in enumerate(iter(functools.partial(log.readline, READ_SIZE), b""), 1):
                record = _object(_parsed(line))
                status, *tokens = [n if type(n := record.get(name)) is int and 0 <= n < 2**53 else 0 for name in COUNTS]
                group = (str(record.get("timestamp"))[:10], *[str(record.get(name) or "-") for name in DIMENSIONS[1:]])
                if not status or not (group in sums or re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", group[0])):
                    others += 1
                elif since <= group[0] <= until:
                    if len(sums) >= MAX_GROUPS and group not in sums:
                        group = (*group[:2], "others", "others")
                    refused = record.get("refused") is not None or (record.get("key") is None and status == 403)
                    numbers = (1, refused, status >= 500 and not refused, *tokens)
                    sums[group] = [*map(int.__add__, sums.get(group, [0] * 6), numbers)]
                if number % 100_000 == 0:
                    progress(f"{path}: {number:,} lines")
    return sums, others


def _shown(name: str) -> str:
    """A name, with what could control a terminal escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def usage_report(sums: Sums, by: Sequence[str], limits: dict[str, int]) -> Iterator[list[Any]]:
    """The report by some of the dimensions; `limits` are the tokens a day of the keys that have a limit."""
    grouped = Sums()
    for names, numbers in sums.items():
        group = tuple(_shown(names[DIMENSIONS.index(name)]) for name in by)
        grouped[group] = [*map(int.__add__, grouped.get(group, [0] * 6), numbers)]
    total = ("total", *[""] * (len(by) - 1)), [*map(sum, zip([0] * 6, *sums.values()))]
    yield [*by, *COLUMNS]
    for group, (*counted, charged) in [*sorted(grouped.items()), total]:
        limit = limits.get(group[-1]) if by == ["day", "key"] else None
        yield [*group, *counted, sum(counted[-2:]), round(charged / limit, 3) if limit else None]


def usage_table(report: Sequence[Sequence[Any]], bar: int = 0) -> Iterator[str]:
    """The report as lines of text, with a bar for the tokens of each row; `bar` is the length of the longest one."""
    cells = [[*map(str, row), f"{share:.0%}" if isinstance(share, float) else share or ""] for *row, share in report]
    columns = [(max(map(len, column)), str.rjust if column[0] in COLUMNS else str.ljust) for column in zip(*cells)]
    most = max([1, *(row[-2] for row in report[1:-1])])
    bars = ["", *("#" * round(bar * row[-2] / most) for row in report[1:-1]), ""]
    for line, end in zip(cells, bars):
        yield "  ".join([*(align(cell, width) for cell, (width, align) in zip(line, columns)), end]).rstrip()


def usage_page(report: Sequence[Sequence[Any]], sums: Sums) -> str:
    """The report as one HTML page, with the tokens by day, key and model as bars."""
    charts = "".join(_chart(name, [*usage_report(sums, [name], {})][1:-1]) for name in DIMENSIONS[:3])
    table = html.escape("\n".join(usage_table(report)))
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Usage of the gateway</title><style>:root {{ color-scheme: light dark }} svg > text {{ font-size: 18px }}
body {{ font: 15px system-ui, sans-serif; margin: 2em }} pre {{ overflow-x: auto }} rect {{ fill: #4a86c8 }}
svg {{ width: min(100%, 400px); vertical-align: top; margin: 0 1em 2em 0; font-size: 13px; fill: currentColor }}</style>
<h1>Usage of the gateway</h1>{charts}<pre>{table}</pre></html>"""


def _chart(name: str, rows: list[list[Any]]) -> str:
    """Bars of tokens as an inline SVG: the last 62 days, or the 20 keys or models with the most."""
    shown = rows[-62:] if name == "day" else sorted(rows, key=lambda row: -row[-2])[:20]
    most, bars = max([1, *(row[-2] for row in shown)]), ""
    for at, (label, *_, tokens, _) in enumerate(shown, 1):
        bars += f'<g transform="translate(0 {22 * at + 24})"><text>{html.escape(label[:24])}</text><text x="400">'
        bars += f'{tokens:,}</text><rect x="190" y="-12" width="{200 * tokens / most:.0f}" height="15"/></g>'
    return f'<svg viewBox="0 0 500 {22 * len(shown) + 32}" role="img"><text y="16">Tokens by {name}</text>{bars}</svg>'


# --- Metrics ---
# What --status tells Prometheus.  Each request is counted once, when its line is written, so what the log says and what
# is counted agree.  No label holds a key, a prompt or an address.

_HELP: Final = {
    "gateway_build_info": "gauge The version of the gateway.",
    "gateway_requests_total": "counter Requests, by method and by the status that was answered.",
    "gateway_refused_total": "counter Requests that the gateway refused, by rule.",
    "gateway_upstream_errors_total": "counter Requests for which the upstream failed, by status.",
    "gateway_tokens_total": "counter Tokens as counted by the upstream, by direction and model.",
    "gateway_request_duration_seconds": "histogram From a request's first byte to the end of its answer.",
    "gateway_requests_in_flight": "gauge Requests that the upstream is working on.",
    "gateway_connections": "gauge Connections of clients.",
    "gateway_audit_lines_waiting": "gauge Audit lines that could not be written yet.",
    "gateway_certificate_expiry_timestamp_seconds": "gauge When the certificate expires, in Unix time.",
}
_METHODS: Final = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"}
# Each bucket of the histogram, with the milliseconds that a request in it may have taken.
_BUCKETS: Final = {f'gateway_request_duration_seconds_bucket{{le="{seconds}"}}': float(seconds) * 1000
                   for seconds in ("0.01", "0.1", "0.5", "1", "5", "10", "30", "60", "300", "+Inf")}  # fmt: skip
MAX_MODELS: Final = 50  # names of models that are told apart, since each is a series in Prometheus' memory


class Metrics:
    """What was counted since the start.

    A request only leaves its record, and the thread that keeps house counts many at once, which costs less than
    counting each where it ends.
    """

    def __init__(self) -> None:
        self.left, self.lock, self.models = deque[dict[str, Any]](), threading.Lock(), set[str]()
        self.found = defaultdict[str, float](float)  # by the name and the labels that Prometheus gets

    def add(self, record: dict[str, Any]) -> None:
        """Have a request counted, by its record for the audit log."""
        self.left.append(record)
        if len(self.left) > MAX_KEPT_LINES:
            self.count()

    def count(self) -> None:
        """Count what was left."""
        with self.lock, contextlib.suppress(IndexError):
            while True:
                record, found = self.left.popleft(), self.found
                status, milliseconds = record["status"], record["duration_ms"]
                method = record["method"] if record["method"] in _METHODS else "other"
                found[f'gateway_requests_total{{method="{method}",status="{status}"}}'] += 1
                if record["refused"]:
                    found[f'gateway_refused_total{{reason="{record["refused"]}"}}'] += 1
                if status in (502, 504):
                    found[f'gateway_upstream_errors_total{{status="{status}"}}'] += 1
                found["gateway_request_duration_seconds_sum"] += milliseconds / 1000
                found["gateway_request_duration_seconds_count"] += 1
                for bucket, bound in _BUCKETS.items():
                    found[bucket] += milliseconds <= bound
                for direction in ("prompt", "response"):
                    if tokens := record[f"{direction}_tokens"]:
                        labels = f'direction="{direction}",model="{self._label(record["model"])}"'
                        found[f"gateway_tokens_total{{{labels}}}"] += tokens

    def _label(self, model: str | None) -> str:
        label = re.sub(r'[\\"\n]', "_", model or "")
        if len(self.models) < MAX_MODELS:
            self.models.add(label)
        return label if label in self.models else "other"

    def lines(self, now: dict[str, float]) -> Iterator[str]:
        """All metrics in Prometheus' text format; `now` are the samples that are not counted."""
        self.count()
        with self.lock:
            samples = {f'gateway_build_info{{version="{__version__}"}}': 1.0, **now, **self.found}
        for metric, about in _HELP.items():
            kind, _, purpose = about.partition(" ")
            yield f"# HELP {metric} {purpose}\n# TYPE {metric} {kind}"
            own = re.compile(f"{metric}(_bucket|_sum|_count)?(?![a-z_])")
            yield from (f"{sample} {number:.15g}" for sample, number in samples.items() if own.match(sample))


# --- Sockets ---
# Every connection has a thread, and calls on its sockets block.  A socket's own time-out would start anew with every
# byte, so a client that sends one now and then could hold a thread for ever.  Instead, a thread that is about to block
# writes down its deadline, and which error it means to miss it.  One thread, the watchman, looks at all deadlines four
# times a second.  Where one has passed, it shuts the socket down, below TLS, so that the blocked call returns.

NO_LINGER: Final = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER, so that closing is a reset
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

# A thread that gives up the interpreter's lock for a system call, while others want it, sleeps until it gets it back.
# So the connections' threads take turns: each keeps its turn from the bytes that woke it until it blocks again, which
# halves the CPU of 1000 streams.  An interpreter without that lock needs neither turns nor a relay.
TURN: Final = threading.Lock() if getattr(sys, "_is_gil_enabled", lambda: True)() else None


class ClientLeft(Exception):
    """The client closed its connection, or does not read."""


class Silence(Exception):
    """No request came in time.  The connection may end without an answer, and it must when the gateway stops."""


Failure = Callable[[], Exception]


class Wire:
    """A connected socket, TLS or plain, whose peer may do nothing for `patience` seconds.

    `overdue` makes the exception for a peer that takes longer, and `broken` the one for a connection that breaks.
    The methods named ..._now do not block.
    """

    client: Client  # whose connection it serves: a client's wire its own, an upstream's the one that uses it now

    def __init__(self, sock: socket.socket, patience: float, overdue: Failure, broken: Failure) -> None:
        self.sock, self.descriptor = sock, sock.fileno()
        self.patience, self.overdue, self.broken = patience, overdue, broken
        self.lock = threading.RLock()  # reentrant, since a second signal may come while the first one ends connections
        self.ahead = b""  # received, but not used yet
        # A read takes at least one whole TLS record, so OpenSSL holds no plaintext that poll() cannot see.
        self._size, self._most = TLS_RECORD, TLS_RECORD if isinstance(sock, ssl.SSLSocket) else READ_SIZE

    def receive(self, deadline: float = 0, overdue: Failure | None = None, may_end: bool = False) -> bytes:
        """The next bytes; b"" at the connection's end, if it may end here.  A deadline is for a whole phase."""
        if deadline and time.monotonic() > deadline:  # a flood of bytes never blocks, and the watchman could miss it
            self.shut_down(socket.SHUT_RD)
            raise (overdue or self.overdue)()
        self.sock.setblocking(True)
        with self.client.until(self, deadline, overdue):
            data = self.sock.recv(self._size)
        if not data and not may_end:
            raise self.client.reason(self)
        # A large buffer costs memory in every thread, so only a connection that fills the small one gets it.
        self._size = self._most if len(data) == self._size else TLS_RECORD
        return data

    def send(self, data: bytes) -> None:
        """Send all.  The peer is overdue if it takes no TLS record of it (16 KiB) for that long."""
        sent = self.send_now(data)  # usually all of it, and then the thread keeps its turn
        while sent < len(data):
            self.sock.setblocking(True)
            with self.client.until(self):
                sent += self.sock.send(memoryview(data)[sent:])

    def receive_now(self) -> bytes | None:
        """What has arrived: bytes, b"" at the end, None if nothing."""
        return self._now(self.sock.recv, TLS_RECORD)

    def send_now(self, data: bytes | memoryview) -> int:
        """Send what can be sent at once, and return how many bytes; the rest, which OpenSSL may hold, must be next."""
        sent = 0
        while sent < len(data) and (more := self._now(self.sock.send, memoryview(data)[sent:] if sent else data)):
            sent += more  # over TLS, a call sends one record
        return sent

    def _now(self, call: Callable[[Any], T], argument: Any) -> T | None:
        """Make a call on the socket; None if it would have had to block."""
        try:
            if self.sock.getblocking():
                self.sock.setblocking(False)
            return call(argument)
        except _NOT_NOW:
            return None
        except OSError:
            raise self.client.reason(self) from None

    def close(self, reset: bool = False) -> None:
        """Close with a close_notify, or with a reset, by which the peer can tell that the message is not whole."""
        with contextlib.suppress(OSError):
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            else:
                self._end_tls()
        with self.lock:
            self.sock.close()

    def shut_down(self, how: int) -> None:
        """Shut the TCP connection down.  SSLSocket.shutdown() would discard the TLS object that a thread is using."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, how)

    def _end_tls(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.setblocking(False)
                self.sock.unwrap()  # sends our close_notify, and raises since the peer's has not come yet


class Client(Wire):
    """The wire to a client, and what the watchman needs to know of the connection.

    `with client.until(wire):` surrounds a call that blocks on a wire, this one or the upstream's.  If it takes too
    long, the watchman makes overdue() its verdict and ends the call.  Sockets are shut down, closed
    and handed over under the lock, or the watchman could shut down a socket that belongs to another connection by then.
    """

    objection: Callable[[], Exception | None] = staticmethod(lambda: None)  # why the request must not go on, if so

    def __init__(self, sock: socket.socket, patience: float) -> None:
        super().__init__(sock, patience, ClientLeft, ClientLeft)
        self.client = self  # until Handler.finish()
        self.upstream: Wire | None = None  # while a request is in flight
        self.wait: tuple[float, Wire, Failure] | None = None  # one attribute, so that all of it changes at once
        self.verdict: Exception | None = None  # why the watchman intervened

    def until(self, wire: Wire, deadline: float = 0, overdue: Failure | None = None) -> Client:
        """Note what the thread is about to block on; a deadline (monotonic) replaces the wire's patience."""
        self.wait = deadline or time.monotonic() + wire.patience, wire, overdue or wire.overdue
        return self

    def __enter__(self) -> None:
        """Let other threads take their turn while this one is blocked."""
        if TURN:
            TURN.release()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """The call has returned.  Raises the watchman's verdict, if there is one, or the reason of an OSError."""
        if TURN:
            TURN.acquire()
        wait, self.wait = self.wait, None
        if wait and (self.verdict or isinstance(error, OSError)):
            raise self.reason(wait[1]) from error

    def reason(self, wire: Wire) -> Exception:
        """Why a call on the wire failed: the watchman's verdict, which counts once, or else that it broke."""
        with self.lock:
            verdict, self.verdict = self.verdict, None
        return verdict or wire.broken()

    def look(self, now: float, left: bool, stopping: bool) -> None:
        """For the watchman, which holds the lock: intervene if the deadline has passed or the client has left."""
        deadline, wire, overdue = self.wait or (sys.maxsize, self, ClientLeft)
        objection = self.objection()
        if deadline < now or objection or (stopping and overdue is Silence):
            # At first only reading ends, since a client that is too slow shall still get its 408.  That ends neither a
            # write nor a read during which records without data keep coming (TLS KeyUpdate), so if the call is still
            # blocked at the next look, both directions end; a thread that has no deadline is not blocked, but computes.
            how = socket.SHUT_RDWR if self.verdict and deadline < sys.maxsize else socket.SHUT_RD
            self.verdict = self.verdict or objection or overdue()  # before the thread wakes and asks for it
            wire.shut_down(how)
        elif self.upstream and left and not self.verdict:
            self.end()

    def end(self) -> None:
        """End the connection as if the client had left, whatever its thread is doing."""
        with self.lock:
            self.verdict = self.verdict or ClientLeft()
            for wire in filter(None, (self, self.upstream)):
                wire.shut_down(socket.SHUT_RDWR)

    def linger(self) -> None:
        """Half-close, and let the client finish sending.

        To close while it is sending would reset the connection, and the client could lose our answer.
        """
        self._end_tls()
        self.shut_down(socket.SHUT_WR)
        with contextlib.suppress(OSError, ClientLeft, Silence, Refusal):
            self.sock.setblocking(True)
            with self.until(self, time.monotonic() + LINGER, Silence):
                while socket.socket.recv(self.sock, READ_SIZE):  # below TLS, since it is only discarded
                    pass


class Watchman:
    """Ends what overstays, and requests whose clients have left."""

    def __init__(self) -> None:
        self.leaving = False  # from then on, --status says that requests should go elsewhere
        self.stopping = False  # from then on, nobody waits for another request
        self.clients: set[Client] = set()  # all there are; other threads copy it, which takes one step
        self._minute = 0.0  # in which something was told last that clients can cause at will

    def run(self) -> None:
        """Look at all connections, again and again.  Nothing in here blocks."""
        while True:
            time.sleep(TICK)
            clients = self.clients.copy()
            left = ready({client.descriptor: GONE for client in clients if client.upstream}, seconds=0)
            for client in clients:
                with client.lock:
                    client.look(time.monotonic(), client.descriptor in left, self.stopping)

    def may_report(self) -> bool:
        """Whether to report what clients can cause at will: at most once a minute."""
        before, self._minute = self._minute, time.monotonic() // 60 + 1
        return self._minute != before


# --- Relay ---
# A connection's thread may lend a running stream to the relay's thread, since waking a thread for every token costs
# twice as much as the token.  The relay does one thing: when something has come from an upstream, it moves it on to the
# client, if that is possible without waiting.  Everything else - a slow client, the end, an error - is left to the
# connection's own thread, which sleeps meanwhile, and which does all of the work where there is no relay.


class Relay:
    """Moves running streams, all in one thread."""

    def __init__(self) -> None:
        self._poll = select.epoll()  # Linux only
        # By the descriptor of the upstream's socket: the function that moves on what has arrived, and where the thread
        # that lent the stream waits for None or an error.
        self._loans: dict[int, tuple[Callable[[], bool], SimpleQueue[Exception | None]]] = {}

    def carry(self, upstream: Wire, move: Callable[[], bool]) -> None:
        """Have move() called whenever the upstream can be read, until it returns False or raises; block until then."""
        _, returned = self._loans[upstream.descriptor] = move, SimpleQueue()
        try:
            self._poll.register(upstream.descriptor, select.EPOLLIN)
        except OSError:  # the system has no more watches to give, and the thread can do without
            del self._loans[upstream.descriptor]
            return
        if failure := returned.get():
            raise failure

    def run(self) -> None:
        """Move what arrives, for ever."""
        try:
            while True:
                found = self._poll.poll()
                with TURN or contextlib.nullcontext():
                    for descriptor, _ in found:
                        self._move(descriptor)
        finally:
            for _, returned in self._loans.values():  # or their threads would sleep for ever, and log nothing
                returned.put(None)

    def _move(self, descriptor: int) -> None:
        (move, returned), failure = self._loans[descriptor], None
        try:
            if move():
                return
        except Exception as error:  # the stream's own thread handles it
            failure = error
        self._poll.unregister(descriptor)
        del self._loans[descriptor]
        returned.put(failure)


# --- Forwarding ---
# http.client connects to the upstream.  Heads and bodies are parsed here, since http.client takes 103 for a final
# answer, "-5" for a length, and a body that was cut short for a whole one.


class UpstreamError(Refusal):
    """The upstream cannot be reached, is silent, or sends what is no valid answer."""


class Pool:
    """Connections to the upstream, kept for a few seconds between two requests."""

    def __init__(self, settings: Settings) -> None:
        self.upstream, self.patience = settings.upstream, settings.upstream_timeout
        self._tls = ssl.create_default_context() if self.upstream.tls else None
        if self._tls:
            self._tls.options &= ~0x80  # OP_IGNORE_UNEXPECTED_EOF: Python 3.9 sets it, and has no name for it
        # (since when, connection), oldest first.  Several threads take from it at a time, and may find it empty.
        self._idle: deque[tuple[float, Wire]] = deque()

    def take(self) -> Wire | None:
        """The kept connection that was used last, if any.  One that has ended, or sent something unasked, is closed."""
        with contextlib.suppress(IndexError):
            while ready({(wire := self._idle.pop()[1]).descriptor: READ}, seconds=0):
                wire.close(reset=True)
            return wire
        return None

    def give_back(self, wire: Wire) -> None:
        """Keep a connection that is ready for another request."""
        self._idle.append((time.monotonic(), wire))

    def prune(self) -> None:
        """Close those that are too old or too many."""
        with contextlib.suppress(IndexError):
            while len(self._idle) > POOL_SIZE or time.monotonic() - self._idle[0][0] > POOL_SECONDS:
                self._idle.popleft()[1].close()

    def connect(self, seconds: float = CONNECT_TIMEOUT) -> Wire:
        """A new connection.  UpstreamError 502."""
        connection = http.client.HTTPConnection(self.upstream.host, self.upstream.port, timeout=seconds)
        try:
            connection.connect()
            sock = connection.sock
            if self._tls:  # HTTPSConnection would not report an end without close_notify, which is a cut
                sock = self._tls.wrap_socket(sock, server_hostname=self.upstream.host, suppress_ragged_eofs=False)
        except OSError as error:
            reason = getattr(error, "verify_message", None) or error.strerror or "no answer"
            remedy = "trust it by SSL_CERT_FILE" if isinstance(error, ssl.SSLError) else "start it there"
            message = f"the upstream at {self.upstream.authority} cannot be reached ({reason}); {remedy}"
            raise UpstreamError(502, message) from None
        silent = functools.partial(UpstreamError, 504, f"the upstream was silent for {self.patience:g} seconds")
        return Wire(sock, self.patience, silent, lambda: UpstreamError(502, "the upstream broke off its answer"))


class Exchange:
    """A request on its way to the upstream, and the answer on its way back.

    `seconds` is how long a client may take for every 4 KiB of the request's body.
    """

    # Whether the connection was used before, and has not proved good yet; and whether it cannot be used again, since
    # the upstream does not get the rest of the request or sent more than was asked.
    _kept = _given_up = False
    _progress, _part = 0, b""  # bytes of the body towards the next 4 KiB; a body to be sent with the head
    held = 0  # bytes of a body that was read whole

    def __init__(self, pool: Pool, client: Client, request: Head, seconds: float, meter: type[Excerpt]) -> None:
        self._pool, self._client, self._request = pool, client, request
        self._seconds = self._left = seconds  # left: of them, for the next 4 KiB
        self._expects = b"100-continue" in list_members(request.fields, b"expect") and request.version == b"1.1"
        self.sent, self.received = meter(), meter()  # of the content of the two bodies
        self.body = BodyReader(request.framing, request.framing == CHUNKED, self.sent.add)  # of the request

    def read_whole(self, hold: Callable[[int], None]) -> bytes:
        """Read the whole body before anything is sent.  Raises ClientError 408 and 413, and what hold(size) raises."""
        content, data = bytearray(), self._client.ahead
        while not self.body.done:
            hold(len(data))
            self.held += len(data)
            longest = max(self._request.framing, self.held)
            require(longest <= MAX_JUDGED, 413, f"the body is longer than {MAX_JUDGED >> 20} MiB", "size")
            content += self.body.feed(data)
            self._client.ahead = self.body.rest
            data = b"" if self.body.done else self._receive()
        whole, self.sent.size = bytes(content), len(content)
        few = len(whole) <= MAX_VALUES or sum(map(whole.count, (b",", b"[", b"{"))) <= MAX_VALUES
        require(few, 413, f"the body holds more than {MAX_VALUES:,} commas and brackets", "size")
        self._part = self.body.framed(whole)
        return whole

    def begin(self, head: bytes) -> None:
        """Send the head, and what there is of the body.  Raises UpstreamError 502."""
        part = self._part or (b"" if self.body.done else self._next_part(b""))
        self._head, self._part = head, b""
        self._open(self._pool.take(), head + part)

    def upload(self) -> None:
        """Send the rest of the body as it comes, until the upstream answers.  After an interim answer, it may go on.

        Raises ClientError 408, ClientLeft, UpstreamError 504.
        """
        while not (self.body.done or self._given_up or self._upstream.ahead):
            data = self._receive(self._upstream)
            self._push(self._next_part(data))
            self._given_up = self._given_up or (not data and self._hear() == b"")

    def read_head(self) -> Head:
        """Wait for the next head; it may be an interim one (1xx).  Raises UpstreamError, ClientLeft."""
        try:
            while not (self._upstream.ahead and (found := _upstreams(split_head, self._upstream.ahead))):
                self._upstream.ahead += self._upstream.receive()
        except UpstreamError as error:
            harmless = self._request.method in IDEMPOTENT and not self._request.framing
            if not (self._kept and harmless and error.status == 502) or self._upstream.ahead:
                raise
            # The kept connection ended just as it was used again, and this request may be repeated (RFC 9110, 9.2.2).
            self.end()
            self._open(None, self._head)
            return self.read_head()
        self._kept = False
        head, self._upstream.ahead = found
        return _upstreams(parse_answer, head, self._request.method)

    def edit(self, answer: Head, edited: Callable[[bytes], bytes | None]) -> Head:
        """Give an answer that the upstream has sent whole another content.  Raises as read_head() does."""
        body, until_close = BodyReader(answer.framing), answer.framing == UNTIL_CLOSE
        content = bytearray(_upstreams(body.feed, self._upstream.ahead))
        while not body.done and len(content) <= MAX_JUDGED and (data := self._upstream.receive(may_end=until_close)):
            content += _upstreams(body.feed, data)
        if len(content) > MAX_JUDGED or (shown := edited(bytes(content))) is None:
            raise UpstreamError(502, "the upstream's list of models is too long, or cannot be read")
        self._given_up = self._given_up or until_close or bool(body.rest)
        answer.fields.drop(b"content-length")
        answer.fields.lines = [*answer.fields.lines, (b"", b"Content-Length: %d" % len(shown))]
        self._upstream.ahead = shown
        return answer._replace(framing=len(shown))

    def bring(self, answer: Head, head: bytes, chunked: bool, relay: Relay | None) -> None:
        """Bring the answer to the client: this head, then the content, piece by piece.  Raises as read_head() does."""
        self._answer = BodyReader(answer.framing, chunked, self.received.add)
        data, self._upstream.ahead = self._upstream.ahead, b""
        self._unsent = head + _upstreams(self._answer.pass_on, data)
        while not self._answer.done:
            self._client.send(self._unsent)
            self._unsent = b""
            if relay and chunked:  # which brings the answer, until that would need waiting for the client
                with self._client.until(self._upstream):
                    _upstreams(relay.carry, self._upstream, self._move)
            if not self._unsent:
                data = self._upstream.receive(may_end=answer.framing == UNTIL_CLOSE)
                self._answer.done = not data
                self._unsent = _upstreams(self._answer.pass_on, data)
        # Before the client has the end of the answer, since its next request may follow at once and need a connection.
        self.end(reusable=keeps_alive(answer) and answer.framing != UNTIL_CLOSE and not self._answer.rest)
        self._client.send(self._unsent)

    def end(self, reusable: bool = False) -> None:
        """Keep the upstream's connection for another request, or close it, which stops the model.  May be repeated."""
        with self._client.lock:
            upstream, self._client.upstream = self._client.upstream, None
        if upstream and reusable and self.body.done and not (self._given_up or self._client.verdict):
            self._pool.give_back(upstream)
        elif upstream:
            upstream.close(reset=True)

    def _open(self, kept: Wire | None, opening: bytes) -> None:
        """Send the beginning of the request over a kept connection or a new one."""
        client, self._kept, self._given_up = self._client, kept is not None, False
        if not kept:
            with client.until(client, sys.maxsize):  # connecting has a time-out of its own
                kept = self._pool.connect()
        self._upstream = client.upstream = kept
        kept.client = client
        self._push(opening)

    def _receive(self, *upstream: Wire) -> bytes:
        """The next bytes of the body; none if the upstream can be read first, or if something woke us for nothing."""
        if self._expects:  # the client waits to be asked for the body (RFC 9110, 10.1.1)
            self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects = False
        client, began = self._client, time.monotonic()
        with client.until(client, began + self._left, lambda: ClientError(408, "the request's body came too slowly")):
            data = client.receive_now()
            if data is None:
                ready({wire.descriptor: READ for wire in (client, *upstream)}, seconds=None)
        if data == b"":
            raise client.reason(client)
        self._progress, self._left = self._progress + len(data or b""), self._left - (time.monotonic() - began)
        if self._progress >= MIN_PROGRESS:
            self._progress, self._left = 0, self._seconds
        return data or b""

    def _next_part(self, data: bytes) -> bytes:
        """The body's next bytes as the upstream gets them; what follows the body is left to the next request."""
        part = self.body.pass_on(self._client.ahead + data)
        self._client.ahead = self.body.rest  # nothing, until the body is done
        return part

    def _push(self, data: bytes) -> None:
        """Send a part of a request.  A blocking write would not notice an upstream that answers instead of reading."""
        rest = memoryview(data)  # or each partial write would copy what is left
        try:
            while not self._given_up and (rest := rest[self._upstream.send_now(rest) :]):
                with self._client.until(self._upstream):
                    ready({self._upstream.descriptor: READ | WRITE}, seconds=None)
                self._given_up = self._hear() is not None and not self._upstream.ahead.startswith(b"HTTP/1.1 1")
        except UpstreamError:
            self._given_up = True  # but an upstream that reads no more may have answered

    def _hear(self) -> bytes | None:
        """What the upstream has sent meanwhile: bytes, b"" at the end, None if nothing."""
        data = self._upstream.receive_now()
        self._upstream.ahead += data or b""
        return data

    def _move(self) -> bool:
        """In the relay's thread: move on what has arrived; False if the stream's own thread has to continue."""
        data = self._upstream.receive_now()
        if data:
            self._unsent = self._answer.pass_on(data)
            if not self._answer.done:  # the end is sent by bring()
                self._unsent = self._unsent[self._client.send_now(self._unsent) :]
            self._client.until(self._upstream)  # anew
        return data != b"" and not self._unsent


def _upstreams(rule: Callable[..., T], *arguments: Any) -> T:
    """Run a parser on the upstream's bytes; its ClientError becomes a 502."""
    try:
        return rule(*arguments)
    except ClientError as error:
        raise UpstreamError(502, f"the upstream's answer is no valid HTTP: {error}") from None


# --- Handler ---
# The life of a connection and of a request, in order.  Only this section answers clients.


class Gateway(NamedTuple):
    """What all connections share."""

    settings: Settings
    keys: Watched[Keys]
    log: LogFile
    pool: Pool
    limits: Limits
    watchman: Watchman
    report: Callable[[str], None]
    metrics: Metrics | None = None


class Handler(socketserver.BaseRequestHandler):
    """One client's connection: a request after the other, and a line in the log for each."""

    def __init__(self, gateway: Gateway, relay: Relay | None, request: Any, client_address: Any, server: Any) -> None:
        self.gateway, self.settings, self.relay = gateway, gateway.settings, relay
        # unread: whether the client may still be sending a request that has been answered
        self.wire, self.unread = Client(request, self.settings.write_timeout), False
        self.peer = client_address[0].removeprefix("::ffff:")  # IPv4 through an IPv6 socket
        super().__init__(request, client_address, server)  # which calls handle()

    def handle(self) -> None:
        """The life of a connection."""
        self.gateway.watchman.clients.add(self.wire)
        if self._shake_hands():
            seconds = self.settings.header_timeout
            while self._await_request(seconds) and self._one_request():
                seconds = self.settings.idle_timeout
        if self.unread:
            self.wire.linger()

    def finish(self) -> None:
        """Close the connection, whatever happened."""
        self.gateway.watchman.clients.discard(self.wire)
        self.wire.close()
        del self.wire.client  # or only the garbage collector would free what OpenSSL holds

    def _shake_hands(self) -> bool:
        """Set up TLS; False if that fails.  Clients that only connect, as health checks do, are not reported."""
        try:
            with self.wire.until(self.wire, time.monotonic() + self.settings.handshake_timeout, Silence):
                self.request.do_handshake()
            return True
        except (ClientLeft, Silence) as failure:
            error = failure.__cause__
        reason = error.reason if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError) else ""
        if reason == "HTTP_REQUEST" and is_writable(self.gateway.log, tolerated=MAX_KEPT_LINES):
            self._answer_plain_http()
        elif reason and self.gateway.watchman.may_report():
            hint = f"clients must trust {self.settings.cert} and speak TLS 1.2 or 1.3"
            self.gateway.report(f"a TLS handshake with {self.peer} failed: {reason}; {hint}")
        return False

    def _answer_plain_http(self) -> None:
        """Answer a client that sent plain HTTP.  OpenSSL has consumed its request, so the log cannot show it."""
        self.began, self.record = datetime.now(timezone.utc), new_record(self.peer, status=400)
        self._log()
        answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nThis port speaks https.\n"
        with contextlib.suppress(OSError):
            self.unread = bool(socket.socket.send(self.request, answer))  # below TLS

    def _await_request(self, seconds: float) -> bool:
        """Wait for the first byte of a request; False if none comes.  Empty lines before it are skipped."""
        wire, deadline = self.wire, time.monotonic() + seconds
        with contextlib.suppress(ClientLeft, Silence, Refusal):
            while not self.gateway.watchman.stopping and is_writable(self.gateway.log, tolerated=MAX_KEPT_LINES):
                if wire.ahead.startswith(b"\r\n"):
                    wire.ahead = re.sub(rb"\A(?:\r\n)+", b"", wire.ahead)  # RFC 9112, 2.2; all at once, against a flood
                if wire.ahead not in (b"", b"\r"):
                    return True
                wire.ahead += wire.receive(deadline, Silence)
        return False

    def _one_request(self) -> bool:
        """The life of a request; True if the connection can carry another."""
        self.began, began = datetime.now(timezone.utc), time.monotonic()
        self.record = new_record(self.peer, None if self.settings.scan == "off" else [])
        self.unread, self.answering = True, False  # answering: a head went out, after which there can be no other
        self.cors: list[bytes] = []
        try:
            request = self._read_request()
            key = self._admit(request)
            return key is not None and self._limited(key, request)
        except Refusal as refusal:
            self._refuse(refusal)
        except (ClientLeft, Silence):  # the latter, if the time for a request was over just when it came
            self.record["status"] = 499
            self.wire.close(reset=True)
        except Exception as error:  # a bug, or a lack of memory, costs one connection and is reported
            self.gateway.report(fault(error))
            self._refuse(Refusal(500, "the gateway failed; its standard error says where"))
        finally:
            self.record["duration_ms"] = round((time.monotonic() - began) * 1000)
            self._log()
        return False

    def _log(self) -> None:
        """Write the request's line, and count it."""
        append_line(self.gateway.log, audit_line(self.began, self.record))
        if self.gateway.metrics:
            self.gateway.metrics.add(self.record)

    def _read_request(self) -> Head:
        """Read a request's head.  Raises ClientError, ClientLeft."""
        wire, deadline = self.wire, time.monotonic() + self.settings.header_timeout
        paths = self.gateway.keys.value.paths
        try:
            while not (found := split_head(wire.ahead)):
                wire.ahead += wire.receive(deadline, lambda: ClientError(408, "the request's head came too slowly"))
        finally:
            self.record["method"], self.record["path"] = requested(wire.ahead, paths)
        head, wire.ahead = found
        request = parse_request(head, paths)
        if self.settings.trusted_proxy:
            self.record["client"] = client_of(request.fields, self.peer, self.settings.trusted_proxy)
        if paths:
            request.fields.drop(b"referer")  # by which browsers tell the whole path of the page before
        return request

    def _admit(self, request: Head) -> Key | None:
        """Check the key, that the log can be written, and the role; None if a preflight, without a key, was answered.

        Raises ClientError 403 or 503.
        """
        origin = request.fields.get(b"origin", b"")
        if origin and may_share(origin, self.settings.cors_origin):
            self.cors = [b"Access-Control-Allow-Origin: " + origin, b"Vary: Origin"]
            request.fields.drop(b"origin")  # Ollama refuses origins that it does not know
            if request.method == b"OPTIONS" and b"access-control-request-method" in request.fields:
                self._answer(204, preflight_lines(request))
                return None
        presented = presented_keys(request.fields)
        key, flaw = find_key(self.gateway.keys.value, presented, self.began.date(), request.secret)
        if key:
            self.record["key"], self.record["charged"] = key.name, 0 if key.tokens else None
        if flaw == "trap":
            with self.wire.until(self.wire, sys.maxsize):  # nobody waits while the terminal does not take the line
                self.gateway.report(f"the trap key {self.record['key']} was used from {self.record['client']}")
        if flaw or not key:
            raise ClientError(403, "a valid API key is needed: X-Api-Key: KEY or Authorization: Bearer KEY", flaw)
        if not is_writable(self.gateway.log):
            raise ClientError(503, "the audit log cannot be written; until it can, nothing is forwarded")
        check_role(key.role, request.method, request.path)
        return key

    def _limited(self, key: Key, request: Head) -> bool:
        """Forward the request within the key's limits, as long as the key is valid.  Raises ClientError 429."""
        limits, today = self.gateway.limits, self.began.date()
        counted = (key.rate or key.tokens or key.parallel) and request.method not in FREE
        if counted:
            limits.enter(key, today, time.monotonic_ns())
        self.wire.objection = functools.partial(self._revoked, key)
        try:
            return self._forward(key, request)
        finally:
            del self.wire.objection  # so that there is none again
            if counted:
                limits.leave(key, today, self.record["charged"] or 0)

    def _revoked(self, key: Key) -> ClientError | None:
        """For the watchman: the reason to end a request whose key was deleted, has expired or became a trap."""
        now = self.gateway.keys.value.get(key.digest)
        valid = now and not now.trap and datetime.now(timezone.utc).date() <= now.expires
        return None if valid else ClientError(403, "the key is no longer valid", "revoked")

    def _forward(self, key: Key, request: Head) -> bool:
        """Send the request on and bring the answer; True if the connection can carry another request."""
        meter = Meter if key.tokens else Excerpt
        exchange = Exchange(self.gateway.pool, self.wire, request, self.settings.body_timeout, meter)
        answer = None
        try:
            self._judge(key, request, exchange)
            exchange.begin(forwarded_head(request, self.settings.upstream, self.peer))
            for _ in range(MAX_INTERIM):
                exchange.upload()
                answer = exchange.read_head()
                if answer.status >= 200:
                    return self._bring(key, request, exchange, answer)
                if answer.status > 100 and request.version == b"1.1":  # the gateway sends 100 itself
                    self.wire.send(answer_head(answer, self.settings.upstream))
            raise UpstreamError(502, "the upstream sends interim answers without end")
        finally:
            exchange.end()
            self._note(key, request, exchange, answer)

    def _judge(self, key: Key, request: Head, exchange: Exchange) -> None:
        """Check what the request says, where its key or --scan ask for that.  Raises ClientError."""
        scan = self.settings.scan
        if key.models:
            check_way(request, key.models)
        if key.tokens or (key.models and lists_models(request)):
            request.fields.drop(b"accept-encoding", b"range")  # or the list, or the counts, could not be read
        scanned = scan != "off" and asks_a_model(request) and may_be_scanned(request.fields, scan)
        if not (key.models or scanned):
            return
        record, known = self.record, self.gateway.keys.value
        content = exchange.read_whole(self.gateway.limits.hold)
        # This takes so long that others have a turn, and for a large body so much memory that no other has.
        alone = self.gateway.limits.large if len(content) > READ_SIZE else contextlib.nullcontext()
        with self.wire.until(self.wire, sys.maxsize), alone:
            value = parse_strictly(content, request) if key.models else prompt_of(content, scan)
            members = {name.casefold(): each for name, each in _object(value).items()}
            record["model"] = model_among(members, request.target)
            if scanned:  # before the names are checked, since the log also names a model that is refused
                record["flags"] = find_secrets(value, known)
                if find_secrets(members.get("model"), known):  # all of it, since a part of a secret would not be found
                    record["model"] = None
            if key.models:
                check_names(_object(value), request, key.models)
        if record["flags"] and scan == "block":
            raise ClientError(400, f"the prompt holds what looks like a secret: {', '.join(record['flags'])}", "scan")

    def _bring(self, key: Key, request: Head, exchange: Exchange, answer: Head) -> bool:
        """Bring the answer to the client; True if the connection can carry another request."""
        self.record["status"] = answer.status
        if key.models and lists_models(request) and answer.status == 200 and request.method != b"HEAD":
            answer = exchange.edit(answer, functools.partial(visible, models=key.models))
        chunked = answer.framing < 0 and request.version == b"1.1"
        keep = keeps_alive(request) and exchange.body.done and not self.gateway.watchman.stopping
        added = [*self.cors, *[b"Connection: close"] * (not keep), *[b"Transfer-Encoding: chunked"] * chunked]
        if self.cors:
            answer.fields.drop(b"access-control-allow-origin")
        self.answering = True
        try:
            exchange.bring(answer, answer_head(answer, self.settings.upstream, added), chunked, self.relay)
        except ClientLeft:
            if has_said_all(exchange.received):
                return False  # it has the whole answer, and the status stays
            raise
        self.unread = bool(self.wire.ahead) or not exchange.body.done
        return keep

    def _note(self, key: Key, request: Head, exchange: Exchange, answer: Head | None) -> None:
        """Note the model, the tokens, and what the key is charged for them."""
        record = self.record
        if exchange.held:
            self.gateway.limits.hold(-exchange.held)
        else:
            record["model"] = model_name(request.target, request.fields.get(b"content-type", b""), exchange.sent)
        record["prompt_tokens"], record["response_tokens"] = counts = token_counts(exchange.received)
        if key.tokens:
            served = answer if answer and answer.status == 200 and asks_a_model(request) else None
            estimated = estimate(served.fields, exchange.sent, exchange.received) if served else 0
            record["charged"] = sum(filter(None, counts)) or estimated

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with an error in the format of the API that was asked."""
        self.record["refused"] = refusal.rule
        body = error_body(self.record["path"] or "", refusal.status, str(refusal), refusal.rule)
        lines = [*refusal.lines, b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
        self._answer(refusal.status, lines, b"" if self.record["method"] == "HEAD" else body)

    def _answer(self, status: int, lines: list[bytes], body: bytes = b"") -> None:
        """Send an answer of the gateway's own, which ends the connection; cut one that is half sent already."""
        self.record["status"] = status
        first = b"HTTP/1.1 %d %b" % (status, http.HTTPStatus(status).phrase.encode())
        if self.answering:
            self.wire.close(reset=True)
            return
        with contextlib.suppress(ClientLeft, Refusal):  # a Refusal, if the watchman's verdict came late
            self.wire.send(b"\r\n".join([first, *lines, *self.cors, b"Connection: close", b"", body]))


# --- Server ---
# Each connection has a thread of its own from the handshake on, so that a silent client delays nobody.  There are at
# most --max-connections at a time; the others wait.


def listen_at(place: tuple[str, int], remedy: str) -> socket.socket:
    """Listen on HOST:PORT; without HOST on all addresses, of IPv4 and IPv6.  Raises Unable, with the remedy."""
    host, port = place
    both = host in ("", "[::]") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    with explained(f"cannot listen on {host}:{port}", f"choose another {remedy}", Unable):
        return socket.create_server((host.strip("[]"), port), family=family, backlog=1024, dualstack_ipv6=both)


class _Listener(http.server.ThreadingHTTPServer):
    """Gives each connection a thread, as long as there are no more than `most`."""

    def __init__(self, gateway: Gateway, place: tuple[str, int], flag: str, most: int, handler: Any) -> None:
        self.gateway, self.slots = gateway, threading.Semaphore(most)
        super().__init__(place, handler, bind_and_activate=False)
        self.socket.close()  # it is for IPv4 only, and binding it would ask the name service for our name
        self.socket = listen_at(place, flag)
        self.port = self.socket.getsockname()[1]  # where the place said 0, the system has chosen one

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; pause where descriptors are short, since the accept loop would spin."""
        try:
            return super().get_request()
        except OSError as error:
            time.sleep(0.1 if error.errno in NO_ROOM else 0)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, once there is a place for it."""
        while not (self.slots.acquire(timeout=TICK) or self.gateway.watchman.stopping):
            pass  # once the gateway is stopping, the connection gets a thread that will only close it
        try:
            # threading.Thread.start() would wait until the thread runs, for a tenth of a new connection's CPU.
            _thread.start_new_thread(self.process_request_thread, (request, client_address))
        except RuntimeError:
            self.shutdown_request(request)
            if self.gateway.watchman.may_report():
                self.gateway.report("cannot start a thread for a connection; lower --max-connections")

    def shutdown_request(self, request: Any) -> None:
        """Make room for another connection at the end of this one."""
        self.slots.release()
        super().shutdown_request(request)

    def handle_error(self, _request: Any, _address: Any) -> None:
        """Report a bug in one line, but no errors that a client causes on its connection."""
        if not isinstance(error := sys.exc_info()[1], (OSError, type(None))):
            self.gateway.report(fault(error))


class Server(_Listener):
    """Accepts, encrypts, counts and drains connections."""

    def __init__(self, gateway: Gateway, context: Watched[ssl.SSLContext], with_relay: bool = True) -> None:
        self.context, settings = context, gateway.settings
        self.relay = Relay() if with_relay and TURN and hasattr(select, "epoll") else None
        handler = functools.partial(Handler, gateway, self.relay)
        super().__init__(gateway, settings.listen, "--listen", settings.max_connections, handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Have Handler handle the connection over TLS."""
        with TURN or contextlib.nullcontext():
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or tokens would wait for 40 ms
            request = self.context.value.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            super().finish_request(request, client_address)

    def drain(self, grace: float) -> None:
        """Let running requests finish for `grace` seconds; then end them, so that they are logged."""
        for seconds in (grace, 2.0):
            deadline = time.monotonic() + seconds
            while self.gateway.watchman.clients and time.monotonic() < deadline:
                time.sleep(0.02)
            for client in self.gateway.watchman.clients.copy():
                client.end()


class StatusServer(_Listener):
    """Tells probes and Prometheus how the gateway does, eight at a time."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway, gateway.settings.status, "--status", 8, socketserver.BaseRequestHandler)

    def finish_request(self, request: Any, _address: Any) -> None:
        """Answer the request that stands in the first bytes, if they come within a second."""
        request.settimeout(1)
        line = re.match(rb"GET (/[a-z]*) ", request.recv(READ_SIZE))
        status, text = self._answer(line[1] if line else b"")
        head = f"HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\r\n"
        request.sendall(f"{head}{text}\n".encode(errors="replace"))  # JSON's "\\ud800" in a model's name is no text

    def _answer(self, path: bytes) -> tuple[str, str]:
        """The status and the text for a path; not being ready means that requests should go to another replica."""
        gateway, reason = self.gateway, ""
        if path == b"/metrics" and gateway.metrics:
            return "200 OK", "\n".join(gateway.metrics.lines(self._now()))
        if path not in (b"/healthz", b"/readyz"):
            return "404 Not Found", "there is /healthz, /readyz and /metrics"
        if path == b"/readyz":
            try:
                gateway.pool.connect(1.0).close(reset=True)  # a prober soon asks again, while this one still waits
            except UpstreamError as error:
                reason = str(error)
            reason = reason if is_writable(gateway.log) else "the audit log cannot be written"
            reason = "the gateway is stopping" if gateway.watchman.leaving else reason
        return ("503 Service Unavailable", reason) if reason else ("200 OK", "ok")

    def _now(self) -> dict[str, float]:
        """The samples that are not counted."""
        clients = self.gateway.watchman.clients.copy()
        now = {"gateway_connections": float(len(clients)), "gateway_audit_lines_waiting": len(self.gateway.log.kept),
               "gateway_requests_in_flight": sum(client.upstream is not None for client in clients)}  # fmt: skip
        with contextlib.suppress(OperatorError):  # the certificate is being exchanged
            until = describe_certificate(self.gateway.settings.cert, ())[1]
            now["gateway_certificate_expiry_timestamp_seconds"] = until.timestamp()
        return now


# --- Demo ---
# With --demo, requests are forwarded to this server, which answers in the formats of Ollama without any model.

DEMO_TEXT: Final = "This is the gateway's built-in demo, not a model. TLS, your key and the audit log are real."
DEMO_WORDS: Final = re.findall(r"\S+\s*", DEMO_TEXT)
DEMO_PACE: Final = 0.03  # seconds per word
DEMO_KEPT: Final = 256 * 1024  # bytes of a request's body that are kept; a longer body is not valid JSON any more
_MODEL: Final = {"name": "demo:latest", "model": "demo:latest", "size": 0, "digest": "", "details": {},
                 "id": "demo:latest", "object": "model", "created": 0, "owned_by": "demo"}  # fmt: skip
_MODELS: Final = {"models": [_MODEL], "object": "list", "data": [_MODEL]}  # for Ollama's API and OpenAI's, as llama.cpp
# What it answers on which path, whatever the method; None where that is DEMO_TEXT.
DEMO_ANSWERS: Final = {"/api/version": {"version": f"{__version__}-demo"}, "/api/tags": _MODELS, "/v1/models": _MODELS,
                       "/api/chat": None, "/api/generate": None, "/v1/chat/completions": None}  # fmt: skip


class DemoUpstream(socketserver.StreamRequestHandler):
    """Stands in for Ollama, as far as DEMO_ANSWERS goes.  It answers one request and closes the connection."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Read the question, and send the answer at a reading pace, making each piece only when its turn has come."""
        request = parse_request(b"\r\n".join(iter(lambda: self.rfile.readline().rstrip(), b"")))
        body, content, path = BodyReader(request.framing), bytearray(), request.path.decode()
        while not body.done and (data := self.rfile.read1(READ_SIZE)):
            content += body.feed(data)[: DEMO_KEPT - len(content)]
        asked = {"model": "demo", "stream": path in ("/api/chat", "/api/generate"), **_object(_parsed(bytes(content)))}
        answer = DEMO_ANSWERS.get(path, {"error": "this is not in the demo"})
        events = asked["stream"] and path.startswith("/v1/")
        kind = "text/event-stream" if events else "application/x-ndjson" if asked["stream"] else "application/json"
        first = f"HTTP/1.1 {'200 OK' if path in DEMO_ANSWERS else '404 Not Found'}\r\nConnection: close"
        self.wfile.write(f"{first}\r\nServer: gateway-demo/{__version__}\r\nContent-Type: {kind}\r\n\r\n".encode())
        for document in [answer] if answer else demo_texts(path, asked):
            self.wfile.write((b"data: %b\n\n" if events else b"%b\n") % json.dumps(document).encode())
            time.sleep(DEMO_PACE)
        self.wfile.write(b"data: [DONE]\n\n" if events else b"")


def demo_texts(path: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """DEMO_TEXT in Ollama's or OpenAI's form, word by word if it is to be streamed; the counts come at the end."""
    words = len(re.findall(r"\w+", json.dumps(asked.get("prompt") or asked.get("messages") or "")))
    usage = {"prompt_tokens": words, "completion_tokens": len(DEMO_WORDS), "total_tokens": words + len(DEMO_WORDS)}
    end = {"done": True, "done_reason": "stop", "prompt_eval_count": words, "eval_count": len(DEMO_WORDS)}
    kind, part = ("chat.completion.chunk", "delta") if asked["stream"] else ("chat.completion", "message")
    said = [*((word, None) for word in DEMO_WORDS), ("", "stop")] if asked["stream"] else [(DEMO_TEXT, "stop")]
    for text, reason in said:
        now, message = datetime.now(timezone.utc), {"role": "assistant", "content": text}
        if path.startswith("/v1/"):
            choices = [{"index": 0, part: message, "finish_reason": reason}]
            head = {"id": "demo", "object": kind, "created": int(now.timestamp()), "model": asked["model"]}
            yield {**head, "choices": choices, "usage": usage if reason else None}
        else:
            head = {"model": asked["model"], "created_at": now.isoformat().replace("+00:00", "Z")}
            content = {"message": message} if path == "/api/chat" else {"response": text}
            yield {**head, **content, **(end if reason else {"done": False})}


def start_demo() -> Upstream:
    """Serve the demo on a free port of the loopback interface, and return its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DemoUpstream)
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients may leave at any time
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Upstream(False, "127.0.0.1", server.server_port, f"127.0.0.1:{server.server_port}", "")


# --- Check ---
# What can be known before the gateway serves, and once it does: each finding is ok, a warning or an error, and its text
# says what to do.  These functions look at files and at the network, and change neither.

Findings = Iterator[tuple[str, str]]


def findings(settings: Settings) -> Findings:
    """All findings; what keeps one function from going on is its last one."""
    for look in (check_keys, check_certificate, check_log, check_ports, check_upstream):
        try:
            yield from look(settings)
        except (OperatorError, UpstreamError) as error:  # noqa: PERF203 - the loop is not a hot one
            yield ("warning" if isinstance(error, Unable) else "error"), str(error)


def check_keys(settings: Settings) -> Findings:
    """The key file: weak, expiring and namesake keys, and who may read it."""
    path, keys, today = settings.keys, load_keys(settings.keys), datetime.now(timezone.utc).date()
    if not os.path.lexists(path):
        yield "ok", f"{path} is not there; the start makes it, with one key"
        return
    yield ("ok" if keys else "error"), f"keys in {path}: {len(keys)}; keygen makes more"
    yield from _readable_by_others(path)
    names, days = Counter(key.name for key in keys.values()), {key: (key.expires - today).days for key in keys.values()}
    for flaw, remedy, found in (
        ("are short or well known", "make others with keygen", [key.name for key in days if key.weak]),
        ("have expired", "delete these lines", [key.name for key in days if days[key] < 0]),
        ("expire within 14 days", "replace them in time", [key.name for key in days if 0 <= days[key] < 14]),
        ("share a name and its limits", "delete the old one", [name for name in names if names[name] > 1]),
    ):
        if found:
            told = ", ".join(map(_shown, found[:3]))
            yield "warning", f"keys that {flaw}: {told}{', ...' * (len(found) > 3)}; {remedy}"


def check_certificate(settings: Settings) -> Findings:
    """Whether certificate and private key are a pair, for which names and until when, and who may read the key."""
    cert, cert_key = settings.cert, settings.cert_key
    if not os.path.lexists(cert) and not os.path.lexists(cert_key):
        yield "ok", f"{cert} and {cert_key} are not there; the start makes them"
        return
    tls_context(cert, cert_key)
    if flaw := certificate_flaw(cert, settings.name):
        yield "warning", f"{cert} {flaw}; renew it, or move it and {cert_key} away for a self-signed one"
    else:
        yield "ok", f"{cert} is good until {describe_certificate(cert, ())[1]:%Y-%m-%d}"
    yield from _readable_by_others(cert_key)


def _readable_by_others(path: str) -> Findings:
    with explained(f"cannot read {path}", "see that it is there"):
        mode = os.stat(path).st_mode
    if os.name == "posix" and mode & 0o077:
        yield "warning", f"others than its owner may read {path}; run: chmod 600 {path}"


def check_log(settings: Settings) -> Findings:
    """Whether the audit log can be written, or made."""
    log, folder = settings.log, os.path.dirname(os.path.realpath(settings.log))
    with explained(f"cannot write to {log}", "choose another --log"):
        if os.path.exists(log):
            os.close(os.open(log, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
        elif log != "-" and not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, f"no file can be made in {folder}")
    yield "ok", f"the audit log can be written to {log}"


def check_ports(settings: Settings) -> Findings:
    """Whether the ports are free."""
    for flag, place in (("--listen", settings.listen), ("--status", settings.status)):
        if place:
            listen_at(place, f"{flag}, unless the gateway runs there already").close()
            yield "ok", "{}:{} is free".format(*place)


def check_upstream(settings: Settings) -> Findings:
    """Which server the upstream is, and whether it can be reached around the gateway."""
    if settings.demo:
        return
    upstream, answer, sock = settings.upstream, b"", Pool(settings).connect().sock
    with contextlib.suppress(OSError), sock:  # with the time-out for connecting
        sock.sendall(f"GET {upstream.prefix}/api/version HTTP/1.0\r\nHost: {upstream.authority}\r\n\r\n".encode())
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while time.monotonic() < deadline and len(answer) < MAX_HEAD and (data := sock.recv(MAX_HEAD)):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    name = (re.findall(r"(?im)^server: *([ -~]{1,128})", head.decode("latin-1")) or [""])[0]
    told = str(_object(_parsed(body)).get("version", ""))
    version = told if re.fullmatch(r"[0-9][0-9A-Za-z.+-]{,40}", told) else ""
    name = f"Ollama {version}" if version else name
    yield "ok", f"the upstream at {upstream.authority} answers{name and f', it is {name}'}"
    if version and tuple(map(int, re.findall("[0-9]+", version)[:3])) < (0, 17, 1):
        yield "warning", f"Ollama {version} has known holes; update it to 0.17.1 or newer"
    own = own_addresses()
    for address in own if upstream.host in ("127.0.0.1", "::1", "localhost", *own) else ():
        with contextlib.suppress(OSError), socket.create_connection((address, upstream.port), timeout=1):
            around = f"port {upstream.port} of {address}"
            yield "warning", f"{around} leads to the upstream around the gateway; bind it to 127.0.0.1 instead"


def own_addresses() -> list[str]:
    """The addresses of this machine, except for loopback."""
    found = set[str]()
    with contextlib.suppress(OSError):
        found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))  # sends nothing, but chooses the address from which it would
            found.add(sock.getsockname()[0])
    return sorted(address for address in found if (known := _address(address)) and not known.is_loopback)


# --- Command line ---
# Arguments come in and an exit status goes out.  No other section prints anything or ends the process.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns 0 after a clean stop, 1 if the gateway cannot run, 2 if it was told wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    commands = {"keygen": lambda words: [key_line(*words)], "check": check, "usage": report_usage, "verify-log": verify}
    try:
        if not arguments or arguments[0] not in commands:
            return serve(parse_arguments(arguments))
        for text in commands[arguments[0]](arguments[1:]):
            print(text)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:  # Ctrl+C before serve() handles signals
        return 130
    except OSError as error:  # what is left to be printed would fail again at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # as in `usage | head`
            return 0
        say(f"gateway: cannot go on: {error.strerror}" if error.strerror else fault(error))
        return 1
    except Exception as error:  # caught whatever it is, because a traceback might show an API key
        say(f"gateway: {error}" if isinstance(error, OperatorError) else fault(error))
        return 2 if type(error) is OperatorError else 1


def check(argv: Sequence[str]) -> Iterator[str]:
    """Tell what serving with these settings would meet.  Raises Unable for warnings, OperatorError for errors."""
    found = list(findings(parse_arguments([argument for argument in argv if argument != "--json"])))
    if "--json" in argv:
        yield json.dumps([{"state": state, "about": about} for state, about in found])
    else:
        yield from (f"{state:<8} {about}" for state, about in found)
    number = Counter(state for state, _ in found)
    if number["warning"] or number["error"]:
        kind = OperatorError if number["error"] else Unable
        raise kind(f"errors: {number['error']}, warnings: {number['warning']}")


def verify(argv: Sequence[str]) -> Iterator[str]:
    """Check an audit log: what is to be told, or an error if a line was changed."""
    parser = _Parser("gateway verify-log", allow_abbrev=False)
    parser.add_argument("files", metavar="FILE", nargs="+", help="the log, its rotated parts first, oldest first")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--head", metavar="HASH", help="a digest that the gateway told; it must be that of a line")
    which.add_argument("--each", action="store_true", help="each file is the log of another gateway")
    given = parser.parse_args(argv)
    if not given.each:
        return verify_log(given.files, given.head and given.head.lower())
    return (f"{file}: {told}" for file in given.files for told in verify_log([file], None))


def report_usage(argv: Sequence[str]) -> Iterator[str]:
    """Report who used what.  The variables GATEWAY_LOG and GATEWAY_KEYS say where the gateway's files are."""
    import csv  # noqa: PLC0415 - is needed here only

    settings, parser = parse_arguments([]), _Parser("gateway usage", allow_abbrev=False)
    parser.add_argument("files", metavar="FILE", nargs="*", default=[settings.log], help="audit logs, also .gz ones")
    parser.add_argument("--by", type=dimensions, default="day,key", help=f"group by {', '.join(DIMENSIONS)} [day,key]")
    parser.add_argument("--since", type=calendar_day, default="0001-01-01", help="the first day, as YYYY-MM-DD (UTC)")
    parser.add_argument("--until", type=calendar_day, default="9999-12-31", help="the last day, which is included")
    forms = parser.add_mutually_exclusive_group()
    for form in ("json", "csv", "html"):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {form.upper()}")
    given = parser.parse_args(argv)
    limits: dict[str, int] = {}
    try:
        limits = {key.name: key.tokens for key in load_keys(settings.keys).values() if key.tokens}
    except OperatorError as error:
        say(f"no share of a limit is told: {error}")
    sums, others = sum_up(given.files, given.since, given.until, say if os.isatty(2) else len)
    if others:
        say(f"{others} lines were left out, since they are no audit lines")
    head, *rows, total = report = [*usage_report(sums, given.by, limits)]
    # A name may hold what the terminal cannot show.  Standard output is a TextIOWrapper, which mypy does not know.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if given.form == "json":
        yield json.dumps({"rows": [dict(zip(head, row)) for row in rows], "total": dict(zip(COLUMNS, total[-7:-1]))})
    elif given.form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([head, *rows])
    elif given.form == "html":
        yield usage_page(report, sums)
    else:
        yield from usage_table(report, bar=20 * os.isatty(1))


def dimensions(text: str) -> list[str]:
    """The dimensions that a list names.  Raises ValueError."""
    return sorted({*text.split(",")}, key=DIMENSIONS.index)


def calendar_day(text: str) -> str:
    """A day, as YYYY-MM-DD.  Raises ValueError."""
    return str(date.fromisoformat(text))


def serve(settings: Settings) -> int:
    """Serve until a signal says stop.  All mistakes in the settings are found before the port is bound."""
    # Requests leave no cycles, and the collector of a free-threaded Python stops all threads and walks everything: with
    # its own threshold, to parse 8 MB of small JSON values takes three times as long.
    gc.set_threshold(100_000)
    wanted, upstream = settings.max_connections, start_demo() if settings.demo else settings.upstream
    settings = settings._replace(upstream=upstream, max_connections=min(wanted, possible_connections()))
    list(check_ports(settings))  # before files are made, since the key in them is shown only once
    line = key_line("first", "role=admin")
    fresh = not os.path.lexists(settings.keys) and create_file(settings.keys, f"{line}\n".encode(), 0o600)
    ensure_certificate(settings.cert, settings.cert_key, settings.name)
    keys = Watched(lambda: load_keys(settings.keys), settings.keys)
    if not keys.value:
        raise OperatorError(f"{settings.keys} holds no key; add one: python3 gateway.py keygen >> {settings.keys}")
    context = Watched(lambda: tls_context(settings.cert, settings.cert_key), settings.cert, settings.cert_key)
    metrics = Metrics() if settings.status else None
    gateway = Gateway(settings, keys, LogFile(settings.log), Pool(settings), Limits(), Watchman(), say, metrics)
    if any(key.tokens for key in keys.value.values()) and not gateway.log.may_block:  # a pipe would never end
        today = datetime.now(timezone.utc).date()
        gateway.limits.charged[today] = charged_on(settings.log, today)
    server, status = Server(gateway, context), StatusServer(gateway) if settings.status else None

    def stop(*_: Any) -> None:  # the first SIGINT or SIGTERM drains the server, and the second one ends it at once
        if gateway.watchman.leaving:
            abandon(server)
        gateway.watchman.leaving = True

    # SIGHUP and SIGUSR1 make other servers reload their settings or reopen their log.  The gateway watches its files,
    # so it ignores these signals instead of being killed by them.  Windows has neither.
    for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), stop if name in ("SIGINT", "SIGTERM") else signal.SIG_IGN)
    # All connections depend on these threads.  If one fails, the gateway ends, so that systemd or Docker start it anew.
    threading.excepthook = lambda failed: abandon(server, failed.exc_value)
    workers = [each.run for each in (gateway.watchman, server.relay) if each]
    for run in [*workers, *(each.serve_forever for each in (server, status) if each)]:
        threading.Thread(target=run, daemon=True).start()
    announce(server, status, line.split()[0] if fresh else "", wanted)
    notify("READY=1")
    return keep_house(server)


def keep_house(server: Server) -> int:
    """While other threads serve, follow the files and close idle connections.  Returns the exit status at the end."""
    gateway, context, day = server.gateway, server.context, datetime.now(timezone.utc).date()
    notice = NOTICE if gateway.settings.status else 0  # in which requests still come, and keys may still be revoked
    try:
        while not gateway.watchman.leaving or (notice := notice - TICK) > 0:
            for news in filter(None, (gateway.keys.refresh(), context.refresh(), *log_news(gateway.log))):
                say(news)
            before, day = day, datetime.now(timezone.utc).date()
            if day != before:
                say(f"the audit log has {log_head(gateway.log)}")
                with contextlib.suppress(OperatorError):  # context.refresh() tells of files that cannot be read
                    if flaw := certificate_flaw(gateway.settings.cert, gateway.settings.name):
                        say(f"WARNING {gateway.settings.cert} {flaw}")
            notify("WATCHDOG=1")
            if gateway.metrics:
                gateway.metrics.count()
            gateway.pool.prune()
            time.sleep(TICK)
    except Exception as error:
        abandon(server, error)
    notify("STOPPING=1")
    say(f"stopping; requests that run have {gateway.settings.grace:g} s to end, or until a second signal")
    gateway.watchman.stopping = True
    server.shutdown()
    server.server_close()
    server.drain(gateway.settings.grace)
    unwritten = "" if append_line(gateway.log) else b"".join(gateway.log.kept.copy()).decode()
    failed = f", but could not write these audit lines:\n{unwritten}" if unwritten else ""
    say(f"Gateway stopped; the audit log has {log_head(gateway.log)}{failed}")
    return 1 if unwritten else 0


def notify(state: str) -> None:
    """Tell the state to systemd, if it started the gateway and waits for that (man 3 sd_notify)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), path.replace("@", "\0", 1))  # @ stands for an abstract name


def abandon(server: Server, error: BaseException | None = None) -> None:
    """End the process with exit status 1, once the requests that this breaks off are logged."""
    if error:
        say(fault(error))
    server.drain(0)
    say(f"Gateway stopped; the audit log has {log_head(server.gateway.log)}")
    os._exit(1)


def possible_connections() -> int:
    """Raise the limit of descriptors as far as the system allows, and return how many clients it suffices for."""
    if sys.platform == "win32":
        return 240  # select() watches 512 sockets at most there
    import resource  # noqa: PLC0415 - does not exist on Windows

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    # A client needs one descriptor and its request another, and 32 are for everything else.  "Unlimited" may be -1,
    # which the remainder turns into a large number.
    return max(1, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**63 - 32) // 2)


def announce(server: Server, status: StatusServer | None, fresh_key: str, wanted: int) -> None:
    """Tell the operator how to use the gateway, and what is wrong with its settings."""
    gateway, settings, upstream = server.gateway, server.gateway.settings, server.gateway.settings.upstream
    host, cert, most = settings.listen[0], settings.cert, settings.max_connections
    url = f"https://{'localhost' if host in ('', '0.0.0.0', '[::]') else host}:{server.port}"  # noqa: S104 - is compared only
    example = """chat -d '{"model":"demo","messages":[{"role":"user","content":"hi"}]}'""" if settings.demo else "tags"
    state = "the built-in demo, not a model" if settings.demo else "it answers"
    try:
        Pool(settings).connect().close(reset=True)
    except UpstreamError as error:
        state = f"NO ANSWER: {error}, or try --demo"
    fingerprint, until, _ = describe_certificate(cert, ())
    found = [*check_keys(settings), *check_certificate(settings)]
    shown = fresh_key if os.isatty(2) else ""  # other people can read a journal or a container's log later
    # Each row is a label, and its text if the row is to be shown.
    rows: list[tuple[str, Any]] = [("URL", url),
        ("Upstream", f"{'https' if upstream.tls else 'http'}://{upstream.authority}{upstream.prefix} - {state}"),
        ("Keys", f"{len(gateway.keys.value)} in {settings.keys}"),
        ("New key", shown and f"{shown} - also in {settings.keys}, and not shown again"),
        ("New key", fresh_key and not shown and f"stands in {os.path.abspath(settings.keys)}"),
        ("Connections", most < wanted and f"at most {most}, not {wanted}, for want of descriptors (see ulimit -Hn)"),
        ("Certificate", f"{cert}, expires {until:%Y-%m-%d}, SHA-256 fingerprint\n{'':15}{fingerprint}"),
        ("Audit log", f"{'standard output' if settings.log == '-' else settings.log}, {log_head(gateway.log)}"),
        ("Status", status and f"http://{settings.status[0]}:{status.port}/healthz, /readyz and /metrics"),
        *[("WARNING", about) for state, about in found if state == "warning"],
        ("Try", f'curl --cacert {cert} -H "X-Api-Key: {shown or "YOUR-KEY"}" {url}/api/{example}')]  # fmt: skip
    near = re.sub(r"\A(127\.0\.0\.1|\[::1\]|localhost)(?=:)", "", upstream.authority)
    lines = "".join(f"\n  {label:<12} {text}" for label, text in rows if text)
    say(f"Gateway listening on {host}:{server.port}, upstream {near}{lines}")


def say(text: str) -> None:
    """Print lines on stderr, the first one with the time.  If nobody reads them, give up after a second."""
    lines = f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}".splitlines()
    with contextlib.suppress(OSError, ValueError):
        while lines and takes_a_line(2, patience=1):
            print(lines.pop(0), file=sys.stderr, flush=True)


# For each option: its flag, its environment variable, what its kind says (see Settings), the default, and the purpose.
OPTIONS: Final = [("--" + name.replace("_", "-"), "GATEWAY_" + name.upper(), *hint.__metadata__)
                  for name, hint in get_type_hints(Settings, include_extras=True).items()]  # fmt: skip


def parse_arguments(argv: Sequence[str]) -> Settings:
    """Read all options.  A flag takes precedence over its environment variable, and that one over the default."""
    parser = _Parser("gateway", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.epilog = "Also: keygen [NAME] [OPTION...], check, usage [FILE...], verify-log FILE..."
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    for flag, variable, what, _, _, default, about in OPTIONS:
        how: Any = {"action": "append", "metavar": what} if what else {"action": "append_const", "const": "yes"}
        note = f"{about} [{variable}; {f'default {default}' if default else 'repeatable'}]"
        parser.add_argument(flag, dest=variable, help=note, **how)
    flags, values = vars(parser.parse_args(argv)), list[Any]()
    for flag, variable, what, pattern, convert, default, about in OPTIONS:
        given, text = flags[variable], os.environ.get(variable, "").strip()
        texts = given or ([text or default] if default else re.findall(r"[^,\s]+", text))
        with explained(f"{flag if given else variable} is not understood", f"it takes {what or 'yes or no'}: {about}"):
            found = [read(pattern, convert, each) for each in texts]
            values.append(found[-1] if default else found)  # the last flag wins
    return Settings(*values)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, and never quotes what follows the name of an argument, since it may be a key."""

    def error(self, message: str) -> NoReturn:
        """Raise an OperatorError; the base class would print the usage as well."""
        known = re.sub(r"(?s)unrecognized arguments: ([^\s=]*).*", r"there is no argument \1", message)
        raise OperatorError(f"{known.partition(chr(39))[0].rstrip(': ')}; see --help")


if __name__ == "__main__":
    sys.exit(main())
