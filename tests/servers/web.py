"""Real web servers, an S3 server, and servers that lie; on loopback, ended by their own pids."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import obstore
import obstore.store

from tests.servers.ports import free_port, free_ports

NGINX = """
{user}
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log {directory}/access.log;
    sendfile on;
    keepalive_requests 100000;
    default_type application/octet-stream;
    client_body_temp_path {directory}/temp;
    proxy_temp_path {directory}/temp;
    fastcgi_temp_path {directory}/temp;
    uwsgi_temp_path {directory}/temp;
    scgi_temp_path {directory}/temp;
    server {{
        listen 127.0.0.1:{port} {tls};
        root {root};
        {more}
    }}
}}
"""


def wait_for(port: int, log: Path, patience_s: float = 10) -> None:
    """Return when somebody listens.  Raises RuntimeError with the log."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(log.read_text() if log.exists() else f"nothing listens at {port}")


class Nginx:
    """nginx that serves `root`, with a configuration in `directory`.

    `more` goes into its server block; `certificate` (and its key, .pem and .key) makes it https.
    """

    def __init__(
        self, directory: Path, root: Path, more: str = "", certificate: Path | None = None
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.scheme = "http" if certificate is None else "https"
        if certificate is not None:
            key = certificate.with_suffix(".key")
            more += f"\nssl_certificate {certificate};\nssl_certificate_key {key};"
        (directory / "nginx.conf").write_text(
            NGINX.format(
                # Of root's nginx the workers would be nobody, and not get at the files.
                user="user root;" if os.geteuid() == 0 else "",
                directory=directory,
                port=self.port,
                root=root,
                more=more,
                tls="" if certificate is None else "ssl",
            )
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        conf = str(self.directory / "nginx.conf")
        log = str(self.directory / "error.log")
        self._process = subprocess.Popen(
            ["/usr/sbin/nginx", "-e", log, "-c", conf, "-p", str(self.directory)],
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.port, Path(log))

    def url(self, name: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}/{quote(name)}"

    def pids(self) -> list[int]:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """At once, with whatever is being sent."""
        if self._process is not None:
            # Not SIGKILL at once: the workers are the master's to wait for.
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                self._process.wait()
            self._process = None

    def requests(self) -> list[str]:
        """The lines of the access log."""
        return (self.directory / "access.log").read_text().splitlines()


def make_certificate(
    directory: Path, names: str = "IP:127.0.0.1,DNS:localhost"
) -> tuple[Path, Path]:
    """A CA of our own and a certificate by it for these names, as PEM."""

    def openssl(*words: object) -> None:
        command = ["openssl", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    ca, ca_key, server = (directory / name for name in ("ca.pem", "ca.key", "server.pem"))
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    common = ("-days", "2", "-subj")
    openssl(*new, "-keyout", ca_key, "-out", ca, *common, "/CN=test CA")
    openssl(
        *(*new, "-keyout", server.with_suffix(".key"), "-out", server),
        *(*common, "/CN=localhost", "-CA", ca, "-CAkey", ca_key),
        *("-addext", f"subjectAltName={names}", "-addext", "basicConstraints=critical,CA:FALSE"),
    )
    return ca, server


class Weed:
    """SeaweedFS's S3 server, with one key pair; `bucket` is made."""

    key, secret, bucket = "tester", "a-secret-of-the-tests", "images"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ports_free = free_ports(8)
        self.port = ports_free.pop()
        binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
        config = directory / "s3.json"
        config.write_text(
            '{"identities": [{"name": "tester", "actions": ["Admin", "Read", "Write", "List"],'
            f'"credentials": [{{"accessKey": "{self.key}", "secretKey": "{self.secret}"}}]}}]}}'
        )
        # Each port P has one for gRPC, by default at P + 10000.
        ports: list[str] = []
        for service in ("master", "volume", "filer"):
            ports += [
                f"-{service}.port={ports_free.pop()}",
                f"-{service}.port.grpc={ports_free.pop()}",
            ]
        ports += [f"-s3.port={self.port}", f"-s3.port.grpc={ports_free.pop()}"]
        local = ("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}", "-s3")
        small = ("-master.volumeSizeLimitMB=64", "-volume.max=8", "-filer.encryptVolumeData=false")
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [binary, "server", f"-dir={directory}", *local, *ports, *small],
                stderr=log,
                stdout=log,
            )
        try:
            wait_for(self.port, directory / "log", 40)
        except BaseException:
            self.stop()
            raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Bucket:
    """Writing to the server, with the library as other people use it."""

    def __init__(self, weed: Weed) -> None:
        self.store = obstore.store.S3Store(
            weed.bucket,
            endpoint=weed.endpoint,
            access_key_id=weed.key,
            secret_access_key=weed.secret,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def put(self, key: str, data: bytes) -> None:
        """For ten seconds after its start SeaweedFS may have no volume to put it on."""
        deadline = time.monotonic() + 30
        while True:
            try:
                obstore.put(self.store, key, data)
                return
            except obstore.exceptions.BaseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


Answer = Callable[["Liar"], None]


class Liar(BaseHTTPRequestHandler):
    """An honest server of `data` at every path; the tests override one method each."""

    protocol_version = "HTTP/1.1"
    data = bytes(range(256)) * 16384  # 4 MiB
    etag: str | None = '"one"'
    modified: str | None = "Sun, 06 Nov 1994 08:49:37 GMT"
    #: what was asked, by each request: method, path, headers
    seen: list[tuple[str, str, dict[str, str]]]

    def log_message(self, *_: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self.note()
        self.send_response(200)
        self.describe(len(self.data))
        self.end_headers()

    def do_GET(self) -> None:
        self.note()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            self.whole()
            return
        start, end = int(found[1]), min(int(found[2]) + 1, len(self.data))
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != self.etag:
            self.refuse(412)
        elif start >= end:
            self.refuse(416)
        else:
            self.part(start, end)

    def part(self, start: int, end: int) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        self.describe(end - start)
        self.end_headers()
        self.wfile.write(self.data[start:end])

    def whole(self) -> None:
        self.send_response(200)
        self.describe(len(self.data))
        self.end_headers()
        self.wfile.write(self.data)

    def refuse(self, status: int, body: bytes = b"<p>no</p>") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def describe(self, length: int) -> None:
        self.send_header("Content-Length", str(length))
        if self.etag is not None:
            self.send_header("ETag", self.etag)
        if self.modified is not None:
            self.send_header("Last-Modified", self.modified)

    def note(self) -> None:
        self.seen.append((self.command, self.path, dict(self.headers)))


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        return  # a client that goes away is not an error here


@contextlib.contextmanager
def serving(handler: type[Liar], port: int = 0) -> Iterator[tuple[str, type[Liar]]]:
    """The server at work: the URL of an image there, and the class, whose attributes count."""
    cls = type(handler.__name__, (handler,), {"seen": []})
    server = _Quiet(("127.0.0.1", port), cls)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/disk.img", cls
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
