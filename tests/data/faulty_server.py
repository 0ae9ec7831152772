"""A real HTTP server on this machine that drops, truncates, stalls and answers 500, as a seed says."""

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

FAULTS = ("drop", "truncate", "stall", "error", "reset")


class FaultyServer:
    """Serves a folder. A request meets a fault with probability `fault_share`; files in `broken` always do."""

    def __init__(self, folder: Path, *, seed: int = 0, fault_share: float = 0.0, faults: tuple[str, ...] = FAULTS):
        self.folder, self.fault_share, self.faults = folder, fault_share, faults
        self.broken: dict[str, str] = {}
        self.takes_ranges = self.says_length = True
        self.seen: Counter[str] = Counter()
        """Faults met, `ok`, and `range` for requests that began in the middle."""
        self.requested: Counter[str] = Counter()
        self._random, self._lock = Random(seed), threading.Lock()
        self.stopping = threading.Event()

    def next_fault(self, name: str) -> str:
        with self._lock:
            self.requested[name] += 1
            fault = self.broken.get(name)
            if fault is None:
                is_faulty = self._random.random() < self.fault_share
                fault = self._random.choice(self.faults) if is_faulty else "ok"
            self.seen[fault] += 1
            return fault

    def draw_share(self) -> float:
        with self._lock:
            return self._random.random()


@contextmanager
def serve(server: FaultyServer) -> Iterator[str]:
    """The URL of the server's folder, for as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, server)

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        server.stopping.set()
        httpd.shutdown()
        httpd.server_close()


def _answer(handler: BaseHTTPRequestHandler, server: FaultyServer) -> None:
    handler.close_connection = True
    name = handler.path.lstrip("/")
    fault = server.next_fault(name)
    path = server.folder / name
    if fault == "error":
        return handler.send_error(500)
    if fault == "reset":
        return handler.connection.shutdown(socket.SHUT_RDWR)
    if not path.is_file():
        return handler.send_error(404)
    data = path.read_bytes()
    start = _send_head(handler, server, data, tag=f'"{len(data)}-{path.stat().st_mtime_ns}"')
    body = data[start:]
    end = len(body) if fault == "ok" else int(len(body) * server.draw_share())
    handler.wfile.write(body[:end])
    handler.wfile.flush()
    if fault == "stall":
        server.stopping.wait(20)
    elif fault == "drop":
        time.sleep(0.01)
        handler.connection.shutdown(socket.SHUT_RDWR)


def _send_head(handler: BaseHTTPRequestHandler, server: FaultyServer, data: bytes, *, tag: str) -> int:
    """Where the body starts."""
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    is_same = handler.headers.get("If-Range", tag) == tag
    start = int(asked[1]) if asked and server.takes_ranges and is_same else 0
    handler.send_response(206 if start else 200)
    if start:
        server.seen["range"] += 1
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    if server.says_length:
        handler.send_header("Content-Length", str(len(data) - start))
    handler.send_header("ETag", tag)
    handler.send_header("Connection", "close")
    handler.end_headers()
    return start
