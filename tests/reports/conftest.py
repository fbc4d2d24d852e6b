"""A headless Chromium for tests of the page, driven over two pipes: no driver, no port and no package is needed."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# A 500-record page on a busy machine takes seconds; only a browser that hangs takes this long.
PATIENCE_S = 120
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    # Root in a container has no sandbox to give; every page here was written by the test itself.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-extensions",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    # No name and no address resolves, so that a page which asks for one gets an error and not an answer.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# Runs in every document before any script of the page: nothing that goes wrong later is missed.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.effectiveDirective} refused ${event.blockedURI.slice(0, 80)}`));
"""


class Browser:
    """One Chromium and its DevTools protocol: JSON messages, a NUL after each, over its descriptors 3 and 4."""

    def __init__(self, program: str, home: Path):
        self.tabs: dict[str, Tab] = {}
        self._numbers = iter(range(1, 10**9))
        self._replies: dict[int, dict] = {}
        self._unread = b""
        self._errors = home / "errors"
        command = [program, *FLAGS, f"--user-data-dir={home / 'profile'}", "about:blank"]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                # Descriptors 3 and 4 may be taken in this process, so a shell makes them of 0 and 1.
                ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")},
                # A group of its own, so that what it leaves behind can be ended and nothing else with it.
                start_new_session=True,
            )

    def open(self, path: Path) -> "Tab":
        """A tab that has loaded the file, with what is in it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self.tabs[session] = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.call("Page.navigate", url=path.as_uri())
        self.wait(lambda: tab.loaded)
        return tab

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """The result of a command; raises RuntimeError where the browser refuses it."""
        number = self.send(method, session, **params)
        self.wait(lambda: number in self._replies)
        reply = self._replies.pop(number)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def send(self, method: str, session: str | None = None, **params) -> int:
        """Send a command without waiting for its reply; returns its number."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\0")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the browser has ended: {self._last_words()}") from None
        return number

    def wait(self, happened) -> None:
        """Take in messages until `happened()`."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self._process.stdout.fileno(), 2**20) if ready else b""
            if not chunk:
                raise RuntimeError(f"the browser {'has ended' if ready else 'hangs'}: {self._last_words()}")
            *messages, self._unread = (self._unread + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._replies[message["id"]] = message
                elif message.get("sessionId") in self.tabs:
                    self.tabs[message["sessionId"]].take(message["method"], message["params"])

    def _last_words(self) -> str:
        return self._errors.read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """End the browser, whatever state it is in."""
        with contextlib.suppress(RuntimeError):
            self.send("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Tab:
    """One page, and everything that went wrong on it as `complaints`: (kind, text)."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self.target, self.session = browser, target, session
        self.loaded = False
        self.complaints: list[tuple[str, str]] = []
        self.requests: list[str] = []

    def call(self, method: str, **params) -> dict:
        return self.browser.call(method, self.session, **params)

    def take(self, event: str, params: dict) -> None:
        match event:
            case "Page.loadEventFired":
                self.loaded = True
            case "Page.javascriptDialogOpening":
                self.complaints.append(("dialog", params["message"]))
                self.browser.send("Page.handleJavaScriptDialog", self.session, accept=True)
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.complaints.append(("script error", details.get("exception", details).get("description", "?")))
            case "Log.entryAdded" if params["entry"]["level"] in ("warning", "error"):
                self.complaints.append(("log", params["entry"]["text"][:200]))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"][:200])

    def show(self, width: int, theme: str) -> None:
        """Look at the page on a screen of this width (a phone's, with a phone's rules, where it is narrow)."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def evaluate(self, expression: str):
        """The value of an expression, of its promise where it is one; raises RuntimeError where it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "?"))
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str) -> None:
        """Press and release a key where the focus is, as a keyboard does."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        del self.browser.tabs[self.session]


def find_chromium() -> str | None:
    """The browser that the environment variable CHROMIUM names, or the first one on the path."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser():
    program = find_chromium()
    if program is None:
        sought = os.environ.get("CHROMIUM") or ", ".join(NAMES)
        if os.environ.get("REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"REQUIRE_CHROMIUM=1, but there is no browser here ({sought}): run .ci/install-chromium", False)
        pytest.skip(f"no browser here ({sought}): run .ci/install-chromium, or name one in CHROMIUM")
    # A browser that is ending may still write into its profile.
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as home:
        with contextlib.closing(Browser(program, Path(home))) as chromium:
            yield chromium
