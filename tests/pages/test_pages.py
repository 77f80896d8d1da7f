"""What the README and the pages of docs/ say stays true."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from material import TOKENIZER, make_model, write_checkpoint
from PIL import Image

from docs.notebook import notebook

ROOT = Path(__file__).parent.parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
TUTORIAL_NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
README, TUTORIAL = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs" / "tutorial.md"]
STUDY = (ROOT / "study" / "results.md").read_text()
# Python blocks of the tutorial, each with the text block that follows at once.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", TUTORIAL, re.DOTALL)
DECIMAL = re.compile(r"[-+]?\d+\.(\d+)")


def test_every_function_that_a_table_names_is_there():
    named = re.findall(r"(\w+\.py): `(\w+)` \|", PAGES[ROOT / "docs" / "differences.md"])
    assert len(named) >= 9
    sources = {file: (ROOT / file).read_text() for file, _ in named}
    assert [x for x in named if not re.search(rf"(def|class) {x[1]}\b", sources[x[0]])] == []


def test_the_code_in_the_readme_is_the_method():
    """CLIP in a few lines, and the five lines that make it SuperCLIP, against SuperCLIP.forward."""
    model, captions = make_model().train(), TOKENIZER(["a red ring", "the blue thing", "grey"], 8)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = model(images, captions)

    def is_in(captions):  # without padding, start and end, which are no words
        present = torch.zeros(len(captions), TOKENIZER.vocab_size).scatter(1, captions, 1.0)
        return present.index_fill(1, torch.tensor([0, TOKENIZER.start, TOKENIZER.end]), 0.0)

    names = {"images": images, "captions": captions, "is_in": is_in, "cls_weight": 1.0}
    names |= {"visual": model.visual, "text_tower": model.text, "head": model.head}
    names |= {k: getattr(model, k) for k in ("logit_scale", "num_captions", "token_counts")}
    names |= {"normalize": F.normalize, "cross_entropy": F.cross_entropy, "arange": torch.arange}
    exec(re.search(r"```python\n(# images.+?)```", README, re.DOTALL)[1], names)
    for name in ("contrastive_loss", "classification_loss", "loss"):
        torch.testing.assert_close(names[name], expected[name])


def test_the_notebook_is_that_of_the_tutorial():
    assert TUTORIAL_NOTEBOOK.read_text() == notebook(TUTORIAL), "run python -m docs.notebook"


def test_every_flag_and_module_that_a_page_names_exists():
    text = "".join(PAGES.values())
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text))
    sources = (path.read_text() for folder in ("", "*/") for path in ROOT.glob(f"{folder}*.py"))
    known = set(re.findall(r'"--(\w+)"', "".join(sources)))
    foreign = {"nproc_per_node", "check", "help", "repo", "local"}  # of torchrun, ruff and hf
    assert flags - known - foreign == set()
    modules = set(re.findall(r"python -m ([a-z]+\.[a-z]+)", text))
    assert [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()] == []


def test_every_difference_is_one_of_the_study():
    """A cell such as "43.6 -> 91.0, +47.4 ± 3.1", and each "47.4 ± 3.1" in a sentence or table."""
    cells = re.findall(r"\| (\d+\.\d -> [^|]+?) (?=\|)", README)
    assert cells and [cell for cell in cells if f"| {cell} |" not in STUDY] == []
    found = re.findall(r"\b\d+\.\d ± \d+\.\d\b", " ".join((README + TUTORIAL).split()))
    assert found and [x for x in found if not re.search(rf"[+-]{x}\b", STUDY)] == []


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


def test_the_readmes_lines_of_inference_run_as_printed(tmp_path, monkeypatch, capsys):
    """On a checkpoint and a picture made here."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    write_checkpoint("out/best.pt", make_model())
    Image.new("RGB", (90, 60), "red").save("photo.jpg")
    exec(re.search(r"```python\n(from PIL.+?)```", README, re.DOTALL)[1], names := {})
    assert re.fullmatch(r"tensor\(\[\[.+,.+\]\]\)\n", capsys.readouterr().out)  # without a graph
    assert not names["model"].training


def same(printed, expected):
    """Are two texts equal, up to the last digit of numbers with a decimal point and to white space?
    The floating point of two CPUs may differ in that digit."""
    if DECIMAL.sub("#", printed).split() != DECIMAL.sub("#", expected).split():
        return False
    pairs = zip(DECIMAL.finditer(printed), DECIMAL.finditer(expected))
    return all(
        len(a[1]) == len(b[1]) and abs(float(a[0]) - float(b[0])) < 1.5 * 10.0 ** -len(a[1])
        for a, b in pairs
    )


def test_a_block_prints_what_the_page_says(capsys):
    """The tutorial computes everything by hand. Its blocks share their names, as they share one
    session on the page."""
    names = {}
    for code, expected in BLOCKS:
        exec(code, names)
        printed = capsys.readouterr().out
        assert same(printed, expected), f"{code}\nprints\n{printed}\nand not\n{expected}"
