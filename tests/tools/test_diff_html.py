"""The page of `alisa diff --html`, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import alisa_compile
from alisa_compile.tools.diff_html import page
from tests.tools import browser, recorded

BROWSER = browser.find()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both graphs of the embedded model with rows on the host. Its name would end the data if it were not escaped."""
    result = tmp_path_factory.mktemp("page") / "diff.html"
    result.write_text(
        page([alisa_compile.diff(graph) for graph in recorded.graphs().values()], "</script><b>novel"), encoding="utf-8"
    )
    return result


@pytest.fixture
def opened(path: Path, tmp_path: Path) -> Iterator[browser.Page]:
    with browser.running(str(BROWSER), tmp_path / "profile") as running:
        running.open(path)
        yield running


def test_it_needs_nothing_else(path: Path) -> None:
    """No address of anything outside."""
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", path.read_text(encoding="utf-8"))


@needs_browser
def test_a_click_filters_to_one_pass(opened: browser.Page, path: Path) -> None:
    """Then search, both graphs, all nodes; never an error, never a request."""
    rows = "[...document.querySelectorAll('.row')]"
    opened.click("#passes button[data-pass=alisa_fold_repeated_heads]")
    assert opened.evaluate(f"{rows}.map(row => row.dataset.pass)") == ["alisa_fold_repeated_heads"] * 8
    assert opened.evaluate(f"{rows}.every(row => row.dataset.kind === 'changed')")
    assert "enable_gqa=True" in opened.evaluate("[...document.querySelectorAll('.now mark')].map(m => m.textContent)")
    assert opened.evaluate("[...document.querySelectorAll('details')].map(d => d.dataset.section)") == [
        f"layer {layer}" for layer in range(8)
    ]
    opened.click("#passes button[data-pass=alisa_rewrite_attention]")
    assert set(opened.evaluate(f"{rows}.map(row => row.dataset.pass)")) == {"alisa_rewrite_attention"}

    opened.click("#passes button[data-pass='']")
    opened.evaluate("document.querySelector('#search').value = 'layers.3.'")
    opened.evaluate("document.querySelector('#search').dispatchEvent(new Event('input'))")
    assert opened.evaluate("[...document.querySelectorAll('details')].map(d => d.dataset.section)") == ["layer 3"]
    opened.click("#changes")
    assert opened.evaluate(f"{rows}.some(row => row.dataset.kind === '')")
    opened.click("#graphs button[data-graph='0']")
    assert opened.evaluate("document.querySelector('#graphs button[aria-pressed=true]').textContent") == "prefill graph"
    assert opened.evaluate("document.title") == "alisa diff - </script><b>novel"
    assert (opened.errors, opened.requests) == ([], [path.as_uri()])


@needs_browser
def test_movement_has_a_lane_of_its_own(opened: browser.Page) -> None:
    """What moves rows is in the third column, and nothing else is."""
    lane = "[...document.querySelectorAll('details[open] .lane')].map(cell => cell.textContent.split('(')[0])"
    assert [name for name in opened.evaluate(lane) if name] == ["kv_wait", "kv_offload", "kv_prefetch"]
    after = "[...document.querySelectorAll('details[open] .now')].map(cell => cell.textContent).join(' ')"
    assert "kv_prefetch" not in opened.evaluate(after)
    opened.click("details[open] .row.added .now")
    assert "modeling_llama.py" in opened.evaluate("document.querySelector('.row.open .facts').innerText")


@needs_browser
def test_it_is_dark_where_that_is_wished(path: Path, tmp_path: Path) -> None:
    """By prefers-color-scheme."""
    colors = []
    for dark in (False, True):
        with browser.running(str(BROWSER), tmp_path / f"profile{dark}") as running:
            running.open(path, dark=dark)
            script = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"
            colors.append(running.evaluate(script))
    assert colors[0] > 700 and colors[1] < 100
