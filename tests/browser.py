"""A page in a real browser: what it shows and says, at any width, in light and dark.

The page stands in a frame, since a window of chromium is at least 500 pixels wide; and a frame takes on the light or
the dark of what is around it.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import urllib.parse
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(shutil.which('chromium') is None, reason='needs the program chromium')

FRAME = """<!doctype html><iframe src="page.html" style="width:{width}px; height:900px; color-scheme:{scheme}"></iframe>
<script>addEventListener('message', ({{data}}) => {{
  if (data.scheme) document.querySelector('iframe').style.colorScheme = data.scheme;
  else document.title = data;
}});</script>"""

# `turn` changes light to dark or back while the page is open.
PROBE = """<script>addEventListener('load', async () => {
  const turn = scheme => new Promise(done => {
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => setTimeout(done, 50));
    parent.postMessage({scheme}, '*');
  });
  const seen = await (async () => { %s })();
  parent.postMessage(encodeURIComponent(JSON.stringify({
    seen: seen ?? null,
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
    fetched: performance.getEntriesByType('resource').map(entry => entry.name),
  })), '*');
});</script>"""


@dataclasses.dataclass
class Seen:
    """What the probe returned; by how much the page is wider than its window; what it fetched; and its errors."""

    seen: Any
    width: int
    overflow: int
    fetched: list[str]
    console: list[str]


def look(html, folder, width, probe='', scheme='light'):
    """Opens the page `width` pixels wide; `probe` is the body of an async function of JavaScript that runs in it."""
    (folder / 'page.html').write_text(html + PROBE % probe)
    (folder / 'frame.html').write_text(FRAME.format(width=width, scheme=scheme))
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--dump-dom']
    flags += ['--enable-logging=stderr', '--virtual-time-budget=20000', f'--user-data-dir={folder / "profile"}']
    done = subprocess.run(
        ['chromium', *flags, '--window-size=1400,1000', 'frame.html'],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r'<title>(.*)</title>', done.stdout)
    console = [line for line in done.stderr.splitlines() if ':CONSOLE' in line]
    assert title, f'the probe did not end: {console}'
    return Seen(console=console, **json.loads(urllib.parse.unquote(title[1])))
