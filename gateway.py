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

It does not protect against: a stolen key (revoke it in keys.txt; a second later it is void), what a
key's holder asks of the model (prompts are neither read nor limited), somebody who reaches the
upstream's own port, or a client that skips the certificate check.

Reading map, from top to bottom, each part using only what stands above it:
Settings - API keys - Certificates - HTTP rules - Token counts - Audit log - Wires (sockets that do not
block) - Selector (waits for all of them) - Forwarding (to the upstream and back) - Handler (a request's way
through all of that) - Server (connections, their number, drain) - Demo - Command line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import functools
import hashlib
import http.client
import http.server
import io
import ipaddress
import json
import math
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
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta, timezone
from http import HTTPStatus
from pathlib import Path
from typing import Any, Callable, Final, Generic, NamedTuple, NoReturn, Optional, TypeVar

__version__ = "1.0.0"

# --- Settings ---

# Bounds that nobody should have to set, with their precedents.
MAX_HEAD: Final = 32 * 1024  # bytes of a message head: nginx takes 4 x 8 KiB, Node.js 16 KiB
MAX_TARGET: Final = 8 * 1024  # bytes of a request target: RFC 9112, 3 asks for 8000, nginx takes 8 KiB
MAX_FIELDS: Final = 100  # fields in a head: as http.client and Apache
MAX_INTERIM: Final = 8  # 1xx answers before the final one
MAX_KEPT_LINES: Final = 5_000  # audit lines in memory while the log cannot be written, about 1.5 MB
MAX_LOGGED: Final = 128  # characters of what a client wrote into the log, 12 bytes each; a line fits in PIPE_BUF
READ_SIZE: Final = 256 * 1024  # bytes a read, where many come: 10 % less CPU per MB than 64 KiB
TLS_RECORD: Final = 16 * 1024  # bytes that the largest one holds: RFC 8446, 5.1
READ_AHEAD: Final = 64 * 1024  # bytes of pipelined requests held while one is being answered
MIN_PROGRESS: Final = 4 * 1024  # bytes of a request's body that renew --body-timeout
CONNECT_TIMEOUT: Final = 5.0  # seconds to reach the upstream
POOL_SIZE: Final = 64  # idle upstream connections
POOL_SECONDS: Final = 4.0  # for which they are kept: uvicorn and llama.cpp close theirs after 5
LINGER: Final = 2.0  # seconds in which a refused client may finish sending and read why
TICK: Final = 0.25  # seconds between two looks at keys, certificate, pool, deadlines
NO_ROOM: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # it may pass, so wait


class OperatorError(Exception):
    """Something that the person who runs the gateway can mend; the text says what and how."""


@contextlib.contextmanager
def explained(failure: str, remedy: str) -> Iterator[None]:
    """Make of what goes wrong in files and programs an OperatorError: what failed, why, what to do."""
    try:
        yield
    except (OSError, ValueError, LookupError) as error:  # an SSLError is an OSError
        # Never the error's own text: it may quote what it could not read, such as a key.
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
        raise OperatorError(f"{failure}: {reason}; {remedy}" if reason else f"{failure}; {remedy}") from None


class Upstream(NamedTuple):
    """Where requests go: http(s)://authority/prefix."""

    tls: bool
    host: str
    port: int
    authority: str  # host[:port], as in the URL
    prefix: str  # goes before every target; "" or "/like/this"


class Settings(NamedTuple):
    """What flags and environment variables decide; time-outs in seconds."""

    listen: tuple[str, int]
    upstream: Upstream
    keys: str
    cert: str
    cert_key: str
    log: str
    name: Sequence[str]
    cors_origin: Sequence[str]
    max_connections: int
    handshake_timeout: float
    header_timeout: float
    body_timeout: float
    write_timeout: float
    idle_timeout: float
    upstream_timeout: float
    grace: float
    demo: bool


T = TypeVar("T")


class Watched(Generic[T]):
    """A value made from files, and made anew when their bytes change; errors leave the last good one.

    Bytes, not times: two edits within one tick of a file system's clock would look the same.  And not
    before two looks have seen the same bytes, or a half-written file would count.
    """

    def __init__(self, load: Callable[[], T], *paths: str) -> None:
        self._load, self._paths = load, paths
        self._seen = self._used = self._look()
        self.value = load()

    def refresh(self) -> str | None:
        """Look at the files again; returns news for the operator, None when nothing changed."""
        before, self._seen = self._seen, self._look()
        if self._seen is None or self._seen != before or self._seen == self._used:
            return None
        self._used = self._seen
        try:
            self.value = self._load()
        except OperatorError as error:
            return f"{error} (until then the last good version stays in force)"
        return f"{' and '.join(self._paths)} changed; the new version is in force"

    def _look(self) -> list[str] | None:
        """What the files hold, as digests; None where we cannot know, for want of descriptors."""
        try:
            return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self._paths]
        except OSError as error:
            return None if error.errno in NO_ROOM else [type(error).__name__]


def create_file(path: str, content: bytes, mode: int) -> bool:
    """Make a file, whole or not at all; False, and the file untouched, where there is one already."""
    remedy = "start in a directory that you may write to, or name others with --keys, --cert, --cert-key and --log"
    with explained(f"cannot make {path}", remedy), tempfile.TemporaryDirectory(".new", dir=Path(path).parent) as folder:
        whole = Path(folder, "whole")  # in a folder that only we can read
        whole.write_bytes(content)
        whole.chmod(mode)
        try:
            os.link(whole, path)  # which, unlike a rename, never replaces
        except OSError:  # the file is there, or the file system has no hard links
            if os.path.lexists(path):
                return False
            whole.rename(path)
    return True


# --- API keys ---
# The key file holds one key a line: the key itself, or sha256: and its digest; then its options.
# Blank lines and what follows a # are no keys.  Only digests stay in memory, and looking one up takes
# the same time however much of a key was guessed right.


class Key(NamedTuple):
    """What the key file says of one key, without the key."""

    name: str  # what the audit log calls it
    expires: date  # the last day on which it works, UTC
    weak: bool


Keys = dict[bytes, Key]  # by SHA-256 digest

STRONG: Final = 16  # characters; what is shorter can be guessed
WELL_KNOWN: Final = {"demo-key", "demo-key-0123456789", "replace-me-with-keygen", "your-api-key-here"}

_OPTION = re.compile(r"name=.+|expires=[0-9]{4}-[0-9]{2}-[0-9]{2}")  # newer Pythons read dates in other forms, too


def find_key(keys: Keys, presented: Iterable[bytes], today: date) -> Key | None:
    """The first of the presented keys that is known and not expired."""
    for secret in presented:
        key = keys.get(hashlib.sha256(secret).digest())
        if key and today <= key.expires:
            return key
    return None


