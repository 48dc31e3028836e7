"""A page in a headless browser."""

import re
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def in_browser(path, profile, *, script="", fragment=""):
    """The document after its scripts, and then `script`, have run.

    The console may show no error.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: found none of {', '.join(BROWSERS)} on the PATH")
    if script:
        path.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [
        found,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"file://{path}{fragment}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def tiles(document):
    """Class and text of every visible tile."""
    found = re.findall(r'<span class="rp-token ([^"]*)"([^>]*)>([^<]*)</span>', document)
    return [(name, text) for name, more, text in found if "hidden" not in more]
