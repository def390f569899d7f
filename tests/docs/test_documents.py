"""What README.md, CONTRIBUTING.md and docs/ say: their Python runs, their links lead somewhere, their tables are current."""

import html
import importlib
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F

import fastkd
from cases import ROOT, randn
from fastkd import backends, functional
from fastkd.cli import COMMANDS, arguments

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


def after(block: str) -> str:
    """The code after a change: a diff's lines without those that begin with -."""
    return "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))


DIFFS = [after(block) for page in PAGES for block in re.findall(r"```diff\n(.*?)```", page.read_text(), re.S)]
# A module of fastkd.compat that needs the package itself, and what that is imported as.
PEERS = {
    "trl": "trl", "torchdistill": "torchdistill", "textbrewer": "textbrewer", "verl": "verl", "pot": "ot",
    "sentence_transformers": "sentence_transformers",
}  # fmt: skip


def peer_of(code: str) -> str:
    return re.search(r"(?:patch\(\"|compat import |compat\.)(\w+)", code)[1]


@pytest.mark.parametrize("code", DIFFS, ids=peer_of)
def test_what_a_diff_leads_to_runs(code):
    if peer_of(code) in PEERS:
        pytest.importorskip(PEERS[peer_of(code)], reason=f"for users of {peer_of(code)}")
    namespace = {"fastkd": fastkd, "trainer": SimpleNamespace(train=list), "costs": numpy.eye(3)}
    try:
        exec(compile(code, "diff", "exec"), namespace)
    finally:
        if "registered" in namespace:
            namespace["registered"].undo()


@pytest.mark.parametrize("there", ["F.kl_div", "GKDTrainer.generalized_jsd_loss", "ot.emd2"])
def test_two_sides_of_the_table_of_migrate_are_equal(there):
    """Rows whose two sides are whole calls."""
    text = (ROOT / "docs/migrate.md").read_text()
    calls = re.search(rf"^\|[^|`]*`({re.escape(there)}\([^|]*)` \| `([^`]*)`", text, re.M).groups()
    if there.startswith("GKD"):
        namespace = {"GKDTrainer": pytest.importorskip("trl.experimental.gkd", reason="for users of TRL").GKDTrainer}
    else:
        namespace = {"ot": pytest.importorskip("ot", reason="for users of POT")} if there.startswith("ot") else {"F": F}
    s, t = randn(2, 3, 9, seed=1), randn(2, 3, 9, seed=2)
    if there == "F.kl_div":
        s, t = s[0], t[0]
    masses = {"a": randn(4, seed=3).softmax(0), "b": randn(5, seed=4).softmax(0), "M": randn(4, 5, seed=5).abs()}
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    namespace |= {"s": s, "t": t, "T": 1.7, "beta": 0.3, "labels": labels, **masses, **vars(functional)}
    found, wanted = (torch.as_tensor(eval(call, namespace)) for call in reversed(calls))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7, check_dtype=False)


def commands(page):
    """The lines of the page's shell blocks, without comments, in words."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from filter(None, (shlex.split(part, comments=True) for part in line.split("&&")))


@pytest.mark.parametrize("page", [p for p in PAGES if "```bash" in p.read_text()], ids=named)
def test_commands_are_understood(page):
    """Shell blocks: each option of `fastkd` is one that its parser takes, and each target of `make` exists."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for program, *words in commands(page):
        if program == "make":
            assert words[0] in targets, words
        elif program == "fastkd":
            command, *options = words
            assert command in COMMANDS, words
            module = importlib.import_module(f"fastkd.cli.{command}")
            if command in ("distill", "finetune"):
                arguments.parse(options, command)
            elif hasattr(module, "parser"):
                module.parser().parse_args(options)


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


def test_the_version_is_the_same_everywhere():
    assert f"version: {fastkd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {fastkd.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.long
def test_the_site_is_built_without_a_warning(tmp_path):
    """mkdocs with strict: true: a warning, of a link for example or of a docstring, is an error."""
    pytest.importorskip("mkdocstrings", reason="the site needs mkdocs and mkdocstrings-python")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site/reference/index.html").read_text()
    assert not [name for name in fastkd.__all__ if not re.search(rf'id="fastkd\.[\w.]*\b{name}"', reference)]
    assert ">>> loss = fastkd.FCDLoss()" in html.unescape(re.sub("<.*?>", "", reference))
    assert (tmp_path / "site/index.html").read_text().count("profile.png") == 1


def test_the_table_of_numerics_has_every_way_and_noise():
    from fastkd.bench.evidence import numerics

    table = (ROOT / "docs/numerics.md").read_text().split(numerics.BEGIN)[1].split(numerics.END)[0]
    head, _, *lines = table.strip().splitlines()
    assert head.count("|") == len(numerics.WAYS) + 2 and len(lines) == len(numerics.NOISE)
    kl, found = numerics.errors(numerics.NOISE[2])
    assert lines[2].startswith(f"| {kl:.0e} |")
    ours, eager, stored = found.values()
    assert max(ours) < 1e-5 and ours[0] < eager[0] / 10 and stored[1] > 0.1
