"""The pictures of README and docs: `python docs/make_images.py`, after `make demo` and `make docs`.

`demo_languages.png` is what the demo drew. The others are screenshots by Chromium: the README as a page, the start page
of the site, and the report of the demo's run, wide and as on a phone.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import markdown

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
STYLE = "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem} img{max-width:100%}"
STYLE += " table{border-collapse:collapse} td,th{border:1px solid #ccc;padding:.3rem .6rem}"
STYLE += " pre{background:#f4f6f6;padding:1rem}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="the run whose report is shown")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium", help="the browser")
    given = parser.parse_args()
    drawn = given.run / "languages.png"
    if (given.run / "demo.json").is_file():
        shutil.copyfile(drawn, IMAGES / "demo_languages.png")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "readme.html"
        text = markdown.markdown((ROOT / "README.md").read_text(encoding="utf-8"), extensions=["tables", "fenced_code"])
        page.write_text(f'<base href="{ROOT.as_uri()}/"><style>{STYLE}</style>{text}', encoding="utf-8")
        phone = Path(folder) / "phone.html"  # a window is at least 500 pixels wide; a frame is as narrow as a phone
        report = (given.run / "report.html").resolve().as_uri()
        phone.write_text(
            f'<body style="margin:0"><iframe src="{report}" style="border:0;width:390px;height:844px"></iframe>',
            encoding="utf-8",
        )
        for name, address, size in (
            ("readme", page.as_uri(), "1000,3000"),
            ("site_start", (ROOT / "site" / "index.html").as_uri(), "1280,900"),
            ("run_report", report, "1100,1700"),
            ("run_report_phone", phone.as_uri(), "390,844"),
        ):
            screenshot(given.chromium, address, size, IMAGES / f"{name}.png")


def screenshot(browser: str, address: str, size: str, path: Path) -> None:
    """Write what a browser shows of a page, without a profile of the user and without the network."""
    with tempfile.TemporaryDirectory() as profile:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--hide-scrollbars",
            *quiet,
        ]
        options = [f"--user-data-dir={profile}", f"--screenshot={path}", f"--window-size={size}", address]
        subprocess.run([*command, *options], check=True, capture_output=True, timeout=120)
    print(path)


if __name__ == "__main__":
    main()
