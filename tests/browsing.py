"""The page in a browser, under watch.

Owns: Tab (what people do on the page, and what it complained of), WATCH and SLOW, scripts that run before the page's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Locator, Request

__all__ = ["SCENE", "SLOW", "WATCH", "Tab"]

SCENE = Path(__file__).parents[1] / "examples" / "scene.png"
WATCH = "addEventListener('securitypolicyviolation', (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
_WAIT_MS = 10_000
# The server's own answers, handed to the page some bytes at a time.
SLOW = """
const real = fetch;
window.fetch = async (...asked) => {
  const response = await real(...asked);
  if (!asked[0].endsWith("chat/completions") || !response.ok) return response;
  const slow = new TransformStream({
    async transform(bytes, out) {
      for (let at = 0; at < bytes.length; at += 150) {
        out.enqueue(bytes.slice(at, at + 150));
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    },
  });
  return new Response(response.body.pipeThrough(slow), response);
};
"""


@dataclass
class Tab:
    """A page under watch."""

    context: BrowserContext
    address: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """What was asked of the model."""
    complaints: list[str] = field(default_factory=list)
    may_fail: bool = False
    """Whether requests may fail, of which Chromium complains too."""

    def __post_init__(self) -> None:
        self.page = self.context.new_page()
        self.page.set_default_timeout(_WAIT_MS)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._requested)
        self.box = self.page.get_by_role("textbox", name="Question")
        self.tray = self.page.get_by_role("list", name="Pictures to send").get_by_role("listitem")
        self.turns = self.page.locator("article")
        self.last = self.turns.last
        self.problem, self.facts = self.last.locator(".problem"), self.last.locator(".facts")
        self.status, self.alert = self.page.get_by_role("status"), self.page.get_by_role("alert")
        self.page.goto(self.address)
        self.until("document.querySelector('#model option')")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def attach(self, path: Path = SCENE) -> None:
        self.page.set_input_files("#files", path)
        self.until("tray.lastElementChild?.textContent.includes('tokens')")

    def say(self, question: str) -> None:
        self.box.fill(question)
        self.box.press("Enter")

    def ask(self, question: str, state: str = "done") -> str:
        self.say(question)
        return self.answer(state)

    def answer(self, state: str = "done") -> str:
        """Wait until the last answer has ended so."""
        self.until(f"log.lastElementChild.dataset.state === '{state}'")
        return self.last.locator(".answer").inner_text()

    def until(self, condition: str) -> None:
        """Wait for the frame in which a JavaScript condition holds; Playwright's own waiting asks every 100 to 1,000 ms."""
        self.page.evaluate(
            f"""(limit) => new Promise((resolve, reject) => {{
              const end = performance.now() + limit;
              const look = () => {{
                if ({condition}) resolve();
                else if (performance.now() > end) reject(new Error("it did not become so"));
                else requestAnimationFrame(look);
              }};
              look();
            }})""",
            _WAIT_MS,
        )

    def greedy(self) -> None:
        self.button("Settings").click()
        self.page.get_by_label("Temperature").fill("0")
        self.page.keyboard.press("Escape")

    def is_sideways(self) -> bool:
        """Tell whether anything is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth || log.scrollWidth > log.clientWidth"))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not (self.may_fail and message.text.startswith("Failed to load resource")):
            self.complaints.append(message.text)

    def _dialog(self, dialog: Dialog) -> None:
        self.complaints.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def _requested(self, request: Request) -> None:
        if not request.url.startswith((self.address, f"blob:{self.address}", "data:")):
            self.complaints.append(f"a request to {request.url}")
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(json.loads(request.post_data or ""))
