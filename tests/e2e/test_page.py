"""The page of llava serve in a real browser: what people do with it, what goes wrong, and that nothing but text and our server comes in.

One server, one Chromium (Debian's, /usr/bin/chromium), a fresh context per test. Every test ends by checking that its pages complained of
nothing: no console error, no violation of the content security policy, no dialog, no request to anybody else.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect, sync_playwright

from tests.browsing import SCENE, SLOW, WATCH, Tab

ROOT = Path(__file__).parents[2]
FILES = ("index.html", "page.css", "page.js", "chat.js", "icon.svg")
CHROMIUM = "/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else shutil.which("chromium")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic", "--no-first-run")
COUNT, CROSS = "How many things are there?", "Is there a red cross?"
CHAT, MODELS = "**/v1/chat/completions", "**/v1/models"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


Opener = Callable[..., Tab]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as people start it."""
    llava = str(Path(sys.executable).parent / "llava")
    with (tmp_path_factory.mktemp("server") / "log").open("w") as log:
        server = subprocess.Popen([llava, "serve", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip() + "/"
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("the page is tested in Debian's Chromium, which is not here: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *QUIET])
        yield found
        found.close()


@pytest.fixture
def open_tab(browser: Browser, address: str) -> Iterator[Opener]:
    tabs: list[Tab] = []

    def opened(*, width: int = 1200, height: int = 800, is_slow: bool = False, may_fail: bool = False, **options: Any) -> Tab:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.add_init_script(WATCH + (SLOW if is_slow else ""))
        tabs.append(Tab(context, address, may_fail=may_fail))
        return tabs[-1]

    yield opened
    complaints = [complaint for tab in tabs for complaint in tab.complaints]
    for tab in tabs:
        tab.context.close()
    assert complaints == []


@pytest.fixture
def tab(open_tab: Opener) -> Tab:
    return open_tab()


def stream(*pieces: str, end: str = "data: [DONE]\n\n") -> str:
    """An answer as the server would write it."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def told(tab: Tab, body: str, **options: Any) -> None:
    """Have the next questions answered by this."""
    kind = "text/event-stream" if options.get("status", 200) == 200 else "application/json"
    tab.page.route(CHAT, lambda route: route.fulfill(body=body, content_type=kind, **options))


def refused(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "", "param": None, "code": ""}})


# Asking


def test_a_picture_is_asked_about_and_asked_about_again(tab: Tab) -> None:
    tab.attach()
    expect(tab.tray).to_have_text(re.compile("384 × 384 · 64 tokens"))
    assert "That makes 6." in tab.ask(COUNT)
    facts = r"\d+ tokens · [\d.]+ tokens/s · first after \d+\.\d\d s · \d+ prompt tokens"
    expect(tab.facts).to_have_text(re.compile(facts))
    assert "yes" in tab.ask(CROSS)
    first, second = tab.bodies
    assert (first["model"], first["temperature"], first["stream"]) == ("llava-miniature", 0.2, True)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0]  # the picture stays in its turn
    assert second["messages"][2]["content"] == [{"type": "text", "text": CROSS}]
    url = first["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert sent.convert("RGB").tobytes() == Image.open(SCENE).convert("RGB").tobytes()


def test_stop_keeps_what_came(open_tab: Opener) -> None:
    tab = open_tab(is_slow=True)
    tab.greedy()
    tab.attach()
    whole = tab.ask(COUNT)
    tab.button("Retry").click()
    expect(tab.last.locator(".answer")).to_have_text(re.compile("^I see a"))
    expect(tab.status).to_have_text("Answering.")
    tab.button("Stop").click()
    kept = tab.answer("stopped")
    assert whole.startswith(kept)
    assert len(kept) < len(whole)
    expect(tab.facts).to_have_text(re.compile("^stopped · about"))
    tab.page.route(CHAT, lambda route: None)
    tab.say("Is anybody there?")
    tab.button("Stop").click()
    tab.page.unroute(CHAT)
    assert "yes" in tab.ask(CROSS)
    assert tab.bodies[-1]["messages"][1] == {"role": "assistant", "content": kept}
    assert len(tab.bodies[-1]["messages"]) == 3
    assert [turn.get_attribute("data-state") for turn in tab.turns.all()] == ["stopped", "stopped", "done"]
    expect(tab.turns.first.locator(".answer")).to_have_text(kept)


def test_an_answer_grows_and_is_read_aloud_once(open_tab: Opener) -> None:
    tab = open_tab(is_slow=True)
    tab.page.evaluate("""() => {
        window.seen = [];
        const look = (name, node) => new MutationObserver(() => seen.push([name, node.textContent]))
            .observe(node, { childList: true, subtree: true, characterData: true });
        look("log", log), look("status", document.getElementById("status"));
    }""")
    tab.attach()
    answer = tab.ask(CROSS)
    seen = tab.page.evaluate("seen")
    assert len({text for name, text in seen if name == "log"}) > 5
    assert [text for name, text in seen if name == "status"] == ["scene.png added.", "Answering.", f"Answer: {answer}"]
    expect(tab.page.get_by_role("log")).to_have_attribute("aria-live", "off")


def test_retry_asks_the_same_again(tab: Tab) -> None:
    told(tab, stream("first"))
    tab.attach()
    assert tab.ask(COUNT) == "first"
    tab.page.unroute(CHAT)
    tab.button("Retry").click()
    expect(tab.last.locator(".answer")).to_contain_text("That makes 6.")
    assert tab.bodies[0] == tab.bodies[1]
    expect(tab.turns).to_have_count(1)


def test_edit_takes_a_question_back_with_its_pictures(tab: Tab) -> None:
    tab.attach()
    tab.ask(COUNT)
    tab.ask("Describe the scene.")
    tab.button("Edit this question").first.click()
    expect(tab.turns).to_have_count(0)
    expect(tab.box).to_have_value(COUNT)
    expect(tab.box).to_be_focused()
    expect(tab.tray).to_have_count(1)
    assert "yes" in tab.ask(CROSS)
    (message,) = tab.bodies[-1]["messages"]
    assert message["content"][0] == tab.bodies[0]["messages"][0]["content"][0]
    assert message["content"][1]["text"] == CROSS


def test_conversations_keep_apart_and_clear_empties_one(open_tab: Opener) -> None:
    tab = open_tab(is_slow=True)
    tab.attach()
    tab.say(COUNT)
    tab.button("New conversation").click()  # the first one goes on answering
    expect(tab.turns).to_have_count(0)
    told(tab, stream("Hello."))
    assert tab.ask("Good day!") == "Hello."
    tab.box.fill("half a question")
    tab.page.unroute(CHAT)
    tab.button(COUNT).click()
    expect(tab.box).to_have_value("")
    assert "That makes 6." in tab.answer()
    tab.ask(CROSS)
    assert "Good day!" not in json.dumps(tab.bodies[-1]["messages"])
    tab.button("Clear").click()
    expect(tab.turns).to_have_count(0)
    tab.button("Good day!").click()
    expect(tab.turns).to_have_count(1)
    expect(tab.box).to_have_value("half a question")
    expect(tab.button("Good day!")).to_have_attribute("aria-current", "true")
    assert tab.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_settings_are_sent(tab: Tab) -> None:
    tab.button("Settings").click()
    for label, value in (("Temperature", "1.5"), ("Top p", "0.9"), ("Max tokens", "3"), ("Seed", "7"), ("System text", "Be brief.")):
        tab.page.get_by_label(label).fill(value)
    tab.button("Close settings").click()
    tab.ask(COUNT)
    body = tab.bodies[0]
    assert [body[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [1.5, 0.9, 3, 7]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(tab.facts).to_have_text(re.compile("^ended at max tokens · 3 tokens"))


# Pictures


@pytest.mark.catalogue("F15", "F16")
def test_pictures_are_pasted_dropped_scaled_and_removed(tab: Tab, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((3000, 1000)).save(tmp_path / "wide.png")
    tab.page.evaluate(
        """async () => {
            const picture = async (name) => {
                const canvas = new OffscreenCanvas(40, 30);
                canvas.getContext("2d").fillRect(0, 0, 20, 30);
                const files = new DataTransfer();
                files.items.add(new File([await canvas.convertToBlob()], name, { type: "image/png" }));
                return files;
            };
            const options = { bubbles: true, cancelable: true };
            const box = document.getElementById("question");
            box.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: await picture("pasted.png") }));
            const dataTransfer = await picture("dropped.png");
            document.body.dispatchEvent(new DragEvent("dragover", { ...options, dataTransfer }));
            const isShown = document.body.classList.contains("dropping");
            document.body.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer }));
            if (!isShown || document.body.classList.contains("dropping")) throw new Error("dropping is not shown");
        }"""
    )
    expect(tab.tray).to_have_count(2)
    tab.attach(tmp_path / "wide.png")
    expect(tab.tray.last).to_contain_text("2048 × 683")
    tab.button("Remove pasted.png").click()
    expect(tab.tray).to_have_count(2)
    tab.ask(COUNT)
    urls = [part["image_url"]["url"] for part in tab.bodies[0]["messages"][0]["content"][:-1]]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sizes == [(40, 30), (2048, 683)]
    expect(tab.last.get_by_role("img", name="Picture: dropped.png")).to_be_visible()
    shown = tab.last.get_by_role("img", name="Picture: wide.png").bounding_box()
    assert shown is not None
    assert shown["width"] / shown["height"] == pytest.approx(3, abs=0.1)


def test_a_file_that_is_no_picture_is_told(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "<b>notes.png").write_text("no picture")
    tab.page.set_input_files("#files", [tmp_path / "<b>notes.png", SCENE])
    expect(tab.alert).to_have_text("<b>notes.png is no picture that this browser can read.")
    expect(tab.tray).to_have_count(1)


# What goes wrong


def test_what_the_server_refuses_is_told_and_can_be_tried_again(open_tab: Opener) -> None:
    tab = open_tab(may_fail=True)
    tab.attach()
    tab.page.evaluate("document.getElementById('temperature').value = 9")
    tab.ask(COUNT, state="failed")
    expect(tab.problem).to_have_text("The server refused this (400): temperature must be at most 2.0.")
    tab.page.evaluate("document.getElementById('temperature').value = 0")
    tab.button("Retry").click()
    assert "That makes 6." in tab.answer()
    expect(tab.problem).to_be_empty()


@pytest.mark.parametrize(
    ("status", "headers", "body", "complaint"),
    [
        (503, {"retry-after": "4"}, refused("it has too much to do"), "The server is busy: it has too much to do. Try again in 4 s."),
        (429, {"retry-after": "9"}, refused("one at a time"), "The server is busy: one at a time. Try again in 9 s."),
        (500, {}, "<b>no JSON</b>", "The server failed (500): it did not say why."),
        (200, {}, stream("half", end=""), "The answer was cut off."),
        (200, {}, stream("half", end=f"data: {refused('the model failed')}\n\n"), "The answer was cut off: the model failed."),
        (200, {}, stream("half", end="data: <html>\n\n"), "The answer was cut off: the server sent something else."),
    ],
    ids=["busy", "too many", "broken", "cut off", "error event", "no event"],
)
def test_other_failures_are_told_and_the_page_goes_on(
    open_tab: Opener, status: int, headers: dict[str, str], body: str, complaint: str
) -> None:
    tab = open_tab(may_fail=True)
    told(tab, body, status=status, headers=headers)
    kept = tab.ask("Why?", state="failed")
    assert kept == ("half" if status == 200 else "")
    expect(tab.problem).to_have_text(complaint)
    expect(tab.status).to_have_text(complaint)
    expect(tab.button("Retry")).to_be_visible()
    tab.page.unroute(CHAT)
    told(tab, stream("Yes."))
    assert tab.ask("And now?") == "Yes."
    assert len(tab.bodies[-1]["messages"]) == (3 if kept else 1)  # a question without an answer is left out


def test_a_server_that_is_gone_is_told(open_tab: Opener) -> None:
    tab = open_tab(may_fail=True)
    tab.context.set_offline(True)
    tab.ask("Anybody there?", state="failed")
    expect(tab.problem).to_have_text("The server cannot be reached. Is it running?")
    tab.context.set_offline(False)
    tab.button("Retry").click()
    tab.answer()


@pytest.mark.catalogue("F17")
def test_a_key_is_asked_for_and_used(open_tab: Opener) -> None:
    tab, given = open_tab(may_fail=True), list[str | None]()

    def guarded(route: Route) -> None:
        given.append(route.request.headers.get("authorization"))
        if given[-1] == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, body=refused("no"), content_type="application/json")

    for path in (CHAT, MODELS):
        tab.page.route(path, guarded)
    key = tab.page.get_by_label("API key")
    tab.attach()
    tab.ask(COUNT, state="failed")
    expect(tab.problem).to_have_text("The server wants a valid API key.")
    expect(key).to_be_focused()
    expect(key).to_have_attribute("type", "password")
    key.fill("wrong")
    key.press("Enter")
    expect(tab.alert).to_contain_text("The server wants a valid API key.")
    expect(key).to_be_focused()
    key.fill("right")
    key.press("Enter")
    assert "That makes 6." in tab.answer()
    expect(tab.alert).to_be_empty()
    assert given == [None, "Bearer wrong", "Bearer right", "Bearer right"]
    assert "right" not in tab.page.url + str(tab.page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])"))


@pytest.mark.catalogue("F13", "F14")
def test_markup_is_text(tab: Tab) -> None:
    told(tab, stream(MARKUP[:9], MARKUP[9:]))
    assert tab.ask(MARKUP) == MARKUP
    expect(tab.last.locator(".question")).to_have_text(MARKUP)
    expect(tab.page.locator("#conversations button")).to_have_text(MARKUP)
    assert tab.page.locator("img[src=x], article script").count() == 0


# Windows, keys, schemes


def test_a_phone_is_wide_enough(open_tab: Opener) -> None:
    tab = open_tab(width=360, height=740, has_touch=True, is_mobile=True)
    tab.attach()
    assert "That makes 6." in tab.ask(COUNT)
    told(tab, stream("word" * 100))
    tab.ask("x" * 200)
    assert not tab.is_sideways()
    tab.button("Conversations").click()
    expect(tab.button("New conversation")).to_be_in_viewport()
    tab.button("New conversation").click()
    expect(tab.button("New conversation")).to_be_hidden()
    expect(tab.turns).to_have_count(0)
    tab.button("Settings").click()
    expect(tab.page.get_by_label("Seed")).to_be_in_viewport()
    assert not tab.is_sideways()


def test_the_keyboard_is_enough(open_tab: Opener) -> None:
    tab = open_tab(is_slow=True)
    keys = tab.page.keyboard
    tab.page.on("filechooser", lambda chooser: chooser.set_files(SCENE))
    expect(tab.box).to_be_focused()
    keys.press("Shift+Tab")
    keys.press("Enter")
    expect(tab.tray).to_have_count(1)
    keys.press("Tab")
    keys.type("Describe")
    keys.press("Shift+Enter")
    keys.type("the scene.")
    keys.press("Enter")
    expect(tab.last.locator(".question")).to_have_text("Describe\nthe scene.")
    expect(tab.last.locator(".answer")).not_to_be_empty()
    keys.press("Escape")
    tab.answer("stopped")
    for name in ("Add pictures", "Retry"):
        keys.press("Shift+Tab")
        expect(tab.button(name)).to_be_focused()
    keys.press("Enter")
    expect(tab.last).to_have_attribute("data-state", "running")
    expect(tab.button("Stop")).to_be_focused()
    keys.press("Enter")
    tab.answer("stopped")
    expect(tab.button("Retry")).to_be_focused()
    backwards = "Edit this question|Conversation|Switch to dark|Settings|Clear|llava-miniature|Describe the scene.|New conversation"
    for name in (*backwards.split("|"), "Skip to the question"):
        keys.press("Shift+Tab")
        assert focused(tab) == name
        assert tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    expect(tab.box).to_be_focused()
    tab.button("Settings").focus()
    keys.press("Enter")
    keys.press("Tab")
    expect(tab.button("Close settings")).to_be_focused()
    keys.press("Escape")
    expect(tab.button("Settings")).to_be_focused()


def focused(tab: Tab) -> str:
    name = "document.activeElement.ariaLabel ?? document.activeElement.textContent"
    return str(tab.page.evaluate(f"({name}).trim().replace(/\\s+/g, ' ')"))


def test_every_control_has_a_name(tab: Tab) -> None:
    tab.attach()
    tab.ask(COUNT)
    tab.attach()
    tab.button("Settings").click()
    nodes = tab.context.new_cdp_session(tab.page).send("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    controls = [one for one in named if one[0] in ("button", "textbox", "combobox", "spinbutton", "link", "image")]
    assert len(controls) > 15
    assert [role for role, name in controls if not name] == []
    landmarks = {role for role, _ in named}
    assert landmarks >= {"navigation", "main", "complementary", "form", "log", "status", "alert", "heading", "list"}


def test_the_scheme_follows_the_system_until_it_is_chosen(open_tab: Opener) -> None:
    tab = open_tab(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = tab.page.evaluate(ground)
    tab.page.emulate_media(color_scheme="light")
    light = tab.page.evaluate(ground)
    assert dark != light
    tab.button("Switch to dark").click()
    assert tab.page.evaluate(ground) == dark
    tab.page.reload()
    expect(tab.button("Switch to light")).to_be_visible()
    assert tab.page.evaluate(ground) == dark


# Pieces


@pytest.mark.catalogue("F14")
def test_events_may_be_split_anywhere(tab: Tab) -> None:
    events = (
        "\ufeffdata: {\"a\": \"Käse 🧀\"}\n\n: a comment\r\ndata:two\r\ndata:  lines\r\n\r\nevent: x\rid: 1\rdata: é\r\rretry: 1\n\n"
        "data: [DONE]\n\ndata: not ended"
    )  # fmt: skip
    expected = ['{"a": "Käse 🧀"}', "two\n lines", "é", "[DONE]"]
    found = tab.page.evaluate(
        """async (text) => {
            const { EventReader } = await import("/chat.js");
            const bytes = new TextEncoder().encode(text);
            const read = (...cuts) => {
                const reader = new EventReader();
                return [0, ...cuts].flatMap((cut, place) => reader.push(bytes.slice(cut, [...cuts, bytes.length][place])));
            };
            const found = [read(...bytes.keys())];
            for (let one = 0; one <= bytes.length; one++) for (let two = one; two <= bytes.length; two++) found.push(read(one, two));
            return [...new Set(found.map((data) => JSON.stringify(data)))].map((data) => JSON.parse(data));
        }""",
        events,
    )
    assert found == [expected]


def test_the_files_are_few_lines_and_nothing_that_runs_text() -> None:
    texts = [(ROOT / "llavakit" / "server" / "page" / name).read_text("utf-8") for name in FILES]
    lines = [line for text in texts for line in text.splitlines()]
    assert len(lines) <= 1000
    assert max(map(len, lines)) <= 140
    whole = "\n".join(lines).replace('xmlns="http://www.w3.org/2000/svg"', "")
    banned = "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( setTimeout( http:// https:// style= onclick="
    for word in banned.split():
        assert word not in whole, word


@pytest.mark.soak
def test_pictures_of_the_page_are_drawn_again(open_tab: Opener) -> None:
    folder = ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    draw(open_tab(color_scheme="light"), folder / "page-desktop.png")
    draw(open_tab(width=390, height=844, color_scheme="dark"), folder / "page-phone.png")


def draw(tab: Tab, path: Path) -> None:
    """Talk about the example, and keep what is seen."""
    tab.greedy()
    if tab.button("New conversation").is_visible():
        tab.ask("What is at the bottom?")
        tab.button("New conversation").click()
    tab.attach()
    tab.ask(COUNT)
    tab.ask(CROSS)
    tab.box.fill("Describe the scene.")
    tab.page.mouse.move(0, 0)
    tab.page.screenshot(path=path)
    assert path.stat().st_size < 150_000
