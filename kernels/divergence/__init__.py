from .logits import divergence_bwd, divergence_fwd
from .topk import divergence_topk_bwd, divergence_topk_fwd

__all__ = ["divergence_bwd", "divergence_fwd", "divergence_topk_bwd", "divergence_topk_fwd"]
