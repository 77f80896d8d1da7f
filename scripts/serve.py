"""Serve serve.html, the page of `python -m scripts.search --serve`, which asks for results and then
for each picture by its number.

Only this machine can use the page, or one that is connected to it by `ssh -L`, because the server
listens on 127.0.0.1. The address of the page has a random part. Other users of this machine do not
know it, nor does a website that gives its own name the address 127.0.0.1.
"""

import json
import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

from torchvision.io import encode_jpeg

from common.cli import InputError, check

PAGE = Path(__file__).with_suffix(".html")


def run(search, images):
    """Answer requests until Ctrl-C. search: a function that returns what scripts.search finds for a
    text; images: the Images of scripts.search."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)  # 0 is any free port
    server.search = search
    server.images = images
    server.token = secrets.token_urlsafe(16)
    # Each connection has a thread, because a browser opens connections that it may never use. The
    # lock lets one thread search at a time, because not every device lets two use a model.
    server.lock = threading.Lock()
    address = f"http://127.0.0.1:{server.server_port}/{server.token}/"
    print(f"\nopen {address} in a browser; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        server.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """Answer one request of a browser. Each handler runs in a separate thread."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        folder, _, name = path.rpartition("/")
        is_token = secrets.compare_digest(folder.encode(), f"/{self.server.token}".encode())
        try:
            check(is_token, "this is not the address of the page")
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
        """Return the content of an address: its type, and its bytes. name: the last part of the
        path; options: the query, a dict. Raise InputError, LookupError or ValueError if the
        address has no content."""
        if name == "":
            return "text/html", PAGE.read_bytes()
        if name == "picture":
            number = int(options["number"])
            check(number >= 0, "there is no such picture")  # Python reads -1 as the last one
            image, _ = self.server.images[number]
            check(image is not None, "it cannot be read any more")
            return "image/jpeg", encode_jpeg(image).numpy().tobytes()
        return "application/json", json.dumps(self.server.search(options["text"])).encode()

    def handle(self):
        with suppress(ConnectionError):  # A browser that leaves the page does not wait for answers.
            super().handle()

    def log_message(self, *_):
        """Print nothing, because a request may contain any text."""
