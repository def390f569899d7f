"""Other packages' losses under their own names, and `fastkd.patch`, which puts them in place of the originals.

`fastkd.compat.<name>` has the functions and classes of that package with their signatures, defaults and results. What a
kernel of fastkd does not cover is computed by the original.
"""

import importlib
import importlib.metadata
import inspect
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """What `fastkd.patch` replaces in a package.

    `package` is the distribution's name, `versions` those that the replacements were tested against. A target is (module,
    attribute, replacement): "package.module", "name", "Class.name" or "REGISTRY.key", "fastkd.compat.module:name".
    """

    package: str
    versions: tuple[str, ...]
    targets: tuple[tuple[str, str, str], ...]


# fmt: off
PATCHES: dict[str, Patch] = {
    "trl": Patch("trl", ("1.16.0",), (
        ("trl.trainer.distillation_trainer", "_chunked_divergence_loss", "fastkd.compat.trl:chunked_divergence_loss"),
        ("trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss", "fastkd.compat.trl:generalized_jsd_loss"),
        ("trl.experimental.gold.gold_trainer", "GOLDTrainer.generalized_jsd_loss", "fastkd.compat.trl:gold_jsd_loss"),
        ("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer.generalized_jsd_loss", "fastkd.compat.trl:iw_opd_jsd_loss"),
    )),
    "liger": Patch("liger-kernel", ("0.8.5",), tuple(
        (f"liger_kernel.{module}", name, f"fastkd.compat.liger:{name}")
        for package, module, name in (
            ("transformers", "kl_div", "LigerKLDIVLoss"),
            ("transformers", "jsd", "LigerJSD"),
            ("transformers", "tvd", "LigerTVDLoss"),
            ("transformers", "fused_linear_jsd", "LigerFusedLinearJSD"),
            ("transformers", "fused_linear_kl_div", "LigerFusedLinearKLDivLoss"),
            ("chunked_loss", "jsd_loss", "LigerFusedLinearJSDLoss"),
            ("chunked_loss", "cosine_similarity_loss", "LigerFusedLinearCosineSimilarityLoss"),
        )
        for module in (package, f"{package}.{module}")  # where it is defined, and where it is exported
    )),
    "torchdistill": Patch("torchdistill", ("1.1.5",), tuple(
        ("torchdistill.losses.registry", f"MIDDLE_LEVEL_LOSS_DICT.{name}", f"fastkd.compat.torchdistill:{name}")
        for name in ("KDLoss", "LogitStdKDLoss", "SKDInstanceLoss", "CRDLoss")
    )),
    "textbrewer": Patch("textbrewer", ("0.2.1.post1",), tuple(
        ("textbrewer.presets", entry, f"fastkd.compat.textbrewer:{name}")
        for entry, name in (
            ("KD_LOSS_MAP.ce", "kd_ce_loss"),
            ("KD_LOSS_MAP.mse", "kd_mse_loss"),
            ("MATCH_LOSS_MAP.hidden_mse", "hid_mse_loss"),
            ("MATCH_LOSS_MAP.attention_mse", "att_mse_loss"),
            ("MATCH_LOSS_MAP.attention_mse_sum", "att_mse_sum_loss"),
        )
    )),
    "sentence_transformers": Patch("sentence-transformers", ("6.2.0",), tuple(
        (f"sentence_transformers.sentence_transformer.losses.{module}", f"{name}.compute_loss_from_embeddings",
         f"fastkd.compat.sentence_transformers:{ours}")
        for module, name, ours in (
            ("multiple_negatives_ranking", "MultipleNegativesRankingLoss", "multiple_negatives_ranking"),
            ("distill_kl_div", "DistillKLDivLoss", "distill_kl_div"),
        )
    )),
    "pot": Patch("POT", ("0.9.7.post1",), (("ot.lp._network_simplex", "emd_c", "fastkd.compat.pot:emd_c"),)),
    "verl": Patch("verl", ("0.9.1",), (
        ("verl.trainer.distillation.fsdp.losses", "compute_forward_kl_topk", "fastkd.compat.verl:compute_forward_kl_topk"),
        *(
            ("verl.trainer.distillation.losses", f"DISTILLATION_{kind}_REGISTRY.forward_kl_topk_tail", f"fastkd.compat.verl:{name}")
            for kind, name in (("LOSS", "forward_kl_topk_tail"), ("SETTINGS", "TAIL_SETTINGS"))
        ),
    )),
}
# fmt: on

