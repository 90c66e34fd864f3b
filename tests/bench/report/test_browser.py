"""The page in a real browser: it draws, asks for nothing, says nothing, and does as its reader wants."""

import numpy as np
import pytest

from duo_mlx.bench.report import explorer, page, rows, themes

TOKENS = ["It", " was", "\n", " the", " best"]
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
HOSTILE = "</script><img src=x onerror=alert(1)><b>bold</b>"


@pytest.fixture
def write(tmp_path):
    """``write(*records)``: the address of the results' page."""

    def make(*records, oracle=None):
        results = rows.labelled([(f"run{at}", record) for at, record in enumerate(records)])
        file = tmp_path / "report.html"
        text = page.page(results, page.charts(results), explorer.texts(results, oracle))
        file.write_text(text, encoding="utf-8")
        return file.as_uri()

    return make


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_everything_is_drawn_without_a_word_or_a_request(browser, write, made_result, width, theme):
    url = write(made_result(contexts=(0, 512)), made_result(metered=False, device="Test M1"))
    browser.show(url, width, theme)
    assert (browser.said, browser.asked) == ([], [url])
    drawn = browser.run("[...document.querySelectorAll('.chart')].map((each) => !!each.querySelector('.main-svg'))")
    assert len(drawn) == len(page.CHARTS) and all(drawn)
    assert browser.run(OVERFLOW) <= 0
    assert not browser.run("document.querySelector('[data-title^=Share], .modebar a[href]')")
    assert not browser.run("document.querySelector('[role=img] button')")  # it would be hidden from who cannot see
    places = "section, nav, .scroll, .chart, .route, #tokens"
    assert all(browser.run(f"[...document.querySelectorAll('{places}')].map((each) => each.ariaLabel)"))


def test_charts_follow_the_theme(browser, write, made_result):
    browser.show(write(made_result()), theme="light")
    ground = "getComputedStyle(document.querySelector('.chart .main-svg')).background"
    for name in ("dark", "light"):
        browser.theme(name)
        colour = themes.THEMES[name].ground
        wanted = f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"
        assert wanted in browser.run(ground)
        assert browser.run("getComputedStyle(document.body).backgroundColor") == wanted


def test_what_a_result_says_is_text(browser, write, made_result):
    record = made_result(contexts=(0, 512))
    record["command"] = record["system"]["device"] = record["model"]["name"] = HOSTILE
    record["samples"]["tokens"] = [HOSTILE, "<b>", "&lt;", "%{x}"]
    for each in (*record["cells"], *record["samples"]["policies"]):
        each["route"] = HOSTILE + each["route"]
    url = write(record)
    browser.show(url)
    assert (browser.said, browser.asked) == ([], [url])
    assert browser.run("document.querySelectorAll('img, .chart b, #tokens b, table b, .chart a[href]').length") == 0
    assert browser.run("document.querySelector('#tokens').textContent") == HOSTILE + "<b>&lt;%{x}"
    assert HOSTILE in browser.run("document.querySelector('#conditions').textContent")
    shown = browser.run("[...document.querySelectorAll('#parts .ytick')].map((each) => each.textContent)")
    assert len(shown) == 8 and all("<img src=x" in each for each in shown)
    bold = browser.run("[...document.querySelectorAll('svg [style*=bold]')].map((each) => each.textContent)")
    assert "bold" not in bold


def test_the_table_sorts_by_keyboard_and_what_is_unknown_comes_last(browser, write, made_result):
    browser.show(write(made_result()))
    losses = "[...document.querySelectorAll('#cells tbody tr')].map((row) => row.cells[14].innerText.split(' ')[0])"
    assert browser.run(losses) == ["-", "3", "3.2", "3.5", "7"]
    browser.run("document.querySelectorAll('#cells thead button')[14].focus()")
    browser.key("Enter", 13)
    assert browser.run(losses) == ["3", "3.2", "3.5", "7", "-"]
    browser.key("Enter", 13)
    assert browser.run(losses) == ["7", "3.5", "3.2", "3", "-"]
    assert browser.run("document.querySelectorAll('#cells th')[14].ariaSort") == "descending"


