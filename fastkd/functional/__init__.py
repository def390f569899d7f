"""The public functions, one file per hot path.

In all of them a mask is 1 where something counts, student and teacher may differ in dtype, losses are float32 (float64 for
float64 inputs), gradients have the student's dtype, and no gradient flows to the teacher. reduction="mean" is the mean over
what counts. backend="auto" takes the fastest implementation that runs here; `fastkd doctor` lists them. The kernels have
first derivatives only; backend="reference" has second derivatives (create_graph=True), forward mode and torch.func as well.

The functions that `fastkd` itself exports are losses. The others are the building blocks of CoDIR and BERT-EMD
(nce_pair_loss, nce_partition, sample_negatives, unit_linear, update_bank, transport_with_cost_attention, CostAttention) and
what is logged beside a loss (linear_entropy).
"""

from fastkd.functional.contrast import (
    info_nce_loss,
    nce_loss,
    nce_pair_loss,
    nce_partition,
    sample_negatives,
    unit_linear,
    update_bank,
)
from fastkd.functional.divergence import divergence
from fastkd.functional.entropy import linear_entropy
from fastkd.functional.gram import gram_correlation_loss
from fastkd.functional.layer_cost import attention_costs, layer_costs
from fastkd.functional.linear_divergence import linear_divergence
from fastkd.functional.relation import relation_kl_loss
from fastkd.functional.transport import transport, transport_with_cost_attention
from fastkd.ops.divergence import DivergenceStats, TopK
from fastkd.ops.transport import CostAttention, TransportPlan

__all__ = [
    "CostAttention",
    "DivergenceStats",
    "TopK",
    "TransportPlan",
    "attention_costs",
    "divergence",
    "gram_correlation_loss",
    "info_nce_loss",
    "layer_costs",
    "linear_divergence",
    "linear_entropy",
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
