"""A real headless Chromium by its DevTools protocol: JSON over a web socket, without a library."""

import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOW_TO_INSTALL = "apt-get install -y chromium"
# Without those about networking it looks for its maker's hosts at every start.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0",
)  # fmt: skip
PATIENCE_S = 60  # machines that test are busy
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def missing() -> str | None:
    """Why there is no browser here, with the remedy; None if there is one."""
    return None if shutil.which("chromium") else f"no chromium here: {HOW_TO_INSTALL}"


class WebSocket:
    """As much of RFC 6455 as one client needs to speak to one local server."""

    def __init__(self, host: str, port: int, path: str):
        self._socket = socket.create_connection((host, port), timeout=PATIENCE_S)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        status = self._file.readline()
        if b" 101 " not in status:
            raise ConnectionError(f"no web socket: {status!r}")
        while self._file.readline().strip():
            pass

    def send(self, text: str) -> None:
        """One frame of text, with the mask that clients must use; of zeros it changes nothing."""
        data = text.encode()
        size = (
            struct.pack("!BB", 0x81, 0x80 | len(data))
            if len(data) < 126
            else struct.pack("!BBH", 0x81, 0x80 | 126, len(data))
        )
        self._socket.sendall(size + bytes(4) + data)

    def receive(self) -> str:
        """The next message, of one frame or several."""
        parts, is_last = [], False
        while not is_last:
            first, size = self._file.read(2)
            if size in (126, 127):
                form = "!H" if size == 126 else "!Q"
                (size,) = struct.unpack(form, self._file.read(struct.calcsize(form)))
            parts.append(self._file.read(size))
            is_last = bool(first & 0x80)
        return b"".join(parts).decode()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Browser:
    """One window."""

    def __init__(self, port: int):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self._socket = WebSocket(
            "127.0.0.1", port, page["webSocketDebuggerUrl"].split(str(port))[1]
        )
        self._count = 0
        self._events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.receive())
            if message.get("id") == self._count:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._events.append(message)

    def open(self, path: Path, width: int, is_dark: bool = False) -> None:
        """Shows a file in a window of that many CSS pixels; forgets what was before."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(json.loads(self._socket.receive()))

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings since the page was opened."""
        self.run("0")  # what was said before is in the events then
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in wrong]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened, but those of data in it."""
        self.run("0")
        sent = [e["params"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        urls = [parameters["request"]["url"] for parameters in sent]
        return [url for url in urls if not url.startswith("data:")]

    def text(self, selector: str) -> str:
        """What an element says to a reader."""
        return self.run(f"document.querySelector({selector!r}).innerText")

    def place_of(self, selector: str) -> tuple[float, float]:
        """The left upper corner of an element, which is brought to the middle of the window."""
        return tuple(
            self.run(
                f"(async () => {{ const e = document.querySelector({selector!r});"
                "e.scrollIntoView({block: 'center', behavior: 'instant'});"
                # The mouse meets what was drawn last.
                "const frame = () => new Promise(requestAnimationFrame);"
                "await frame(); await frame();"
                "const b = e.getBoundingClientRect(); return [b.left, b.top]; })()"
            )
        )

    def mouse(self, selector: str, x: float, y: float, kind: str = "mouseMoved") -> None:
        """The mouse at a place in an element, from its left upper corner."""
        left, top = self.place_of(selector)
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=left + x, y=top + y, **button)

    def tap(self, selector: str, x: float, y: float) -> None:
        """A finger at a place in an element, from its left upper corner."""
        left, top = self.place_of(selector)
        points = [{"x": left + x, "y": top + y}]
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def click(self, selector: str) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(selector, 5, 5, kind)

    def press(self, selector: str, key: str) -> None:
        """Gives an element the focus and presses a key: an arrow's name, or a character."""
        self.run(f"document.querySelector({selector!r}).focus()")
        parameters: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        if key not in KEYS:
            parameters |= {"text": key}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **parameters)

    def picture(self, path: Path) -> None:
        """Takes a picture of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, gone in the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = ["chromium", *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            browser = Browser(_port(Path(folder) / "DevToolsActivePort"))
            try:
                yield browser
            finally:
                browser.close()
        finally:
            process.terminate()
            process.wait()


def _port(file: Path) -> int:
    """The port on which it listens, as it writes to its profile."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        if file.is_file() and "\n" in (words := file.read_text()):
            return int(words.splitlines()[0])
        time.sleep(0.05)
    raise TimeoutError("chromium did not start")
