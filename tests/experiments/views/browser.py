"""A real headless Chromium, driven over its debugging pipe with the standard library alone.

Pages may keep everything in shadow roots, as TensorBoard does; `Tab.text` reads through them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)

# All that a person can read, shadow roots included, in the order of the page.
VISIBLE = """
(() => {
  const found = [];
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) { const t = node.textContent.trim(); if (t) found.push(t); return; }
    if (node.nodeType === Node.ELEMENT_NODE) {
      if (["SCRIPT", "STYLE", "TEMPLATE"].includes(node.tagName)) return;
      const style = getComputedStyle(node);
      if (style.display === "none" || style.visibility === "hidden") return;
      if (node.shadowRoot) { for (const child of node.shadowRoot.childNodes) walk(child); }
      if (node.tagName === "SLOT" && node.assignedNodes().length) return;
    }
    for (const child of node.childNodes) walk(child);
  };
  walk(document.body);
  return found.join("\\n");
})()
"""

PRESS = """
(() => {
  const label = %s;
  let count = 0;
  const walk = node => {
    if (node.tagName === "BUTTON" && node.textContent.trim().startsWith(label)) { node.click(); count += 1; }
    if (node.shadowRoot) { for (const child of node.shadowRoot.children) walk(child); }
    for (const child of node.children || []) walk(child);
  };
  walk(document.body);
  return count;
})()
"""


def find() -> str | None:
    """SPIKEGATE_CHROMIUM, or the first browser on the path; None without one."""
    return os.environ.get("SPIKEGATE_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A Chromium of its own in `folder`; use it in a `with` block. Raises TimeoutError where it does not answer."""

    def __init__(self, program: str, folder: Path, width: int = 1400, height: int = 1000) -> None:
        self.width, self.height = width, height
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        words = [program, *FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        # The browser reads commands from descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser} 2>/dev/null'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *words],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest = b""
        self._number = 0

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close", limit_s=20)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, session: str | None = None, limit_s: float = 120.0, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result. Raises RuntimeError with the browser's own words."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + limit_s
        while True:
            answer = self._message(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _message(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"{method}: no answer from the browser")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise OSError(f"{method}: the browser ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, address: str, *, heed_policy: bool = True) -> Tab:
        """A new tab at an address; without `heed_policy` as if the page had no content security policy."""
        target = self.call("Target.createTarget", url=address if heed_policy else "about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        if not heed_policy:
            self.call("Page.setBypassCSP", session, enabled=True)
            self.call("Page.navigate", session, url=address)
        size = {"width": self.width, "height": self.height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        return Tab(self, session)


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, script: str) -> Any:
        """The value of an expression. Raises RuntimeError for a script that throws."""
        answer = self._browser.call(
            "Runtime.evaluate", self._session, expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def text(self) -> str:
        """What can be read on the page now."""
        return str(self.evaluate(VISIBLE))

    def press(self, label: str) -> int:
        """Click every button whose words begin with `label`, shadow roots included; how many there were."""
        return int(self.evaluate(PRESS % json.dumps(label)))

    def until(self, *words: str, limit_s: float = 120.0) -> str:
        """The page's text once it holds all `words`. Raises AssertionError, with what is there, after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                text = self.text()
            except RuntimeError:  # the page is being replaced
                text = ""
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            if time.monotonic() > deadline:
                raise AssertionError(f"not on the page: {missing}; there is:\n{text[:3000]}")
            time.sleep(0.3)

    def screenshot(self, path: Path) -> Path:
        """The visible part as PNG."""
        data = self._browser.call("Page.captureScreenshot", self._session, format="png")["data"]
        path.write_bytes(base64.b64decode(data))
        return path
