"""Turn tutorial.md and gpu.md into notebooks: python -m docs.notebook

Python blocks become cells, shell blocks cells with "!", and a text block that follows is what the
cell printed. All else stays Markdown.
"""

import json
import re
from pathlib import Path

TUTORIAL = Path(__file__).with_name("tutorial.md")
GPU = TUTORIAL.with_name("gpu.md")
# The commands are for the project's folder, and for the Python of the kernel.
SETUP = """import os, sys
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
%cd -q .."""
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.M | re.S)


def code_cell(source, printed=None):
    """A cell of code, and what it has printed, if anything."""
    output = {"output_type": "stream", "name": "stdout", "text": printed}
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source}
    return {**cell, "outputs": [output] if printed else []}


def markdown_cells(text):
    """A list of one cell, or of none if the text is blank."""
    source = text.strip()
    return [{"cell_type": "markdown", "metadata": {}, "source": source}] if source else []


def notebook(text):
    """The Markdown text of a page -> the text of an .ipynb file."""
    cells = [code_cell(SETUP)]
    end = 0
    for match in BLOCK.finditer(text):
        cells += markdown_cells(text[end : match.start()])
        language, source, printed = match.groups()
        if language == "bash":
            source = re.sub(r"^(?=\S)", "!", source, flags=re.M)
        cells.append(code_cell(source.rstrip("\n"), printed))
        end = match.end()
    cells += markdown_cells(text[end:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4}
    return json.dumps({**content, "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for page in (TUTORIAL, GPU):
        page.with_suffix(".ipynb").write_text(notebook(page.read_text("utf-8")), "utf-8")
