"""What tests of the numbers on the pages have in common."""

import re

# A line of scores, as a validation and eval.py print it
SCORE_LINE = re.compile(
    r"^ *(\S.*?) +([\d.]+) % +chance +([\d.]+) % +95 % interval ([\d.]+)-([\d.]+) +n ([\d,]+)", re.M
)


def printed(name, score):
    """A score, as a log or --json holds it, as the groups of SCORE_LINE."""
    low, high = score["interval"]
    value, chance = (f"{100 * score[kind]:.2f}" for kind in ("value", "chance"))
    return name, value, chance, f"{100 * low:.1f}", f"{100 * high:.1f}", f"{score['n']:,}"


def numbers_in(sentence, text):
    """The numbers, as texts, that stand where a sentence in the text has a #."""
    pattern = re.escape(sentence).replace(r"\#", r"([\d.]+)")
    found = re.search(pattern, " ".join(text.split()))
    assert found, "no page says this any more: change SENTENCES"
    return found.groups()
