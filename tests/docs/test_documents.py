"""What README.md, CONTRIBUTING.md and docs/ say: their Python runs, their links lead somewhere, their tables are current."""

import re

import pytest

import fastkd
from cases import ROOT
from fastkd import backends, functional

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def named(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=named)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_public_name_is_on_the_api_page():
    text = (ROOT / "docs/api.md").read_text()
    assert not [name for name in {*fastkd.__all__, *functional.__all__} if f"`{name}`" not in text]
    assert backends.support_table() in text, "docs/api.md: paste fastkd.backends.support_table()"
