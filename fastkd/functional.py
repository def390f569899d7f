"""The public functions, one per hot path: check once, let the op choose its implementation, reduce. They are written in
fastkd/functions/<stem>.py; here is the whole surface, and the one place to import it from.

Everywhere: a mask has 1 where something counts; student and teacher dtypes may differ; losses come back in float32
(float64 for float64 inputs), gradients in the student's dtype; no gradient flows to the teacher.
reduction="mean" is over what counts. backend="auto" takes the fastest implementation that runs here; see `fastkd doctor`.
Kernels have a first derivative, in backward mode. backend="reference" has the others: create_graph=True, forward mode, and
the transforms of torch.func.
"""

from fastkd.functions.contrast import (
    info_nce_loss,
    nce_loss,
    nce_pair_loss,
    nce_partition,
    sample_negatives,
    unit_linear,
    update_bank,
)
from fastkd.functions.divergence import divergence
from fastkd.functions.gram import gram_correlation_loss
from fastkd.functions.layer_cost import attention_costs, layer_costs
from fastkd.functions.linear_divergence import linear_divergence
from fastkd.functions.relation import relation_kl_loss
from fastkd.functions.transport import transport, transport_with_cost_attention
from fastkd.ops.divergence import TopK
from fastkd.ops.transport import CostAttention, TransportPlan

__all__ = [
    "CostAttention",
    "TopK",
    "TransportPlan",
    "attention_costs",
    "divergence",
    "gram_correlation_loss",
    "info_nce_loss",
    "layer_costs",
    "linear_divergence",
    "nce_loss",
    "nce_pair_loss",
    "nce_partition",
    "relation_kl_loss",
    "sample_negatives",
    "transport",
    "transport_with_cost_attention",
    "unit_linear",
    "update_bank",
]