@pytest.fixture
def explored(browser, write, made_result, tmp_path):
    """``explored(hash)`` opens the page of a text of five tokens, with an oracle, there."""
    record = made_result()
    record["samples"]["tokens"], record["samples"]["ids"] = TOKENS, [11, 12, 13, 14, 15]
    for policy in record["samples"]["policies"]:
        policy["patterns"] = [policy["patterns"][0]] * 4 + ["B-s-"]
        policy["loss"].append(1.25)
    np.savez(
        tmp_path / "tokens.npz",
        inputs=np.array([[11, 12, 13, 14, 15]]),
        difficulty=np.array([[0.1, 0.2, 0.3, 0.4, 0.5]]),
        oracle_routes=np.tile([0, 1, 2, 2], (1, 5, 1)),
    )
    url = write(record, oracle=tmp_path / "tokens.npz")
    return lambda place="": browser.show(f"{url}{place}")


def panel(browser):
    return browser.run("document.querySelector('#panel').innerText").split("\n")


def test_an_address_leads_to_a_token_under_two_policies(browser, explored):
    explored("#token=4&policy=BBss&versus=big")
    told = panel(browser)
    assert told[0] == "Token 4 of 5:  the"
    assert told[told.index("Loss, BBss") + 1 : told.index("A: BBss")] == [
        "2.700", "Loss, big", "2.500", "B less A", "-0.200", "Difficulty", "0.300 (the oracle's, of predicting it)",
    ]  # fmt: skip
    routes = "[...document.querySelectorAll('.route')].map((each) => each.textContent)"
    assert browser.run(routes) == ["BBss", "BBBB"]
    assert browser.run("document.querySelectorAll('.layer.differs').length") == 4
    assert browser.run("document.querySelectorAll('.token.differs').length") == 4
    assert browser.run("document.querySelector('#difference').textContent") == "BBss and big differ in 4 of 5 tokens."
    assert browser.run("scrollY") > 1000 and browser.said == []


def test_tokens_are_reached_by_keyboard_and_pointer(browser, explored):
    explored()
    assert browser.run("document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('#tokens [tabindex=\"0\"]').focus()")
    assert panel(browser)[0].startswith("Token 1 of 5") and "none: it is the first" in panel(browser)
    browser.key("ArrowRight", 39)
    assert panel(browser)[0].startswith("Token 2 of 5")
    browser.key("End", 35)
    assert panel(browser)[0].startswith("Token 5 of 5") and browser.run("location.hash") == "#token=5&policy=big"
    assert browser.run("[...document.querySelectorAll('.layer')].map((each) => each.textContent).join('')") == "B-s-"
    assert browser.run("[...document.querySelectorAll('.layer')].every((each) => each.offsetWidth > 20)")
    where = browser.run("(() => {const box = document.querySelector('.token').getBoundingClientRect();"
                        " return [box.x + 3, box.y + 12]})()")  # fmt: skip
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])
    browser.settle()
    assert panel(browser)[0].startswith("Token 1 of 5")
    shares = "[...document.querySelectorAll('.token')].map((each) => Number(each.style.getPropertyValue('--share')))"
    assert browser.run(shares) == [1, 1, 1, 1, 0.25]


def test_the_oracle_can_be_chosen(browser, explored):
    explored()
    change = "const b = document.querySelector('#choose-b select'); b.value = b.options[4].value;"
    browser.run(f"{change} b.dispatchEvent(new Event('change'))")
    browser.settle()
    assert "B: oracle" in panel(browser) and browser.run("location.hash") == "#token=1&policy=big&versus=oracle"
    assert browser.run("document.querySelectorAll('.route')[1].textContent") == "-sBB"
    assert browser.run("document.querySelector('#tokens').textContent") == "It was↵ the best"
