"""The feature page in a browser: what it shows, clicks, Back, search, ranges, hostile text, phones and dark mode."""

import json
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest
from chromium import Chromium, needs_chromium
from described import describe

from sae_lab.plots import page_blocks
from sae_lab.plots.feature_page import SOURCES, write_page
from sae_lab.plots.page_server import start_server
from sae_lab.runtime.errors import UserError

N = 150
ROLES = {
    0: {"group": 0, "class": "shared", "relative_norm": 0.5, "writes": [1.0, 1.0], "routed": [0.25, 0.75]},
    1: {"group": 1, "class": "tuned_only", "relative_norm": 1.0, "writes": [0.0, 1.0], "routed": [0.5, 0.5]},
}
FOUND = {
    "tokens": ["<b>", " sys"],
    "read": [False, True],
    "n_active": 2,
    "latents": [{"latent": 3, "max": 2.0, "values": [[1, 2.0]]}, {"latent": 999, "max": 1.0, "values": [[1, 1.0]]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_page(describe(N, 8_192, 40), folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture
def page(browser, folder):
    """The page, freshly opened. At the end no script has failed, and no hostile token has run."""
    browser.open(f"file://{folder}/index.html")
    yield browser
    assert browser.errors() == []
    assert browser.run("window.pwned") is None


def shown(page: Chromium) -> list[int]:
    return page.run("[...document.querySelectorAll('article')].map(a => +a.id.replace('latent-', ''))")


def do(page: Chromium, action: str) -> None:
    """Run a script and wait until the page is drawn again."""
    before = page.run(f"(() => {{ const n = document.documentElement.dataset.drawn; {action}; return n; }})()")
    page.wait(f"document.documentElement.dataset.drawn !== '{before}'")


def search(page: Chromium, query: str) -> None:
    do(
        page,
        f"document.getElementById('query').value = {json.dumps(query)}; document.getElementById('query').oninput()",
    )


def test_sizes_in_python_and_javascript_agree():
    assert f"const CHUNK = {page_blocks.CHUNK};" in (SOURCES / "data.js").read_text()
    assert f"const WIDE = {page_blocks.WIDE};" in (SOURCES / "context.js").read_text()


def test_no_text_of_others_is_html(folder):
    text = (folder / "index.html").read_text()
    assert "pwned" not in text
    assert all("innerHTML" not in file.read_text() for file in SOURCES.glob("*.js"))
    assert "default-src 'none'" in text
    assert json.loads((folder / "features.json").read_text())["latents"][3]["latent"] == 3


@needs_chromium
def test_search_is_on_the_tokens_that_fire(page):
    assert shown(page)[:3] == [0, 1, 2]
    assert "135 of 150 latents" in page.run("found.textContent")  # every tenth is dead
    search(page, "import")  # tokens 40 and 41; "Important" is another one
    assert sorted(shown(page)) == [40, 41, 90, 91, 140, 141]
    assert "fire on the token “import”" in page.run("found.textContent")
    search(page, "impor")
    assert sorted(shown(page)) == [40, 41, 42, 90, 91, 92, 140, 141, 142]
    search(page, '"import"')
    assert sorted(shown(page)) == [41, 91, 141]
    do(page, "where.value = 'promotes'; where.onchange()")
    assert shown(page) == []


@needs_chromium
def test_ranges_and_lists(page):
    search(page, "17, 20-23,9")
    assert shown(page) == [9, 17, 20, 21, 22, 23]
    search(page, "9 17 20 \u2013 23")
    assert shown(page) == [9, 17, 20, 21, 22, 23]
    do(page, "show.value = 'dead'; show.onchange()")
    assert shown(page) == [9]
    search(page, "")
    assert shown(page) == [*range(9, N, 10)]
    assert "Does not fire" in page.run("document.querySelector('article').textContent")


@needs_chromium
def test_back_returns_to_what_was_shown(page):
    page.click("#query")
    page.type("import")
    page.wait("location.hash === '#q=import' && document.querySelectorAll('article').length === 6")
    first = shown(page)
    page.click("aside a")
    page.wait("/^#q=[0-9]+$/.test(location.hash) && document.querySelectorAll('article').length === 1")
    do(page, "history.back()")
    assert shown(page) == first
    assert page.run("query.value") == "import"
    do(page, "history.back()")
    assert page.run("[location.hash, query.value]") == ["", ""]
    assert shown(page)[:3] == [0, 1, 2]
    do(page, "history.forward()")
    assert shown(page) == first


@needs_chromium
def test_an_address_is_a_link(page, folder):
    page.open(f"file://{folder}/index.html#show=dead&sort=max")
    assert shown(page)[0] == 9
    page.open(f"file://{folder}/index.html#17")  # of earlier pages
    assert shown(page) == [17]
    page.open(
        f"file://{folder}/index.html#show=constructor&sort=__proto__&q=%3Cimg%20src=x%20onerror=window.pwned=1%3E"
    )
    assert page.run("show.value") == "firing"


@needs_chromium
def test_a_card_shows_deciles_logits_and_the_threshold(page):
    search(page, "3")
    said = page.run("document.querySelector('article').innerText")
    for part in ("90–100 %", "0–10 %", "threshold 0.7", "Promotes (logit)", "1.5", "Nearest latents", "Fires together"):
        assert part in said
    lines = page.run("document.querySelectorAll('.context').length")
    assert lines == 20
    short = page.run("document.querySelector('.context').textContent.length")
    page.click(".context")
    page.wait("document.querySelector('.context.wide')")
    assert page.run("document.querySelector('.context').textContent.length") > 2 * short
    peak = page.run("document.querySelector('.context .centre').title")
    assert peak.endswith(page.run("document.querySelector('.context i').textContent"))


@needs_chromium
def test_a_click_in_the_map_opens_a_latent(page):
    i, x, y = page.run(
        "(() => { const b = canvas.getBoundingClientRect(), far = ([x, y], [a, c]) => (a - x) ** 2 + (c - y) ** 2 > 4;"
        "const i = points.findIndex((p, i) => points.every((q, j) => i === j || far(p, q)));"
        "return [i, b.x + points[i][0], b.y + points[i][1]]; })()"
    )
    page.click_at(x, y)
    page.wait("document.querySelectorAll('article').length === 1")
    assert shown(page) == [i]


@needs_chromium
def test_more_latents_are_decoded_when_they_are_needed(page):
    assert page.run("decoded.has('latents-2')") is False
    count = len(shown(page))
    page.click("#more")
    page.wait(f"document.querySelectorAll('article').length > {count}")
    assert shown(page)[count] == shown(page)[count - 1] + 1
    search(page, "148")
    assert page.run("decoded.has('latents-2')") is True


@needs_chromium
def test_dark_and_narrow(page, folder):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.run(colour)
    page.open(f"file://{folder}/index.html", dark=True)
    assert page.run(colour) != light
    page.open(f"file://{folder}/index.html", width=390, height=844)
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run("document.querySelector('aside').getBoundingClientRect().left") < 40  # below the contexts
    hidden = (
        "[...document.querySelectorAll('.context .centre')].filter(c => { const b = c.getBoundingClientRect(), t = "
        "c.parentNode.getBoundingClientRect(); return b.left < t.left - 1 || b.left > t.right; }).length"
    )
    assert page.run(hidden) == 0


@needs_chromium
def test_groups_classes_and_sites_are_shown(page, tmp_path):
    roles = {"groups": {"name": "group", "sizes": [1, 9]}, "models": ["base", "tuned"]}
    facts = {i: ROLES[min(i, 1)] for i in range(10)}
    write_page(describe(10, 1_280, 20, head=roles, facts=facts), tmp_path)
    page.open(f"file://{tmp_path}/index.html")
    badges = page.run("[...document.querySelectorAll('#latent-0 .badge')].map(b => b.textContent)")
    assert badges == ["group 1 of 2", "shared"]
    said = page.run("document.querySelector('#latent-1').innerText")
    assert "tuned model only" in said
    assert "Decoder norm by site" in said
    assert "Share of its activations by site" in said
    do(page, "show.value = 'group-0'; show.onchange()")
    assert shown(page) == [0]
    do(page, "show.value = 'class-tuned_only'; show.onchange()")
    assert shown(page) == [*range(1, 9)]


@needs_chromium
def test_characters_that_no_font_draws_are_named(page, folder):
    page.open(f"file://{folder}/index.html")
    assert page.run(r"alone('a b\n\t\r\x03\x7f\u200b')") == "a·b⏎⇥␍<0x03><0x7F><U+200B>"


@needs_chromium
def test_own_text(page, tmp_path):
    write_page(describe(10, 1_280, 20) | {"own": FOUND}, tmp_path)
    page.open(f"file://{tmp_path}/index.html")
    assert page.run("own.hidden") is False
    assert page.run("document.getElementById('ask').hidden") is True
    assert page.run("[...document.querySelectorAll('#owned .text span')].map(s => s.textContent)") == ["<b>", " sys"]
    chips = page.run("[...document.querySelectorAll('#owned .chips button')].map(b => b.firstChild.textContent)")
    assert chips == ["3", "999"]
    assert page.run("document.querySelectorAll('#owned a').length") == 1


@pytest.fixture
def server(tmp_path):
    def answer(text: str):
        if text == "bad":
            raise UserError("text has 0 tokens")
        return FOUND

    write_page(describe(10, 1_280, 20) | {"served": True}, tmp_path)
    server = start_server(tmp_path, answer, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@needs_chromium
def test_the_box_asks_the_server(page, server):
    page.open(f"http://{server.names[0]}/")
    page.click("#typed")
    page.type("import sys")
    page.click("#ask button")
    page.wait("document.querySelectorAll('#owned .text span').length === 2")
    page.run("typed.value = 'bad'")
    page.click("#ask button")
    page.wait("answer.textContent.includes('0 tokens')")


def request(server, method="POST", path="/activations", body=b'{"text": "x"}', **headers):
    connection = HTTPConnection(*server.server_address)
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_the_server_answers_its_own_page_only(server):
    assert server.server_address[0] == "127.0.0.1"
    status, content = request(server)
    assert (status, json.loads(content)) == (200, FOUND)
    assert request(server, Host="evil.example")[0] == 404  # a name that points here
    assert request(server, "GET", "/", None, Host="evil.example")[0] == 404
    assert request(server, Content_Type="text/plain")[0] == 415  # what a form of another site may send
    assert request(server, Content_Length=str(2**21), body=b"")[0] == 413
    for body in (b"[]", b"{", b'{"text": 3}', b'{"text": "bad"}', b"\xff"):
        assert request(server, body=body)[0] == 400
    for path in ("/../features.json", "/etc/passwd", "/%2e%2e/x", "//index.html/.."):
        assert request(server, "GET", path, None)[0] == 404
    assert request(server, "GET", "/", None)[0] == request(server, "GET", "/features.json?x", None)[0] == 200
    with pytest.raises(UserError, match=r"port=.* cannot be used"):
        start_server(Path(), lambda text: {}, server.server_port)
