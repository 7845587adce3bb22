"""Chromium without a window, for pages that people open."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_MISSING = "no chromium here (Debian: apt-get install chromium): pages are not opened in a browser"


def look(page: Path, script: str, picture: Path, width: int, dark: bool = False) -> Any:
    """Opens a page in a window of that width; skips the test where there is no browser.

    Takes a screenshot and returns what the expression `script` gives there, as JSON. AssertionError
    where the page or the browser complains.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip(_MISSING)
    html = page.read_text(encoding="utf-8")
    asks = f"document.documentElement.dataset.answer = JSON.stringify({script});"
    digest = base64.b64encode(hashlib.sha256(asks.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    copy = picture.with_suffix(".html")
    copy.write_text(html + f"<script>{asks}</script>", encoding="utf-8")
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--user-data-dir={picture.with_suffix('.profile')}",
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            # A window is never narrower than 500, but a screen may be, and a page that fills it.
            *(f"--screen-info={{{width}x844}}", f"--window-size={width},844", "--start-fullscreen"),
            *(f"--screenshot={picture}", "--dump-dom", copy.as_uri()),
        ],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and not said, said or done.stderr[-2000:]
    answer = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert answer, done.stdout[:2000]
    return json.loads(answer[1].replace("&quot;", '"').replace("&amp;", "&"))
