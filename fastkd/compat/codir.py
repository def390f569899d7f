"""CoDIR as its authors' code calls it: `CRDLoss(opt)(f_s, f_t, idx, contrast_idx)` of crd/criterion.py."""

import torch
from torch import Tensor

from fastkd.losses.crd import CRDLoss as FastCRDLoss

# The buffers of the released ContrastMemory, and ours. `params` holds K, T, Z of both anchors and the momentum.
_RELEASED = {"contrast.memory_v1": "bank_student", "contrast.memory_v2": "bank_teacher"}


class CRDLoss(FastCRDLoss):
    """The released loss, half the sum of both anchors' NCE, of shape [1]. It loads the state_dict of the released module.

    Args:
        opt: An object with the attributes s_dim, t_dim, feat_dim, n_data, nce_k, nce_t and nce_m.
        negatives: Where `contrast_idx` is None: "all" draws from the whole data set, the positive included, as released;
            "others" leaves the positive out. After `set_labels` both draw from other classes.

    Example:
        >>> from types import SimpleNamespace
        >>> opt = SimpleNamespace(s_dim=16, t_dim=32, feat_dim=8, n_data=50, nce_k=10, nce_t=0.07, nce_m=0.5)
        >>> loss = fastkd.compat.codir.CRDLoss(opt)
        >>> loss(torch.randn(4, 16), torch.randn(4, 32), torch.tensor([0, 7, 9, 30])).backward()
    """

    def __init__(self, opt, *, negatives: str = "all"):
        super().__init__(opt)
        if negatives not in ("all", "others"):
            raise ValueError(f"negatives: expected 'all' or 'others', got {negatives!r}")
        self.draws_the_positive = negatives == "all"

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        """The loss [1].

        Args:
            f_s: [B, ...], flattened to [B, s_dim].
            f_t: [B, ...], flattened to [B, t_dim].
            idx: [B], the ids of the examples.
            contrast_idx: [B, K + 1], idx in column 0 and the ids of K negatives. None: they are drawn.
        """
        if contrast_idx is None and self.draws_the_positive and self.labels is None:
            contrast_idx = torch.randint(self.n_data, (len(idx), self.nce_k + 1), device=idx.device)
            contrast_idx[:, 0] = idx
        return super().forward(f_s, f_t, idx, contrast_idx).reshape(1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        params = state_dict.pop(prefix + "contrast.params", None)
        if params is not None:
            for released, ours in _RELEASED.items():
                state_dict[prefix + ours] = state_dict.pop(prefix + released)
            for ours, z in (("z_student", params[2]), ("z_teacher", params[3])):
                state_dict[prefix + ours] = z.clamp_min(0.0).reshape(
                    getattr(self, ours).shape
                )  # -1 before the first call
            state_dict[prefix + "sampler"] = self.sampler
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
