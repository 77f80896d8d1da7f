"""What the README and the pages of docs/ say stays true."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from material import TOKENIZER, make_model, write_checkpoint
from PIL import Image

from docs.notebook import SETUP, notebook

ROOT = Path(__file__).parent.parent.parent
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path: path.read_text() for path in PATHS}
README = PAGES[ROOT / "README.md"]
TUTORIAL = PAGES[ROOT / "docs" / "tutorial.md"]
STUDY = (ROOT / "study" / "results.md").read_text()
every_page = pytest.mark.parametrize("page", PATHS, ids=lambda path: path.name)


# ---- names in the text


NAMED = re.findall(r"(\w+\.py): `(\w+)` \|", PAGES[ROOT / "docs" / "differences.md"])


@pytest.mark.parametrize("file, name", sorted({*NAMED}), ids=" ".join)
def test_a_function_that_the_table_of_differences_names_is_there(file, name):
    assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text())


def test_the_table_of_differences_is_found():
    assert len(NAMED) >= 9


def flags_of_all_commands():
    sources = [path.read_text() for folder in ("", "*/") for path in ROOT.glob(f"{folder}*.py")]
    return {flag for source in sources for flag in re.findall(r'"--(\w+)"', source)}


@every_page
def test_every_flag_that_a_page_names_exists(page):
    """In a sentence, too. test_shell_lines.py holds that it belongs to its command."""
    of_others = {"nproc_per_node", "check", "help", "repo", "local"}  # of torchrun, ruff and hf

    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", PAGES[page]))

    assert named - flags_of_all_commands() - of_others == set()


@every_page
def test_every_module_that_a_page_names_exists(page):
    for module in re.findall(r"python -m ([a-z]+\.[a-z]+)", PAGES[page]):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def anchors_of(page):
    headings = re.findall(r"^##? (.+)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


@every_page
def test_every_file_and_heading_that_a_page_links_exists(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page

        assert target.exists(), link
        assert not heading or heading in anchors_of(target), link


# ---- numbers


def test_every_cell_of_the_readmes_table_is_one_of_the_study():
    """Such as "43.6 -> 91.0, +47.4 ± 3.1", in bold where it is reliable."""
    cells = re.findall(r"\| (\*{0,2}\d+\.\d -> [^|]+?) (?=\|)", README)

    assert cells
    assert [cell for cell in cells if f"| {cell} |" not in STUDY] == []


def test_every_difference_in_a_sentence_is_one_of_the_study():
    """Such as "47.4 ± 3.1"."""
    text = " ".join((README + TUTORIAL).split())

    found = re.findall(r"\b\d+\.\d ± \d+\.\d\b", text)

    assert found
    assert [number for number in found if not re.search(rf"[+-]{number}\b", STUDY)] == []


# ---- code


def test_the_code_in_the_readme_is_the_method():
    """The five lines that make CLIP SuperCLIP, against SuperCLIP.forward."""
    model = make_model().train()
    captions = TOKENIZER(["a red ring", "the blue thing", "grey"], 8)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = model(images, captions)

    def multi_hot(captions):  # without padding, start and end, which are no words
        present = torch.zeros(len(captions), TOKENIZER.vocab_size).scatter(1, captions, 1.0)
        return present.index_fill(1, torch.tensor([0, TOKENIZER.start, TOKENIZER.end]), 0.0)

    names = {
        "image_tokens": model.visual(images),
        "captions": captions,
        "contrastive_loss": expected["contrastive_loss"],
        "multi_hot": multi_hot,
        "cls_weight": 1.0,
        "head": model.head,
        "num_captions": model.num_captions,
        "token_counts": model.token_counts,
        "normalize": F.normalize,
        "cross_entropy": F.cross_entropy,
    }
    exec(re.search(r"```python\n(logits = .+?)```", README, re.DOTALL)[1], names)

    for name in ("classification_loss", "loss"):
        torch.testing.assert_close(names[name], expected[name])


def test_the_readmes_lines_of_inference_run_as_printed(tmp_path, monkeypatch, capsys):
    """On a checkpoint and a picture made here. They print numbers without a graph."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    write_checkpoint("out/best.pt", make_model())
    Image.new("RGB", (90, 60), "red").save("photo.jpg")
    names = {}

    exec(re.search(r"```python\n(from PIL.+?)```", README, re.DOTALL)[1], names)

    assert re.fullmatch(r"tensor\(\[\[.+,.+\]\]\)\n", capsys.readouterr().out)
    assert not names["model"].training


# ---- the tutorial

# Python blocks, each with the text block that follows at once.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", TUTORIAL, re.DOTALL)
DECIMAL = re.compile(r"[-+]?\d+\.(\d+)")


def test_the_notebook_is_that_of_the_tutorial():
    path = ROOT / "docs" / "tutorial.ipynb"

    assert path.read_text() == notebook(TUTORIAL), "run python -m docs.notebook"


def test_the_shell_of_the_notebook_has_the_python_of_its_kernel(monkeypatch):
    """Even if another one is first on the path. (A line with % is IPython's.)"""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    lines = [line for line in SETUP.splitlines() if not line.startswith("%")]

    exec("\n".join(lines), {})

    assert Path(shutil.which("python")).parent == Path(sys.executable).parent


def is_same_text(printed, expected):
    """Are two texts equal, up to the last digit of numbers with a decimal point and to white space?
    The floating point of two CPUs may differ in that digit."""
    if DECIMAL.sub("#", printed).split() != DECIMAL.sub("#", expected).split():
        return False
    for ours, theirs in zip(DECIMAL.finditer(printed), DECIMAL.finditer(expected)):
        if len(ours[1]) != len(theirs[1]):
            return False
        if abs(float(ours[0]) - float(theirs[0])) > 1.5 * 10.0 ** -len(theirs[1]):
            return False
    return True


def test_a_block_prints_what_the_page_says(capsys):
    """The tutorial computes everything by hand. Its blocks share their names, as they share one
    session on the page."""
    names = {}
    for code, expected in BLOCKS:
        exec(code, names)
        printed = capsys.readouterr().out

        assert is_same_text(printed, expected), f"{code}\nprints\n{printed}\nand not\n{expected}"
