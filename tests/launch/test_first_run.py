"""docs/first_run.ipynb, run as it stands."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def shown(cells):
    """Which kinds of output each cell has."""
    return [sorted({output.output_type for output in cell.get("outputs", ())}) for cell in cells]


@pytest.mark.by_hand  # the README's commands, which do the same, are in every run
def test_the_notebook_runs_learns_and_shows_what_its_committed_form_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    committed = nbformat.read(ROOT / "docs" / "first_run.ipynb", as_version=4)
    notebook = nbformat.read(ROOT / "docs" / "first_run.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300).execute()  # a cell that fails raises
    lines = (tmp_path / "first_run/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["eval/loss"] for line in map(json.loads, lines) if "eval/loss" in line]
    manifest = (tmp_path / "first_run/data/topics/manifest.json").read_text(encoding="utf-8")
    assert losses[-1] < json.loads(manifest)["unigram_entropy"] < losses[0]
    assert shown(notebook.cells) == shown(committed.cells)
