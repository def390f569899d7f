from .logits import divergence_bwd, divergence_fwd, divergence_log_sum_exp, divergence_shard_terms
from .topk import divergence_topk_bwd, divergence_topk_fwd

__all__ = [
    "divergence_bwd",
    "divergence_fwd",
    "divergence_log_sum_exp",
    "divergence_shard_terms",
    "divergence_topk_bwd",
    "divergence_topk_fwd",
]
