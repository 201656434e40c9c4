"""The lab in headless Chromium, offline: two choices, a short training each, the comparison, and a refusal."""

import importlib.util
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

_spec = importlib.util.spec_from_file_location("_browser", Path(__file__).with_name("test_browser.py"))
browser = importlib.util.module_from_spec(_spec)
sys.modules["_browser"] = browser
_spec.loader.exec_module(browser)
server, page = browser.server, browser.page  # its fixtures: JupyterLab on loopback, and a page that counts requests

pytestmark = pytest.mark.browser

NAME = "90_lab.ipynb"


def test_a_reader_compares_two_choices_and_meets_a_refusal(server, page):
    from playwright.sync_api import expect

    address, token = server
    page.goto(f"{address}/lab/tree/notebooks/{NAME}?token={token}")
    browser.wait(page, lambda state: state["ready"], 120)
    browser.menu(page, "Edit", "Clear Outputs of All Cells")
    browser.wait(page, lambda state: not any(state["counts"]), 10)
    browser.menu(page, "Run", "Run All Cells")
    done = browser.wait(page, lambda state: state["ready"] and (all(state["counts"]) or state["wrong"]), 300)
    assert not done["wrong"], "\n".join(done["wrong"])

    bench = page.locator(".jp-Cell-outputArea", has=page.get_by_role("button", name="Train", exact=True)).first
    menu = lambda name: bench.locator(".widget-dropdown", has=page.get_by_text(name, exact=True)).locator("select")
    press = lambda name: bench.get_by_role("button", name=name, exact=True)
    picture = bench.locator("img")
    press("Train").scroll_into_view_if_needed()
    expect(bench.get_by_text(re.compile("parameters, .* FLOPs"))).to_be_visible(timeout=30_000)
    expect(bench.get_by_text("b × 16 × 64 → b × 16 × 192").first).to_be_visible()
    expect(bench.get_by_text("torch.manual_seed(0)")).to_be_visible()

    # The first choice, trained to its end, drawn while it learns.
    menu("steps").select_option("100")
    press("Train").click()
    expect(press("Train")).to_be_disabled()
    expect(picture).to_have_count(1, timeout=60_000)
    expect(bench.get_by_text("100 of 100")).to_be_visible(timeout=120_000)
    expect(press("Train")).to_be_enabled()

    # The second, which is refused at first, is stopped on its way; the page answers meanwhile.
    menu("positions").select_option("Rotary")
    menu("mixer").select_option("GatedConvolution")
    expect(bench.get_by_text("Rotary goes into an attend slot, and GatedConvolution has none")).to_be_visible()
    expect(press("Train")).to_be_disabled()
    menu("positions").select_option("SinusoidalPositions")
    menu("steps").select_option("3000")
    expect(press("Train")).to_be_enabled(timeout=30_000)
    before = picture.get_attribute("src")
    press("Train").click()
    expect(picture).not_to_have_attribute("src", before, timeout=60_000)
    menu("norm").select_option("RMSNorm")
    expect(bench.get_by_text("nn.RMSNorm(normalized_shape=64)")).to_be_visible(timeout=20_000)
    press("Stop").click()
    expect(bench.get_by_text("stopped")).to_be_visible(timeout=30_000)

    # Both stand on one figure and in one table.
    expect(bench.locator("table tr")).to_have_count(3)
    words = picture.get_attribute("alt")
    assert "1: MultiHeadAttention" in words and "2: GatedConvolution" in words
    assert not browser.wait(page, lambda state: state["ready"], 10)["wrong"]

    outside = [url for url in page.asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")]
    outside = [url for url in outside if urlsplit(url).hostname != "127.0.0.1"]
    assert not outside, f"the page asked for {outside[:5]}"
    assert not page.failed, f"requests failed: {page.failed[:5]}"
