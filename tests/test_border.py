"""Test that the core needs nothing of the folders that a fork may delete. The README names them."""

import re

import pytest
from children import ROOT

CORE = [path for folder in (".", "common", "tests") for path in sorted(ROOT.glob(f"{folder}/*.py"))]


@pytest.mark.parametrize("path", CORE, ids=[str(path.relative_to(ROOT)) for path in CORE])
def test_the_core_imports_nothing_that_a_fork_may_delete(path):
    assert not re.findall(r"^ *(?:from|import) (?:scripts|study|docs)\b", path.read_text(), re.M)