def load_keys(path: str) -> Keys:
    """Read the key file; no file, no keys.  OperatorError names file and line, but never their text."""
    with explained(f"cannot read {path}", "it must be a text file in UTF-8 that the gateway may read"):
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return {}
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # from `echo demo-key > keys.txt` in PowerShell
        lines = content.decode("utf-16" if utf16 else "utf-8-sig").split("\n")
    keys: Keys = {}
    for number, line in enumerate(lines, 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if words:
            digest, key = _parse_key(words, f"{path}:{number}")
            if digest in keys:
                raise OperatorError(f"{path}:{number}: this key is in the file already; delete one of the lines")
            keys[digest] = key
    return keys


def _parse_key(words: list[str], where: str) -> tuple[bytes, Key]:
    """One line's words: the key, then name=NAME and expires=YYYY-MM-DD in any order."""
    secret, *words = words
    options = dict(word.split("=", 1) for word in words if _OPTION.fullmatch(word))
    if len(options) < len(words):
        raise OperatorError(f"{where}: after the key, only name=... and expires=YYYY-MM-DD may stand, once each")
    hashed = secret.startswith("sha256:")
    if hashed and not re.fullmatch("sha256:[0-9a-fA-F]{64}", secret):
        raise OperatorError(f"{where}: behind sha256: there must be 64 hexadecimal digits")
    digest = bytes.fromhex(secret[7:]) if hashed else hashlib.sha256(secret.encode()).digest()
    with explained(f"{where}: there is no such day", "expires= takes a date like 2027-01-31"):
        expires = date.fromisoformat(options.get("expires", "9999-12-31"))
    weak = not hashed and (len(secret) < STRONG or secret in WELL_KNOWN)
    return digest, Key(options.get("name", f"sha256:{digest.hex()[:8]}"), expires, weak)


def new_key() -> str:
    """A fresh random key: 43 letters and digits are 256 bits, and by ztg_ secret scanners can find a leaked one."""
    return "ztg_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(43))


# --- Certificates ---
# One self-signed P-256 pair, of a form that curl, Python 3.13, Go, Node.js and rustls all take for
# their trust anchor: a subject, addresses as IP names, CA:FALSE, serverAuth, SKI and AKI.

ISSUER: Final = "Zero-Trust LLM Gateway"
DAYS: Final = 397  # the longest that Apple's platforms accept


def tls_context(cert: str, cert_key: str) -> ssl.SSLContext:
    """TLS 1.2 and 1.3, forward-secret AEAD suites; OperatorError where the files are no usable pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    context.num_tickets = 1  # is enough to resume a session; the second one costs 15 % of a handshake
    remedy = "put an unencrypted PEM pair there that belongs together, or move both away to have a new one made"
    with explained(f"{cert} and {cert_key} are no usable pair of files", remedy):
        context.load_cert_chain(cert, cert_key, password=lambda: b"")  # never ask on the terminal
    return context


def ensure_certificate(cert: str, cert_key: str, names: Iterable[str]) -> None:
    """Make the pair where there is none.  Of two instances at once, one makes it for both."""
    if not os.path.lexists(cert) and not os.path.lexists(cert_key):
        here = re.findall(r"\A[0-9A-Za-z.-]+\Z", socket.gethostname())  # if it is a name at all
        certificate, key = make_certificate([*dict.fromkeys(("localhost", "127.0.0.1", "::1", *here, *names))])
        if create_file(cert_key, key, 0o600):
            create_file(cert, certificate, 0o644)
    patience = time.monotonic() + 2  # until the other instance has made its second file
    while os.path.lexists(cert_key) and not os.path.lexists(cert) and time.monotonic() < patience:
        time.sleep(0.02)
    for there, missing in ((cert, cert_key), (cert_key, cert)):
        if not os.path.lexists(missing):
            raise OperatorError(f"{there} is there, but not {missing}; put it back, or move {there} away")


def describe_certificate(cert: str, names: Iterable[str]) -> tuple[str, datetime, list[str]]:
    """(SHA-256 fingerprint, end of validity, those of the names that it does not cover)."""
    with explained(f"cannot read the certificate in {cert}", "see that it is there, in PEM"):
        pem = re.findall(f"(?s){ssl.PEM_HEADER}.+?{ssl.PEM_FOOTER}", Path(cert).read_text("latin-1"))[0]
        der = ssl.PEM_cert_to_DER_cert(pem)
        # The validity is the only pair of times in it (RFC 5280, 4.1.2.5).  The standard library has
        # no public function that reads a certificate which no peer has presented.
        expiry = re.findall(rb"(?:\x17\r|\x18\x0f)(\d{12}|\d{14})Z", der)[1].decode()
        until = datetime.strptime(("20" + expiry)[-14:] + "+0000", "%Y%m%d%H%M%S%z")
    missing = [name for name in names if (_address(name) or name.encode()) not in der]
    return hashlib.sha256(der).digest().hex(":").upper(), until, missing


def make_certificate(names: Sequence[str]) -> tuple[bytes, bytes]:
    """(certificate, private key) in PEM, made by `cryptography`, else by the openssl command."""
    try:
        from cryptography import x509  # noqa: PLC0415 - needed once in the life of an installation
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    except ImportError:
        return _certificate_by_openssl(names)
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
    start = datetime.now(timezone.utc) - timedelta(minutes=5)  # for clients whose clocks are late
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(name)) if _address(name) else x509.DNSName(name)
        for name in names
    ]
    certificate = (
        x509.CertificateBuilder(subject, subject, public, x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(True, *[False] * 8), critical=True)  # digital signature only
        .add_extension(x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def _certificate_by_openssl(names: Sequence[str]) -> tuple[bytes, bytes]:
    import subprocess  # noqa: PLC0415 - likewise, and it would bring idle memory over 30 MB

    alternatives = ",".join(f"{'IP' if _address(name) else 'DNS'}:{name}" for name in names)
    # With a configuration of our own, since some systems' own says CA:TRUE as well.
    configuration = f"""[req]\nprompt = no\nencrypt_key = no\ndefault_md = sha256\ndistinguished_name = dn
x509_extensions = v3\n[dn]\nCN = {ISSUER}\n[v3]\nsubjectAltName = {alternatives}\nbasicConstraints = critical,CA:FALSE
extendedKeyUsage = serverAuth\nkeyUsage = critical,digitalSignature\nsubjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always\n"""
    command = "openssl req -x509 -config conf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -out cert -keyout key"
    remedy = "install the Python package cryptography or the openssl command, or put a cert.pem and key.pem here"
    with explained("no certificate can be made here", remedy), tempfile.TemporaryDirectory() as folder:
        Path(folder, "conf").write_text(configuration)  # in a folder that only we can read
        arguments = [*command.split(), "-days", str(DAYS)]
        try:
            subprocess.run(arguments, cwd=folder, check=True, capture_output=True, timeout=30)  # noqa: S603 - all ours
        except subprocess.SubprocessError:
            raise ValueError from None
        return Path(folder, "cert").read_bytes(), Path(folder, "key").read_bytes()


def _address(name: str) -> bytes | None:
    try:
        return ipaddress.ip_address(name).packed
    except ValueError:
        return None


# --- HTTP rules ---
# How HTTP/1.1 messages are read and rewritten (RFC 9110 and RFC 9112), for requests and answers alike.
# These functions take bytes and return decisions; none of them touches a socket.
#
# Where the RFCs allow a recipient to repair or to refuse a message, it is refused.  If two programs in a
# row read the same bytes differently, a request can be hidden from the first one inside of another.


class Refusal(Exception):
    """An error that the gateway itself answers: the status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ClientError(Refusal):
    """The request is malformed, ambiguous, too slow, or has no valid key."""


class Fields(dict[bytes, bytes]):
    """The fields of a head: a dict from names in lower case to values, and the lines as they came.

    Messages are forwarded from the lines, since a dict has neither their order nor their repetitions.  The
    values of a repeated field are joined with ", " (RFC 9110, 5.3).  Fields that may come only once, such as
    Content-Length and Host, are checked with patterns that ", " does not match.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[bytes, bytes]] = []  # (name in lower case, the line as it came)


NO_FIELDS: Final = Fields()
CHUNKED: Final = -1  # a body's framing is its length in bytes or one of these: chunks tell where it ends,
UNTIL_CLOSE: Final = -2  # or the end of the connection does


class Request(NamedTuple):
    """The head of a request.  The target always begins with a slash."""

    method: bytes
    target: bytes
    version: bytes  # b"1.0" or b"1.1"
    fields: Fields
    framing: int


class Answer(NamedTuple):
    """The head of the upstream's answer."""

    status: int
    reason: bytes
    version: bytes
    fields: Fields
    framing: int


# These fields are about one connection, so neither requests nor answers carry them on to the next.
HOP_BY_HOP: Final = {
    b"connection",  # options of one connection, and the names of more such fields: RFC 9110, 7.6.1
    b"keep-alive",  # how long one connection may idle: RFC 9112, C.2.2
    b"proxy-authenticate",  # would make the client send its password for a proxy: RFC 9110, 11.7.1
    b"proxy-connection",  # what old clients send in place of Connection: RFC 9112, C.2.2
    b"te",  # which transfer codings the next recipient may use: RFC 9110, 10.1.4
    b"trailer",  # belongs to the framing, which each side decides anew: RFC 9110, 6.6.2
    b"transfer-encoding",  # likewise: RFC 9112, 6.1
    b"upgrade",  # to a protocol that the gateway does not speak: RFC 9110, 7.8
}
# Of a request, these are withheld from the upstream as well.
_REQUEST_ONLY: Final = {
    b"authorization",  # may hold a key of the gateway
    b"proxy-authorization",  # a password that is meant for the first proxy: RFC 9110, 11.7.2
    b"x-api-key",  # may hold a key of the gateway
    b"content_length",  # see _spellings; Content-Length itself has been checked and is forwarded
    b"expect",  # the gateway says 100 Continue itself, once the key is checked: RFC 9110, 10.1.1
    b"host",  # replaced by the upstream's: Ollama on loopback refuses other names
    b"x-forwarded-for",  # replaced by the same with the client's address added
    b"x-forwarded-host",  # replaced by the checked Host, since frameworks build links of it
    b"x-forwarded-proto",  # replaced by https
}


def _spellings(name: bytes) -> set[bytes]:
    """This name and those that WSGI and CGI servers take for it, because they read "_" as "-" (RFC 3875, 4.1.18)."""
    first, dash, rest = name.partition(b"-")
    return {first + sign + more for sign in (b"-", b"_") for more in _spellings(rest)} if dash else {name}


# All spellings are listed in advance, so that a request needs only one look-up for each field.
NOT_FORWARDED: Final = {spelling for name in HOP_BY_HOP | _REQUEST_ONLY for spelling in _spellings(name)}
IDEMPOTENT: Final = {b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"}  # may be sent twice: RFC 9110, 9.2.2

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([^\x00-\x20\x7f]+) HTTP/([0-9]\.[0-9])" % _TOKEN)
_TARGET = re.compile(rb"(?i:https?://[^/?#@]+)?(/.*)?")
_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
_FIELDS = re.compile(rb"(?:(?:\A|\r\n)%b:[\t\x20-\x7e\x80-\xff]*)*" % _TOKEN)
_HOST = re.compile(rb"[0-9A-Za-z._~!$&'()*+,;=:%\[\]-]+")
_CHUNK_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]{0,1000})?\r\n")
_CHUNK_LINE_BEGUN = re.compile(rb"(?:\r(?:\n[^\n]{0,1020})?)?")  # what may still become one


def split_head(data: bytes) -> tuple[bytes, bytes] | None:
    """Split a head from what follows its empty line; None while that line has not arrived.

    Raises ClientError 400, 414 or 431 as soon as no valid head can come of the data.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end or len(head) > MAX_TARGET:
        require(head.count(b"\n") == head.count(b"\r\n"), 400, "a line of the head does not end in CRLF")
        require(len(head.partition(b"\r\n")[0]) <= MAX_TARGET, 414, "the request line is longer than 8 KiB")
        require(len(head) <= MAX_HEAD, 431, "the head, or the trailers, are longer than 32 KiB")
    return (head, rest) if end else None


def parse_request(head: bytes) -> Request:
    """Parse the head of a request (RFC 9112, 3 to 6).  Raises ClientError 400, 431, 501 or 505."""
    first, _, lines = head.partition(b"\r\n")
    method, target, version = require(_REQUEST_LINE.fullmatch(first), 400, "the request line is malformed").groups()
    require(version in (b"1.0", b"1.1"), 505, "only HTTP/1.0 and HTTP/1.1 are supported")
    require(method != b"CONNECT", 501, "CONNECT is not supported")
    # Some servers cut a target at "#" and others do not, and raw bytes above 0x7F are decoded in several ways.
    # Either would let a request pass for another path than the one that the upstream serves.
    require(target.isascii() and b"#" not in target, 400, "the request target holds a # or a byte that is not ASCII")
    if not target.startswith(b"/"):  # an absolute target is reduced to its path (RFC 9112, 3.2.2)
        target = require(_TARGET.fullmatch(target), 400, "the request target must be a path")[1] or b"/"
    fields = parse_fields(lines)
    if b"host" in fields or version == b"1.1":
        require(_HOST.fullmatch(fields.get(b"host", b"")), 400, "there must be one valid Host field")
    return Request(method, target, version, fields, body_framing(fields, version))


def parse_answer(head: bytes, method: bytes) -> Answer:
    """Parse the head of an answer to a request with that method.  Raises ClientError 400, 431 or 501."""
    first, _, lines = head.partition(b"\r\n")
    version, code, reason = require(_STATUS_LINE.fullmatch(first), 400, "the status line is malformed").groups()
    fields, status = parse_fields(lines), int(code)
    return Answer(status, reason or b"", version, fields, body_framing(fields, version, status, method))


def require(found: T | None, status: int, message: str) -> T:
    """Return what was found, such as a match; raise ClientError if it is None or false."""
    if not found:
        raise ClientError(status, message)
    return found


def parse_fields(lines: bytes) -> Fields:
    """Parse field lines that are separated by CRLF (RFC 9112, 5).  Raises ClientError 400 or 431."""
    require(lines.count(b"\n") < MAX_FIELDS, 431, "there are more than 100 fields")
    # This refuses folded lines, a space before the colon, names that are no tokens, and control characters.
    require(_FIELDS.fullmatch(lines), 400, "a field line is malformed")
    fields = Fields()
    append = fields.lines.append
    for line in lines.split(b"\r\n") if lines else ():
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip()  # blanks and tabs are the only white space that is left here
        append((name, line))
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def body_framing(fields: Fields, version: bytes, status: int = 0, answers: bytes = b"") -> int:
    """How the end of a body is found: its length, CHUNKED, or UNTIL_CLOSE.  Raises ClientError 400 or 501.

    For an answer, `status` is its status and `answers` the method of its request.  The steps are numbered as
    in RFC 9112, 6.3.
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


def requested(data: bytes) -> tuple[str | None, str | None]:
    """The method and the path, without its query, that the log shows for a request that is not valid."""
    line = _REQUEST_LINE.match(data)
    target = _TARGET.fullmatch(line[2]) if line else None
    return line and logged(line[1]), target and logged((target[1] or b"/").partition(b"?")[0])


