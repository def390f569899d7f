"""FCD as its authors' code calls it: `FCDLoss(alpha, beta, gamma, K, loss_weight)(feature_S, feature_T)`."""

from typing import Literal

from torch import Tensor

from fastkd.losses.fcd import FCDLoss as FastFCDLoss


class FCDLoss(FastFCDLoss):
    """The released loss, its quirks included: the sequence level views [N, B, B] as [B, N·B], so that groups straddle
    positions; with alpha=0 features are not normalised; padding counts like any token.

    Args:
        alpha, beta, gamma, K, loss_weight: As released; see `fastkd.FCDLoss`.
        grouping: "official", or "position" for the sequence level and the normalisation that the paper describes.

    Example:
        >>> loss = fastkd.compat.fcd.FCDLoss(alpha=1.0, beta=1.0)
        >>> loss(torch.randn(4, 7, 12, requires_grad=True), torch.randn(4, 7, 20)).backward()
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
        K: int = 128,
        loss_weight: float = 1.0,
        *,
        grouping: Literal["official", "position"] = "official",
    ):
        super().__init__(alpha, beta, gamma, K, loss_weight, grouping)

    def forward(self, feature_S: Tensor | list[Tensor], feature_T: Tensor | list[Tensor]) -> Tensor:
        """The loss, a scalar: [B, N, Ds] and [B, N, Dt], or lists of as many layers each, of which it is the mean."""
        return super().forward(feature_S, feature_T)
