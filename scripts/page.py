"""HTML pages that need no network and no library: page.html, which all of them share, then a
template of their own. What a page begins with travels in it as one JSON object."""

import json
from pathlib import Path

START_OF_PAGE = Path(__file__).with_suffix(".html")
PLACEHOLDER = "/* the numbers */"  # in page.html: where the JSON goes


def page_text(template, content):
    """Returns page.html, with `content` as JSON in it, followed by a template that shows it."""
    # A text may hold "</script>". Without "<" nothing in a script element can end it.
    numbers = json.dumps(content).replace("<", "\\u003c")
    page = START_OF_PAGE.read_text("utf-8").replace(PLACEHOLDER, numbers)
    return page + template.read_text("utf-8")