def logged(text: bytes) -> str:
    """A client's words as the log shows them: decoded whatever they hold, and shortened."""
    return text.decode("utf-8", "backslashreplace")[:MAX_LOGGED]


def list_members(fields: Fields, name: bytes) -> set[bytes]:
    """The members of a field that is a comma-separated list (RFC 9110, 5.6.1), in lower case."""
    return {member.strip().lower() for member in fields[name].split(b",")} if name in fields else set()


def keeps_alive(message: Request | Answer) -> bool:
    """Whether the sender allows another request on its connection (RFC 9112, 9.3); never in HTTP/1.0."""
    return message.version == b"1.1" and b"close" not in list_members(message.fields, b"connection")


def end_to_end(fields: Fields, dropped: set[bytes], without: bytes = b"") -> list[bytes]:
    """The lines to forward: all but those in `dropped`, the one named `without`, and those that Connection names."""
    unwanted = {without}
    if b"connection" in fields:  # RFC 9110, 7.6.1; without Content-Length, though, the body would be read as a request
        unwanted |= list_members(fields, b"connection") - {b"content-length"}
    return [line for name, line in fields.lines if name not in dropped and name not in unwanted]


def forwarded_head(request: Request, upstream: Upstream, peer: str, without: bytes = b"") -> bytes:
    """The head for the upstream: without credentials and the field `without`, with the client's address and Host."""
    fields, before = request.fields, request.fields.get(b"x-forwarded-for")
    first = b"%b %b%b HTTP/1.1" % (request.method, upstream.prefix.encode(), request.target)
    lines = [first, b"Host: " + upstream.authority.encode(), *end_to_end(fields, NOT_FORWARDED, without)]
    lines += [b"X-Forwarded-For: " + (before + b", " if before else b"") + peer.encode(), b"X-Forwarded-Proto: https"]
    if b"host" in fields:  # which a request in HTTP/1.0 may lack
        lines.append(b"X-Forwarded-Host: " + fields[b"host"])
    if request.framing == CHUNKED:
        lines.append(b"Transfer-Encoding: chunked")
    return b"\r\n".join([*lines, b"", b""])


def answer_head(answer: Answer, upstream: Upstream, added: Iterable[bytes] = (), without: bytes = b"") -> bytes:
    """The head for the client: the upstream's own lines, but for the field `without`, and then ours.

    Content-Length is forbidden in 1xx and 204 answers (RFC 9110, 8.6).
    """
    dropped = HOP_BY_HOP | {b"content-length"} if answer.status < 200 or answer.status == 204 else HOP_BY_HOP
    lines = [b"HTTP/1.1 %d %b" % (answer.status, answer.reason), *end_to_end(answer.fields, dropped, without), *added]
    if b"location" in answer.fields:
        lines = [_reachable(line, upstream) for line in lines]
    return b"\r\n".join([*lines, b"", b""])


def _reachable(line: bytes, upstream: Upstream) -> bytes:
    """Turn a Location that names the upstream, which clients cannot reach, into a path on the gateway.

    Web frameworks build redirects from the Host that they see, which is the upstream's, and from http, or from
    https if they believe X-Forwarded-Proto.  A path must not become another host in the client's eyes: it would
    read //evil.example as one, browsers take "\\" for "/" and ignore tabs.  So a line with such a path, or
    outside of the prefix in --upstream, is left alone.  So is Content-Location, since no client follows it.
    """
    host = re.escape(re.sub(":(80|443)$", "", upstream.authority).encode())
    own = rb"(?i:(location:[\t ]*)https?://%b(?::80|:443)?)%b" % (host, re.escape(upstream.prefix.encode()))
    return re.sub(rb"\A%b(?:/(?![/\\\t])|(?=[?#]|[\t ]*\Z))" % own, rb"\1/", line)


def presented_keys(fields: Fields) -> list[bytes]:
    """The keys that a request presents in X-Api-Key and in Authorization; an empty one is none.

    Both are returned, because SDKs send a dummy Authorization beside the real X-Api-Key.  The values of a
    repeated field were joined, which makes no valid key.
    """
    keys = fields.get(b"x-api-key"), _key_in_authorization(fields.get(b"authorization", b""))
    return [key for key in keys if key]


def _key_in_authorization(value: bytes) -> bytes:
    """The token of Bearer (RFC 6750, 2.1) or the password of Basic (RFC 7617, 2)."""
    scheme, _, secret = value.partition(b" ")
    if scheme.lower() == b"basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(secret.strip(), validate=True).partition(b":")[2]
    return secret.strip() if scheme.lower() == b"bearer" else b""


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if a page may send a request (CORS); browsers never send a key with this question."""
    return request.method == b"OPTIONS" and b"access-control-request-method" in request.fields


def preflight_lines(request: Request) -> list[bytes]:
    """The fields that allow a web page to send the request that it asked for."""
    wanted = request.fields.get(b"access-control-request-headers", b"")
    methods = b"Access-Control-Allow-Methods: GET, HEAD, POST, PUT, PATCH, DELETE"
    return [methods, b"Access-Control-Allow-Headers: " + wanted, b"Access-Control-Max-Age: 86400"]


def error_body(path: str, status: int, message: str) -> bytes:
    """An error in the JSON of the API that the path belongs to: Anthropic's, OpenAI's, or else Ollama's."""
    kind = "permission_error" if status == 403 else "api_error" if status >= 500 else "invalid_request_error"
    body: dict[str, Any] = {"error": message}
    if path.startswith("/v1/messages"):
        body = {"type": "error", "error": {"type": "request_too_large" if status == 413 else kind, "message": message}}
    elif path.startswith("/v1/"):  # OpenAI's clients parse `code` as a string or null
        body = {"error": {"message": message, "type": kind, "code": "permission_denied" if status == 403 else None}}
    return json.dumps(body).encode()


class BodyReader:
    """Finds the end of a body in the bytes of a connection, without touching the connection.

    Once it is `done`, `rest` is what follows the body, `trailers` the fields behind its last chunk.
    """

    def __init__(self, framing: int) -> None:
        self.framing = framing
        self.done = framing == 0
        # Preceded by one CRLF more, each chunk's size line stands between two.
        self.rest = b"\r\n" if framing == CHUNKED else b""
        self.trailers = NO_FIELDS
        # Bytes, of the body or of the chunk; without an end in sight, more than will ever come.
        self._missing = sys.maxsize if framing == UNTIL_CLOSE else max(framing, 0)

    def feed(self, data: bytes) -> bytes:
        """The content in the connection's next bytes.  Raises ClientError 400 or 431."""
        if self.framing != CHUNKED:
            content, self.rest = data[: self._missing], data[self._missing :]
            self._missing -= len(content)
            self.done = self.done or not self._missing
            return content
        # By position, since one-byte chunks must not cost a copy of the rest each.
        pieces, data, at = [], self.rest + data, 0
        while not self.done:
            if self._missing:
                piece = data[at : at + self._missing]
                pieces.append(piece)
                at += len(piece)
                self._missing -= len(piece)
                if self._missing:
                    break
            if not (line := _CHUNK_LINE.match(data, at)):
                require(_CHUNK_LINE_BEGUN.fullmatch(data, at), 400, "a chunk is malformed")
                break
            if size := int(line[1], 16):
                self._missing, at = size, line.end()
            else:  # the last one, and its trailers, have the form of a head (RFC 9112, 7.1)
                end = split_head(data[at + 2 :])
                if not end:
                    break
                self.trailers = parse_fields(end[0].partition(b"\r\n")[2])
                self.done, at = True, len(data) - len(end[1])
        self.rest = data[at:]
        return b"".join(pieces)

    def whole_chunk(self, data: bytes) -> bytes:
        """The content of the next bytes, if they are one whole chunk, written as chunk() does it."""
        at = data.find(b"\n") + 1
        expected = self.rest == b"\r\n" and data.endswith(b"\r\n")
        return data[at:-2] if expected and data[:at] == b"%x\r\n" % (len(data) - at - 2) else b""

    def end(self) -> bool:
        """The connection has ended: was the body whole?"""
        self.done = self.done or self.framing == UNTIL_CLOSE
        return self.done


def chunk(content: bytes) -> bytes:
    """A chunk, or nothing for nothing: an empty one would be the last."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""


def last_chunk(trailers: Fields) -> bytes:
    """The end of a chunked body, with the trailers that may travel on."""
    return b"\r\n".join([b"0", *end_to_end(trailers, NOT_FORWARDED | {b"content-length"}), b"", b""])


# --- Token counts ---
# Every API counts at the end of its answer: Ollama in the last object, OpenAI and Anthropic in `usage`
# in one of the last events; so a bounded tail will do.  A member found in there is the API's own only
# if what stands behind it closes the very object it must stand in, which the JSON parser can tell: in
# text the quotes are escaped, and what a model writes into a tool call's arguments stands deeper.

HEAD_KEPT: Final = 2 * 1024  # bytes; holds Anthropic's message_start, and most requests' model
TAIL_KEPT: Final = 8 * 1024  # bytes; counts stand in the last few hundred
MAX_TRIES: Final = 16  # members looked at in one document

_COUNTED = re.compile(rb'"(?:prompt_eval_count|eval_count|usage)"[ \t\r\n]*:')
_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*"(?:[^"\\]|\\.)*"')
_ESTIMATE = b'"message_start"'
_LAST_WORD = re.compile(rb'\Adata: \[DONE\]\Z|"type": ?"(?:message_stop|response\.completed)"|"done": ?true')

_decode = json.JSONDecoder().raw_decode  # json.loads() would first guess the encoding, in a third of its time

Counts = tuple[Optional[int], Optional[int]]


class Excerpt:
    """The first and the last bytes of a body: all that is kept of it."""

    def __init__(self) -> None:
        self.head = b""
        self._tail = bytearray()

    def add(self, content: bytes) -> None:
        """Take note of the next bytes."""
        if len(self.head) < HEAD_KEPT:
            self.head += content[: HEAD_KEPT - len(self.head)]
        self._tail += content[-TAIL_KEPT:]
        if len(self._tail) > 2 * TAIL_KEPT:  # not with every token
            del self._tail[:-TAIL_KEPT]

    @property
    def tail(self) -> bytes:
        """The last TAIL_KEPT bytes."""
        return bytes(self._tail[-TAIL_KEPT:])


def token_counts(content_type: bytes, answer: Excerpt) -> Counts:
    """(prompt tokens, response tokens), each None where the answer does not say."""
    for document in _documents(content_type.partition(b";")[0].strip().lower(), answer.tail):
        for usage in _usages(document):
            prompt, response = _counts(usage)
            if prompt or response:  # Ollama's /v1/completions says 0 and 0 until it knows
                # llama.cpp counts an Anthropic prompt in message_start, and nowhere else.
                if prompt is None:
                    begun = (line for line in answer.head.splitlines() if _ESTIMATE in line)
                    prompt = next((_counts(usage)[0] for line in begun for usage in _usages(line)), None)
                return prompt, response
    return None, None


def _documents(media_type: bytes, tail: bytes) -> list[bytes]:
    """Where counts may stand, the likeliest first."""
    if media_type == b"application/json":
        return [tail]
    if media_type == b"application/x-ndjson":
        return tail.splitlines()[::-1]
    if media_type == b"text/event-stream":
        return [line for line in tail.splitlines()[::-1] if _ESTIMATE not in line]
    return []


def _counts(usage: dict[str, Any]) -> Counts:
    prompt = _number(usage, "prompt_eval_count", "prompt_tokens")
    if prompt is None and (prompt := _number(usage, "input_tokens")) is not None:
        for cached in ("cache_read_input_tokens", "cache_creation_input_tokens"):  # which Anthropic leaves out of it
            prompt += _number(usage, cached) or 0
    return prompt, _number(usage, "eval_count", "completion_tokens", "output_tokens")


def _number(usage: dict[str, Any], *names: str) -> int | None:
    """The first of these members that is there, and a count."""
    for name in names:
        number = usage.get(name)
        if type(number) is int and 0 <= number < 2**53:
            return number
    return None


def _usages(document: bytes) -> Iterator[dict[str, Any]]:
    """Objects of the document's own that may hold counts."""
    for match in [*_COUNTED.finditer(document)][-MAX_TRIES:]:
        rest = document[match.start() :]
        # The member stands at the top, or in the one object that an event holds.
        members = _json_object(b"{" + rest) or _json_object(b'{"":{' + rest).get("")
        usage = members.get("usage", members) if isinstance(members, dict) else None
        if usage and isinstance(usage, dict):
            yield usage


