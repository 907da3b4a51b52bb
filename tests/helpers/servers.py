"""An S3 server on the loopback interface, and a faulty proxy before it, in separate processes."""

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO

import pytest

BUCKET = "shared"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-test",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    "AWS_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a new server with an empty bucket; it keeps objects in memory."""
    with _served("-m", "moto.server", "-H", "127.0.0.1", "-p") as address:
        with environment(address):
            raw_client().create_bucket(Bucket=BUCKET)
        yield address


@contextlib.contextmanager
def environment(address: str) -> Iterator[None]:
    """Environment variables that lead this process and its children to a server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def faulty(address: str, seed: int, share: float, log: str = os.devnull) -> Iterator[str]:
    """The address of a proxy that lets a share of all requests fail, in various ways.

    It writes a line for each request to a file: method, path and range.
    """
    with _served(str(Path(__file__)), address, str(seed), str(share), log) as proxy:
        yield proxy


@contextlib.contextmanager
def _served(*words: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *words, str(port)],
        env={**os.environ, **CREDENTIALS}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.05)


def raw_client() -> Any:
    """A client independent of our code, for the server that the environment names."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name=CREDENTIALS["AWS_REGION"]
    )


# --- harm ---

FAULTS = ("500", "503", "slow", "refuse", "swallow", "lose", "cut")


class Proxy(BaseHTTPRequestHandler):
    """Forwards requests, but drops some requests, some answers and parts of some answers."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    draw = random.Random(0)
    share = 0.0
    log: TextIO = sys.stderr
    lock = threading.Lock()

    def handle_any(self) -> None:
        with self.lock:
            fault = self.draw.choice(FAULTS) if self.draw.random() < self.share else ""
            print(self.command, self.path, self.headers.get("Range"), file=self.log, flush=True)
        if fault == "refuse":
            return self._hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "swallow":  # the request arrives and is never carried out
            return self._hang_up()
        if fault in ("500", "503"):
            return self._answer(int(fault), [("Content-Type", "application/xml")], b"<Error/>")
        if fault == "slow":
            time.sleep(1)
        upstream = http.client.HTTPConnection(self.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "lose":  # the request is carried out, and its answer is dropped
            return self._hang_up()
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _OF_THE_CONNECTION]
        return self._answer(answer.status, kept, data, cut=fault == "cut")

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any


_OF_THE_CONNECTION = {"connection", "transfer-encoding", "keep-alive", "server", "date"}


def serve_faults(address: str, seed: str, share: str, log: str, port: str) -> None:
    Proxy.upstream = address.removeprefix("http://")
    Proxy.draw, Proxy.share = random.Random(int(seed)), float(share)
    with Path(log).open("a") as Proxy.log:
        ThreadingHTTPServer(("127.0.0.1", int(port)), Proxy).serve_forever()


if __name__ == "__main__":
    serve_faults(*sys.argv[1:])
