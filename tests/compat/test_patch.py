"""fastkd.patch: replaces, says what it replaced, puts back, and refuses what it does not know."""

import subprocess
import sys
import types

import pytest

import fastkd
from cases import ROOT
from fastkd import compat


def ours(x):
    return compat.original("somebody.losses", "loss")(x) + 1


class Ours:
    @staticmethod
    def loss(x):
        return -x


@pytest.fixture
def losses(monkeypatch):
    """The module `somebody.losses` of a package in its version 1.0, which fastkd can patch."""
    package, module = types.ModuleType("somebody"), types.ModuleType("somebody.losses")

    def loss(x):
        return x

    class Trainer:
        @staticmethod
        def loss(x):
            return 2 * x

        def method(self, x):
            return 3 * x

    module.loss, module.Trainer, package.losses = loss, Trainer, module
    monkeypatch.setitem(sys.modules, "somebody", package)
    monkeypatch.setitem(sys.modules, "somebody.losses", module)
    monkeypatch.setitem(sys.modules, "replacements", sys.modules[__name__])
    targets = (
        ("somebody.losses", "loss", "replacements:ours"),
        ("somebody.losses", "Trainer.loss", "replacements:ours"),
        ("somebody.servers", "loss", "replacements:ours"),
    )
    monkeypatch.setitem(compat.PATCHES, "somebody", compat.Patch("somebody", ("1.0", "1.1"), targets))
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: "1.0")
    return module


def test_replaces_until_the_end_of_the_block(losses):
    before, kept = losses.loss, vars(losses.Trainer)["loss"]
    with fastkd.patch("somebody"):
        assert losses.loss is ours and losses.loss(1) == 2
        assert losses.Trainer.loss(1) == 2 and losses.Trainer().loss(1) == 2  # static, as it was
        assert compat.original("somebody.losses", "Trainer.loss")(1) == 2 and before is compat.original(
            "somebody.losses", "loss"
        )
    assert losses.loss is before and vars(losses.Trainer)["loss"] is kept
    assert compat.original("somebody.losses", "loss") is before


def test_undo_is_explicit_and_may_be_repeated(losses):
    patched = fastkd.patch("somebody")
    assert losses.loss is ours
    patched.undo()
    patched.undo()
    assert losses.loss(1) == 1


def test_says_what_it_replaced_and_what_it_skipped(losses):
    with fastkd.patch("somebody") as patched:
        said = repr(patched).splitlines()
    assert said[0] == "fastkd.patch('somebody'), somebody 1.0"
    assert said[1:3] == [f"  somebody.losses.{x} → replacements.ours" for x in ("loss", "Trainer.loss")]
    assert said[3].startswith("  skipped somebody.servers.loss: No module named 'somebody.servers'")


def test_an_exception_puts_the_original_back(losses):
    with pytest.raises(KeyError), fastkd.patch("somebody"):
        raise KeyError
    assert losses.loss(1) == 1


def test_refuses(losses, monkeypatch):
    with pytest.raises(ValueError, match=r"name: expected one of .*'liger'.*'trl'.*, got 'tlr'"):
        fastkd.patch("tlr")
    with fastkd.patch("somebody"), pytest.raises(RuntimeError, match=r"somebody\.losses\.loss is replaced already"):
        fastkd.patch("somebody")
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: "1.2")
    with pytest.raises(RuntimeError, match=r"somebody 1\.2 was not tested.*install somebody==1\.0 or somebody==1\.1"):
        fastkd.patch("somebody")
    assert losses.loss(1) == 1

    def missing(name):
        raise compat.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(compat.importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError, match=r"somebody is not installed; install somebody==1\.0"):
        fastkd.patch("somebody")


def test_undo_does_not_throw_away_what_somebody_else_put_there(losses):
    patched, mine = fastkd.patch("somebody"), lambda x: 5
    losses.loss = mine
    with pytest.raises(RuntimeError, match=r"somebody\.losses\.loss was replaced again since; undo that first"):
        patched.undo()
    assert losses.loss is mine
    losses.loss = ours
    patched.undo()
    assert losses.loss(1) == 1


def test_a_name_that_the_package_lacks_changes_nothing(losses, monkeypatch):
    monkeypatch.setitem(
        compat.PATCHES,
        "somebody",
        compat.PATCHES["somebody"]._replace(
            targets=(("somebody.losses", "loss", "replacements:ours"), ("somebody.losses", "gone", "replacements:ours"))
        ),
    )
    with pytest.raises(AttributeError, match="gone"):
        fastkd.patch("somebody")
    assert losses.loss(1) == 1
    monkeypatch.undo()


def test_importing_fastkd_patches_nothing_and_imports_no_other_package():
    names = list(compat.PATCHES)
    code = f"import sys, fastkd; assert not fastkd.compat._originals; print([x for x in {names} if x in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", compat.PATCHES)
def test_every_replacement_exists(name):
    for _, _, replacement in compat.PATCHES[name].targets:
        try:
            compat._load(replacement)
        except ModuleNotFoundError as error:  # subclasses of what is not installed
            pytest.skip(f"{error}; the package's own tests say how to install it")


def test_entries_of_a_registry_are_replaced_added_and_put_back(losses, monkeypatch):
    losses.REGISTRY = {"loss": losses.loss}
    targets = tuple(("somebody.losses", f"REGISTRY.{key}", "replacements:Ours") for key in ("loss", "another"))
    monkeypatch.setitem(compat.PATCHES, "somebody", compat.PATCHES["somebody"]._replace(targets=targets))
    with fastkd.patch("somebody"):
        assert {"loss": Ours, "another": Ours} == losses.REGISTRY
        assert compat.original("somebody.losses", "REGISTRY.loss") is losses.loss
    assert {"loss": losses.loss} == losses.REGISTRY
    assert compat.original("somebody.losses", "REGISTRY.loss") is losses.loss
