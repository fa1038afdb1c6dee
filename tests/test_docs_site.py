"""The documentation's site needs nothing from elsewhere, is whole without JavaScript, and fails on a broken link."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="`make docs` installs what builds the site")

ROOT = Path(__file__).parents[1]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def outside(html: str) -> list[str]:
    """Return the addresses that a browser would fetch from elsewhere: scripts, styles, fonts, pictures, frames."""
    tags = re.findall(r"<(?:script|img|iframe|source)\b[^>]*|<link\b[^>]*", html)
    addresses = [match for tag in tags for match in re.findall(r"""(?:src|href)=["']([^"']+)""", tag)]
    styles = re.findall(r"url\(([^)]+)\)", html)
    return [address for address in addresses + styles if re.match(r"['\"]?(https?:)?//", address)]


@pytest.mark.slow
def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 20
    for page in [*pages, *(path for path in site.rglob("*.css"))]:
        assert outside(page.read_text(encoding="utf-8")) == [], page.name
    assert outside('<script src="https://example.org/a.js">') == ["https://example.org/a.js"]


@pytest.mark.slow
def test_pages_are_whole_without_javascript(site: Path) -> None:
    def text_of(page: str) -> str:
        html = re.sub(r"<script\b.*?</script>", "", (site / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        return re.sub(r"<[^>]+>", "", html)

    assert "fine-tunes mixture-of-experts language models" in text_of("index.html")
    assert "Load a base model of any supported family" in text_of("reference.html"), "docstrings are on the page"
    assert "0.1.0" in text_of("changelog.html")
    assert "adapter tensors applied" in text_of("tutorial.html"), "with what the notebook printed"
    assert all((site / "images" / f"tutorial_{number}.png").is_file() for number in (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["[a page](missing.md)", "[a heading](data.md#no-such-heading)"])
def test_a_broken_link_fails(broken: str, tmp_path: Path) -> None:
    for name in ("docs", "lola_ft"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    glossary = tmp_path / "docs" / "glossary.md"
    glossary.write_text(f"{glossary.read_text(encoding='utf-8')}\nSee {broken}.\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "glossary.md" in done.stderr
