"""CoDIR (Sun et al., EMNLP 2020): contrastive distillation of intermediate representations, against a bank of examples.

preset="paper": InfoNCE; the teacher's vector of an example must pick the student's among K others, of other labels.
preset="official", the released code: NCE; each side's vector against the other side's bank, also for the positive.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import checks, distributed, functional, reductions
from fastkd.checks import Backend
from fastkd.deprecation import renamed

Preset = Literal["official", "paper"]
Negatives = Literal["label", "uniform", "window", "in_batch"]
POOLS = {"official": "cls", "paper": "mean"}
LABELS = ("labels", "label_order", "label_bounds")


class Embed(nn.Module):
    """A linear layer to the common space, followed by normalisation; see `functional.unit_linear`."""

    def __init__(self, dim_in: int, dim_out: int, backend: Backend = "auto"):
        super().__init__()
        self.linear, self.backend = nn.Linear(dim_in, dim_out), backend

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.weight.dtype)
        return functional.unit_linear(x, self.linear.weight, self.linear.bias, backend=self.backend)  # [B, feat_dim]


class CoDIRLoss(nn.Module):
    """CoDIR: contrast the features of B examples with those of other examples, kept in a bank.

    With preset "paper" the loss is `fastkd.info_nce_loss` of the teacher's vector against student vectors; with "official" it
    is the mean of `fastkd.nce_loss` of both sides' vectors. The vectors are normalize(linear(features)). The two linear
    layers, embed_s and embed_t, train with the student: pass their parameters to the optimizer. In train mode each call
    updates the examples' rows in the banks once, after the loss.

    Args:
        student_dim: Width of the student's features, after pooling and concatenation.
        teacher_dim: Width of the teacher's features.
        n_data: The number of examples in the data set.
        feat_dim: Width of the common space.
        nce_k: The number of negatives.
        nce_t: The temperature.
        nce_m: Momentum of the banks, in [0, 1).
        preset: "official", the released code, or "paper".
        pool: How token states [B, S, D] become features: "mean" over the real tokens, or "cls", the first real token.
            None: "cls" for "official", "mean" for "paper".
        negatives: "label": examples of other classes (see `set_labels`); "uniform": all others; "window": the `window` ids
            on either side; "in_batch": the other examples of the batch, except those of the same label (if set) or id. None:
            "label" once the labels are set, else "uniform". With "in_batch" the paper preset has no bank.
        window: The number of ids on either side, with negatives="window".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.
        process_group: The banks and Z are shared by its ranks, which must begin with the same state and hold equally many
            examples. Pass broadcast_buffers=False to DDP.

    Attributes:
        bank_student, bank_teacher: [n_data, feat_dim], buffers; None where the preset needs none.
        z_student, z_teacher: NCE's normalisers, buffers: 0 before the first call, constant after it.

    Example:
        >>> loss = fastkd.CoDIRLoss(16, 32, n_data=50, feat_dim=8, nce_k=10)
        >>> student_hidden, teacher_hidden = torch.randn(4, 16, requires_grad=True), torch.randn(4, 32)
        >>> loss(student_hidden, teacher_hidden, torch.tensor([0, 7, 9, 30])).backward()
    """

    @renamed(s_dim="student_dim", t_dim="teacher_dim")
    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        n_data: int,
        *,
        feat_dim: int = 128,
        nce_k: int = 100,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
        preset: Preset = "official",
        pool: Literal["mean", "cls"] | None = None,
        negatives: Negatives | None = None,
        window: int = 0,
        backend: Backend = "auto",
        process_group=None,
    ):
        super().__init__()
        sizes = {
            "student_dim": student_dim,
            "teacher_dim": teacher_dim,
            "feat_dim": feat_dim,
            "nce_k": nce_k,
            "n_data": n_data,
        }
        for name, size in sizes.items():
            checks.count(name, size)
        checks.positive("nce_t", nce_t)
        checks.number("nce_m", nce_m)
        if n_data < 2:
            raise ValueError(f"n_data: negatives are other examples, so at least 2 are needed, got {n_data!r}")
        if not 0 <= nce_m < 1:
            raise ValueError(f"nce_m: must lie in [0, 1), got {nce_m!r}; 0 replaces the bank's rows")
        checks.one_of("preset", preset, get_args(Preset))
        self.pool = POOLS[preset] if pool is None else pool
        checks.one_of("pool", self.pool, ("mean", "cls"))
        if negatives is not None:
            checks.one_of("negatives", negatives, get_args(Negatives))
        if (negatives == "window") != (window > 0):
            raise ValueError(f"window: how many ids on either side, > 0 with negatives='window' only, got {window!r}")
        self.negatives, self.window = negatives, window
        self.n_data, self.nce_k, self.nce_t, self.nce_m, self.preset = n_data, nce_k, nce_t, nce_m, preset
        self.backend, self.process_group = backend, process_group
        self.embed_s, self.embed_t = (Embed(dim, feat_dim, backend) for dim in (student_dim, teacher_dim))
        bound = (3 / feat_dim) ** 0.5  # rows of norm 1 on average
        for name, needed in (("bank_student", preset == "official" or negatives != "in_batch"),
                             ("bank_teacher", preset == "official")):  # fmt: skip
            self.register_buffer(name, torch.empty(n_data, feat_dim).uniform_(-bound, bound) if needed else None)
        self.register_buffer("z_student", torch.zeros(()))
        self.register_buffer("z_teacher", torch.zeros(()))
        self.register_buffer("sampler", torch.stack([torch.randint(2**62, ()), torch.tensor(0)]))  # seed, step
        for name in LABELS:
            self.register_buffer(name, None)

    def set_labels(self, labels: Tensor) -> None:
        """Draw negatives from other classes only; by default they are drawn from all other examples.

        Args:
            labels: [n_data], the class of each example, integers.
        """
        checks.integers("labels", labels, "[n_data]")
        checks.mask("labels", labels, (self.n_data,), "[n_data]")
        labels = labels.to(self.z_student.device)
        classes, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        if len(classes) < 2:
            raise ValueError(
                "labels: all examples have the same label, so there are no negatives; do not set the labels"
            )
        self.labels = inverse  # [n_data]
        self.label_order = inverse.argsort(stable=True)  # [n_data] ids, class after class
        self.label_bounds = nn.functional.pad(counts.cumsum(0), (1, 0))  # [C + 1]

    @renamed(f_s="student_hidden", f_t="teacher_hidden")
    def forward(
        self,
        student_hidden: Tensor | list[Tensor],
        teacher_hidden: Tensor | list[Tensor],
        idx: Tensor,
        contrast_idx: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        parts: Sequence[int] | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_hidden: Features [B, D]; or token states [B, S, D], which are pooled; or a list of either, one per
                layer, which are concatenated.
            teacher_hidden: The teacher's, in the same form.
            idx: [B], the ids of the examples in the data set, 0 to n_data - 1.
            contrast_idx: [B, K + 1], idx in column 0 and the ids of K negatives. None: they are drawn.
            mask: [B, S], 1 = real token, for token states.
            parts: The sizes of the micro-batches that were put together to this batch, if it was, where each of them is spread
                over the ranks of process_group. Negatives are then drawn as for one process that has all of each.
        """
        f_s, f_t = (
            self.pooled("student_hidden", student_hidden, mask),
            self.pooled("teacher_hidden", teacher_hidden, mask),
        )
        checks.frozen("teacher_hidden", f_t)
        idx, contrast_idx = self._indices(f_s, f_t, idx, contrast_idx, parts)  # [B], [B, K + 1]
        v_s, v_t = self.embed_s(f_s), self.embed_t(f_t)  # [B, feat_dim]
        if contrast_idx is None:
            loss = self._in_batch(v_s, v_t, idx)
        elif self.preset == "paper":
            loss = functional.info_nce_loss(
                v_t, v_s, self.bank_student, contrast_idx[:, 1:], temperature=self.nce_t, backend=self.backend
            )
        else:
            loss = self._nce((v_s, v_t), (self.bank_teacher, self.bank_student), contrast_idx)
        if self.training:
            self._update(idx, v_s, v_t)
        return loss

    if TYPE_CHECKING:
        __call__ = forward

    def _in_batch(self, v_s: Tensor, v_t: Tensor, idx: Tensor) -> Tensor:
        """The paper's loss against the other student vectors of the (global) batch, with a gradient to them, too."""
        own = idx if self.labels is None else self.labels[idx]
        everyone, ids = (distributed.gather_rows(x, self.process_group) for x in (v_s, own))
        return functional.info_nce_loss(
            v_t, v_s, everyone, temperature=self.nce_t, exclude=(own, ids), backend=self.backend
        )

    def pooled(self, name: str, x, mask) -> Tensor:
        """Token states [B, S, D] pooled to [B, D]; a list of layers pooled and concatenated."""
        if isinstance(x, (list, tuple)):
            checks.layers(name, x)
            return torch.cat([self.pooled(f"{name}[{i}]", layer, mask) for i, layer in enumerate(x)], dim=-1)
        if not isinstance(x, Tensor) or x.dim() != 3:
            checks.tensor(name, x, "[B, D]")
            return x
        checks.tensor(name, x, "[B, S, D]")
        checks.mask("mask", mask, x.shape[:2], "[B, S]")
        if self.pool == "mean":
            return reductions.masked_mean(
                x.to(torch.promote_types(x.dtype, torch.float32)), reductions.as_bool(mask), 1
            )
        if mask is None:
            return x[:, 0]
        first = reductions.as_bool(mask).int().argmax(1)  # [B], not 0 under left padding
        return x.gather(1, first[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)

    def _indices(self, f_s: Tensor, f_t: Tensor, idx, contrast_idx, parts) -> tuple[Tensor, Tensor]:
        for name, x, embed in (("student", f_s, self.embed_s), ("teacher", f_t, self.embed_t)):
            width = embed.linear.in_features
            if x.shape[1] != width:
                raise ValueError(f"{name}_hidden: expected width {width}, {name}_dim, got {checks.describe(x)}")
        checks.integers("idx", idx, "[B]")
        checks.same_leading("student_hidden", f_s, "teacher_hidden", f_t, 1)
        checks.same_leading("idx", idx, "student_hidden", f_s, 1)
        states = {"student_hidden": f_s, "teacher_hidden": f_t, "idx": idx, "contrast_idx": contrast_idx}
        checks.same_device(z_student=self.z_student, **states)
        checks.indices_in_range("idx", idx, self.n_data, "n_data examples")
        idx = idx.long()
        if self.negatives == "in_batch" and self.preset == "paper":
            if contrast_idx is not None:
                raise ValueError(
                    "contrast_idx: negatives='in_batch' takes the negatives from the batch; do not pass it"
                )
            return idx, None
        if contrast_idx is not None:
            checks.integers("contrast_idx", contrast_idx, "[B, K + 1]")
            checks.same_leading("contrast_idx", contrast_idx, "idx", idx, 1)
            if contrast_idx.shape[1] < 2:
                raise ValueError(
                    f"contrast_idx: expected idx in column 0 and at least one negative, got {checks.describe(contrast_idx)}"
                )
            checks.indices_in_range("contrast_idx", contrast_idx, self.n_data, "n_data examples")
            agree = lambda: (contrast_idx[:, 0] == idx).all()  # noqa: E731 (called only where values may be read)
            checks.values("contrast_idx", contrast_idx, agree, "column 0 must be idx; the negatives follow it")
            return idx, contrast_idx.long()
        return idx, self._draw(idx, parts)

    def _draw(self, idx: Tensor, parts: Sequence[int] | None) -> Tensor:
        """idx in column 0, then K drawn negatives: [B, K + 1]. What is drawn for an example depends on its place in the batch,
        so all ranks draw for the examples of all."""
        everyone, own = self._everyone(idx, parts)
        if self.negatives == "in_batch":
            steps = torch.arange(everyone.shape[0], device=idx.device)
            return everyone[(own[:, None] + steps) % everyone.shape[0]]
        labels = None
        if self.negatives == "label" or (self.negatives is None and self.labels is not None):
            if self.labels is None:
                raise ValueError("negatives: 'label' needs the classes of the examples; call set_labels first")
            labels = self.labels, self.label_order, self.label_bounds
        options = {"n_data": self.n_data, "labels": labels, "window": self.window, "backend": self.backend}
        negatives = functional.sample_negatives(everyone, self.nce_k, self.sampler, **options)
        if self.training:
            self.sampler[1] += 1
        return torch.cat([idx[:, None], negatives if everyone is idx else negatives[own]], 1)

    def _everyone(self, idx: Tensor, parts: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """The ids of all ranks [world * B], rank by rank within each part, and the places of this rank's among them [B]."""
        group, count = self.process_group, idx.shape[0]
        if group is None:
            return idx, torch.arange(count, device=idx.device)
        world, rank, begin, places = dist.get_world_size(group), dist.get_rank(group), 0, []
        for part in parts or [count]:
            places.append(torch.arange(part, device=idx.device) + begin * world + rank * part)
            begin += part
        of_ranks = distributed.gather_rows(idx, group).view(world, count).split(list(parts or [count]), 1)
        return torch.cat([x.flatten() for x in of_ranks]), torch.cat(places)

    def _nce(self, queries: tuple, banks: tuple, index: Tensor) -> Tensor:
        frozen = z = self.z_student, self.z_teacher
        options = {"n_data": self.n_data, "temperature": self.nce_t, "backend": self.backend}
        if self.process_group is not None:  # until z is frozen, it is the mean of what the ranks estimate
            sides = zip(queries, banks, z, strict=True)
            own = [functional.nce_partition(query, bank, index, z=now, **options) for query, bank, now in sides]
            shared = [distributed.mean_over_ranks(now, None, self.process_group) for now in own]
            z = [torch.where(now > 0, now, mean) for now, mean in zip(z, shared, strict=True)]
        loss, z = functional.nce_pair_loss(queries, banks, index, z=tuple(z), **options)
        if self.training:
            for buffer, now in zip(frozen, z, strict=True):
                buffer.copy_(now)
        return loss

    @torch.no_grad()
    def _update(self, idx: Tensor, v_s: Tensor, v_t: Tensor) -> None:
        idx, v_s, v_t = (distributed.gather_rows(x.detach(), self.process_group) for x in (idx, v_s, v_t))
        for bank, rows in ((self.bank_student, v_s), (self.bank_teacher, v_t)):
            if bank is not None:
                functional.update_bank(bank, idx, rows, momentum=self.nce_m, backend=self.backend)

    def _apply(self, fn, recurse=True):
        """Z is about e^(1/T) · n_data, too large for half precision: .half() and the like leave it in float32."""
        kept = {name: self._buffers[name] for name in ("z_student", "z_teacher")}
        super()._apply(fn, recurse)
        for name, z in kept.items():
            moved = self._buffers[name]
            self._buffers[name] = moved.float() if z.is_meta else z.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in LABELS:  # None before set_labels; their sizes are those of the saved data set
            if prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name], device=self.z_student.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
