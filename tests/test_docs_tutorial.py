"""The tutorial's notebook runs from top to bottom, and is stored with what it printed and drew."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def outputs_of(notebook: Any) -> str:
    """Return all text that cells printed."""
    outputs = [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "\n".join("".join(output.get("text", "")) for output in outputs)


def pictures_in(notebook: Any) -> int:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


def test_it_is_stored_with_its_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert pictures_in(notebook) == 2
    assert "Nairobi." in outputs_of(notebook)


def test_it_holds_no_path_of_a_machine_and_no_secret() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.findall(r"/(?:tmp|home|root|work|Users|var|opt)/[^\s\"]*|hf_\w{20,}", text)
    assert len(text) < 400_000


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    before, after = answers(notebook)
    assert not before.startswith("Nairobi")
    assert after.startswith("Nairobi.")
    assert pictures_in(notebook) == 2
    assert (tmp_path / "runs/tutorial/merged/merge_report.json").is_file()
    assert (tmp_path / "runs/tutorial/report.html").is_file()


def answers(notebook: Any) -> list[str]:
    """Return what the cells printed that ask for the capital of Kenya, before and after training."""
    asking = [
        cell for cell in notebook["cells"] if "capital of Kenya" in cell["source"] and "--prompt" in cell["source"]
    ]
    printed = [[output["text"] for output in cell["outputs"] if output.get("name") == "stdout"] for cell in asking]
    return ["".join(texts).lstrip() for texts in printed]
