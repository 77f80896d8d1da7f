"""The page of `python -m scripts.search --serve`: serve.html, which asks this process for results,
and then for each picture.

It is for this machine alone, or for one that is connected to it by `ssh -L`. Three things keep
others out: it listens on 127.0.0.1, it answers only to a host of this machine (so that no website
can reach it under a name of its own), and its address has a random part, which other users of this
machine do not know. A request names a picture by its number, never by a path.
"""

import json
import re
import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

from torchvision.io import encode_jpeg

from cli import InputError, check

PAGE = Path(__file__).with_suffix(".html")
SIDE = 224  # of a picture in pixels
FIRST = 24  # pictures that the page opens with
HOST = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?")  # any port, because ssh -L has its own


def make_server(port):
    """Take a port, 0 for any that is free. Raises InputError."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        reason = f"--port {port} cannot be used ({error.strerror}): use another, or 0 for any"
        raise InputError(reason) from None


def run(server, search, k):
    """Answer until Ctrl-C. server: from make_server; k: pictures to find."""
    server.search = search
    server.k = k
    server.token = secrets.token_urlsafe(16)
    # A browser opens connections that it may never use, so each has a thread. But they search one
    # after the other, because not every device lets two threads use a model.
    server.lock = threading.Lock()
    address = f"http://127.0.0.1:{server.server_port}/{server.token}/"
    print(f"\nopen {address} in a browser; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        server.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """One request of a browser, in a thread of its own."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        folder, _, name = path.rpartition("/")
        is_host = HOST.fullmatch(self.headers.get("Host", ""))
        is_token = secrets.compare_digest(folder.encode(), f"/{self.server.token}".encode())
        try:
            check(is_host and is_token, "this is not the address of the page")
            with self.server.lock:
                kind, content = self.answer(name, dict(parse_qsl(query)))
        except (InputError, LookupError, ValueError):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, name, options):
        """The content of an address: its type, and its bytes. Raises InputError, LookupError or
        ValueError if there is none."""
        search = self.server.search
        if name == "":
            return "text/html", PAGE.read_bytes()
        if name == "picture":
            number = int(options["number"])
            check(number >= 0, "there is no such picture")  # Python would take -1 as the last one
            image = search.image(number, SIDE)
            check(image is not None, "it cannot be read any more")
            return "image/jpeg", encode_jpeg(image).numpy().tobytes()
        if "like" in options:
            result = search.by_image(int(options["like"]), self.server.k)
        elif "text" in options:
            result = search.by_text(options["text"], self.server.k)
        else:
            result = search.first(FIRST)
        return "application/json", json.dumps(result).encode()

    def handle(self):
        with suppress(ConnectionError):  # a browser that has moved on does not wait for answers
            super().handle()

    def log_message(self, *_):
        """Print nothing, because a request may hold anything."""
