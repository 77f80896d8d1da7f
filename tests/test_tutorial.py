"""What the tutorial prints is true, and what it links and names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
# Python blocks, each with the text block that follows at once.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", PAGE, re.DOTALL)
DECIMAL = re.compile(r"[-+]?\d+\.(\d+)")
BOUNDARY = "-- the next block --"


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


@pytest.fixture(scope="module")
def printed():
    """What each block prints. They share one process, as they share one session on the page."""
    start = "import torch\ntorch.set_num_threads(1)\n"
    program = start + "".join(f"{code}\nprint({BOUNDARY!r})\n" for code, _ in BLOCKS)
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split(BOUNDARY)


@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_a_block_prints_what_the_page_says(printed, i):
    code, expected = BLOCKS[i]
    assert expected, f"no expected output after {code}"
    assert same(printed[i], expected), f"{code}\nprints\n{printed[i]}\nand not\n{expected}"


def test_every_python_block_is_found_and_is_short():
    assert len(BLOCKS) == PAGE.count("```python") >= 11
    assert [code for code, _ in BLOCKS if len(code.splitlines()) > 15] == []


def test_a_wrong_number_is_noticed():
    """Every number on the page, raised by two in its last digit."""
    for _, expected in BLOCKS:
        for number in re.finditer(r"\d+(?:\.(\d+))?", expected):
            digits = len(number[1] or "")
            wrong = f"{float(number[0]) + 2 * 10.0**-digits:.{digits}f}"
            changed = expected[: number.start()] + wrong + expected[number.end() :]
            assert not same(changed, expected), number[0]
    assert not same("the same: False", "the same: True")


def test_every_shell_block_says_how_long_it_takes():
    assert PAGE.count("```bash") >= 8
    for section in PAGE.split("\n## "):
        before, *blocks = section.split("```bash")
        said = re.search(r"\*(This takes|Seconds)\b[^*]*\.\*", before)
        assert said or not blocks, section[:30]


def test_the_page_has_pictures():
    """tests/test_readme.py sees to it that they and all other links are there."""
    assert len(re.findall(r"\]\([^)]+\.png\)", PAGE)) >= 4
