"""A headless Chromium that a test drives over two pipes (the DevTools protocol), without a driver or a package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Tab:
    """A tab: `call` sends a command and returns its result; `errors` is what the console complained of so far."""

    def __init__(self, sends: int, reads: int) -> None:
        self.sends, self.replies = sends, os.fdopen(reads, "rb", buffering=0)
        self.session, self.number, self.rest = "", 0, b""
        self.errors: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.sends, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self.number:
            pass
        assert "error" not in reply, reply
        return dict(reply["result"])

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.errors, self.loaded = [], False
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self.loaded:
            self._next()

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def photograph(self, path: Path) -> Path:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={
            "x": 0, "y": 0, "scale": 1, **self.call("Page.getLayoutMetrics")["cssContentSize"],
        })  # fmt: skip
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = self.replies.read(65536)
            assert part, "Chromium is gone"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method = message.get("method", "")
        complaint = message.get("params", {}).get("entry", {}).get("level") == "error"
        if method in {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"} or (
            method == "Log.entryAdded" and complaint
        ):
            self.errors.append(json.dumps(message["params"]))
        self.loaded |= method == "Page.loadEventFired"
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Start Chromium with an empty profile, and end it."""
    (reads, sends), (listens, speaks) = _pipe(), _pipe()
    command = f'exec "$@" 3<&{reads} 4>&{speaks} 2>/dev/null'
    program = subprocess.Popen(
        ["bash", "-c", command, "bash", str(PROGRAM), *FLAGS, f"--user-data-dir={profile}"], pass_fds=(reads, speaks)
    )
    os.close(reads)
    os.close(speaks)
    try:
        yield Tab(sends, listens)
    finally:
        program.terminate()
        program.wait(20)


def _pipe() -> list[int]:
    """A pipe with numbers above 3 and 4, which are to be given to the program."""
    found = [(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10), end) for end in os.pipe()]
    for _, end in found:
        os.close(end)
    return [high for high, _ in found]
