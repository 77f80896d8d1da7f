"""What the README claims of the code stays true."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_line_that_the_tables_quote_is_in_the_code():
    quoted = re.findall(r"(\w+\.py): `(.+?)` \|", README)
    assert len(quoted) >= 14  # the equations and the differences from the authors' code
    for name, line in quoted:
        code = (ROOT / name).read_text()
        line = line.replace("\\|", "|")
        # as one line, however the formatter has broken it
        flat, sought = (re.sub(r"\s+", "", text) for text in (code, line))
        assert sought in flat, f"{name} no longer holds: {line}"


def test_every_flag_that_the_readme_names_exists():
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", README))
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")])
    known = set(re.findall(r'add\(\s*"(\w+)"', code)) | set(re.findall(r'"--(\w+)"', code))
    foreign = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "check"}
    foreign |= {"repo", "local"}  # of hf download
    assert flags - known - foreign == set()


def test_every_result_is_one_of_the_study():
    table = README.split("## Results")[1].split("## Speed")[0]
    numbers = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", table)
    study = (ROOT / "results" / "small_batch.md").read_text()
    assert len(numbers) >= 24
    assert [number for number in numbers if f"| {number} |" not in study] == []


def test_every_file_that_the_readme_links_exists():
    for path in re.findall(r"\]\((?!http|#)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_three_lines_of_inference_run_as_printed(tmp_path):
    """The README's Python block, on a checkpoint and a picture made here."""
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    setup = (
        "import torch, superclip, data; from PIL import Image\n"
        "import os; os.makedirs('out')\n"
        "tokenizer = data.Tokenizer(data.vocabulary_from_words(['dog', 'cat']))\n"
        "config = superclip.SuperCLIPConfig.preset('tiny', vocab_size=tokenizer.vocab_size)\n"
        "model = superclip.SuperCLIP(config)\n"
        "torch.save({'model': model.state_dict(), 'config': vars(config),"
        " 'vocab': tokenizer.vocab}, 'out/best.pt')\n"
        "Image.new('RGB', (90, 60), 'red').save('photo.jpg')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", setup + code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert re.match(r"tensor\(\[\[.+,.+\]\]", run.stdout)