def has_said_all(answer: Excerpt) -> bool:
    """Whether the last line of a stream is its last word, on which clients leave without awaiting the body's end."""
    return bool(_LAST_WORD.search(answer.tail.rstrip().rpartition(b"\n")[2]))


def model_name(request: Excerpt) -> str | None:
    """The "model" at the top of a JSON request, if it stands in its last or first bytes."""
    model = _json_object(request.tail).get("model")  # of a short request, the tail is all
    if not isinstance(model, str):
        models = (_json_object(part).get("model") for part in _around_model(request))
        model = next((name for name in models if isinstance(name, str)), None)
    return model and model[:MAX_LOGGED]


def _around_model(request: Excerpt) -> Iterator[bytes]:
    """What of a long request shows a "model" at its top, from there to the end, or from the beginning to there."""
    for match in [*_MODEL.finditer(request.tail)][-MAX_TRIES:]:
        yield b"{" + request.tail[match.start() :]
    for match in [*_MODEL.finditer(request.head)][:MAX_TRIES]:
        yield request.head[: match.end()] + b"}"


def _json_object(text: bytes) -> dict[str, Any]:
    """An object, or an empty one for everything else."""
    try:
        document = text.decode().strip()
        value, end = _decode(document)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and end == len(document) else {}


# --- Audit log ---
# Every request produces one line, appended in one write, so that lines of several threads never mix.
# No audit, no service: a line that cannot be written is kept in memory, and until it stands in the log
# requests are answered 503.


class LogFile:
    """The audit log as it is open now, and the lines that wait to be written.

    Threads share all of it but the path, so everything else is read and changed under the lock.
    """

    def __init__(self, path: str) -> None:
        self.path, self.lock = path, threading.Lock()
        self.file: io.FileIO | None = None
        self.may_block = False  # whether it is a pipe, a terminal or the like, whose reader may stop reading
        self.kept: deque[bytes] = deque()
        self.written = 0  # how many bytes of the first kept line are in the file
        self.whole = True  # what the operator was told last, see log_news


def new_record(client: str) -> dict[str, Any]:
    """What the audit log says of a request, besides the time; the members keep this order in the line."""
    tokens = {"prompt_tokens": None, "response_tokens": None}
    return {"key": None, "path": None, **tokens, "status": 500, "method": None, "model": None, "client": client}


def audit_line(began: datetime, record: dict[str, Any], seconds: float) -> bytes:
    """The line, in ASCII JSON, of a request that began then (in UTC) and took that many seconds."""
    start = began.isoformat("T", "milliseconds")[:23]
    # The times are put around the record's JSON, since a dict that has them all takes a fifth longer.
    return f'{{"timestamp": "{start}Z", {json.dumps(record)[1:-1]}, "duration_ms": {round(seconds * 1000)}}}\n'.encode()


def append_line(log: LogFile, line: bytes) -> bool:
    """Write the line, after those that wait; False if some still wait."""
    with log.lock:
        log.kept.append(line)
        return _write_kept(log)


def is_writable(log: LogFile, tolerated: int = 0) -> bool:
    """Whether lines can be written, or fewer than `tolerated` wait.  Tries to write them where that is the question."""
    with log.lock:
        return len(log.kept) < tolerated or _write_kept(log)


def unwritten_lines(log: LogFile) -> bytes:
    """The lines that cannot be written even now, for whoever ends the gateway."""
    with log.lock:
        return b"" if _write_kept(log) else b"".join(log.kept)


def takes_a_line(descriptor: int, patience: float) -> bool:
    """Whether a write of up to 4096 bytes, PIPE_BUF, would not block, now or within that many seconds."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(patience * 1000))


def open_log(path: str) -> LogFile:
    """Open the log before the gateway serves, so that a path that cannot be written to is found at once."""
    log = LogFile(path)
    with explained(f"cannot write to {path}", "choose another --log"):
        _open_file(log)
    return log


def log_news(log: LogFile) -> str | None:
    """Follow a log that was renamed or deleted, and write what waits; returns news for the operator, if any."""
    with log.lock:
        if log.file and _was_moved(log.path, log.file):
            log.file.close()
            log.file = None
        before, log.whole = log.whole, _write_kept(log)
        if before == log.whole:
            return None
        return "the audit log is whole again" if log.whole else f"cannot write to {log.path}: nothing is forwarded"


def _write_kept(log: LogFile) -> bool:
    """Write the lines that wait; False if some cannot be written now.  The caller holds the lock."""
    try:
        file = log.file or _open_file(log)
        while log.kept:
            # A write that blocks would hold the lock, and so every connection, until somebody reads the pipe.
            if log.may_block and not takes_a_line(file.fileno(), patience=0):
                return False
            log.written += file.write(log.kept[0][log.written :]) or 0
            if log.written == len(log.kept[0]):
                log.kept.popleft()
                log.written = 0
    except OSError:
        return False
    return True


def _open_file(log: LogFile) -> io.FileIO:
    """Open what has the log's name now; a line that was begun in another file is written anew."""

    def opener(path: str, flags: int) -> int:  # private, and without waiting for somebody to read a FIFO
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), mode=0o600)

    file = open(1 if log.path == "-" else log.path, "ab", buffering=0, closefd=log.path != "-", opener=opener)  # noqa: SIM115 - it stays open
    log.file, log.written = file, 0
    log.may_block = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    if not log.may_block and _is_torn(log.path):  # by a crash or a full disk: the next line must not be glued to it
        log.kept.appendleft(b"\n")
    return file


def _was_moved(path: str, file: io.FileIO) -> bool:
    """Whether the file that is open has lost its name, as when a log is rotated."""
    try:
        return path != "-" and not os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError as error:
        return isinstance(error, FileNotFoundError)


def _is_torn(path: str) -> bool:
    """Whether the file ends in the middle of a line."""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # an empty one has no last byte to go to: OSError
        return file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
    return False


# --- Wires ---
# Sockets that never block.  Who serves a request must notice the upstream's answer or the client's leaving,
# whichever comes first, and a socket's own time-out starts anew with every byte, so that a byte now and
# then would hold him for ever.  So what has to wait is written as Steps: a generator that yields what for.

READ: Final = getattr(select, "POLLIN", 1)
WRITE: Final = getattr(select, "POLLOUT", 4)
GONE: Final = getattr(select, "POLLRDHUP", 0)  # Linux only: the peer has left, even behind unread bytes

_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ClientLeft(Exception):
    """The client closed its connection, or does not read."""


# They yield a Wait, or what looks like one; or a function that blocks, and get what it returns or raises.
Steps = Generator[Any, Any, T]


class Wait(NamedTuple):
    """What Steps wait for: one of these events (READ | WRITE | GONE), or the deadline."""

    deadline: float  # monotonic
    watched: tuple[tuple[Wire, int], ...] = ()
    idle: bool = False  # whether they can as well be told at once that it is over, since the gateway stops

    def happened(self, wire: Wire, events: int) -> bool:
        """Look at an event: whether it is what they wait for."""
        return True

    def overdue(self) -> Exception:
        """What is raised in them after the deadline."""
        return TimeoutError()


