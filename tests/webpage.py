"""What tests of the pages that report.py and demo.py write have in common."""

import json
import re

import torch


def numbers_of(page):
    """The JSON that a page of scripts/report.py or scripts/demo.py carries."""
    text = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S)
    return json.loads(text[1])


def are_near(numbers, tensor, tolerance=1e-3):
    """Is each number of a page that of the tensor, up to rounding?"""
    return (torch.tensor(numbers, dtype=tensor.dtype) - tensor).abs().max() <= tolerance


def requests_of(browser):
    """The addresses that a browser has asked for since it was asked this before."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if "requestWillBeSent" in m["method"]]
    return {url for url in sent if not url.startswith("data:")}
