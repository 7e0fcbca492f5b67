"""HTTP servers on the loopback that stand in for those of others."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], **bound: object) -> Iterator[str]:
    """Serve by ``handler``, a class that gets ``bound`` as attributes, and yield the server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), bound))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