class Wire:
    """A connected socket, TLS or plain.  When it breaks, it raises what that means: `failure`."""

    def __init__(self, sock: socket.socket, failure: Callable[[], Exception]) -> None:
        sock.setblocking(False)
        self.sock, self.failure = sock, failure
        self.descriptor = sock.fileno()
        self._read: Callable[[int], bytes] = sock.recv
        self._write: Callable[[bytes | memoryview], int] = sock.send
        self._size, self._most = TLS_RECORD, READ_SIZE  # bytes of the next read; of any
        if isinstance(sock, ssl.SSLSocket):
            # What it checks before each call, such as that it is connected, we know; it costs 10 % of a request's CPU.
            inner = getattr(sock, "_sslobj", None) or sock
            self._read, self._write, self._most = inner.read, inner.write, TLS_RECORD
        self.ahead = b""  # what was read and not used yet
        self.events = 0  # for which a selector watches it
        self.unwatch: Callable[[Wire], None] = lambda _: None  # which makes it stop
        self.task: Any = None  # who waits for them

    def shake_hands(self, deadline: float) -> Steps[None]:
        """Be TLS's server.  These are steps like others: in a thread, a new connection cost a fifth more CPU."""
        while isinstance(self.sock, ssl.SSLSocket):
            try:
                return self.sock.do_handshake()
            except _NOT_NOW as error:
                events = WRITE if isinstance(error, ssl.SSLWantWriteError) else READ
            except OSError:
                self._close()  # and no more, since a reset might overtake our alert
                raise
            yield Wait(deadline, ((self, events),), idle=True)

    def receive(self) -> bytes | None:
        """What has arrived: bytes, b"" at the end, None for nothing.

        As nothing less than a whole TLS record is read, none of its bytes stay behind, where no poll can see them.
        """
        try:
            data = self._read(self._size)
        except _NOT_NOW:
            return None
        except OSError:
            raise self.failure() from None
        if len(data) < TLS_RECORD:
            self._size = TLS_RECORD  # since room costs, too
            return data
        self._size = self._most
        return data if len(data) > TLS_RECORD else data + self._more()

    def _more(self) -> bytes:
        """Behind a full record there mostly are others; taken together they cost a third less CPU per MB."""
        pieces: list[bytes] = []
        try:
            while len(pieces) < 3:
                pieces.append(self._read(TLS_RECORD))
        except _NOT_NOW:
            pass
        except OSError as error:
            self._read = functools.partial(_fail, error)  # the system would say it once, and then that this is the end
        return b"".join(pieces)

    def receive_until(self, deadline: float, idle: bool = False) -> Steps[bytes]:
        """The next bytes, b"" at the end; TimeoutError when the deadline passes."""
        data = None
        while data is None:
            yield Wait(deadline, ((self, READ),), idle)
            data = self.receive()
        return data

    def send_some(self, data: bytes) -> bytes:
        """Send what can go now; returns the rest."""
        at = 0
        try:
            at = self._write(data)
            while at < len(data):  # over TLS a record of 16 KiB went
                at += self._write(memoryview(data)[at:])
        except _NOT_NOW:
            pass
        except OSError:
            raise self.failure() from None
        return data[at:]

    def send(self, data: bytes, timeout: float) -> Steps[None]:
        """Send all; fails when for `timeout` seconds nothing could go."""
        try:
            while data := self.send_some(data):
                yield Wait(time.monotonic() + timeout, ((self, WRITE),))
        except TimeoutError:
            raise self.failure() from None

    def linger(self) -> Steps[None]:
        """End our half, and let the peer finish sending.

        A socket that is closed while bytes arrive resets the connection: our answer would be lost.
        """
        self._end_tls()
        with contextlib.suppress(OSError, ClientLeft):
            self.sock.shutdown(socket.SHUT_WR)
            self._read = self.sock.recv  # which also reads what is not TLS any more
            deadline = time.monotonic() + LINGER
            while (yield from self.receive_until(deadline)):
                pass

    def close(self) -> None:
        """End it well."""
        self._end_tls()
        self._close()

    def abort(self) -> None:
        """End with a reset: the peer shall not take what it has for all, even where only the end could tell."""
        no_linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        self._close()

    def interrupt(self) -> None:
        """Shut it down from another thread: below TLS, since two threads must not share that."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def _end_tls(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()  # says our close_notify, then raises for want of the peer's

    def _close(self) -> None:
        self.unwatch(self)  # before its descriptor can be another's
        self.sock.close()


def _fail(error: OSError, _: int) -> bytes:
    raise error


# --- Selector ---
# One thread makes the Steps of all connections, each when what it waits for has happened.  Only what blocks
# whatever one does, to look up a name and to connect elsewhere, has a thread for that time.  With a thread for each
# connection, which lent its running answer to one like this, a request of 16 busy clients and the beginning
# of 256 streams cost 1.6 times the CPU: to wake a thread costs more than most steps, and those that are awake
# fight for the interpreter.


class SelectPoll:
    """select.poll for Windows, which has none."""

    def __init__(self) -> None:
        self._watched: dict[int, int] = {}
        self.register = self.modify = self._watched.__setitem__
        self.unregister = self._watched.__delitem__

    def poll(self) -> list[tuple[int, int]]:
        """[(descriptor, events)], when something happened."""
        reading, writing = ([fd for fd, events in self._watched.items() if events & event] for event in (READ, WRITE))
        reading, writing, _ = select.select(reading, writing, [])
        return [(fd, READ) for fd in reading] + [(fd, WRITE) for fd in writing]


NEVER: Final = Wait(math.inf)


class Task:
    """Steps that have begun."""

    def __init__(self, steps: Steps[None]) -> None:
        self.steps = steps
        self.wait: Any = NEVER
        self.watched = NEVER.watched  # of the wait, as the selector knows it


class Selector:
    """Makes the steps of all tasks."""

    def __init__(self) -> None:
        self.stopping = False  # from then on, nobody waits for another request
        # epoll is Linux only; it finds what is ready without looking at the rest.
        self._poll: Any = getattr(select, "epoll", getattr(select, "poll", SelectPoll))()
        self._wires: dict[int, Wire] = {}  # that are watched, by descriptor
        self._tasks: dict[Task, None] = {}
        self._news: deque[tuple[Task, Any, Exception | None]] = deque()  # from other threads
        self._ticked = False  # whether it is time to look at deadlines
        self._ringer, bell = socket.socketpair()  # tells of both
        self._ringer.setblocking(False)
        self._step(Task(self._hear(Wire(bell, ClientLeft))))
        threading.Thread(target=self._run, daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def begin(self, steps: Steps[None]) -> None:
        """Have these steps made; they handle what they raise."""
        self._tell(Task(steps))

    def _tell(self, task: Task, result: Any = None, failure: Exception | None = None) -> None:
        self._news.append((task, result, failure))
        self._ring()

    def _tick(self) -> None:
        """Have deadlines looked at.  A time-out of each poll's own cost 1 % more of a request's CPU."""
        while True:
            time.sleep(TICK)
            self._ticked = True
            self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already, and how
            self._ringer.send(b"!")

    def _hear(self, bell: Wire) -> Steps[None]:
        rung = Wait(math.inf, ((bell, READ),))
        while True:
            yield rung
            bell.receive()
            while self._news:
                self._step(*self._news.popleft())
            if self._ticked:
                self._ticked = False
                self._look_for_overdue(time.monotonic())

    def _look_for_overdue(self, now: float) -> None:
        for task in list(self._tasks):
            if task.wait.deadline < now or (self.stopping and task.wait.idle):
                self._step(task, failure=task.wait.overdue())

    def _run(self) -> None:
        while True:
            for descriptor, events in self._poll.poll():
                wire = self._wires.get(descriptor)
                if not wire:  # a step just now has closed it
                    continue
                task = wire.task
                try:
                    if not task:  # nobody waits for that any more
                        self._unwatch(wire)
                    elif task.wait.happened(wire, events):
                        self._step(task)
                    elif task.wait.watched is not task.watched:
                        self._watch(task, task.wait)
                except Exception as error:  # is for those who wait
                    self._step(task, failure=error)

    def _step(self, task: Task, result: Any = None, failure: Exception | None = None) -> None:
        try:
            wait = task.steps.throw(failure) if failure else task.steps.send(result)
            self._tasks[task] = None
        except Exception:  # it is StopIteration: they handle what they raise
            self._tasks.pop(task, None)
            wait = NEVER
        try:
            self._watch(task, NEVER if callable(wait) else wait)  # first, so that no event passes for a call's end
            if callable(wait):
                threading.Thread(target=self._call, args=(task, wait), daemon=True).start()
        except (OSError, RuntimeError) as error:  # a wire could not be watched, or no thread be had
            self._tell(task, failure=OSError(errno.ENOMEM, str(error)))

    def _call(self, task: Task, call: Callable[[], Any]) -> None:
        try:
            result = call()
        except Exception as error:  # is for those who asked for the call
            self._tell(task, failure=error)
        else:
            self._tell(task, result)

    def _watch(self, task: Task, wait: Any) -> None:
        for wire, _ in task.watched:  # which stay watched, mostly for the next one: to change that is a system call
            wire.task = None
        task.wait, task.watched = wait, wait.watched
        for wire, events in wait.watched:
            wire.task = task
            if not events:  # not even for its end, which would be reported all the time
                self._unwatch(wire)
            elif not wire.events:
                self._poll.register(wire.descriptor, events)
                self._wires[wire.descriptor], wire.unwatch = wire, self._unwatch
            elif events != wire.events:
                self._poll.modify(wire.descriptor, events)
            wire.events = events

    def _unwatch(self, wire: Wire) -> None:
        if wire.events:
            wire.events = 0
            del self._wires[wire.descriptor]
            self._poll.unregister(wire.descriptor)


# --- Forwarding ---
# http.client connects, verifies an https upstream and sets the socket up.  Heads and bodies are ours:
# http.client takes 103 for a final answer, "-5" for a length, and a body cut short for a whole one.


class UpstreamError(Refusal):
    """The upstream cannot be reached, is silent, or sends what is no answer."""


class Pool:
    """Connections to the upstream, kept for a few seconds between two requests."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._tls = ssl.create_default_context() if upstream.tls else None
        if self._tls:
            self._tls.options &= ~0x80  # OP_IGNORE_UNEXPECTED_EOF: Python 3.9 sets it, and has no name for it
        next_door = not upstream.tls and upstream.host in ("127.0.0.1", "::1")
        self._try_at_once = -math.inf if next_door else math.inf  # from then on; monotonic
        self._idle: deque[tuple[float, Wire]] = deque()  # (since when, connection), oldest first

    def take(self) -> Wire | None:
        """A kept connection, if there is one."""
        return self._idle.pop()[1] if self._idle else None

    def give_back(self, wire: Wire) -> None:
        """Keep a connection that is ready for another request."""
        self._idle.append((time.monotonic(), wire))

    def prune(self) -> Steps[None]:
        """Close those that are too old or too many, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                yield Wait(time.monotonic() + TICK)
            while self._idle and (len(self._idle) > POOL_SIZE or time.monotonic() - self._idle[0][0] > POOL_SECONDS):
                self._idle.popleft()[1].close()

    def connect_at_once(self) -> Wire | None:
        """A new connection, where that takes no time: over loopback, unless the upstream's queue is full.

        With a thread for each, 256 streams took twice the time to begin, and a tenth more CPU.
        """
        if time.monotonic() > self._try_at_once:
            with contextlib.suppress(UpstreamError):
                return self.connect(timeout=0.001)  # without any, the system says that it has only begun
            self._try_at_once = time.monotonic() + TICK  # or a crowd would be held up for as many milliseconds
        return None

    def connect(self, timeout: float = CONNECT_TIMEOUT) -> Wire:
        """A new connection; it blocks.  UpstreamError 502."""
        address = self.upstream.host, self.upstream.port
        connection = http.client.HTTPConnection(*address, timeout=timeout)
        if self._tls:
            connection = http.client.HTTPSConnection(*address, timeout=timeout, context=self._tls)
        try:
            connection.connect()
        except OSError as error:
            reason = getattr(error, "verify_message", None) or error.strerror or "no answer"
            message = f"the upstream at {self.upstream.authority} cannot be reached ({reason}); start it there"
            raise UpstreamError(502, message) from None
        if isinstance(connection.sock, ssl.SSLSocket):  # where an end without close_notify is a cut
            connection.sock.suppress_ragged_eofs = False  # type: ignore[attr-defined] # public but not in typeshed
        return Wire(connection.sock, lambda: UpstreamError(502, "the connection to the upstream broke"))


STREAMING: Final = (READ, READ)  # what an exchange waits for, mostly: more of the answer, or that the client leaves


class Exchange:
    """A request's way to the upstream and the answer's way back.

    Both ways are in one, since an upstream may answer before it has the whole request, and a client
    may leave before there is an answer.  It is itself the Wait of its Steps, and moves what can move in
    happened(), so that a token takes one call instead of six generators.
    """

    idle = False

    def __init__(self, pool: Pool, client: Wire, request: Request, head: bytes, settings: Settings) -> None:
        self.request_body = BodyReader(request.framing)
        self.sent, self.received = Excerpt(), Excerpt()  # of their content
        self.upstream: Wire  # from connect() on
        self.watched: tuple[tuple[Wire, int], ...] = ()  # see _watch()
        self._events = (0, 0)
        self._pool, self._client, self._request, self._settings = pool, client, request, settings
        self._answer_body: BodyReader  # from relay() on
        self._head = self._outgoing = head  # what is to be sent, and what of it is still here
        self._incoming = b""  # what the client is to get, and has not taken yet
        self._chunked = False  # whether it gets that in chunks
        self._used_before = False  # whether the upstream's connection was
        self._begun = False  # whether some of the request went
        self._answering = False  # whether the answer is being brought to the client
        self._refused = False  # whether a part of it could not be sent; the upstream may still answer
        self._reusable = False
        self._moved = self._taken = time.monotonic()  # when something last moved; when the client last took something
        self._patience = self._moved + settings.body_timeout  # for the client's next MIN_PROGRESS bytes
        self._progress = 0
        if not self.request_body.done:
            data, client.ahead = client.ahead, b""
            self._upload(data)

    def connect(self, fresh: bool = False) -> Steps[None]:
        """Take a kept connection, or make one.  UpstreamError 502."""
        kept = None if fresh else self._pool.take()
        self.upstream = kept or self._pool.connect_at_once() or (yield self._pool.connect)
        self._used_before, self._events = kept is not None, (0, 0)

    def read_head(self) -> Steps[Answer]:
        """Wait for the next head, interim ones (1xx) included.

        Raises UpstreamError, and what the client does meanwhile: ClientError, ClientLeft.
        """
        try:
            head = yield from self._read_head()
        except UpstreamError as error:
            harmless = self._request.method in IDEMPOTENT and not self._request.framing  # RFC 9110, 9.2.2
            if not self._used_before or error.status != 502 or self.upstream.ahead or (self._begun and not harmless):
                raise
            # A kept connection that ended before, or just when, it was to be used again.
            self.upstream.abort()
            self._outgoing = self._head if self._begun else self._outgoing
            self._begun = self._refused = False
            yield from self.connect(fresh=True)
            head = yield from self._read_head()
        self._used_before = False  # now it is known to be good
        answer = _upstreams(parse_answer, head, self._request.method)
        if answer.status == 101:
            raise UpstreamError(502, "the upstream changed the protocol without being asked")
        return answer

    def relay(self, answer: Answer, head: bytes, chunked: bool) -> Steps[None]:
        """Bring the answer to the client: this head, then its content.  Raises as read_head does."""
        self._incoming, self._chunked, self._answering = head, chunked, True
        self._answer_body = BodyReader(answer.framing)
        self._reusable = keeps_alive(answer) and answer.framing != UNTIL_CLOSE
        data, self.upstream.ahead = self.upstream.ahead, b""
        if not self._pass_on(data):
            self._watch()
            yield self

    def happened(self, wire: Wire, events: int) -> bool:
        """Move what can move after this; whether more of a head has come, or the answer is with the client."""
        data = None
        if wire is self._client and events & ~WRITE:
            self._hear_client(events)
        if self._outgoing:
            self._push()
        if wire is self.upstream and not self._incoming:
            data = self.upstream.receive()
            if data == b"" and not (self._answering and self._answer_body.end()):
                raise UpstreamError(502, "the upstream closed the connection before the end of its answer")
        if self._answering:
            over = self._pass_on(data)
        else:
            self.upstream.ahead += data or b""
            over = bool(data)
        if self._incoming or self._outgoing or self._client.ahead or self._events != STREAMING:
            self._watch()
        return over

    @property
    def deadline(self) -> float:
        """Until when something has to move."""
        if self._incoming:
            return self._taken + self._settings.write_timeout
        if self.request_body.done or self._outgoing:
            return self._moved + self._settings.upstream_timeout
        return self._patience

    def overdue(self) -> Exception:
        """What to raise when nothing moved until the deadline."""
        if self._incoming:
            return ClientLeft()
        if self.request_body.done or self._outgoing:
            return UpstreamError(504, f"the upstream was silent for {self._settings.upstream_timeout:g} seconds")
        return ClientError(408, "the request's body came too slowly")

    def close(self) -> None:
        """Keep the upstream connection for another request, or close it, which stops the model."""
        sent = self.request_body.done and not self._outgoing and not self._refused
        if self._reusable and sent and self._answer_body.done and not self._answer_body.rest:
            self._pool.give_back(self.upstream)
        else:
            self.upstream.abort()

    def _read_head(self) -> Steps[bytes]:
        # Is it of use?  A kept one that is still watched said nothing; a look at each cost 5 % of a request's CPU.
        if not self._begun and not self.upstream.events and self.upstream.receive() is not None:
            raise UpstreamError(502, "the upstream spoke before it was asked, or closed the connection")
        if self._outgoing:
            self._push()
        self._watch()
        while not self.upstream.ahead or not (found := _upstreams(split_head, self.upstream.ahead)):
            yield self
        head, self.upstream.ahead = found
        return head

    def _pass_on(self, data: bytes | None) -> bool:
        """Bring what has come to the client, in its framing; whether it now has the whole answer."""
        if data is not None:
            content = self._answer_body.whole_chunk(data) if self._chunked else b""
            if not content:  # as seldom with tokens
                content = _upstreams(self._answer_body.feed, data)
                data = chunk(content) if self._chunked else content
                if self._chunked and self._answer_body.done:
                    data += last_chunk(self._answer_body.trailers)
            self.received.add(content)
            self._incoming += data
            self._moved = self._taken = time.monotonic()
        if self._incoming:
            rest = self._client.send_some(self._incoming)
            if rest and len(rest) < len(self._incoming):
                self._taken = time.monotonic()
            self._incoming = rest
        return self._answer_body.done and not self._incoming

    def _watch(self) -> None:
        """See what to wait for now."""
        up, down = (0, WRITE) if self._incoming else (READ, 0)  # the upstream waits for a slow client
        events = up | (WRITE if self._outgoing else 0), down | (READ if self._hears() else GONE)
        if events != self._events:
            self._events = events
            self.watched = (self.upstream, events[0]), (self._client, events[1])

    def _hears(self) -> bool:
        """Whether more from the client is welcome, of its request's body or of the next request."""
        return not self._outgoing and (not self.request_body.done or len(self._client.ahead) < READ_AHEAD)

    def _hear_client(self, events: int) -> None:
        """The client did something: it sent some of its request's body or of its next request, or it left."""
        data = self._client.receive() if self._hears() else b"" if events & ~(READ | WRITE) else None
        if data == b"":
            raise ClientLeft
        if data and self.request_body.done:
            self._client.ahead += data
        elif data:
            self._upload(data)

    def _upload(self, data: bytes) -> None:
        """Put bytes of the request's body into the upstream's framing."""
        content = self.request_body.feed(data)
        self.sent.add(content)
        if self._request.framing == CHUNKED:
            content = chunk(content)
        if self.request_body.done:
            self._client.ahead = self.request_body.rest
            content += last_chunk(self.request_body.trailers) if self._request.framing == CHUNKED else b""
        self._outgoing += b"" if self._refused else content
        self._progress += len(data)
        self._moved = time.monotonic()
        if self._progress >= MIN_PROGRESS:
            self._progress, self._patience = 0, self._moved + self._settings.body_timeout

    def _push(self) -> None:
        """Send what is due.  An upstream that takes no more may still have an answer for us."""
        try:
            rest = self.upstream.send_some(self._outgoing)
        except UpstreamError:
            if not self._begun:
                raise
            rest, self._refused = b"", True
        if len(rest) < len(self._outgoing):
            now = time.monotonic()
            self._patience += now - self._moved  # while we waited for the upstream, the client could not send
            self._outgoing, self._begun, self._moved = rest, True, now


