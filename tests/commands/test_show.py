"""Test scripts/show.py, which counts and draws what shards hold."""

from material import png, run, write_shard
from PIL import Image

from scripts import show


def test_it_counts_samples_and_repeated_captions_and_draws_some_pairs(tmp_path, capsys):
    """Two of the seven captions have the same words. A picture cannot be read, and a caption is
    missing."""
    captions = [f"a red dog {i}" for i in range(5)] + ["A red dog 1"]
    samples = [{"png": png("red"), "txt": caption.encode()} for caption in captions]
    samples += [{"png": b"?", "txt": b"a dog"}, {"png": png("red")}]
    shard = write_shard(tmp_path / "0.tar", samples)

    assert not run(show.main, shard, "--out", tmp_path / "pairs.png")

    printed = capsys.readouterr().out
    assert f"2 of them cannot be used, such as {shard}:0006" in printed
    assert f"{2 / 7:.1%}" in printed
    assert Image.open(tmp_path / "pairs.png").width > 4 * show.SIDE
