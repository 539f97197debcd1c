"""The page of the server, driven in Chromium as a person would: by keys, with a narrow window, and with bad manners."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import connect
from typing import Any
from urllib.parse import urlsplit

import pytest

from plm.querying import PoolPair
from plm.serving import interviews
from plm.serving.app import make_app
from plm.serving.server import running
from plm.serving.service import RewardService
from plm.users import store_path

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

HOSTILE = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
RTL = "שלום עולם — مرحبا"
WALKS = [PoolPair("What next?", f"a walk in wood {number}", f"a film of {number} hours", {}) for number in range(12)]
STRANGE = [
    PoolPair(f"{HOSTILE}&amp;\"'", HOSTILE, RTL, {}),
    PoolPair('[{"role":"user","content":"<b>Hi</b>"},{"role":"assistant","content":"?"}]', "x" * 600, "`${1}`", {}),
]
POOL = WALKS + STRANGE
KEY = "k" * 16


@pytest.fixture(scope="module")
def served(shared_path: Path) -> RewardService:
    return RewardService(shared_path, name="lore")


@pytest.fixture(scope="module")
def url(served: RewardService) -> Iterator[str]:
    with running(make_app(served, POOL)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield launched
        launched.close()


@pytest.fixture
def person(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new person; at the end nothing but the server was asked, and nothing was complained about."""
    complaints: list[str] = []
    hosts: set[str] = set()
    contexts = []

    def opened(where: str = "#ask", address: str = url, tab_of: Any = None, **options: Any) -> Any:
        context = tab_of.context if tab_of else browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url)._replace(path="", query="").geturl()))
        page.goto(f"{address}/{where}")
        page.complaints = complaints
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(host.startswith(("http://127.0.0.1:", "data:")) for host in hosts)


def begin(page: Any, user: str) -> None:
    page.fill("#person", user)
    page.keyboard.press("Enter")
    page.wait_for_selector(".question", state="visible")


@contextmanager
def changing(page: Any) -> Iterator[None]:
    """Wait for the number of answers to change."""
    before = page.inner_text(".counts")
    yield
    page.wait_for_function("before => document.querySelector('.counts').innerText !== before", arg=before)


def press(page: Any, key: str) -> None:
    with changing(page):
        page.keyboard.press(key)


def liked(text: str) -> bool:
    """What the person of the first test prefers: walks, and what begins with a mark."""
    return "walk" in text or text[:1] in "<`"


def believed(page: Any) -> str:
    """The expected accuracy and its interval, such as ``61 % (52 % to 70 %)``."""
    return f"{page.inner_text('.estimate output')} {page.inner_text('.since').split(';')[0]}"


def rows(path: Path, user: str) -> list[int]:
    """How many rows of users and of pairs the database holds of a user."""
    with closing(connect(store_path(path))) as database:
        query = "SELECT count(*) FROM {} WHERE user_id = ?"
        return [database.execute(query.format(table), [user]).fetchone()[0] for table in ("plm_users", "plm_pairs")]


