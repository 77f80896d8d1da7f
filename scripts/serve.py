"""The page of scripts/search.py, written to a file (--out found.html) or served (--serve):

    python -m scripts.search --checkpoint clip.pt --images photos/ --features photos.npz --serve

Both pages are page.html, which the report has, too, followed by serve.html. In the file are the
results of the searches that the command was given, with their pictures. The served page asks this
process for results, then for each picture, and for words and maps when somebody clicks.

The page is for this machine alone, or for one that is connected to it by `ssh -L`. Three things
keep others out: it listens on 127.0.0.1, it answers only to a host of this machine (so that no
website can reach it under a name of its own), and its address has a random part, which other users
of this machine do not know. A request names a picture by its number, never by a path.
"""

import json
import os
import re
import secrets
import signal
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

import eval as evaluation
from cli import InputError, check
from scripts.report import SIDE, WORDS, data_uri, page_text, words_of, write_page

TEMPLATE = Path(__file__).with_suffix(".html")
HOST = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?")  # any port, because ssh -L has its own


def thumbnail(search, entry):
    """A picture as the text of a data: address, or "" if it cannot be read any more."""
    image = search.image(entry, SIDE)
    if isinstance(image, str):
        return ""
    return data_uri(image)


def write_results(path, results, search):
    """Write the page that needs no network. results: dict {text or entry: the result of its search}
    of a scripts.search.Search."""
    images = {}  # number of a picture, or name of one that others are like -> data: address
    for query, result in results.items():
        if "like" in result:
            images[result["like"]] = thumbnail(search, query)
        for found in result["found"]:
            i = found["number"]
            images[i] = thumbnail(search, search.entries[i])
    content = {"served": False, "results": [*results.values()], "images": images}
    write_page(path, TEMPLATE, content)


# -----------------------------------------------------------------------------
# The server


def open_server(port):
    """Take a port of 127.0.0.1; 0 is any that is free. Raises InputError."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}") from None


def run(server, search, k):
    """Answer until Ctrl-C. k: pictures to find at a time."""
    server.search = search
    server.k = k
    server.token = secrets.token_urlsafe(16)
    address = f"http://127.0.0.1:{server.server_port}/{server.token}/"
    signal.signal(signal.SIGINT, stop)
    print(f"\nopen {address} in a browser; Ctrl-C ends it", flush=True)
    server.serve_forever()


def stop(*_):
    """What Ctrl-C does: end at once. A thread may go on computing maps for a minute, and where
    Python ends under a thread that is inside torch, the process aborts. A KeyboardInterrupt would
    close the request that has just come under its thread, which would then complain."""
    print("\nstopped", flush=True)
    os._exit(0)


class Handler(BaseHTTPRequestHandler):
    """One request of a browser, in a thread of its own."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        folder, _, name = path.rpartition("/")
        is_host = HOST.fullmatch(self.headers.get("Host", ""))
        is_token = secrets.compare_digest(folder.encode(), f"/{self.server.token}".encode())
        try:
            check(is_host and is_token, "this is not the address of the page")
            content = self.answer(name, dict(parse_qsl(query)))
        except InputError:
            self.send_error(404)
            return
        kind = "application/json" if name else "text/html"
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "max-age=86400")  # the next run has another token
        self.end_headers()
        self.wfile.write(content.encode())

    def answer(self, name, options):
        """The content of an address, as text. Raises InputError if there is none."""
        search = self.server.search
        if name == "":
            return page_of(search.model, len(search.entries), self.server.k)
        if name == "search":
            return json.dumps(self.find(options))
        entry = search.entries[number_below(len(search.entries), options.get("number", ""))]
        if name == "picture":
            return json.dumps(thumbnail(search, entry))
        check(name in ("words", "maps"), "there is no such address")
        return json.dumps(words_in(search, entry, with_maps=name == "maps"))

    def find(self, options):
        """The result of a search for a text, or for what is like picture number `like`."""
        search = self.server.search
        k = self.server.k
        n = len(search.entries)
        skip = number_below(n + 1, options.get("skip", "0"))
        if "like" in options:
            i = number_below(n, options["like"])
            return search.by_image(search.entries[i], search.features[i], k, skip)
        check("text" in options, "there is nothing to look for")
        return search.by_text(options["text"], k, skip)

    def handle(self):
        with suppress(ConnectionError):  # a browser that has moved on does not wait for answers
            super().handle()

    def log_message(self, *_):
        """Print nothing, because a request may hold anything."""


def number_below(n, text):
    """The number that a request has as text, from 0 to n - 1. Raises InputError."""
    is_good = re.fullmatch("[0-9]{1,9}", text) and int(text) < n
    check(is_good, f"{text} is not a number below {n}")
    return int(text)


def page_of(model, n, k):
    """The page for a browser, with which to search n pictures and show k at a time. Unlike the one
    in a file it may ask for more, but its own server alone."""
    content = {"served": True, "pictures": n, "k": k, "head": model.head is not None}
    page = page_text(TEMPLATE, content)
    return page.replace("img-src data:", "img-src data:; connect-src 'self'", 1)


def words_in(search, entry, with_maps):
    """The head's words for a picture, as words_of has them or, at once, without their maps."""
    image = search.image(entry, search.model.config.image_size)
    if isinstance(image, str):
        raise InputError(image)
    with search.lock:
        if with_maps:
            return words_of(search.model, search.tokenizer, image, captions=[])
        [words] = evaluation.top_words(search.model, search.tokenizer, image[None], WORDS)
    return [{"word": word, "probability": p} for word, p, _ in words]
