"""A reader's sessions in headless Chromium, offline: JupyterLab with a chapter and its slider; the book."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tfkit.papers import papers

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
NAME = "01_attention.ipynb"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("there is no Chromium here; on Debian and Ubuntu: apt install chromium")


def options() -> list[str]:
    """The options that `make lab` gives to JupyterLab."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.search(r"^LAB_DEFAULTS := (.+)$", text, re.M)[1].split()


@pytest.fixture
def server(tmp_path):
    """JupyterLab on loopback with a copy of the notebooks, as `make lab` starts it; yields its address and token."""
    if not (ROOT / "notebooks" / NAME).exists():
        pytest.skip(f"notebooks/{NAME} does not exist")
    chromium()
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    live = {
        k: v for k, v in os.environ.items() if k not in ("TFKIT_STATIC", "MPLBACKEND") and not k.startswith("JUPYTER")
    }
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        live[f"JUPYTER_{name}"] = str(tmp_path / name)
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        live[f"JUPYTERLAB_{name}"] = str(tmp_path / name)
    live["IPYTHONDIR"] = str(tmp_path / "ipython")
    settings = tmp_path / "SETTINGS_DIR" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # All cells are in the page at once, also those far below, so that the test can look at them.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}', encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *options(),
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
    ]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={tmp_path}", "--LabApp.expose_app_in_browser=True"]
    with (tmp_path / "server.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=live, stdout=log, stderr=log, cwd=ROOT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert process.poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")[-2000:]
                    time.sleep(0.25)
            yield address, token
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def page(tmp_path):
    """A browser page, with what it asked for in `page.asked` and what went wrong in `page.failed`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.asked, page.failed = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda socket: page.asked.append(socket.url))
        page.on(
            "requestfailed",
            lambda r: r.failure == "net::ERR_ABORTED" or page.failed.append(f"{r.url}: {r.failure}"),
        )
        page.on("response", lambda r: page.failed.append(f"{r.url}: {r.status}") if r.status >= 400 else None)
        yield page
        page.screenshot(path=tmp_path / "page.png")  # pytest keeps the folders of the last runs
        browser.close()


STATE = """() => {
    const notebook = window.jupyterapp?.shell.currentWidget;
    const kernel = notebook?.sessionContext?.session?.kernel;
    const code = (notebook?.content?.widgets ?? []).filter(cell => cell.model.type === "code");
    const outputs = code.flatMap(cell => cell.model.outputs.toJSON());
    return {
        ready: kernel?.connectionStatus === "connected" && kernel.status === "idle" && code.length > 0,
        counts: code.map(cell => cell.model.executionCount),
        wrong: outputs.filter(o => o.output_type === "error" || o.name === "stderr").map(o => JSON.stringify(o)),
    };
}"""


def wait(page, condition, seconds: float) -> dict:
    """Wait until `condition` of the notebook's state holds, at most `seconds`; returns the state."""
    end = time.monotonic() + seconds
    while not condition(state := page.evaluate(STATE)):
        assert time.monotonic() < end, (
            f"after {seconds} s the notebook is still at {state['counts']}, ready: {state['ready']}"
        )
        page.wait_for_timeout(200)
    return state


def menu(page, *names: str) -> None:
    for place, name in zip((".lm-MenuBar-item", ".lm-Menu-item"), names, strict=True):
        page.locator(place, has=page.get_by_text(name, exact=True)).first.click()


def test_a_reader_runs_the_first_chapter_and_moves_a_slider(server, page):
    from playwright.sync_api import expect

    address, token = server
    page.goto(f"{address}/lab/tree/notebooks/{NAME}?token={token}")
    wait(page, lambda state: state["ready"], 120)

    menu(page, "Edit", "Clear Outputs of All Cells")
    wait(page, lambda state: not any(state["counts"]), 10)
    menu(page, "Run", "Run All Cells")
    done = wait(page, lambda state: state["ready"] and (all(state["counts"]) or state["wrong"]), 300)
    assert not done["wrong"], "\n".join(done["wrong"])
    assert "Validate" not in page.locator(".jp-NotebookPanel-toolbar").first.inner_text(), "nbgrader's button"

    area = page.locator(".jp-Cell-outputArea", has=page.locator('[role="slider"]')).first
    slider, picture = area.locator('[role="slider"]').first, area.locator("img")
    slider.scroll_into_view_if_needed()
    expect(picture).to_have_count(1)
    before, value = picture.get_attribute("src"), slider.get_attribute("aria-valuenow")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(slider).not_to_have_attribute("aria-valuenow", value)
    expect(picture).not_to_have_attribute("src", before, timeout=20_000)
    expect(picture).to_have_count(1)  # replaced, not added to
    assert not wait(page, lambda state: state["ready"], 10)["wrong"]

    outside = [url for url in page.asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")]
    outside = [url for url in outside if urlsplit(url).hostname != "127.0.0.1"]
    assert not outside, f"the page asked for {outside[:5]}"
    assert not page.failed, f"requests failed: {page.failed[:5]}"


def test_a_reader_opens_the_book_searches_and_follows_a_link(page, tmp_path):
    from playwright.sync_api import expect

    from tfkit.authoring import book

    folder = book.build(tmp_path / "book")
    page.goto((folder / "index.html").as_uri())
    page.locator('input[name="q"]:visible').first.fill("rotary")
    page.keyboard.press("Enter")
    found = page.locator("#search-results ul.search li a")
    expect(found.first).to_be_visible(timeout=20_000)
    titles = found.all_inner_texts()
    assert any("Telling tokens where they are" in title for title in titles), titles

    found.filter(has_text="Telling tokens where they are").first.click()
    expect(page.locator("h1").first).to_contain_text("Telling tokens where they are")
    expect(page.locator("mjx-container svg").first).to_be_attached(timeout=20_000)  # formulas are set
    pictures = page.locator("img.figure")
    assert pictures.count() >= 3 and all(
        pictures.evaluate_all("all => all.map(one => one.alt && one.naturalWidth > 0)")
    )

    color = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(color)
    for _ in range(3):  # automatic, light, dark, in an order that depends on the system
        page.locator("button.theme-toggle:visible").first.click()
        if page.evaluate(color) != before:
            break
    assert page.evaluate(color) != before

    page.get_by_role("link", name="01 Attention by hand").first.click()
    expect(page.locator("h1").first).to_contain_text("Attention by hand")

    page.goto((folder / "99_atlas.html").as_uri())
    rows = page.locator("table.atlas tbody tr:visible")
    expect(rows).to_have_count(len(papers()))
    page.get_by_label("search the papers").fill("relative representations")
    expect(page.locator("#shaw_relative")).to_be_visible()
    assert 1 <= rows.count() < 20
    page.get_by_label("search the papers").fill("")
    page.get_by_label("filter by kind").select_option("benchmark")
    assert rows.count() == 11
    page.locator("table.atlas th", has_text="year").click()
    found = page.locator("table.atlas tbody tr:visible td:nth-child(2)").all_inner_texts()
    assert found == sorted(found)
    page.get_by_label("filter by kind").select_option("")
    page.locator("#shaw_relative a").click()
    expect(page).to_have_url(re.compile(r"03_positions\.html#.+"))
    section = page.locator(f"[id='{page.url.split('#')[1]}']")
    expect(section.locator("h2, h3").first).to_be_visible()
    outside = [url for url in page.asked if urlsplit(url).scheme not in ("file", "data", "blob")]
    assert not outside, f"the book asked for {outside[:5]}"
