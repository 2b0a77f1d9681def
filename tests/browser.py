"""A page in headless Chromium, driven over the pipe of its own debugging protocol: no driver to install."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = (os.environ.get("ITRAIN_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, filter(None, NAMES))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]


class Page:
    """A page from disk or from a server, with what it complained of in ``errors``.

    Args:
        file: of the page, or its address.
        profile: a fresh folder for Chromium's own files.
        width: of the window.
        scheme: the colours that the reader prefers, light or dark.
    """

    def __init__(self, file: Path | str, *, profile: Path, width: int = 1366, scheme: str = "light") -> None:
        assert CHROMIUM is not None
        # Chromium listens on descriptor 3 and speaks on 4.
        command = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', CHROMIUM]
        self.process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={profile}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.count, self.session, self.loaded = 0, {}, False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.shape(width=width, scheme=scheme)
        self.go(file if isinstance(file, str) else file.resolve().as_uri())

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": arguments, **self.session}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._receive()).get("id") != self.count:
            self._hear(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def shape(self, *, width: int, height: int = 800, scheme: str) -> None:
        """Give the window a size, and the reader a preference of colours."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def go(self, url: str) -> None:
        """Open an address, and wait until it is loaded."""
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self._hear(self._receive())

    def run(self, program: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.send("Runtime.evaluate", expression=program, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, element: str, *, click: bool = False) -> None:
        """Move to the middle of an element, and press there."""
        box = f"document.querySelector({json.dumps(element)})"
        x, y = self.run(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]}})({box})"
        )
        # Scrolling hides what is shown; let its event pass first.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key on what has the focus."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        message = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            message += byte
        return json.loads(message)

    def _hear(self, event: dict[str, Any]) -> None:
        what = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(what["request"]["url"])
            case "Network.loadingFailed" if not what.get("canceled"):
                self.errors.append(f"{what['errorText']} ({what['type']})")
            case "Runtime.exceptionThrown":
                self.errors.append(str(what["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if what["type"] in ("error", "warning", "assert"):
                self.errors.append(str(what["args"]))
            case "Log.entryAdded" if what["entry"]["level"] in ("error", "warning"):
                self.errors.append(what["entry"]["text"])
