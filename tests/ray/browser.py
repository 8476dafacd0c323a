"""A real browser without a window, told what to do over its debugging port (the Chrome DevTools Protocol)."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """One page, or the browser itself where there is no session."""

    def __init__(self, connection: ClientConnection, session: str | None) -> None:
        self._connection, self._session, self._number = connection, session, 0

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and what comes of it."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": parameters}
        told |= {"sessionId": self._session} if self._session else {}
        self._connection.send(json.dumps(told))
        while (answer := json.loads(self._connection.recv(timeout=60))).get("id") != self._number:
            pass  # what it tells of itself
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page, once it has one."""
        found = self.tell("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def drag(self, *places: tuple[float, float]) -> None:
        """Draw with the mouse from place to place."""
        for number, (x, y) in enumerate(places):
            kind = "mousePressed" if number == 0 else "mouseMoved"
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = places[-1]
        self.tell("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def picture(self) -> bytes:
        """What it looks like, as PNG."""
        return base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])


@contextmanager
def page_at(url: str, folder: Path) -> Iterator[Page]:
    """The page in a browser of its own, whose files are in the folder."""
    assert PROGRAM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    options += ["--no-first-run", "--window-size=900,900", f"--user-data-dir={folder}"]
    log = folder / "browser.log"
    with log.open("w") as errors:
        browser = subprocess.Popen([PROGRAM, *options, "about:blank"], stderr=errors, stdout=subprocess.DEVNULL)
    try:
        where = ""
        while not where:
            assert browser.poll() is None, log.read_text()
            lines = [line for line in log.read_text().splitlines(keepends=True) if "DevTools listening on" in line]
            where = next((line.split()[-1] for line in lines if line.endswith("\n")), "")
        with connect(where, max_size=None, open_timeout=60) as connection:
            browser_itself = Page(connection, None)
            target = browser_itself.tell("Target.createTarget", url=url)["targetId"]
            session = browser_itself.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            yield Page(connection, session)
    finally:
        browser.terminate()
        browser.wait(timeout=60)