_NOTHING = object()  # where a registry has no entry of that name
_originals: dict[tuple[str, str], Any] = {}  # what was replaced, as it lay in the module or class


def original(module: str, attribute: str) -> Any:
    """A package's own function or class, also while `fastkd.patch` has replaced it.

    Args:
        module: As in `Patch.targets`, for example "trl.experimental.gkd.gkd_trainer".
        attribute: "name", "Class.name" or "REGISTRY.key".
    """
    if (module, attribute) in _originals:
        found = _originals[module, attribute]
        return found.__func__ if isinstance(found, staticmethod) else found
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


class patch:
    """Replaces a package's losses by fastkd's, until `undo()` or the end of a `with` block.

    Only names that are looked up after the patch are affected: `from package import Loss` before it keeps the original. A
    module of the package that cannot be imported is skipped; printing the patch says what was replaced, what was skipped
    and why.

    Args:
        name: One of `fastkd.compat.PATCHES`, for example "trl".

    Raises:
        ValueError: fastkd has no patch of this name.
        RuntimeError: The package is missing or of a version that was not tested, or it is patched already.

    Example:
        >>> sorted(fastkd.compat.PATCHES)  # doctest: +ELLIPSIS
        [...'trl'...]
        >>> with fastkd.patch("trl") as patched:  # doctest: +SKIP
        ...     print(patched)
        ...     trainer.train()
    """

    def __init__(self, name: str):
        if name not in PATCHES:
            raise ValueError(f"name: expected one of {sorted(PATCHES)}, got {name!r}")
        self.name, self.version = name, _tested_version(name)
        self.replaced: list[str] = []
        self.skipped: list[str] = []
        self._undo: list[tuple[Any, str, Any, Any, tuple[str, str]]] = []
        for module, attribute, replacement in PATCHES[name].targets:
            if (module, attribute) in _originals:
                raise RuntimeError(f"fastkd.patch({name!r}): {module}.{attribute} is replaced already; undo that first")
            try:
                owner = importlib.import_module(module)
            except ImportError as error:
                self.skipped.append(f"{module}.{attribute}: {error}")
                continue
            *classes, last = attribute.split(".")
            for each in classes:
                owner = getattr(owner, each)
            found = _look_up(owner, last)
            ours = _load(replacement)
            if isinstance(found, staticmethod):
                ours = staticmethod(ours)
            self._undo.append((owner, last, found, ours, (module, attribute)))
            self.replaced.append(f"{module}.{attribute} → {replacement.replace(':', '.')}")
        for owner, last, found, ours, key in self._undo:
            _originals[key] = found
            _put(owner, last, ours)

    def undo(self) -> None:
        """Puts the originals back; a second call does nothing."""
        for owner, last, _, ours, key in self._undo:
            if _look_up(owner, last) is not ours:
                raise RuntimeError(
                    f"fastkd.patch({self.name!r}): {'.'.join(key)} was replaced again since; undo that first"
                )
        while self._undo:
            owner, last, found, _, key = self._undo.pop()
            _put(owner, last, found)
            del _originals[key]

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *error) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"fastkd.patch({self.name!r}), {PATCHES[self.name].package} {self.version}"]
        lines += [f"  {line}" for line in self.replaced]
        lines += [f"  skipped {line}" for line in self.skipped]
        return "\n".join(lines)


def _tested_version(name: str) -> str:
    package, versions = PATCHES[name].package, PATCHES[name].versions
    known = " or ".join(f"{package}=={version}" for version in versions)
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"fastkd.patch({name!r}): {package} is not installed; install {known}") from None
    if found not in versions:
        raise RuntimeError(
            f"fastkd.patch({name!r}): {package} {found} was not tested, and its losses may differ; install {known}"
        )
    return found


def _look_up(owner: Any, name: str) -> Any:
    """What lies in a module or class, or in a registry, a dict."""
    return owner.get(name, _NOTHING) if isinstance(owner, dict) else inspect.getattr_static(owner, name)


def _put(owner: Any, name: str, value: Any) -> None:
    if not isinstance(owner, dict):
        setattr(owner, name, value)
    elif value is _NOTHING:
        del owner[name]
    else:
        owner[name] = value


def _load(replacement: str) -> Any:
    module, name = replacement.split(":")
    return getattr(importlib.import_module(module), name)
