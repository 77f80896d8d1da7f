"""Turn tutorial.md, lab.md and gpu.md into notebooks: python -m docs.notebook

Python blocks become cells, and so do shell blocks, by way of `run`. A text block that follows a
Python block at once is what the cell printed. All else stays Markdown, and the figures are in it.

A notebook may be opened anywhere, also without the repository, and all of its cells may be run
again: a run of train.py then resumes. The address of the repository is that of CITATION.cff.
"""

import base64
import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = [DOCS / name for name in ("tutorial.md", "lab.md", "gpu.md")]
CITATION = (DOCS.parent / "CITATION.cff").read_text("utf-8")
ADDRESS = re.search(r'^repository-code: "(.*)"$', CITATION, re.M)[1]
# The first cell. Its commands have no terminal, so they draw no progress bars.
SETUP = f"""
ADDRESS = "{ADDRESS}"  # of the repository: fill it in where there is no clone yet, as on Colab
"""
SETUP += r'''
import os
import re
import subprocess
import sys
from pathlib import Path


def run(commands):
    """Run each line as in a terminal, with the Python of this notebook, and show its output."""
    for command in commands.replace("\\\n", "").splitlines():
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        command = re.sub("^python ", f'"{sys.executable}" ', command)
        with subprocess.Popen(command, shell=True, **pipes) as process:
            for line in process.stdout:
                print(line, end="")


os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
os.environ["PYTHONUNBUFFERED"] = "1"  # lines come as they are printed
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait sleep, as in train.py
here = Path.cwd()
clone = here / "superclip"
found = [folder for folder in (here, *here.parents, clone) if (folder / "superclip.py").exists()]
if not found:
    assert ADDRESS, f"fill in ADDRESS, and this cell clones the repository into {clone}"
    run(f"git clone -q {ADDRESS} superclip")
    run("python -m pip install -q -r superclip/requirements.txt")
    found = [clone]
os.chdir(found[0])
sys.path.insert(0, str(found[0]))
'''
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.M | re.S)


def code_cell(source, printed=None):
    """A cell of code, and what it has printed, if anything."""
    output = {"output_type": "stream", "name": "stdout", "text": printed}
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source.strip()}
    return {**cell, "outputs": [output] if printed else []}


def shell_cell(commands):
    """A cell that runs shell commands, which may be given again."""
    commands = re.sub(r"^python train\.py", r"\g<0> --resume", commands.strip(), flags=re.M)
    return code_cell(f'run(r"""{commands}""")')


def embedded(match):
    """A figure whose file is named -> one that carries its bytes. Colab shows no other kind."""
    title, path = match.groups()
    content = base64.b64encode((DOCS / path).read_bytes()).decode()
    return f"![{title}](data:image/png;base64,{content})"


def markdown_cells(text):
    """A list of one cell, or of none if the text is blank."""
    source = re.sub(r"!\[([^]]*)\]\((\S+\.png)\)", embedded, text.strip())
    return [{"cell_type": "markdown", "metadata": {}, "source": source}] if source else []


def notebook(text):
    """The Markdown text of a page -> the text of an .ipynb file."""
    cells = [code_cell(SETUP)]
    end = 0
    for match in BLOCK.finditer(text):
        cells += markdown_cells(text[end : match.start()])
        language, source, printed = match.groups()
        cells.append(shell_cell(source) if language == "bash" else code_cell(source, printed))
        end = match.end()
    cells += markdown_cells(text[end:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel}
    if "--device cuda" in text:
        metadata["accelerator"] = "GPU"  # that Colab lends
    content = {"cells": cells, "metadata": metadata, "nbformat": 4}
    return json.dumps({**content, "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for page in PAGES:
        page.with_suffix(".ipynb").write_text(notebook(page.read_text("utf-8")), "utf-8")