def _upstreams(rule: Callable[..., T], *arguments: Any) -> T:
    """Apply a rule to what the upstream sent: it is the same for both directions; whose fault a breach is, is not."""
    try:
        return rule(*arguments)
    except ClientError as error:
        raise UpstreamError(502, f"the upstream's answer is no valid HTTP: {error}") from None


# --- Handler ---
# The order in which a request meets all of the above.  Clients are answered here and nowhere else.


class Gateway(NamedTuple):
    """What all connections share."""

    settings: Settings
    keys: Watched[Keys]
    log: LogFile
    pool: Pool
    selector: Selector
    report: Callable[[str], None]


class Handler:
    """One client's connection: a request after the other, and a line in the log for each."""

    def __init__(self, gateway: Gateway, wire: Wire, address: Any) -> None:
        self.gateway, self.settings, self.wire = gateway, gateway.settings, wire
        self.peer = address[0].replace("::ffff:", "", 1)  # IPv4 through an IPv6 socket

    def handle(self) -> Steps[None]:
        """Serve requests until the connection can carry no more."""
        self.unread = False  # whether the client may still be sending a request that we have answered
        patience = self.settings.header_timeout
        while (yield from self._await_request(patience)) and (yield from self._one_request()):
            patience = self.settings.idle_timeout
        if self.unread:
            yield from self.wire.linger()
        self.wire.close()

    def _await_request(self, seconds: float) -> Steps[bool]:
        """Wait for the first byte of a request.  Silence is no request, and neither are empty lines."""
        wire, deadline = self.wire, time.monotonic() + seconds
        with contextlib.suppress(ClientLeft, TimeoutError):
            while not self.gateway.selector.stopping and not self._log_is_full():
                if wire.ahead.startswith(b"\r\n"):  # RFC 9112, 2.2
                    wire.ahead = re.sub(rb"\A(?:\r\n)+", b"", wire.ahead)  # all at once, for there may be many
                if wire.ahead not in (b"", b"\r"):
                    return True
                data = yield from wire.receive_until(deadline, idle=True)
                if not data:
                    break
                wire.ahead += data
        return False

    def _log_is_full(self) -> bool:
        return not is_writable(self.gateway.log, tolerated=MAX_KEPT_LINES)

    def _one_request(self) -> Steps[bool]:
        """Answer one request and log it; True if the connection can carry another."""
        self.began, began = datetime.now(timezone.utc), time.monotonic()
        self.record = new_record(self.peer)
        self.unread = True
        self.answering = False  # whether a head went out, after which there can be no other
        self.cors: list[bytes] = []
        try:
            return (yield from self._serve())
        except Refusal as refusal:
            yield from self._refuse(refusal)
        except ClientLeft:
            self.record["status"] = 499
            self.wire.abort()
        except OSError:  # see Selector: what peers do is none
            yield from self._refuse(Refusal(503, "the gateway is short of threads or memory; try again"))
        finally:
            append_line(self.gateway.log, audit_line(self.began, self.record, time.monotonic() - began))
        return False

    def _serve(self) -> Steps[bool]:
        request = yield from self._read_request()
        origin = request.fields.get(b"origin", b"")
        if origin and origin.decode("latin-1") in self.settings.cors_origin:
            self.cors = [b"Access-Control-Allow-Origin: " + origin, b"Vary: Origin"]
            if is_preflight(request):
                yield from self._answer(204, preflight_lines(request))
                return False
        key = find_key(self.gateway.keys.value, presented_keys(request.fields), self.began.date())
        if not key:
            raise ClientError(403, "a valid API key is needed: X-Api-Key: KEY or Authorization: Bearer KEY")
        self.record["key"] = key.name
        if not is_writable(self.gateway.log):
            raise ClientError(503, "the audit log cannot be written; until it can, nothing is forwarded")
        return (yield from self._forward(request))

    def _read_request(self) -> Steps[Request]:
        wire, deadline = self.wire, time.monotonic() + self.settings.header_timeout
        try:
            while not (found := split_head(wire.ahead)):
                data = yield from wire.receive_until(deadline)
                if not data:
                    raise ClientLeft
                wire.ahead += data
            request = parse_request(found[0])
        except (ClientError, ClientLeft, TimeoutError) as error:
            self.record["method"], self.record["path"] = requested(wire.ahead)
            if isinstance(error, TimeoutError):
                raise ClientError(408, "the request's head came too slowly") from None
            raise
        self.record["method"], self.record["path"] = logged(request.method), logged(request.target.partition(b"?")[0])
        wire.ahead = found[1]
        return request

    def _forward(self, request: Request) -> Steps[bool]:
        """Send the request on and its answer back; True if the connection can carry another."""
        without = b"origin" if self.cors else b""  # Ollama would refuse it
        head = forwarded_head(request, self.settings.upstream, self.peer, without)
        exchange = Exchange(self.gateway.pool, self.wire, request, head, self.settings)
        yield from exchange.connect()
        content_type = b""
        try:
            expects = b"100-continue" in list_members(request.fields, b"expect") and request.version == b"1.1"
            if expects and not exchange.request_body.done:
                yield from self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            for _ in range(MAX_INTERIM):
                answer = yield from exchange.read_head()
                if answer.status >= 200:
                    self.record["status"] = answer.status
                    content_type = answer.fields.get(b"content-type", b"")
                    return (yield from self._relay(request, exchange, answer))
                if answer.status > 100 and request.version == b"1.1":  # nobody asked the upstream for a 100
                    yield from self._send(answer_head(answer, self.settings.upstream))
            raise UpstreamError(502, "the upstream sends interim answers without end")
        finally:
            exchange.close()
            self.record["model"] = model_name(exchange.sent)
            counts = token_counts(content_type, exchange.received)
            self.record["prompt_tokens"], self.record["response_tokens"] = counts

    def _relay(self, request: Request, exchange: Exchange, answer: Answer) -> Steps[bool]:
        chunked = answer.framing < 0 and request.version == b"1.1"
        keep = keeps_alive(request) and not self.gateway.selector.stopping
        added = [*self.cors, *[b"Transfer-Encoding: chunked"] * chunked, *[b"Connection: close"] * (not keep)]
        without = b"access-control-allow-origin" if self.cors else b""
        head = answer_head(answer, self.settings.upstream, added, without)
        self.answering = True
        try:
            yield from exchange.relay(answer, head, chunked)
        except ClientLeft:
            if has_said_all(exchange.received):
                return False  # and the status stays what it was
            raise
        self.unread = bool(self.wire.ahead) or not exchange.request_body.done
        return keep and exchange.request_body.done

    def _refuse(self, refusal: Refusal) -> Steps[None]:
        """Answer with an error; what is half answered is broken off, for it must not look whole."""
        self.record["status"] = refusal.status
        if self.answering:
            self.wire.abort()
            return
        body = error_body(self.record["path"] or "", refusal.status, str(refusal))
        lines = [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
        yield from self._answer(refusal.status, lines, b"" if self.record["method"] == "HEAD" else body)

    def _answer(self, status: int, lines: list[bytes], body: bytes = b"") -> Steps[None]:
        """Answer in the gateway's own name, which always ends the connection."""
        self.record["status"] = status
        first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
        with contextlib.suppress(ClientLeft):
            yield from self._send(b"\r\n".join([first, *lines, *self.cors, b"Connection: close", b"", body]))

    def _send(self, data: bytes) -> Steps[None]:
        return self.wire.send(data, self.settings.write_timeout)


# --- Server ---
# Connections: one thread accepts them, then each goes its own steps, from the handshake on, so that a silent
# client delays nobody.  --max-connections of them at a time; the others wait.


class Server(http.server.ThreadingHTTPServer):
    """Accepts, encrypts, counts and drains connections, which need no threads of their own: see Selector."""

    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    request_queue_size = 1024
    block_on_close = False  # drain() waits instead, and not for ever

    def __init__(self, gateway: Gateway, context: Watched[ssl.SSLContext]) -> None:
        self.gateway, self.context = gateway, context
        self.slots = threading.BoundedSemaphore(gateway.settings.max_connections)
        self.wires: dict[Wire, None] = {}
        host, port = gateway.settings.listen
        host = host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")  # noqa: S104 - what --listen says
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)  # type: ignore[arg-type] # it is no BaseRequestHandler: it never blocks

    def server_bind(self) -> None:
        """Bind, without asking the name service for our name as HTTPServer does."""
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept.  Out of descriptors, pause: the port stays ready, and the loop would spin."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in NO_ROOM:
                time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have the connection served, once there is a place for it."""
        while not self.slots.acquire(timeout=TICK):
            if self.gateway.selector.stopping:
                return self.close_request(request)
        return self.gateway.selector.begin(self._converse(request, client_address))

    def _converse(self, request: socket.socket, client_address: Any) -> Steps[None]:
        try:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or tokens wait for 40 ms
            tls = self.context.value.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            wire = Wire(tls, ClientLeft)
            self.wires[wire] = None
            try:
                yield from wire.shake_hands(time.monotonic() + self.gateway.settings.handshake_timeout)
                yield from Handler(self.gateway, wire, client_address).handle()
            except Exception:
                wire.abort()
                raise
            finally:
                del self.wires[wire]
        except Exception:
            self.handle_error(request, client_address)
        finally:
            request.close()
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What clients do to connections is no news.  A fault of ours is, in one line."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            where = error.__traceback__
            while where and where.tb_next:
                where = where.tb_next
            line = where.tb_lineno if where else 0
            self.gateway.report(f"internal error: {type(error).__name__} in line {line} of the gateway")

    def drain(self, grace: float) -> None:
        """Let running requests finish for `grace` seconds; then break them off, so that they are logged."""
        for seconds in (grace, 2.0):
            deadline = time.monotonic() + seconds
            while self.wires and time.monotonic() < deadline:
                time.sleep(0.02)
            self.interrupt()

    def interrupt(self) -> None:
        """Break all connections off."""
        for wire in list(self.wires):
            wire.interrupt()


# --- Demo ---
# What answers behind --demo: no model, but Ollama's shapes, at a reading pace.

DEMO_TEXT: Final = (
    "This is the gateway's built-in demo, not a model: it tells everybody the same."
    " The rest is real: TLS, your key, a stream, and a line in the audit log."
)
DEMO_PACE: Final = 0.03  # seconds a word
DEMO_KEPT: Final = 256 * 1024  # bytes of a question that are looked at


class DemoUpstream(http.server.BaseHTTPRequestHandler):
    """Stands in for Ollama: /api/chat, /api/generate, /api/tags, /api/version, /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing; the audit log does."""

    def do_GET(self) -> None:
        """What is here."""
        models = [{"name": "demo:latest", "model": "demo:latest", "size": 0, "digest": "", "details": {}}]
        known = {"/api/version": {"version": f"{__version__}-demo"}, "/api/tags": {"models": models}}
        self._answer("application/json", [demo_line(known[self.path])] if self.path in known else [])

    def do_POST(self) -> None:
        """The canned answer in the shape of the API that was asked, streamed or not."""
        fields = parse_fields("\r\n".join(f"{name}:{value}" for name, value in self.headers.items()).encode("latin-1"))
        body, content = BodyReader(body_framing(fields, b"1.1", 0)), b""
        while not body.done and (data := self.rfile.read1(READ_SIZE)):
            content = (content + body.feed(data))[:DEMO_KEPT]
        asked = {"model": "demo", "stream": self.path.startswith("/api/"), **_json_object(content)}
        if self.path == "/v1/chat/completions":
            self._answer("text/event-stream" if asked["stream"] else "application/json", demo_openai(asked))
        elif self.path in ("/api/chat", "/api/generate"):
            self._answer("application/x-ndjson", demo_ollama(asked, chat=self.path == "/api/chat"))
        else:
            self._answer("application/json", [])

    def _answer(self, content_type: str, pieces: list[bytes]) -> None:
        self.send_response(200 if pieces else 404)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")  # so that nothing unread can pass for a request
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked has left
            for piece in pieces or [demo_line({"error": "this is not in the demo"})]:
                self.wfile.write(chunk(piece))
                time.sleep(DEMO_PACE if len(pieces) > 1 else 0)
            self.wfile.write(last_chunk(NO_FIELDS))


def demo_ollama(asked: dict[str, Any], chat: bool) -> list[bytes]:
    """What /api/chat and /api/generate say, piece by piece."""

    def said(text: str, **more: Any) -> bytes:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        answer = {"message": {"role": "assistant", "content": text}} if chat else {"response": text}
        return demo_line({"model": asked["model"], "created_at": now, **answer, "done": bool(more), **more})

    words = re.findall(r"\S+\s*", DEMO_TEXT)
    end = {"done_reason": "stop", "prompt_eval_count": demo_prompt_tokens(asked), "eval_count": len(words)}
    return [*map(said, words), said("", **end)] if asked["stream"] else [said(DEMO_TEXT, **end)]


def demo_openai(asked: dict[str, Any]) -> list[bytes]:
    """What /v1/chat/completions says, piece by piece."""

    def said(choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if asked["stream"] else "chat.completion"
        head = {"id": "demo", "object": kind, "created": 0, "model": asked["model"]}
        return demo_line({**head, "choices": choices, **more})

    words, prompt = re.findall(r"\S+\s*", DEMO_TEXT), demo_prompt_tokens(asked)
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
    if not asked["stream"]:
        message = {"role": "assistant", "content": DEMO_TEXT}
        return [said([{"index": 0, "message": message, "finish_reason": "stop"}], usage=usage)]
    deltas = [{"role": "assistant", "content": word} for word in words]
    events = [said([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    events.append(said([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    if asked.get("stream_options") == {"include_usage": True}:
        events.append(said([], usage=usage))
    return [b"data: " + event + b"\n" for event in [*events, b"[DONE]\n"]]


def demo_prompt_tokens(asked: dict[str, Any]) -> int:
    """How many words the question has."""
    return len(re.findall(rb"\w+", demo_line(asked.get("prompt") or asked.get("messages") or "")))


def demo_line(value: Any) -> bytes:
    """A line of JSON."""
    return json.dumps(value).encode() + b"\n"


def start_demo() -> Upstream:
    """Serve the demo on a free port of the loopback interface; returns where."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DemoUpstream)
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # who leaves early is no news
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    return Upstream(False, "127.0.0.1", port, f"127.0.0.1:{port}", "")


