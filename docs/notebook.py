"""Turn the tutorial into a notebook: python -m docs.notebook

Python blocks of tutorial.md become cells, shell blocks cells with "!", and a text block that
follows is what the cell printed. All else stays Markdown.
"""

import json
import re
from pathlib import Path

TUTORIAL = Path(__file__).with_name("tutorial.md")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.M | re.S)


def code_cell(source, printed=None):
    """A cell of code, and what it has printed, if anything."""
    output = {"output_type": "stream", "name": "stdout", "text": printed}
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source}
    return {**cell, "outputs": [output] if printed else []}


def notebook(text):
    """The Markdown text of the tutorial -> the text of an .ipynb file."""
    cells, end = [code_cell("%cd -q ..")], 0  # the commands are for the project's folder
    for match in [*BLOCK.finditer(text), None]:
        between = text[end : match.start() if match else len(text)].strip()
        if between:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": between})
        if match:
            language, source, printed = match.groups()
            source = re.sub(r"^(?=\S)", "!", source, flags=re.M) if language == "bash" else source
            cells.append(code_cell(source.rstrip("\n"), printed))
            end = match.end()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4}
    return json.dumps({**content, "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TUTORIAL.with_suffix(".ipynb").write_text(notebook(TUTORIAL.read_text("utf-8")), "utf-8")
