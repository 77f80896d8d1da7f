"""What tests of pages have in common."""

import json
import re

import torch
from children import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def numbers_of(page):
    """The JSON that a page carries."""
    text = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S)
    return json.loads(text[1])


def are_near(numbers, tensor, tolerance=1e-3):
    """Is each number of a page that of the tensor, up to rounding?"""
    numbers = torch.tensor(numbers, dtype=tensor.dtype)
    return numbers.shape == tensor.shape and (numbers - tensor).abs().max() <= tolerance


def requests_of(browser):
    """The addresses that a browser has asked for since it was asked this before."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {one["request"]["url"] for one in sent}
    return {url for url in urls if not url.startswith("data:")}
