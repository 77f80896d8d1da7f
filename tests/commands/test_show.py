"""Test scripts/show.py, which prints what shards hold."""

from material import png, run, write_shard
from PIL import Image

from common.tokenizer import words_to_tiktoken
from scripts import show

PNG = png("red")


def test_samples_captions_twins_labels_and_what_cannot_be_used(tmp_path, capsys):
    """The shard holds eight samples with seven captions, two of which have the same words. Four
    parts of the shard are not used. They are an image that cannot be read, a caption without an
    image, an image without a caption, and a name with a second dot. We also check the label of "a
    red dog 3". The word "3" is in one of seven captions, "red" in six, "a" and "dog" in all. So
    their weights are log(8 / 2) = 1.386, log(8 / 7) = 0.134 and 0."""
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken("a red dog cat 1 2 3".split()))
    captions = [f"a red dog {i}" for i in range(5)] + ["A red dog 1"]
    samples = [{"png": PNG, "txt": caption.encode()} for caption in captions]
    samples += [{"png": b"?", "txt": b"a dog"}, {"txt": b"a cat"}, {"png": PNG}, {"v2.png": PNG}]
    dogs = write_shard(tmp_path / "0.tar", samples)

    assert not run(show.main, dogs, "--picture", tmp_path / "grid.png")

    printed = capsys.readouterr().out
    assert "8 samples in 1 shards, 7 captions" in printed
    assert "repeated captions: 2 (28.6%)" in printed
    assert "not used: 4\n" in printed
    for key in ("0006", "0007", "0008", "0009.v2.png"):
        assert f"such as {dogs}:{key}\n" in printed
    assert "label: 3 0.91  red 0.09  a 0.00  dog 0.00" in printed
    assert Image.open(tmp_path / "grid.png").width > 4 * show.SIDE
