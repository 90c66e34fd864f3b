"""A real browser that opens pages: headless Chromium over the DevTools protocol, whose pipe needs no library."""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

LIMIT = 30.0  # s for any answer


class Browser:
    """A tab. ``said`` is what the pages wrote to the console, ``asked`` the addresses they asked for."""

    def __init__(self, program: str, home: Path) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self._count, self._rest = 0, b""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # the browser reads at 3 and writes to 4
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        switches = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={home}", "--remote-debugging-pipe", "about:blank",
        )  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *switches], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._session: str | None = None
        (page,) = (each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol."""
        self._count += 1
        sent = {"id": self._count, "method": method, "params": parameters}
        sent |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(sent).encode() + b"\0")
        while (got := self._next()).get("id") != self._count:
            pass
        assert "error" not in got, got
        return got["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], LIMIT)[0], "the browser does not answer"
            found = os.read(self._read, 1 << 16)
            assert found, "the browser is gone"
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        got: dict[str, Any] = json.loads(message)
        parameters = got.get("params", {})
        match got.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Page.javascriptDialogOpening":
                self.said.append(json.dumps(parameters)[:2000])
            case "Log.entryAdded":
                self.said.append(json.dumps(parameters["entry"])[:2000])
            case "Network.requestWillBeSent":
                self.asked.append(parameters["request"]["url"])
        return got

    def show(self, url: str, width: int = 1200, theme: str = "light") -> None:
        """Open a page and wait until its charts are drawn."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.theme(theme)
        self("Page.navigate", url="about:blank")
        self.said.clear()
        self.asked.clear()
        self("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass
        self.settle()

    def theme(self, name: str) -> None:
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])
        self.settle()

    def settle(self) -> None:
        """Let the page react to what happened."""
        self.run("new Promise((done) => setTimeout(done, 300))")

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def key(self, key: str, code: int) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": "\r"} if (key, kind) == ("Enter", "keyDown") else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)
        self.settle()

    def close(self) -> None:
        self._session = None
        try:
            self("Browser.close")
            self._process.wait(LIMIT)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._read)
            os.close(self._write)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A `Browser`; without Chromium the test is skipped."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome")
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
