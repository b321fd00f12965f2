"""A headless Chromium, driven with DevTools messages over a pipe: no port, no driver program, no package."""

import base64
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# Chromium reads messages from descriptor 3 and answers on 4.
MOVE_PIPES = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
TIMEOUT_S = 30.0
SCREENSHOTS = os.environ.get("SCREENSHOTS", "")

VARIANTS = [(1280, 900, "light"), (1280, 900, "dark"), (360, 740, "light"), (360, 740, "dark")]
"""Width, height and colour scheme: desktop and phone."""

# Elements that reach over the edge of the window, those in boxes that hide it too.
OUTSIDE = """[...document.body.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""

# The least contrast of text to what is behind it (WCAG 2), and where. Backgrounds are opaque or absent.
LEAST_CONTRAST = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgb = colour => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
    const behind = e => {
        const colour = rgb(getComputedStyle(e).backgroundColor);
        return colour[3] ? colour : behind(e.parentElement);
    };
    const holdsText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    let least = [99, ''], seen = new Set();
    for (const e of document.body.querySelectorAll('*')) {
        if (!holdsText(e) || !e.checkVisibility() || e.closest('svg')) continue;
        const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
        const contrast = (pair[0] + .05) / (pair[1] + .05);
        for (const name of ['prompt', 'trained', 'ctl', 'gap', 'where', 'cut', 'axis'])
            if (e.closest('.' + name)) seen.add(name);
        if (contrast < least[0]) least = [contrast, e.outerHTML.slice(0, 80)];
    }
    return [...least, [...seen].sort()];
})()"""


@dataclass
class Page:
    """The one tab of a browser. events: what DevTools reported and nobody has looked at yet."""

    process: "subprocess.Popen[bytes]"
    write_fd: int
    read_fd: int
    session: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    _last_id: int = 0
    _buffer: bytes = b""

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a DevTools method. Raises AssertionError when it fails or takes too long."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_S
        while (answer := self._receive(deadline)).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, *, width: int, height: int, scheme: str) -> None:
        """Load a file in a window of this size, with this `prefers-color-scheme`."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + TIMEOUT_S
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(deadline))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, name: str) -> None:
        """The whole page, from top to bottom, as NAME.png in the folder that SCREENSHOTS names; nothing without one."""
        if not SCREENSHOTS:
            return
        path = Path(SCREENSHOTS, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requested(self) -> list[str]:
        """Addresses that the page asked for since it was opened, its own among them."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the console says: errors and warnings of the browser, output of scripts, exceptions."""
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in methods]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self.read_fd, selectors.EVENT_READ)
                assert selector.select(max(0.0, deadline - time.monotonic())), "the browser does not answer"
            received = os.read(self.read_fd, 2**20)
            assert received, f"the browser ended with code {self.process.wait(TIMEOUT_S)}"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Start a browser with a profile of its own; it and its helpers are gone afterwards."""
    assert BINARY is not None
    # Above 9, so that moving them to 3 and 4 overwrites neither.
    ends = [fcntl(end, F_DUPFD, 10) for pipe in (os.pipe(), os.pipe()) for end in _closing(pipe)]
    their_in, our_out, our_in, their_out = ends
    browser = [BINARY, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", MOVE_PIPES, str(their_in), str(their_out), *browser],
        pass_fds=(their_in, their_out),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"HOME": str(profile)},
    )
    os.close(their_in)
    os.close(their_out)
    try:
        page = Page(process, our_out, our_in)
        targets = page.send("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        page.session = page.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            page.send(f"{domain}.enable")
        yield page
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: nothing but this browser is in it
        process.wait(TIMEOUT_S)
        os.close(our_in)
        os.close(our_out)


def _closing(pipe: tuple[int, int]) -> Iterator[int]:
    """Both ends, each closed once it has been duplicated."""
    for end in pipe:
        yield end
        os.close(end)
