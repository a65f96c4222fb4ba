"""A web server on loopback that answers each path as it is told, byte for byte, also wrongly."""

import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TLS_HANDSHAKE = b"\x16"
Page = Callable[[socket.socket], None]
"""Sends an answer of its own over the connection; the request has been read."""


def answer(
    body: bytes = b"", status: str = "200 OK", length: int | None = None, **headers: str
) -> Page:
    """A well-formed answer, but for a Content-Length of another value where one is given."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


def raw(data: bytes) -> Page:
    """Just these bytes, then the end of the connection."""
    return lambda connection: connection.sendall(data)


def redirect(onward: str, status: str = "302 Found") -> Page:
    """Sends the client elsewhere."""
    return answer(status=status, Location=onward)


def drip(data: bytes, pause: float, size: int = 1) -> Page:
    """A few bytes at a time, with a pause after each."""

    def send(connection: socket.socket) -> None:
        for start in range(0, len(data), size):
            connection.sendall(data[start : start + size])
            threading.Event().wait(pause)

    return send


def endless(head: bytes, piece: bytes) -> Page:
    """The same piece for as long as the client listens."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return send


def silent(connection: socket.socket) -> None:
    """Nothing until the client goes away."""
    connection.recv(1)


class Web:
    """A running server. `pages` may be changed at any time; `requests` is what was asked."""

    def __init__(self, address: str, port: int, pages: dict[str, Page]) -> None:
        self.host, self.port = address, port
        self.pages = pages
        self.requests: list[bytes] = []
        self.scheme = "http"

    def url(self, path: str = "/", host: str | None = None) -> str:
        """The address of a page."""
        return f"{self.scheme}://{host or self.host}:{self.port}{path}"

    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [request.split(b" ", 2)[1].decode() for request in self.requests]


@contextmanager
def serve(
    pages: dict[str, Page], tls: ssl.SSLContext | None = None, address: str = "127.0.0.1"
) -> Iterator[Web]:
    """A server for as long as this lasts; a page that is not there is a 404."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            # Clients that are right to hang up make sending fail.
            with suppress(OSError):
                self._answer(tls.wrap_socket(self.request, server_side=True) if tls else None)

        def _answer(self, secured: ssl.SSLSocket | None) -> None:
            connection: socket.socket = secured or self.request
            request = b""
            while b"\r\n\r\n" not in request:
                received = connection.recv(65536)
                if not received:
                    return
                request += received
                if request[:1] == TLS_HANDSHAKE:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    return
            web.requests.append(request)
            path = request.split(b" ", 2)[1].decode()
            web.pages.get(path, answer(b"gone", "404 Not Found"))(connection)
            connection.close()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 256
        block_on_close = False

    with Server((address, 0), Handler) as server:
        web = Web(address, server.server_address[1], pages)
        web.scheme = "https" if tls else "http"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def port_without_answers() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]