# --- Command line ---
# Arguments in, exit status out; the only place that prints or ends the process.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  0: a clean stop; 1: it could not run; 2: what was asked cannot be."""
    try:
        command, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if command == "keygen":
            print(new_key(), *([f" name={arguments['label']}"] if arguments["label"] else []))
            return 0
        return serve(Settings(**arguments))
    except OperatorError as error:
        say(f"gateway: {error}")
        return 2
    except KeyboardInterrupt:  # while starting
        return 130


def serve(settings: Settings) -> int:
    """Serve until told to stop.  What can be wrong is found before the port is bound."""
    if settings.demo:
        settings = settings._replace(upstream=start_demo())
    room = max(1, (descriptors() - 32) // 2)  # a client needs one, its request another, files and the pool some
    settings = settings._replace(max_connections=min(settings.max_connections, room))
    fresh = new_key()
    if os.path.lexists(settings.keys) or not create_file(settings.keys, f"{fresh}  name=first\n".encode(), 0o600):
        fresh = ""
    ensure_certificate(settings.cert, settings.cert_key, settings.name)
    keys = Watched(lambda: load_keys(settings.keys), settings.keys)
    if not keys.value:
        raise OperatorError(f"{settings.keys} holds no key; add one: python3 gateway.py keygen >> {settings.keys}")
    context = Watched(lambda: tls_context(settings.cert, settings.cert_key), settings.cert, settings.cert_key)
    gateway = Gateway(settings, keys, open_log(settings.log), Pool(settings.upstream), Selector(), say)
    gateway.selector.begin(gateway.pool.prune())
    try:
        server = Server(gateway, context)
    except OSError as error:
        say(f"gateway: cannot listen there: {error.strerror}; choose another place with --listen HOST:PORT")
        return 1
    stop_on_signals(server)
    announce(settings, keys.value, server.server_address[1], fresh)
    threading.Thread(target=server.serve_forever, args=(TICK,), daemon=True).start()
    while not gateway.selector.stopping:
        keep_house(gateway, context)
        time.sleep(TICK)
    server.shutdown()
    server.server_close()
    server.drain(settings.grace)
    if unwritten := unwritten_lines(gateway.log):
        say("Gateway stopped, but could not write these audit lines:\n" + unwritten.decode())
        return 1
    say("Gateway stopped")
    return 0


def keep_house(gateway: Gateway, context: Watched[ssl.SSLContext]) -> None:
    """What wants a look several times a second."""
    for news in (gateway.keys.refresh(), context.refresh(), log_news(gateway.log)):
        if news:
            say(news)


def stop_on_signals(server: Server) -> None:
    """SIGINT and SIGTERM stop gently, the second at once.  SIGHUP is heard: files are watched anyway."""

    def stop(*_: Any) -> None:
        if server.gateway.selector.stopping:
            server.interrupt()
            threading.Timer(0.2, os._exit, (1,)).start()  # by then what was broken off is logged
            return
        server.gateway.selector.stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: None)


