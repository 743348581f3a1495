"""A real browser and a real JupyterLab for tests. Requests to other hosts than this one fail, so that tests notice."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from dit_lens.commands.page import find_browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


def browser_or_skip():
    """Returns the path of the browser. Without one the test is skipped, or fails if a browser is required."""
    found = find_browser()
    if found is None:
        required = os.environ.get("DIT_LENS_BROWSER") == "required"
        (pytest.fail if required else pytest.skip)("no Chromium or Chrome: set CHROMIUM to one, or put one on PATH")
    return found


@contextlib.contextmanager
def page(*, width=1200, height=900, dark=False, noise=()):
    """Opens a page of a new browser, and asserts at the end that no request failed and no error was logged.

    width: of the window, in pixels.
    height: of the window, in pixels.
    dark: whether the browser prefers dark pages.
    noise: beginnings of error messages of other software, which are ignored.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_or_skip(), headless=True, args=ARGUMENTS)
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        found = context.new_page()
        errors, failed = [], []
        found.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: errors.append(str(error)))
        found.on("requestfailed", lambda request: failed.append((request.url, request.failure)))
        try:
            yield found
            # A page stops requests of its own, as JupyterLab does when it polls again.
            assert [one for one in failed if one[1] != "net::ERR_ABORTED"] == []
            assert [error for error in errors if not error.startswith(tuple(noise))] == []
        finally:
            browser.close()


@contextlib.contextmanager
def jupyterlab(root, timeout=90):
    """Starts a JupyterLab for a folder, with its own settings, and yields its address. timeout: in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="lab-") as home:
        environment, settings = os.environ | _folders(home), Path(home) / "settings"
        # All cells are in the page, and no notification covers it.
        _write(settings / "@jupyterlab/notebook-extension/tracker.jupyterlab-settings", {"windowingMode": "none"})
        _write(settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings", {"fetchNews": "false"})
        log = Path(home) / "server.log"
        with log.open("w") as output:
            server = subprocess.Popen(_command(root, port), env=environment, stdout=output, stderr=output)
            try:
                _wait(f"http://127.0.0.1:{port}/api/status", server, log, timeout)
                yield f"http://127.0.0.1:{port}"
            finally:
                server.terminate()
                server.wait(20)


_READY = """() => { const w = window.jupyterapp.shell.currentWidget;
    return !!(w?.content?.widgets && w.sessionContext?.isReady && w.sessionContext.session?.kernel); }"""


def open_notebook(page, address, name):
    """Opens a notebook in JupyterLab and waits for its kernel."""
    page.goto(f"{address}/lab/tree/{name}?reset", wait_until="domcontentloaded")
    page.wait_for_function("() => !!window.jupyterapp", timeout=90_000)
    page.wait_for_function(_READY, timeout=90_000)


def show_notebook(page, name):
    """Shows a notebook beside the one that is shown in JupyterLab; one that is not open yet gets the kernel of that."""
    page.evaluate(
        """async path => {
          const app = window.jupyterapp, { id } = app.shell.currentWidget.sessionContext.session.kernel;
          const found = await app.commands.execute('docmanager:open', { path, kernel: { id } });
          app.shell.activateById(found.id);
        }""",
        name,
    )
    shown = "path => window.jupyterapp.shell.currentWidget?.context?.path === path"
    page.wait_for_function(shown, arg=name, timeout=90_000)
    page.wait_for_function(_READY, timeout=90_000)


def run_all(page, seconds=180):
    """Runs all cells of the open notebook and returns the errors that they raised."""
    page.set_default_timeout(seconds * 1000)
    return page.evaluate(
        """async () => {
          const app = window.jupyterapp, notebook = app.shell.currentWidget.content;
          await app.commands.execute('notebook:run-all-cells');
          const cells = notebook.widgets.filter(cell => cell.model.type === 'code');
          return cells.flatMap(cell => cell.model.outputs.toJSON())
            .filter(output => output.output_type === 'error').map(output => `${output.ename}: ${output.evalue}`);
        }"""
    )


def send_to_widget(widget, message):
    """Delivers a message to a widget as its browser would, without a kernel."""
    widget.comm.handle_msg({"content": {"data": {"method": "custom", "content": message}}, "buffers": []})


def ask_kernel(page, expression):
    """Returns what the kernel of the open notebook prints for an expression."""
    return page.evaluate(
        """async code => {
          const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          const future = kernel.requestExecute({ code });
          let text = '';
          future.onIOPub = message => { text += message.content.text ?? ''; };
          await future.done;
          return text.trim();
        }""",
        f"print({expression})",
    )


def _folders(home):
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    return {name: f"{home}/{name}" for name in names} | {
        "JUPYTERLAB_SETTINGS_DIR": f"{home}/settings",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }


def _command(root, port):
    options = {
        "--ip": "127.0.0.1",
        "--port": port,
        "--ServerApp.port_retries": 0,
        "--ServerApp.root_dir": root,
        "--IdentityProvider.token": "",
        "--ServerApp.disable_check_xsrf": True,
        "--LabApp.expose_app_in_browser": True,
        "--LabApp.news_url": None,
        "--LabApp.extension_manager": "readonly",
        "--LabApp.check_for_updates_class": "jupyterlab.handlers.announcements.NeverCheckForUpdate",
    }
    words = [f"{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", *words]


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _wait(address, server, log, timeout):
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=2).read()
            return
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
