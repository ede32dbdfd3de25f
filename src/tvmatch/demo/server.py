"""Serve the page until Ctrl-C or SIGTERM."""

import errno
import logging
import signal
import socket
import threading

import uvicorn
from fastapi import FastAPI

from tvmatch.errors import InputError

_GRACE = 1  # seconds that the server waits for open connections when it ends


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens on `host` and `port`; port 0 takes any free port.

    Raises:
        InputError: if the port is in use or not permitted, or `host` is not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError("port", f"must be from 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                "port", f"{port} is in use on {host}; choose another, or 0 for any free port"
            ) from None
        if error.errno == errno.EACCES:
            raise InputError("port", f"{port} is not permitted; choose a port above 1023") from None
        raise InputError("host", f"cannot listen on {host!r} ({error.strerror or error})") from None


def url(listening: socket.socket) -> str:
    """The URL of the page for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(application: FastAPI, listening: socket.socket) -> int:
    """Serve until Ctrl-C or SIGTERM, and return the exit code.

    The server and the threads that draw samples are daemon threads, so the process can end while samples are
    being drawn.
    """
    config = uvicorn.Config(
        application, log_level="error", access_log=False, timeout_graceful_shutdown=_GRACE, ws="none"
    )
    server = uvicorn.Server(config)
    finished = threading.Event()  # Thread.join cannot be called again after a signal interrupts it

    def run() -> None:
        try:
            server.run([listening])
        finally:
            finished.set()

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Thread(target=run, daemon=True).start()
        finished.wait()
    except KeyboardInterrupt:
        # Do not log the connections that are closed.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        server.should_exit = True
        finished.wait(_GRACE + 2)
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1  # uvicorn could not start, and has logged the reason