def descriptors() -> int:
    """Take all the descriptors that the system grants; how many can be used."""
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows
        return 512  # of which select() can watch no more
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def announce(settings: Settings, keys: Keys, port: int, fresh_key: str) -> None:
    """Tell what one needs to use it."""
    host, upstream, cert = settings.listen[0], settings.upstream, settings.cert
    fingerprint, until, missing = describe_certificate(cert, settings.name)
    listen = f"[{host}]" if ":" in host else host
    everywhere, near = host in ("", "0.0.0.0", "::"), upstream.host in ("127.0.0.1", "::1", "localhost")  # noqa: S104
    upstream_host = "" if near else upstream.host
    first = f"Gateway listening on {'' if everywhere else listen}:{port}, upstream {upstream_host}:{upstream.port}"
    weak = any(key.weak for key in keys.values())
    fault = f"does not cover {', '.join(missing)}" if missing else ""
    fault = "has expired" if until < datetime.now(timezone.utc) else fault
    path, body = "/api/tags", ""
    if settings.demo:
        path, body = "/api/chat", """ -d '{"model":"demo","messages":[{"role":"user","content":"hi"}]}'"""
    url = f"https://{'localhost' if everywhere else listen}:{port}"
    state = "the built-in demo, not a model" if settings.demo else upstream_state(upstream)
    lines = [
        ("URL", url),
        ("Upstream", f"{'https' if upstream.tls else 'http'}://{upstream.authority}{upstream.prefix} - {state}"),
        ("Keys", f"{len(keys)} in {settings.keys}"),
        ("New key", f"{fresh_key} - also in {settings.keys}, and not shown again" if fresh_key else ""),
        ("WARNING", "keys are short or well known; for good ones: python3 gateway.py keygen NAME" if weak else ""),
        ("Certificate", f"{cert}, expires {until:%Y-%m-%d}, SHA-256 fingerprint"),
        ("", fingerprint),
        ("WARNING", f"{cert} {fault}; move it and {settings.cert_key} away to have a new pair made" if fault else ""),
        ("Audit log", "standard output" if settings.log == "-" else settings.log),
        ("Try", f'curl --cacert {cert} {url}{path} -H "X-Api-Key: {fresh_key or "YOUR-KEY"}"{body}'),
    ]
    say("\n".join([first, *(f"  {label:<12} {text}" for label, text in lines if text)]))


def upstream_state(upstream: Upstream) -> str:
    """Whether somebody listens there."""
    try:
        Pool(upstream).connect().abort()
    except UpstreamError as error:
        return f"NO ANSWER: {error}, or try --demo"
    return "it answers"


def say(text: str) -> None:
    """Lines on stderr, the first with the time; to nobody, if nobody reads them."""
    with contextlib.suppress(OSError, ValueError):
        for line in f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}".splitlines():
            if not takes_a_line(2, patience=1):
                return
            print(line, file=sys.stderr, flush=True)


def host_port(text: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT or :PORT."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]*)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, like 127.0.0.1:8443 or [::]:8443")
    return match[1] or match[2] or "", int(match[3])


def upstream_url(text: str) -> Upstream:
    """http://HOST:PORT or https://HOST:PORT, with a path at most."""
    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text)
        odd = url.username or url.password or url.query or url.fragment or not re.fullmatch("[!-~]+", text)
        if url.scheme in ("http", "https") and url.hostname and not odd:
            url.hostname.encode("idna")  # or to connect would raise a UnicodeError
            tls = url.scheme == "https"
            return Upstream(tls, url.hostname, url.port or (443 if tls else 80), url.netloc, url.path.rstrip("/"))
    raise argparse.ArgumentTypeError("an upstream is http://HOST:PORT or https://HOST:PORT, with a path at most")


def matching(pattern: str, example: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A kind of argument: what matches the pattern, converted."""

    def parse(text: str) -> Any:
        if re.fullmatch(pattern, text):
            return convert(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {example}")

    return parse


SECONDS: Final = matching(r"(?!0*\.?0*$)[0-9]{1,6}(\.[0-9]{1,3})?", "a number of seconds above 0", float)
COUNT: Final = matching("[1-9][0-9]{0,5}", "a whole number from 1 to 999999", int)
ORIGIN: Final = matching(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+", "an origin like https://chat.example.com")
HOST: Final = matching(r"[0-9A-Za-z*][0-9A-Za-z.:-]*|::[0-9A-Fa-f:.]*", "a host name or address")
WORD: Final = matching(r"\S+", "one word")

# Flag, what it takes, how to read that, default (None: it may be given several times), what it is for.
OPTIONS: Final[Sequence[tuple[str, str, Callable[[str], Any], str | None, str]]] = (
    ("--listen", "HOST:PORT", host_port, ":8443", "where to listen; without HOST everywhere, IPv4 and IPv6"),
    ("--upstream", "URL", upstream_url, "http://127.0.0.1:11434", "the Ollama, or other, server"),
    ("--keys", "FILE", str, "keys.txt", "the API keys; where there is none, it is made with one fresh key"),
    ("--cert", "FILE", str, "cert.pem", "the certificate, with its chain; where there is none, it is made"),
    ("--cert-key", "FILE", str, "key.pem", "its private key"),
    ("--log", "FILE", str, "gateway.log", "the audit log; - is standard output"),
    ("--name", "HOST", HOST, None, "one more name or address in a certificate that is made"),
    ("--cors-origin", "ORIGIN", ORIGIN, None, "lets web pages from there use the gateway"),
    ("--max-connections", "N", COUNT, "1024", "clients at a time; others wait"),
    ("--handshake-timeout", "S", SECONDS, "10", "seconds for a TLS handshake"),
    ("--header-timeout", "S", SECONDS, "15", "seconds for the whole head of a request"),
    ("--body-timeout", "S", SECONDS, "30", "seconds for every 4 KiB of a request's body"),
    ("--write-timeout", "S", SECONDS, "60", "seconds for a client to take the next 16 KiB"),
    ("--idle-timeout", "S", SECONDS, "75", "seconds between two requests on a connection"),
    ("--upstream-timeout", "S", SECONDS, "600", "seconds of silence from the upstream"),
    ("--grace", "S", SECONDS, "30", "seconds for running requests to finish, at the end"),
)


def parse_arguments(argv: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """(command, its arguments): flags, else environment variables, else defaults.  OperatorError."""
    parser = _Parser(prog="gateway", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    text = "answer from a built-in stand-in, for want of an Ollama [GATEWAY_DEMO]"
    parser.add_argument("--demo", action="store_true", help=text)
    environment = ["--demo"] if os.environ.get("GATEWAY_DEMO", "") not in ("", "0", "no", "false") else []
    given = {argument.partition("=")[0] for argument in argv}
    for flag, metavar, kind, default, text in OPTIONS:
        variable = "GATEWAY_" + flag[2:].replace("-", "_").upper()
        value = "" if flag in given else os.environ.get(variable, "").strip()
        if default is None:
            note = f"{text} [{variable}; may be given several times]"
            parser.add_argument(flag, metavar=metavar, type=kind, help=note, action="append", default=[])
            environment += [f"{flag}={word}" for word in re.split(r"[,\s]+", value) if word]
        else:
            note = f"{text} [{variable}; default {default}]"
            parser.add_argument(flag, metavar=metavar, type=kind, help=note, default=default)
            environment += [f"{flag}={value}"] if value else []
    commands = parser.add_subparsers(dest="command", title="instead of serving", metavar="")
    keygen = commands.add_parser("keygen", help="print a fresh line for the key file")
    keygen.add_argument("label", nargs="?", type=WORD, metavar="NAME", help="what the audit log calls it")
    arguments = vars(parser.parse_args([*environment, *argv]))
    return arguments.pop("command"), arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise OperatorError(f"{message}; see --help")


if __name__ == "__main__":
    sys.exit(main())
