"""CoDIR (Sun et al., EMNLP 2020): contrastive distillation of intermediate representations, against a bank of examples.

"paper": the teacher's vector must pick the student's own among K student vectors of other labels (InfoNCE).
"official", the released code: each side's vector against the other side's bank, the positive from the bank too (NCE).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import checks, distributed, functional, reductions

PRESETS = ("official", "paper")
NEGATIVES = ("label", "uniform", "window", "in_batch")
POOLS = {"official": "cls", "paper": "mean"}
LABELS = ("labels", "label_order", "label_bounds")


class Embed(nn.Module):
    """Linear map to the common space, on the unit sphere there. A zero vector stays zero, with a finite gradient."""

    def __init__(self, dim_in: int, dim_out: int, backend: str = "auto"):
        super().__init__()
        self.linear, self.backend = nn.Linear(dim_in, dim_out), backend

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.weight.dtype)
        return functional.unit_linear(x, self.linear.weight, self.linear.bias, backend=self.backend)  # [B, feat_dim]


class CoDIRLoss(nn.Module):
    """CoDIR on features of B examples whose ids in the data set (0 .. n_data - 1) are known.

    Features are [B, D]; or token states [B, S, D], pooled here by `pool` ("mean" over the tokens that `mask` counts,
    "cls" the first of them; the default is the preset's); or a list of either, one per chosen layer, concatenated.
    s_dim and t_dim are the widths after that. The projections embed_s and embed_t train with the student: hand their
    parameters to the optimizer. In train mode every call moves the examples' bank rows once, after the loss.

    Learned state is in buffers, so `state_dict` has it: bank_student, bank_teacher [n_data, feat_dim] (the paper preset
    needs no bank_teacher: None), z_student and z_teacher (NCE's normaliser of either anchor: 0 until the first call,
    then frozen), the classes of `set_labels`, and the sampler's seed and step.

    negatives: which examples a batch is held against. "label": those of other classes (`set_labels`, fine-tuning);
    "uniform": all others; "window": the 2 `window` whose ids are nearest, "in_batch": the other examples of the batch
    (pre-training, where neighbours are hard negatives). None is "label" once the labels are set and "uniform" before.
    In the batch, examples of one label (if set) or one id are no negatives of each other, and the paper preset trains
    both sides and has no bank.

    process_group: banks and Z are shared by its ranks, which must start from the same state and hold equally many
    examples each. Under DDP pass broadcast_buffers=False: the banks are the same everywhere without it.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        n_data: int,
        *,
        feat_dim: int = 128,
        nce_k: int = 100,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
        preset: str = "official",
        pool: str | None = None,
        negatives: str | None = None,
        window: int = 0,
        backend: str = "auto",
        process_group=None,
    ):
        super().__init__()
        sizes = {"s_dim": s_dim, "t_dim": t_dim, "feat_dim": feat_dim, "nce_k": nce_k, "n_data": n_data}
        for name, size in sizes.items():
            checks.count(name, size)
        checks.positive("nce_t", nce_t)
        checks.number("nce_m", nce_m)
        if n_data < 2:
            raise ValueError(f"n_data: negatives are other examples, so at least 2 are needed, got {n_data!r}")
        if not 0 <= nce_m < 1:
            raise ValueError(f"nce_m: must lie in [0, 1), got {nce_m!r}; 0 replaces the bank's rows")
        checks.one_of("preset", preset, PRESETS)
        self.pool = POOLS[preset] if pool is None else pool
        checks.one_of("pool", self.pool, ("mean", "cls"))
        if negatives is not None:
            checks.one_of("negatives", negatives, NEGATIVES)
        if (negatives == "window") != (window > 0):
            raise ValueError(f"window: how many ids on either side, > 0 with negatives='window' only, got {window!r}")
        self.negatives, self.window = negatives, window
        self.n_data, self.nce_k, self.nce_t, self.nce_m, self.preset = n_data, nce_k, nce_t, nce_m, preset
        self.backend, self.process_group = backend, process_group
        self.embed_s, self.embed_t = (Embed(dim, feat_dim, backend) for dim in (s_dim, t_dim))
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
        """The class of every example, [n_data] integers: negatives are then drawn from other classes only.

        Without it (pre-training, regression) they are drawn from all other examples.
        """
        checks.integers("labels", labels, "[n_data]")
        checks.mask("labels", labels, (self.n_data,), "[n_data]")
        labels = labels.to(self.z_student.device)
        classes, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        if len(classes) < 2:
            raise ValueError("labels: all examples have one label, so none could be a negative; leave the labels unset")
        self.labels = inverse  # [n_data]
        self.label_order = inverse.argsort(stable=True)  # [n_data] ids, class after class
        self.label_bounds = nn.functional.pad(counts.cumsum(0), (1, 0))  # [C + 1]

    def forward(
        self, f_s: Tensor | list, f_t: Tensor | list, idx: Tensor, contrast_idx: Tensor | None = None, *, mask=None
    ) -> Tensor:
        """idx [B]: ids of the examples. contrast_idx [B, K + 1]: idx and K negatives; drawn here when None."""
        f_s, f_t = self.pooled("f_s", f_s, mask), self.pooled("f_t", f_t, mask)
        checks.frozen("f_t", f_t)
        idx, contrast_idx = self._indices(f_s, f_t, idx, contrast_idx)  # [B], [B, K + 1]
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

    def _in_batch(self, v_s: Tensor, v_t: Tensor, idx: Tensor) -> Tensor:
        """The paper's loss against the other students of the (global) batch, whose gradient they get too."""
        own = idx if self.labels is None else self.labels[idx]
        everyone, ids = (distributed.gather_rows(x, self.process_group) for x in (v_s, own))
        return functional.info_nce_loss(
            v_t, v_s, everyone, temperature=self.nce_t, exclude=(own, ids), backend=self.backend
        )

    def pooled(self, name: str, x, mask) -> Tensor:
        """Of a layer [B, S, D] the [CLS] token or the mean over the real ones, [B, D]; of a list of layers, side by side."""
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

    def _indices(self, f_s: Tensor, f_t: Tensor, idx, contrast_idx) -> tuple[Tensor, Tensor]:
        for name, x, embed in (("f_s", f_s, self.embed_s), ("f_t", f_t, self.embed_t)):
            width = embed.linear.in_features
            if x.shape[1] != width:
                raise ValueError(f"{name}: expected width {width}, as {name[-1]}_dim says, got {checks.describe(x)}")
        checks.integers("idx", idx, "[B]")
        checks.same_leading("f_s", f_s, "f_t", f_t, 1)
        checks.same_leading("idx", idx, "f_s", f_s, 1)
        checks.same_device(z_student=self.z_student, f_s=f_s, f_t=f_t, idx=idx, contrast_idx=contrast_idx)
        checks.indices_in_range("idx", idx, self.n_data, "n_data examples")
        idx = idx.long()
        if self.negatives == "in_batch" and self.preset == "paper":
            if contrast_idx is not None:
                raise ValueError("contrast_idx: with negatives='in_batch' the batch itself decides; leave it out")
            return idx, None
        if contrast_idx is not None:
            checks.integers("contrast_idx", contrast_idx, "[B, K + 1]")
            checks.same_leading("contrast_idx", contrast_idx, "idx", idx, 1)
            if contrast_idx.shape[1] == 0:
                raise ValueError(f"contrast_idx: expected idx in column 0, got {checks.describe(contrast_idx)}")
            agree = lambda: (contrast_idx[:, 0] == idx).all()  # noqa: E731 (looked at only where a look is free)
            checks.values("contrast_idx", contrast_idx, agree, "column 0 must be idx, the negatives come after it")
            return idx, contrast_idx.long()
        return idx, self._draw(idx)

    def _draw(self, idx: Tensor) -> Tensor:
        """[B, K + 1], the example itself first."""
        if self.negatives == "in_batch":
            everyone = distributed.gather_rows(idx, self.process_group)  # [world * B]
            first = 0 if self.process_group is None else dist.get_rank(self.process_group) * idx.shape[0]
            steps = torch.arange(everyone.shape[0], device=idx.device)
            return everyone[(first + steps[: idx.shape[0], None] + steps) % everyone.shape[0]]
        labels = None
        if self.negatives == "label" or (self.negatives is None and self.labels is not None):
            if self.labels is None:
                raise ValueError("negatives: 'label' needs the labels; call set_labels first")
            labels = self.labels, self.label_order, self.label_bounds
        options = {"n_data": self.n_data, "labels": labels, "window": self.window, "backend": self.backend}
        negatives = functional.sample_negatives(idx, self.nce_k, self.sampler, **options)
        if self.training:
            self.sampler[1] += 1
        return torch.cat([idx[:, None], negatives], 1)

    def _nce(self, queries: tuple, banks: tuple, index: Tensor) -> Tensor:
        frozen = z = self.z_student, self.z_teacher
        options = {"n_data": self.n_data, "temperature": self.nce_t, "backend": self.backend}
        if self.process_group is not None:  # what this batch says counts until z is frozen, and for all ranks
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
        """Z is about e^(1/T) · n_data, which half precision cannot hold: .half() and its like leave it in float32."""
        kept = {name: self._buffers[name] for name in ("z_student", "z_teacher")}
        super()._apply(fn, recurse)
        for name, z in kept.items():
            moved = self._buffers[name]
            self._buffers[name] = moved.float() if z.is_meta else z.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in LABELS:  # their sizes are the saved data set's, and before set_labels there are none
            if prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name], device=self.z_student.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
