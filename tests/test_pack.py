"""From a list of images and captions to shards (pack), and a look at them (show)."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import JPEG, WORDS, encoded, good, photo, write_tar

import data
from data import Pairs, words_to_tiktoken
from scripts import pack, pictures, show
from superclip import InputError

# -----------------------------------------------------------------------------
# pack


@pytest.fixture
def pictures_and_list(tmp_path):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for i in range(12):
        photo(i, (300 + i, 200)).save(folder / f"é {i}.jpg", quality=95)
    photo(1, (50, 40)).save(folder / "small.jpg")
    photo(2, (400, 300), "RGBA").save(folder / "alpha.png")
    (folder / "broken.jpg").write_bytes(b"?")
    rows = [f'é {i}.jpg,"a red dog, number {i}"' for i in range(12)]
    rows += ["small.jpg,a cat", "alpha.png,a blue cat", "é 0.jpg,a second caption"]
    rows += ["broken.jpg,a dog", "missing.jpg,a dog", "small.jpg,  ", "small.jpg,one, two"]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")
    return tmp_path


def run_pack(folder, *options):
    options = ["--out", str(folder / "out"), "--images", str(folder / "my pictures"), *options]
    pack.main(["--csv", str(folder / "pairs.csv"), *options])


def contents(folder):
    return {p.name: p.read_bytes() for p in (folder / "out").iterdir()}


def samples(folder):
    """Image name -> fields of the .json, of all shards that pack made in folder / "out"."""
    pairs = Pairs(data.expand([folder / "out"]), None, 16, ["json.captions"])
    assert pairs.unused == []
    all_fields = [json.loads(pairs.read(row, data.JSON)) for row in pairs.index.tolist()]
    return {fields["image"]: fields for fields in all_fields}


def bad_rows(folder):
    lines = (folder / "out" / "bad_rows.csv").read_text().splitlines()
    assert lines[0] == "line,image,reason"
    return [line.split(",", 2) for line in lines[1:]]


def test_pack_makes_shards_that_pairs_reads(pictures_and_list, capsys):
    run_pack(pictures_and_list, "--size", "64", "--val", "0.3", "--shard_size", "4")
    pairs = Pairs(data.expand([pictures_and_list / "out"]), None, 16, ["json.captions"])
    assert len(pairs) == 14 and pairs.unused == []
    captions = {}
    for row in pairs.index.tolist():
        fields = json.loads(pairs.read(row, data.JSON))
        captions[fields["image"]] = pairs.texts(row, "json.captions")
        image = Image.open(io.BytesIO(pairs.read(row, data.IMAGE)))
        assert min(image.size) == (40 if fields["image"] == "small.jpg" else 64)  # never enlarged
        assert image.size == (fields["width"], fields["height"])
        assert pairs.texts(row, "txt") == captions[fields["image"]][:1]
    assert captions["é 0.jpg"] == ["a red dog, number 0", "a second caption"]
    bad = bad_rows(pictures_and_list)
    assert [line for line, _, _ in bad] == ["17", "18", "19", "20"]
    reasons = ["cannot be read", "no such file", "empty", "quotes"]
    assert all(expected in reason for expected, (_, _, reason) in zip(reasons, bad))
    printed = capsys.readouterr().out
    assert "4 rows cannot be used" in printed and "--captions json.captions" in printed
    assert "fine-tune" in printed  # few pairs


def test_pack_makes_only_what_is_missing(pictures_and_list, monkeypatch):
    options = ["--size", "64", "--val", "0.3", "--shard_size", "4"]
    original, calls = pack.encode, []

    def stops(path, size, quality):
        calls.append(path)
        if len(calls) == 7:
            raise RuntimeError
        return original(path, size, quality)

    monkeypatch.setattr(pack, "encode", stops)
    with pytest.raises(RuntimeError):
        run_pack(pictures_and_list, *options)
    finished = {n: c for n, c in contents(pictures_and_list).items() if n.endswith(".tar")}
    assert len(finished) == 1
    calls.clear()

    def counts(path, size, quality):
        calls.append(path)
        return original(path, size, quality)

    monkeypatch.setattr(pack, "encode", counts)
    run_pack(pictures_and_list, *options)
    assert len(calls) == 16 - 4  # those of the first shard are not read again
    resumed = contents(pictures_and_list)
    assert resumed.items() >= finished.items() and not any("tmp" in name for name in resumed)
    calls.clear()
    run_pack(pictures_and_list, *options)  # nothing is left to do
    assert calls == [] and contents(pictures_and_list) == resumed
    for path in (pictures_and_list / "out").iterdir():
        path.unlink()
    run_pack(pictures_and_list, *options)  # in one go: the same bytes
    assert contents(pictures_and_list) == resumed
    (pictures_and_list / "out" / "train-00001.tar").unlink()
    run_pack(pictures_and_list, *options)  # a shard was lost: it is made again
    assert contents(pictures_and_list) == resumed
    with pytest.raises(InputError, match="other options"):
        run_pack(pictures_and_list, "--size", "32")


def test_images_that_were_missing_are_tried_again(pictures_and_list):
    folder = pictures_and_list / "my pictures"
    (folder / "small.jpg").rename(folder / "away.jpg")
    run_pack(pictures_and_list, "--shard_size", "4")
    assert {"small.jpg", "missing.jpg"} <= {image for _, image, _ in bad_rows(pictures_and_list)}
    (folder / "away.jpg").rename(folder / "small.jpg")
    run_pack(pictures_and_list, "--shard_size", "4")
    assert len(samples(pictures_and_list)) == 14 and "small.jpg" in samples(pictures_and_list)
    bad = [image for _, image, reason in bad_rows(pictures_and_list) if "no such file" in reason]
    assert bad == ["missing.jpg"]


def test_a_shard_without_samples_is_not_written(pictures_and_list):
    (pictures_and_list / "pairs.csv").write_text("file,text\nmissing.jpg,a cat\nsmall.jpg,a dog\n")
    for _ in range(2):
        run_pack(pictures_and_list, "--val", "0", "--shard_size", "1")
        shards = [path.name for path in (pictures_and_list / "out").glob("*.tar")]
        assert shards == ["train-00001.tar"] and list(samples(pictures_and_list)) == ["small.jpg"]


def test_size_0_keeps_the_files(pictures_and_list):
    run_pack(pictures_and_list, "--size", "0", "--val", "0")
    pairs = Pairs(data.expand([pictures_and_list / "out"]), None, 16)
    for row in pairs.index.tolist():
        name = json.loads(pairs.read(row, data.JSON))["image"]
        original = pictures_and_list / "my pictures" / name
        assert pairs.read(row, data.IMAGE) == original.read_bytes()


def test_smaller_images_are_upright_and_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo(0, (90, 60)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (60, 60), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name, size in (("turned.jpg", (30, 45)), ("clear.png", (30, 30))):
        _, content, width, height = pack.encode(tmp_path / name, 30, 90)
        image = Image.open(io.BytesIO(content))
        assert image.size == (width, height) == size and not image.getexif()
    assert np.asarray(image).min() > 250


def test_an_image_stays_in_its_split_when_the_list_grows():
    names = [f"{i}.jpg" for i in range(1000)]

    def validation(names):
        plan = pack.plan(names, 0.2, 100)
        return {name for shard, part in plan.items() if "val" in shard for _, name in part}

    assert 150 < len(validation(names)) < 250
    assert validation(names[:500]) == validation(names) & set(names[:500])


# -----------------------------------------------------------------------------
# The list


def read_list(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return pack.read_list(path, pack.IMAGE_COLUMNS, pack.CAPTION_COLUMNS)


def captions_and_bad_lines(path, text):
    found, bad = read_list(path, text)
    return {image: pack.merge(rows)[0] for image, rows in found.items()}, [b[0] for b in bad]


ROWS = [("what", "Text", "long"), *((f"é {i}.jpg", f"a dog; {i}", f"long, {i}") for i in range(3))]


@pytest.mark.parametrize("kind", ["comma", "semicolon", "tab", "JSON"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_kind_of_list_is_recognised(pictures_and_list, kind, encoding):
    if kind == "JSON":
        lines = [json.dumps(dict(zip(ROWS[0], row))) for row in ROWS[1:]]
    else:
        delimiter = {"comma": ",", "semicolon": ";", "tab": "\t"}[kind]
        quote = "" if kind == "tab" else '"'
        lines = [delimiter.join(f"{quote}{field}{quote}" for field in row) for row in ROWS]
    path = pictures_and_list / {"tab": "list.tsv", "JSON": "list.jsonl"}.get(kind, "list.csv")
    path.write_bytes("\r\n".join(lines).encode(encoding))
    options = ["--csv", str(path), "--out", str(pictures_and_list / "out"), "--val", "0"]
    options += ["--images", str(pictures_and_list / "my pictures")]
    with pytest.raises(InputError, match="--image_column: what, Text, long"):
        pack.main(options)
    pack.main([*options, "--image_column", "what"])
    assert [
        (name, fields["captions"], fields["long"])
        for name, fields in samples(pictures_and_list).items()
    ] == [(name, [text], long) for name, text, long in ROWS[1:]]


def test_in_a_tsv_a_quotation_mark_is_a_character(tmp_path):
    text = 'image\tcaption\na.jpg\t"big dog\nb.jpg\tpipe 5"\nc.jpg\t"a cat"\n'
    found, bad = captions_and_bad_lines(tmp_path / "list.tsv", text)
    assert found == {"a.jpg": ['"big dog'], "b.jpg": ['pipe 5"'], "c.jpg": ['"a cat"']} and not bad


SWALLOWED = {  # rows after the header "image,caption" -> the images that are used, the bad lines
    "until another stray quote": (
        'a.jpg,"big dog\nb.jpg,cat\nc.png,pipe 5"\nd.jpg,cat',
        "bcd",
        [2],
    ),
    "until a quoted caption": ('a.jpg,"big dog\nb.jpg,cat\nc.jpg,"x, y"\nd.jpg,cat', "bcd", [2]),
    "until the end": ('a.jpg,cat\nb.jpg,"big dog\nc.jpg,cat\nd.jpg,cat', "acd", [3]),
    "names without suffix": ('a,"big dog\nb,cat\nc,pipe 5"\nd,cat', "bcd", [2]),
    "text after the quotes": ('a.jpg,"big" dog\nb.jpg,cat', "b", [2]),
    "a cut file": ('a.jpg,cat\nb.jpg,"a caption\nof two lines', "a", [3, 4]),
    "the quote in the image's name": ('"a.jpg,big dog\nb.jpg,cat\n"c.jpg",cat', "bc", [2]),
}


@pytest.mark.parametrize("text, used, bad_lines", SWALLOWED.values(), ids=SWALLOWED)
def test_a_stray_quote_in_a_csv_costs_its_own_row_only(tmp_path, text, used, bad_lines):
    found, bad = read_list(tmp_path / "list.csv", "image,caption\n" + text)
    assert "".join(Path(image).stem for image in found) == used
    assert [line for line, _, _ in bad] == bad_lines
    assert "quotation mark" in bad[0][2]


def test_a_quoted_caption_may_have_several_lines_and_quotes(tmp_path):
    text = 'image,caption\na.jpg,"a ""red"" dog,\n\nwith 5, 6 or 7 cats"\n\nb.jpg,a cat\n'
    found, bad = captions_and_bad_lines(tmp_path / "list.csv", text)
    assert found == {"a.jpg": ['a "red" dog,\n\nwith 5, 6 or 7 cats'], "b.jpg": ["a cat"]}
    assert bad == []


def test_other_columns_of_later_rows_are_kept(pictures_and_list):
    rows = ["image,caption,long,source", "small.jpg,a cat,a long text,web", "small.jpg,a dog,,web"]
    rows += ["small.jpg,a cat,another one,web"]
    (pictures_and_list / "pairs.csv").write_text("\n".join(rows))
    run_pack(pictures_and_list, "--val", "0")
    fields = samples(pictures_and_list)["small.jpg"]
    assert fields["captions"] == ["a cat", "a dog"]
    assert fields["long"] == ["a long text", "another one"] and fields["source"] == "web"
    lists = [(1, [], {"tags": ["x"], "n": None}), (2, [], {"tags": ["y"], "n": 0})]
    assert pack.merge(lists) == ([], {"tags": [["x"], ["y"]], "n": 0})


def test_two_spellings_of_a_path_are_one_sample(tmp_path):
    text = "image,caption\n./a.jpg,one\nb/../a.jpg,two\na.jpg ,three\nb//c.jpg,four"
    found, _ = captions_and_bad_lines(tmp_path / "list.csv", text)
    assert found == {"a.jpg": ["one", "two", "three"], "b/c.jpg": ["four"]}


def test_pack_says_which_columns_it_takes(tmp_path, capsys):
    read_list(tmp_path / "list.csv", "url,Title,filename,caption\nhttp://x,b,a.jpg,a dog")
    assert (
        "images from column 'filename', captions from column 'caption'" in capsys.readouterr().out
    )


def test_many_rows_of_one_image_are_not_compared_with_each_other():
    class Text(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Text.compared += 1
            return str.__eq__(self, other)

    rows = [(i, [Text(f"caption {i % 1500}")], {"long": Text(i)}) for i in range(3000)]
    captions, fields = pack.merge(rows)
    assert len(captions) == 1500 and len(fields["long"]) == 3000
    assert Text.compared <= 10 * len(rows)


def test_rows_that_cannot_be_used_are_named_with_the_reason(tmp_path):
    rows = [{"image": "a.jpg"}, {"image": "a.jpg", "caption": [" ", None]}, {"caption": "a dog"}]
    rows += [{"image": 3, "caption": "a dog"}, {"image": "a.jpg", "caption": "\ud800"}]
    rows += [{"image": "a.jpg", "caption": "a " * 20_000}, ["a.jpg", "a dog"]]
    good_row = {"image": "a.jpg", "caption": [None, "a dog"], "long": "\ud800"}
    text = "\n".join(map(json.dumps, [*rows, good_row])) + "\n{"
    found, bad = read_list(tmp_path / "list.jsonl", text)
    assert list(found) == ["a.jpg"]
    empty, nameless, no_json = "missing or empty", "no image is named", "not a JSON object"
    expected = [empty, empty, nameless, nameless, "not UTF-8", "too long", no_json, no_json]
    assert [line for line, _, _ in bad] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert all(part in reason for part, (_, _, reason) in zip(expected, bad))


def test_bytes_that_are_not_utf8_spoil_their_own_row(tmp_path):
    content = b"image,caption\na.jpg,caf\xe9\nb.jpg,a dog\n"
    (tmp_path / "list.csv").write_bytes(content)
    found, bad = pack.read_list(tmp_path / "list.csv", ["image"], ["caption"])
    assert list(found) == ["b.jpg"] and bad == [(2, "a.jpg", "the caption is not UTF-8")]


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg", "x" * 300, "/", "no/such/file.jpg"])
def test_a_name_that_is_not_a_files_is_a_bad_row(tmp_path, name):
    rows = [{"image": name, "caption": "a dog"}, {"image": "a.jpg", "caption": "a cat"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    photo().save(tmp_path / "a.jpg")
    options = ["--csv", str(tmp_path / "list.jsonl"), "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second run looks for it again
        pack.main([*options, "--val", "0"])
        assert list(samples(tmp_path)) == ["a.jpg"]
        assert [line for line, _, _ in bad_rows(tmp_path)] == ["1"]


def test_pack_says_what_is_wrong(pictures_and_list, tmp_path):
    out = ["--out", str(tmp_path / "o")]
    with pytest.raises(InputError, match="no file"):
        pack.main(["--csv", str(tmp_path / "none.csv"), *out])
    with pytest.raises(InputError, match="none of the rows .* line 2, there is no such file"):
        pack.main(["--csv", str(pictures_and_list / "pairs.csv"), *out])  # --images forgotten
    for text, message in (("", "empty"), ("image,caption\n", "empty"), ("a,b\n1,2", "a, b")):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            pack.main(["--csv", str(tmp_path / "list.csv"), *out])
    (tmp_path / "list.csv").write_bytes(encoded(photo(0, (400, 300)), "BMP"))
    with pytest.raises(InputError):
        pack.main(["--csv", str(tmp_path / "list.csv"), *out])
    write_tar(pictures_and_list / "out" / "mine.tar", good("a"))
    with pytest.raises(InputError, match="another list"):
        run_pack(pictures_and_list)


# -----------------------------------------------------------------------------
# show


@pytest.fixture
def word_folder(tmp_path):
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(WORDS))
    return tmp_path


def test_show_prints_and_draws(word_folder, capsys):
    twins = [("t.jpg", JPEG), ("t.txt", b"A red  dog 1")]
    broken = [("x.jpg", b"?"), ("x.txt", b"a dog"), ("y.txt", b"a cat"), ("z.jpg", JPEG)]
    members = [m for i in range(5) for m in good(f"{i}", i)] + twins + broken
    write_tar(word_folder / "0.tar", members)
    show.main([str(word_folder / "0.tar"), "--picture", str(word_folder / "grid.png")])
    printed = capsys.readouterr().out
    assert "8 samples in 1 shards, 7 captions (txt)" in printed
    assert "captions with a twin: 2 (28.6%)" in printed and "2 x a red dog 1" in printed
    assert "not used: 3" in printed
    for reason in ("no image, or an empty one", "no txt, or an empty one", "cannot be decoded"):
        assert sum(reason in line and line.split()[0] == "1" for line in printed.splitlines()) == 1
    assert "0.tar x: the image cannot be decoded" in printed and "0.tar y: no image" in printed
    # Label weights by hand: caption "a red dog 3", seven captions, "3" in one of them.
    weights = {"a": math.log(8 / 8), "red": math.log(8 / 7), "3": math.log(8 / 2)}
    share = {word: weight / sum(weights.values()) for word, weight in weights.items()}
    assert f"label: 3 {share['3']:.2f}  red {share['red']:.2f}  a 0.00  dog 0.00" in printed
    picture = Image.open(word_folder / "grid.png")
    assert picture.width > 4 * show.SIDE and picture.height > 2 * show.SIDE


def test_twins_within_a_sample_do_no_harm(word_folder, capsys):
    captions = json.dumps({"captions": ["a red dog", "A red dog", "\ud800 \ud83d\ude00 cat"]})
    members = [("a.jpg", JPEG), ("a.json", captions.encode())]
    write_tar(word_folder / "0.tar", members)
    show.main([str(word_folder / "0.tar"), "--captions", "json.captions"])
    printed = capsys.readouterr().out
    assert "3 captions" in printed and "captions with a twin: 0" in printed
    printed.encode()  # half of a surrogate pair would be an error here, and on a terminal


def test_show_prints_names_that_are_not_utf8(word_folder, capsys):
    write_tar(word_folder / "0.tar", [*good("a"), ("caf\udce9.txt", b"a dog")])
    show.main([str(word_folder / "0.tar")])
    assert "caf?: no image" in capsys.readouterr().out


def test_shards_without_any_caption(word_folder, capsys):
    write_tar(word_folder / "0.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    show.main([str(word_folder / "0.tar"), "--picture", str(word_folder / "grid.png")])
    printed = capsys.readouterr().out
    assert "2 samples in 1 shards, 0 captions" in printed and "not used: 2" in printed


# -----------------------------------------------------------------------------
# Pictures


def test_text_that_is_too_wide_ends_in_dots():
    font = pictures.ImageFont.load_default(size=15)
    text = "a red dog runs on the grass, and a green cat sits on it"
    assert pictures.fit(text, font, 1000) == text
    short = pictures.fit(text, font, 100)
    assert short.endswith("…") and text.startswith(short[:-1]) and 5 < len(short)
    assert font.getlength(short) <= 100
    lines = pictures.wrap(f"{text} {'x' * 500} {text}", font, 200, 4)
    assert len(lines) == 4 and all(font.getlength(line) <= 200 for line in lines)
    assert " ".join(lines[:2]) == text and lines[2].startswith("xxx") and lines[3].endswith("…")
    assert pictures.wrap("a dog", font, 200, 4) == ["a dog"] and pictures.wrap("", font, 9, 4) == []


def test_a_picture_that_cannot_be_written_is_refused(tmp_path, word_folder):
    for name in ("grid.xyz", "grid", "nowhere/grid.png"):
        with pytest.raises(InputError, match="must end in|no folder"):
            pictures.save_picture(Image.new("RGB", (9, 9)), tmp_path / name)
    with pytest.raises(InputError, match="must end in .png"):
        show.main(["nowhere.tar", "--picture", "grid.xyz"])  # before all other work
