"""CRD (Tian et al., ICLR 2020) with its constructor, as CoDIR released it: the mean of both anchors' NCE.

CRD's own release returns their sum: multiply by 2 to reproduce its loss weights.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd import checks
from fastkd.checks import Backend
from fastkd.deprecation import renamed
from fastkd.losses.codir import CoDIRLoss


class CRDLoss(CoDIRLoss):
    """CRD: `CoDIRLoss` with preset "official", built from the options object of CRD's code.

    Args:
        opt: An object with the attributes s_dim, t_dim, feat_dim, n_data, nce_k, nce_t and nce_m.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.
        process_group: As for `CoDIRLoss`.

    Example:
        >>> from types import SimpleNamespace
        >>> opt = SimpleNamespace(s_dim=16, t_dim=32, feat_dim=8, n_data=50, nce_k=10, nce_t=0.07, nce_m=0.5)
        >>> loss = fastkd.CRDLoss(opt)
        >>> loss(torch.randn(4, 16), torch.randn(4, 32), torch.tensor([0, 7, 9, 30])).backward()
    """

    def __init__(self, opt, *, backend: Backend = "auto", process_group=None):
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

    @renamed(f_s="student_hidden", f_t="teacher_hidden")
    def forward(
        self, student_hidden: Tensor, teacher_hidden: Tensor, idx: Tensor, contrast_idx: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_hidden: [B, ...], flattened to [B, s_dim], such as feature maps of a convolutional network.
            teacher_hidden: [B, ...], flattened to [B, t_dim].
            idx: [B], the ids of the examples.
            contrast_idx: [B, K + 1], idx in column 0 and the ids of K negatives. None: they are drawn.
        """
        for name, x in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
            checks.tensor(name, x, "[..., B, D]")
        return super().forward(student_hidden.flatten(1), teacher_hidden.flatten(1), idx, contrast_idx)

    if TYPE_CHECKING:
        __call__ = forward
