"""The papers of the project agree with the code: a page for every method, one version, forms that a tracker accepts."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from experiments.comparison.overview import COLUMNS
from tests.docs.pages import ROOT, name

DOCS = ROOT / "docs"
METHODS = [path for group in ("gate", "subset", "mask") for path in sorted((ROOT / "configs").glob(f"**/{group}/*.yaml"))]
METHODS += sorted((ROOT / "configs/published/trainer").glob("*.yaml"))
METHODS += [path for path in sorted((ROOT / "configs" / "growth").glob("*.yaml")) if path.stem != "none"]
RESULTS = [path for path in sorted((DOCS / "results").rglob("*.md")) if path.stem not in ("index", "log")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SECTIONS = ("## What it claims", "## The rule", "## What it costs", "## When it loses", "## Settings to type")


@pytest.mark.parametrize("config", METHODS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_shipped_method_has_a_page_that_names_it(config):
    setting = f"{config.parent.name}={config.stem}"
    found = [page for page in (DOCS / "methods").rglob("*.md") if f"`{setting}`" in page.read_text(encoding="utf-8")]
    pages = [page for page in found if page.stem == config.stem]
    assert len(pages) == 1, f"{setting}: pages {list(map(name, pages))} under docs/methods"
    text = pages[0].read_text(encoding="utf-8")
    assert [section for section in SECTIONS if section not in text] == []
    assert f"```{{shipped}} {config.parent.name}/{config.stem}" in text
    assert (
        setting == "subset=all"
        or f"spikegate train {setting}" in text
        or re.search(rf"spikegate train .*{setting}\b", text)
    )


def test_there_are_methods_and_results():
    assert len(METHODS) > 25
    assert len(RESULTS) > 10


@pytest.mark.parametrize("page", RESULTS, ids=lambda path: path.stem)
def test_a_result_has_its_question_answer_command_and_commit(page):
    text = page.read_text(encoding="utf-8")
    for word in ("**Question.**", "**Answer.**"):
        assert text.count(word) == 1, word
    assert re.search(r"`(spikegate|python -m experiments|pytest|make demo)[^`]*`", text), "no command"
    assert re.search(r"commits? [0-9a-f]{7}", text), "no commit"


LOG_COMMITS = set(re.findall(r"\b[0-9a-f]{7}\b", (ROOT / "experiments/LOG.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_one_of_the_log(page):
    """Every number with four decimals and every commit of a results page stands in the log."""
    log = "".join((ROOT / path).read_text(encoding="utf-8") for path in ("experiments/LOG.md", "hardware/README.md"))
    text = re.sub(r"^```text\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)  # what a command printed
    text = re.sub(r"arXiv [\d.]+", "", text)
    assert set(re.findall(r"commits? ([0-9a-f]{7})", text)) <= LOG_COMMITS
    assert [number for number in re.findall(r"\d+\.\d{4}", text) if number not in log] == []


def test_the_version_is_one():
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert newest[1] == version


def test_the_citation_has_what_the_format_asks_for():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "software"
    assert found["license"] == PROJECT["license"]
    assert all(set(author) == {"name"} for author in found["authors"])


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_an_issue_form_is_one(form):
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert set(found) == {"name", "description", "labels", "body"}
    for field in found["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "markdown", "checkboxes")
        assert field["attributes"]["label"]
    ids = [field["id"] for field in found["body"]]
    assert len(ids) == len(set(ids))


def test_the_changelog_maps_modules_that_are_there():
    """Every module that the table of moves names on its right side can be imported."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.*\| (`.*) \|$", text, re.M)
    assert len(rows) > 10
    named = {
        name
        for row in rows
        for name in re.findall(r"`((?:neuro|sparse_update|hardware|experiments)[a-z_.]*?)(?:\.\*|\.NAME)?`", row)
    }
    code = f"import importlib\nfor name in {sorted(named)!r}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_the_tutorial_explains_every_column():
    text = (DOCS / "tutorials/comparison.md").read_text(encoding="utf-8")
    assert [column.header for column in COLUMNS if f"| `{column.header}` |" not in text] == []


def test_the_page_on_installation_names_every_dependency_and_extra():
    text = (DOCS / "install.md").read_text(encoding="utf-8")
    names = [re.split(r"[><=]", requirement)[0] for requirement in PROJECT["dependencies"]]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == []
    assert [extra for extra in PROJECT["optional-dependencies"] if f"| `{extra}` |" not in text] == []
