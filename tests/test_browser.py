"""JupyterLab in a browser: notebooks run, a handle moves by the keyboard, the explorer starts and stops a run.

Everything waits for what it wants to see, as long as that takes: nothing here depends on how busy the machine is.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
TOKEN = "browser-test"
LONG = 15 * 60 * 1000  # ms
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is on the page
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
    pytest.mark.filterwarnings("default"),
]


@contextmanager
def served(folder, theme="JupyterLab Light"):
    """A JupyterLab of its own, with no configuration of the user's, over copies of notebooks; its address."""
    (folder / "notebooks").mkdir()
    for name in ("00-start-here", "11-explorer"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder / "notebooks")
    shutil.copytree(ROOT / "notebooks" / "studies", folder / "notebooks" / "studies")
    shutil.copytree(ROOT / "figures", folder / "figures", ignore=shutil.ignore_patterns("*.svg", "*.csv"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, content in {**SETTINGS, "apputils-extension/themes": {"theme": theme}}.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    places |= {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    env = os.environ | {name: str(folder / place) for name, place in places.items()}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "notebooks")]), "JUPYTER_PLATFORM_DIRS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    try:
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            try:
                urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=60).close()
                break
            except (URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def opened(address, name):
    """A notebook in the browser, its kernel idle."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1366, "height": 820})
        page.set_default_timeout(LONG)
        page.goto(f"{address}/lab/tree/notebooks/{name}.ipynb?token={TOKEN}")
        page.locator("#jp-bottom-panel", has_text="Python 3 (ipykernel) | Idle").wait_for()
        yield page
        browser.close()


def command(page, name):
    page.evaluate("name => window.jupyterapp.commands.execute(name)", name)


def run_all(page):
    command(page, "notebook:run-all-cells")
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def cell_with(page, selector):
    """The first cell that shows something, and the picture in its outputs."""
    cell = page.locator(".jp-CodeCell", has=page.locator(selector)).first
    return cell, cell.locator(".jp-OutputArea-output img").first


OTHER = """([cell, before]) => {
    const picture = cell.querySelector(".jp-OutputArea-output img");
    return picture && picture.src !== before;
}"""


def press(page, cell, picture, key, knob=0):
    """Moves a knob by the keyboard; gives the new picture."""
    before = picture.get_attribute("src")
    cell.locator(".noUi-handle").nth(knob).press(key)
    page.wait_for_function(OTHER, arg=[cell.element_handle(), before])
    return picture.get_attribute("src")


def stored(folder, name):
    """The pictures in a notebook's file, as the page has them."""
    book = json.loads((folder / "notebooks" / f"{name}.ipynb").read_text())
    data = [o.get("data", {}) for c in book["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    return ["data:image/png;base64," + "".join(d["image/png"]).replace("\n", "") for d in data if "image/png" in d]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with served(folder) as address:
        yield folder, address


def test_a_handle_of_the_first_notebook_moves_and_is_saved_where_it_stands(lab):
    folder, address = lab
    with opened(address, "00-start-here") as page:
        run_all(page)
        cell, picture = cell_with(page, ".noUi-handle")
        size = picture.evaluate("img => [img.naturalWidth, img.naturalHeight]")
        first = picture.get_attribute("src")
        moved = press(page, cell, picture, "ArrowRight")
        assert moved != first and press(page, cell, picture, "ArrowLeft") == first
        moved = press(page, cell, picture, "ArrowRight")
        assert picture.evaluate("img => [img.naturalWidth, img.naturalHeight]") == size
        command(page, "docmanager:save")
        page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    assert moved in stored(folder, "00-start-here")


def test_the_explorer_starts_and_stops_a_run_and_its_handle_answers(lab):
    _, address = lab
    with opened(address, "11-explorer") as page:
        run_all(page)
        cell, picture = cell_with(page, ".widget-button:has-text('Run')")
        button = cell.locator("button", has_text="Run")
        epochs = cell.locator(".widget-text", has=page.locator("label", has_text="epochs")).locator("input").first
        before = picture.get_attribute("src")
        epochs.fill("100000")
        epochs.press("Enter")
        button.click()
        cell.get_by_text("task 1 of 5").wait_for()
        cell.locator("button", has_text="Stop").click()
        cell.get_by_text("stopped").wait_for()
        assert picture.get_attribute("src") == before
        epochs.fill("none")
        epochs.press("Enter")
        button.click()
        cell.get_by_text("epochs: 'none'; give a whole number").wait_for()
        epochs.fill("1")
        epochs.press("Enter")
        button.click()
        cell.get_by_text("on average, in").wait_for()
        cell.locator("table", has_text="Training(epochs=1)").wait_for()  # what is shown last
        made = picture.get_attribute("src")
        assert made != before
        assert press(page, cell, picture, "ArrowRight") != made
