"""What the README claims of the code stays true."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


def names_of(file):
    """The functions and classes that a file defines."""
    tree = ast.parse((ROOT / file).read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_every_function_that_the_tables_name_is_there():
    named = re.findall(r"(\w+\.py): `(\w+)` \|", PAGES[ROOT / "docs" / "differences.md"])
    equations = README.split("| function in superclip.py |")[1].split("\n\n")[0]
    named += [("superclip.py", name) for name in re.findall(r"`(\w+)` \|", equations)]
    assert len(named) >= 16
    assert [(file, name) for file, name in named if name not in names_of(file)] == []


def test_every_flag_that_the_pages_name_exists():
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", "".join(PAGES.values())))
    folders = ("", "scripts/", "study/")
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]
    known = set(re.findall(r'"--(\w+)"', "".join(path.read_text() for path in paths)))
    known |= {row[0] for row in train.OPTIONS if isinstance(row, tuple)}
    foreign = {"nproc_per_node", "check", "help", "repo", "local"}  # of torchrun, ruff and hf
    assert flags - known - foreign == set()


def test_every_difference_is_one_of_the_study():
    """A cell such as "43.6 -> 91.0, +47.4 ± 3.1" stands in the study's results, too."""
    cells = re.findall(r"\| (\d+\.\d -> [^|]+?) (?=\|)", README)
    study = (ROOT / "study" / "results.md").read_text()
    assert len(cells) >= 5
    assert [cell for cell in cells if f"| {cell} |" not in study] == []


def test_every_interval_is_one_of_the_study():
    """Each "47.4 ± 3.1" of the README and the tutorial, in a sentence or a table."""
    text = README + PAGES[ROOT / "docs" / "tutorial.md"]
    study = (ROOT / "study" / "results.md").read_text()
    found = re.findall(r"\b\d+\.\d ± \d+\.\d\b", " ".join(text.split()))
    assert len(found) >= 20
    assert [interval for interval in found if not re.search(rf"[+-]{interval}\b", study)] == []


def anchors_of(page):
    headings = re.findall(r"^##? (.+)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


def test_every_file_and_heading_that_a_page_links_exists():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page}: {link}"
            assert not heading or heading in anchors_of(target), f"{page}: {link}"


def test_the_three_lines_of_inference_run_as_printed(tmp_path):
    """The README's Python block, on a checkpoint and a picture made here."""
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    setup = (
        "import torch, superclip, data; from PIL import Image\n"
        "from data import words_to_tiktoken\n"
        "import os; os.makedirs('out')\n"
        "tokenizer = data.Tokenizer(words_to_tiktoken(['dog', 'cat']))\n"
        "config = superclip.SuperCLIPConfig.preset('tiny', vocab_size=tokenizer.vocab_size)\n"
        "model = superclip.SuperCLIP(config)\n"
        "torch.save({'model': model.state_dict(), 'config': vars(config),"
        " 'vocab': tokenizer.vocab}, 'out/best.pt')\n"
        "Image.new('RGB', (90, 60), 'red').save('photo.jpg')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", setup + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert re.match(r"tensor\(\[\[.+,.+\]\]", run.stdout)
