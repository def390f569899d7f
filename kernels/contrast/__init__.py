from .bank import sample_negatives, update_bank
from .loss import info_nce_bank_bwd, info_nce_fwd
from .nce import nce_fwd, nce_pair, nce_partition

__all__ = [
    "info_nce_bank_bwd", "info_nce_fwd", "nce_fwd", "nce_pair", "nce_partition", "sample_negatives", "update_bank",
]  # fmt: skip