# ---------------------------------------------------------------------- ask
def test_a_person_answers_ten_pairs_takes_one_back_and_is_forgotten(
    person: Callable[..., Any], served: RewardService, shared_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By keys alone. The estimate moves, a reload loses nothing, and the end empties the store."""
    caplog.set_level(logging.INFO, "plm.serving")
    page = person()
    begin(page, "anna/α")
    estimates = [believed(page)]
    for number in range(10):
        sides = page.locator(".choice .text").all_inner_texts()
        press(page, "ArrowDown" if number == 4 else "ArrowRight" if liked(sides[1]) else "ArrowLeft")
        estimates.append(believed(page))
        if number == 6:
            page.reload()
            page.wait_for_selector(".question", state="visible")
            assert page.inner_text(".counts") == "7 answered · 7 left"
    assert len(set(estimates)) > 3 and page.locator(".dots i").count() == 9  # one had no preference
    kept = served.method.users.pairs(["anna/α"])["anna/α"]
    assert len(kept) == 10 and [number for number, one in enumerate(kept) if one["tie"]] == [4]
    walks = [one for one in kept if not one["tie"] and one["prompt"] == "What next?"]
    assert len(walks) >= 7 and all("walk" in one["chosen"] for one in walks)

    press(page, "Backspace")
    assert page.inner_text(".counts") == "9 answered · 5 left"
    assert served.method.users.pairs(["anna/α"])["anna/α"] == kept[:9]

    assert rows(shared_path, "anna/α") == [1, 9]
    page.click(".forget")
    page.click("dialog .no")
    assert rows(shared_path, "anna/α") == [1, 9]
    page.click(".forget")
    page.click("dialog .yes")
    page.wait_for_selector("#person", state="visible")
    assert "Nothing is left in the store of users" in page.inner_text(".message")
    assert rows(shared_path, "anna/α") == [0, 0]
    assert b"anna" not in b"".join(file.read_bytes() for file in shared_path.parent.glob("*.db*"))
    page.reload()
    assert page.is_visible("#person")
    assert caplog.records and not any("anna" in line.getMessage() for line in caplog.records)


def test_keys_answer_questions_and_nothing_else(person: Callable[..., Any], served: RewardService) -> None:
    """Not before there is one, not twice for a double click or a held key, not behind a dialog or on another page."""
    page = person()
    page.fill("#person", "bo")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Backspace")
    assert page.input_value("#person") == "o"
    begin(page, "bo")
    with changing(page):
        page.dblclick(".choice >> nth=0")
    with changing(page):
        page.evaluate(
            """for (const [key, repeat] of [["ArrowLeft", false], ["ArrowRight", false], ["ArrowDown", true]])
                 document.body.dispatchEvent(new KeyboardEvent("keydown", {key, repeat, bubbles: true}))"""
        )
    page.keyboard.press("Control+ArrowLeft")
    page.click(".forget")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    page.click("nav a >> nth=2")
    page.wait_for_selector("#users tbody tr", state="visible")
    page.keyboard.press("ArrowLeft")
    page.click("nav a >> nth=1")
    press(page, "ArrowRight")
    assert page.inner_text(".counts") == "3 answered · 11 left"
    assert served.user("bo").num_pairs == 3
    served.forget("bo")


def test_two_tabs_of_one_person(person: Callable[..., Any], served: RewardService) -> None:
    """An undo of what the other tab has changed is refused and shows it; who is forgotten in one is so in both."""
    one, other = (page := person()), person(tab_of=page)
    for page in (one, other):
        begin(page, "kim")
    press(one, "ArrowLeft")
    press(other, "ArrowRight")
    version = served.user("kim").version
    one.keyboard.press("Backspace")  # the other one's answer: refused
    one.wait_for_function("() => document.querySelector('.message').innerText.includes('changed meanwhile')")
    assert served.user("kim").version == version
    assert len(one.complaints) == 1 and "409" in one.complaints.pop()
    other.click(".forget")
    other.click("dialog .yes")
    one.wait_for_selector("#person", state="visible")
    other.wait_for_selector("#person", state="visible")
    assert "kim" not in served.method.users


def test_who_is_forgotten_elsewhere_is_not_brought_back(person: Callable[..., Any], served: RewardService) -> None:
    """A phone on which somebody is still asked, while the user is deleted by an administrator."""
    page = person()
    begin(page, "mia")
    press(page, "ArrowLeft")
    served.forget("mia")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#person", state="visible")
    assert "was forgotten meanwhile" in page.inner_text(".message") and "mia" not in served.method.users
    assert len(page.complaints) == 1 and "409" in page.complaints.pop()


def test_who_was_trained_on_pairs_that_were_not_kept_starts_anew(
    person: Callable[..., Any], served: RewardService
) -> None:
    page = person("#users")
    page.click("tr:has-text('eva') button >> nth=0")
    page.wait_for_selector(".anew", state="visible")
    assert "5 answers" in page.inner_text(".anew") and served.user("eva").num_pairs == 5
    page.click(".anew .go")
    page.keyboard.press("Backspace")  # there is nothing of this person to take back
    press(page, "ArrowLeft")
    assert served.user("eva").num_pairs == 1


def test_an_answer_that_was_learned_is_not_given_again_where_the_next_question_fails(
    person: Callable[..., Any], served: RewardService
) -> None:
    page = person()
    begin(page, "stale")
    page.route("**/beliefs", lambda route: route.fulfill(status=429, json={"error": {"message": "busy for a while"}}))
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.message').innerText.includes('busy for a while')")
    assert served.user("stale").num_pairs == 1
    page.unroute("**/beliefs")
    press(page, "ArrowRight")  # asks for the next question alone
    assert served.user("stale").num_pairs == 1
    press(page, "ArrowRight")
    assert served.user("stale").num_pairs == 2
    assert len(page.complaints) == 1 and "429" in page.complaints.pop()
    served.forget("stale")


def test_questions_may_be_pasted(person: Callable[..., Any], served: RewardService, shared_path: Path) -> None:
    """By a person whose server has none; when all are answered there is an end, and a way back."""
    with running(make_app(served)) as address:
        page = person(address=address)
        page.fill("#person", "pat")
        for text, problem in (("{", "Line 1 of the questions is no JSON"), ('\n{"responses": ["a"]}', "Line 2")):
            page.fill("#pool", text)
            page.click(".start .primary")
            page.wait_for_function("words => document.querySelector('.message').innerText.includes(words)", arg=problem)
        page.fill("#pool", '{"prompt": "p", "responses": ["tea", "milk"]}\n\n{"chosen": "sun", "rejected": "rain"}\n')
        page.click(".start .primary")
        page.wait_for_selector(".question", state="visible")
        press(page, "ArrowLeft")
        press(page, "ArrowDown")
        assert page.is_visible(".done") and not page.is_visible(".asked") and page.is_disabled(".tie") is False
        page.keyboard.press("ArrowLeft")
        press(page, "Backspace")
        assert page.is_visible(".asked") and served.user("pat").num_pairs == 1
    served.forget("pat")


# ---------------------------------------------------------------------- all pages
def test_ids_and_texts_are_shown_as_text_and_fit_a_narrow_window(
    person: Callable[..., Any], served: RewardService
) -> None:
    """Markup, quotes, right-to-left writing and words without an end, as ids and texts, on all pages at 375 pixels."""
    page = person(viewport={"width": 375, "height": 800}, color_scheme="dark")
    ids = [HOSTILE, f'"{RTL}/%2F?#', "w" * 300]
    shown: set[str] = set()

    def look() -> None:
        shown.update([page.inner_text(".prompt"), *page.locator(".choice .text").all_inner_texts()])
        assert page.evaluate("document.documentElement.scrollWidth") == 375

    for user in ids:
        begin(page, user)
        assert page.inner_text(".question .who") == user
        look()
        press(page, "ArrowLeft")
        page.click("aside .leave")
    begin(page, HOSTILE)
    while page.is_visible(".asked"):
        look()
        press(page, "ArrowLeft")
    assert {HOSTILE, RTL, "x" * 600, "`${1}`"} <= shown and any("<b>Hi</b>" in text for text in shown)
    page.click("nav a >> nth=2")
    page.wait_for_selector("#users tbody tr", state="visible")
    assert set(ids) <= set(page.locator("tbody th").all_inner_texts())
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.click("nav a >> nth=0")
    page.fill("#prompt", HOSTILE)
    page.fill(".responses textarea >> nth=0", RTL)
    for user in ids:
        page.fill("#add-user", user)
        page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("number => document.querySelectorAll('.person h2').length === number", arg=6)
    assert set(ids) <= set(page.locator(".person h2").all_inner_texts())
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.title() == "plm" and page.locator("main img, main script").count() == 0
    for user in ids:
        served.forget(user)


def test_the_playground_shows_the_rewards_of_the_server(person: Callable[..., Any], served: RewardService) -> None:
    page = person("")
    page.wait_for_selector(".person")
    texts = ["strong tea", "black coffee", "water"]
    page.click(".add-response")
    for number, text in enumerate(texts):
        page.fill(f".responses textarea >> nth={number}", text)
    page.fill("#prompt", "What to drink?")
    page.fill("#add-user", "nobody known")
    page.click("#playground .primary")
    page.wait_for_function("() => document.querySelectorAll('.reward').length === 12")
    cards = page.locator(".person").all_inner_texts()
    for user, card in zip((None, "ben", "eva", "nobody known"), cards, strict=True):
        expected = served.method.score(
            texts, prompts="What to drink?", **({"user_id": user} if user in ("ben", "eva") else {})
        )
        lines = card.replace("−", "-").splitlines()
        values = [float(line.split(" ± ")[0]) for line in lines if " ± " in line]
        assert values == pytest.approx(expected.tolist(), abs=0.005)
        assert ("not known" in card) == (user == "nobody known")
    page.fill(".responses textarea >> nth=0", " ")
    page.click("#playground .primary")
    assert "A response is empty" in page.inner_text(".message")


def test_users_are_listed_found_and_forgotten(
    person: Callable[..., Any], served: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than fit one part of the list."""
    monkeypatch.setattr(interviews, "USERS_AT_ONCE", 8)
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    for number in range(12):
        served.method.learn(f"many {number}", [pair])
    page = person("#users")
    page.wait_for_selector("#users tbody tr")
    assert "14 users are known" in page.inner_text(".summary")
    assert page.locator("tbody tr").count() == 8
    page.click(".more")
    page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 14")
    assert not page.is_visible(".more")
    page.fill(".find input", "many 7")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 1")
    assert "personal" in page.inner_text("tbody tr")
    page.click("tbody .danger")
    page.click("dialog .yes")
    page.wait_for_function("() => document.querySelector('.summary').innerText.startsWith('13')")
    assert "many 7" not in served.method.users
    page.fill(".find input", "..")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.message').innerText.includes('cannot send the id')")
    served.method.users.delete([f"many {number}" for number in range(12)])


def test_a_server_with_keys_asks_for_one(person: Callable[..., Any], served: RewardService) -> None:
    """A wrong one is asked for again, the right one is kept while the tab is open, and no request goes without."""
    with running(make_app(served, POOL, keys=[KEY])) as address:
        page = person("#users", address)
        page.wait_for_selector("dialog.key[open]")
        assert page.locator("tbody tr").count() == 0
        page.fill("#key", "wrong" * 4)
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('dialog.key').innerText.includes('does not know')")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("tbody tr")
        page.reload()
        page.wait_for_selector("tbody tr")
        assert page.inner_text(".model") == "lore"
        assert page.complaints and all("401" in text for text in page.complaints)
        page.complaints.clear()
        cancelled = person("#users", address)
        cancelled.wait_for_selector("dialog.key[open]")
        cancelled.keyboard.press("Escape")
        cancelled.wait_for_function("() => document.querySelector('.message').innerText.includes('needs a key')")
