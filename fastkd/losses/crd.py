"""CRD (Tian et al., ICLR 2020) behind its constructor, as CoDIR released it: the mean of the two anchors' NCE.

CRD's own release returns their sum: multiply by 2 to reproduce its loss weights.
"""

from fastkd import checks
from fastkd.losses.codir import CoDIRLoss


class CRDLoss(CoDIRLoss):
    """CRDLoss(opt) with opt.s_dim, t_dim, feat_dim, n_data, nce_k, nce_t, nce_m; then (f_s, f_t, idx, contrast_idx).

    Features of any shape [B, ...] are flattened to [B, D], as for feature maps of a convolutional network.
    """

    def __init__(self, opt, *, backend: str = "auto", process_group=None):
        names = ("s_dim", "t_dim", "n_data", "feat_dim", "nce_k", "nce_t", "nce_m")
        if missing := [name for name in names if not hasattr(opt, name)]:
            raise ValueError(f"opt: expected the attributes {', '.join(names)}, and {', '.join(missing)} are not there")
        super().__init__(
            opt.s_dim,
            opt.t_dim,
            opt.n_data,
            feat_dim=opt.feat_dim,
            nce_k=opt.nce_k,
            nce_t=opt.nce_t,
            nce_m=opt.nce_m,
            backend=backend,
            process_group=process_group,
        )

    def forward(self, f_s, f_t, idx, contrast_idx=None):
        """As CoDIRLoss, without its pooling and its lists of layers."""
        for name, x in (("f_s", f_s), ("f_t", f_t)):
            checks.tensor(name, x, "[..., B, D]")
        return super().forward(f_s.flatten(1), f_t.flatten(1), idx, contrast_idx)
