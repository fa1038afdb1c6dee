"""The report's page as HTML: whole, without other files, ready for a phone and for print, with tables that sort."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lola_ft.routing.profile import Profile
from lola_ft.routing.report_page import write_report

Make = Callable[..., Profile]
VOID = {"meta", "img", "br", "hr", "link", "input"}

# Enough of a browser for the page's script: tables of cells with text, a click on each button in turn.
BROWSER = """
const tables = TABLES.map(({headings, rows}) => {
  const element = text => {
    const attributes = {}, own = {textContent: text, click: null};
    return {...own, getAttribute: name => attributes[name] ?? null, attributes,
      setAttribute: (name, value) => attributes[name] = value, removeAttribute: name => delete attributes[name],
      querySelector: () => ({addEventListener: (_, act) => own.click = act}), press: () => own.click()};
  };
  const body = {rows: rows.map(cells => ({cells: cells.map(element)})),
    append: (...sorted) => body.rows = sorted};
  return {tHead: {rows: [{cells: headings.map(element)}]}, tBodies: [body]};
});
const document = {querySelectorAll: what => what === "table.sorts" ? tables : []};
const addEventListener = () => {};
SCRIPT
const shown = [];
for (const table of tables) table.tHead.rows[0].cells.forEach(heading => {
  for (const _ of [1, 2]) {
    heading.press();
    shown.push([heading.textContent, heading.getAttribute("aria-sort"),
      table.tBodies[0].rows.map(row => row.cells[0].textContent)]);
  }
});
console.log(JSON.stringify(shown));
"""


class Page(HTMLParser):
    """Collects the elements of a page and checks that they are nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.tables = list[str](), list[tuple[str, dict[str, Any]]](), list[dict[str, Any]]()
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "table":
            assert self.elements[-1] == ("div", {"class": "wide"}), "a wide table scrolls by itself"
            self.tables.append({"sorts": found.get("class") == "sorts", "headings": [], "rows": []})
        if tag == "tr" and "tbody" in self.open:
            self.tables[-1]["rows"].append([])
        if tag == "th":
            self.tables[-1]["headings"].append("")
        if tag == "td":
            self.tables[-1]["rows"][-1].append("")
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "th" in self.open:
            self.tables[-1]["headings"][-1] += data.strip()
        if "td" in self.open:
            self.tables[-1]["rows"][-1][-1] += data.strip()


@pytest.fixture(scope="module")
def page(made_profile: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = [[[8, 0], [2, 2]], [[200, 0], [5, 1]], [[0, 30], [3, 0]]]
    profile = made_profile(["de", "sw", "xx"], counts)
    return write_report(profile, tmp_path_factory.mktemp("page") / "report", profile, permutations=9).page.read_text()


def test_the_page_is_whole_and_needs_no_other_file(page: str) -> None:
    found = Page(page)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.elements
    pictures = [attributes for tag, attributes in found.elements if tag == "img"]
    assert len(pictures) >= 5
    assert all(one["src"].startswith("data:image/png;base64,") and one["alt"] for one in pictures)
    links = [value for _, attributes in found.elements for name, value in attributes.items() if name in ("href", "src")]
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "@media print" in page
    assert "@media (max-width" in page


def test_a_tag_that_the_table_of_languages_lacks_is_said(page: str, made_profile: Make, tmp_path: Path) -> None:
    assert "not in the table of languages: xx." in page
    report = write_report(made_profile(["de", "sw", "xx"], [[[8, 0]], [[5, 5]], [[1, 2]]]), tmp_path / "report")
    assert [
        line for line in report.headlines() if "not in the table of languages: xx. The report has them without" in line
    ]
    known = write_report(made_profile(["de", "swh_Latn"], [[[8, 0]], [[5, 5]]]), tmp_path / "known")
    assert "not in the table" not in "".join(known.headlines()) + known.page.read_text()


def test_every_row_has_a_cell_for_each_heading(page: str) -> None:
    tables = Page(page).tables
    assert len(tables) >= 4
    for table in tables:
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["headings"])}
    assert [table["headings"][0] for table in tables if table["sorts"]] == ["language", "language"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's script, is not installed")
def test_a_heading_sorts_by_number_or_text_and_again_the_other_way(page: str, tmp_path: Path) -> None:
    tables = [table for table in Page(page).tables if table["sorts"]]
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    program = tmp_path / "page.js"
    program.write_text(BROWSER.replace("TABLES", json.dumps(tables)).replace("SCRIPT", script))
    done = subprocess.run(["node", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = {(heading, order): rows for heading, order, rows in json.loads(done.stdout)}
    german, swahili, unknown = "de German", "sw Swahili", "xx"
    assert shown["tokens", "ascending"] == [german, unknown, swahili], "by number: 8, 30 and 200"
    assert shown["tokens", "descending"] == [swahili, unknown, german]
    assert shown["language", "descending"] == [unknown, swahili, german]
    assert shown["family", "ascending"] == [unknown, swahili, german], "Atlantic-Congo before Indo-European"
