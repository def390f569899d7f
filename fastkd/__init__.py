"""fastkd: distillation losses for transformers, with fused kernels behind plain PyTorch functions."""

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# In a checkout, kernels/ and bench/ lie beside this package; installed, they lie in it (setup.py maps them there).
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

from fastkd.compat import patch  # noqa: E402 - fastkd.kernels must be found first
from fastkd.emd_numpy import emd, emd_with_flow  # noqa: E402
from fastkd.functional import (  # noqa: E402
    TopK,
    TransportPlan,
    attention_costs,
    divergence,
    gram_correlation_loss,
    info_nce_loss,
    layer_costs,
    linear_divergence,
    nce_loss,
    relation_kl_loss,
    transport,
)
from fastkd.losses.bank import MemoryBank, NegativeQueue  # noqa: E402
from fastkd.losses.batch_relations import CCLoss, PKTLoss, RKDLoss, SPLoss  # noqa: E402
from fastkd.losses.bert_emd import BertEMDLoss  # noqa: E402
from fastkd.losses.cka import CKALoss  # noqa: E402
from fastkd.losses.codir import CoDIRLoss  # noqa: E402
from fastkd.losses.crd import CRDLoss  # noqa: E402
from fastkd.losses.dist import DISTLoss  # noqa: E402
from fastkd.losses.distilbert import DistilBERTLoss  # noqa: E402
from fastkd.losses.dkd import DecoupledKDLoss  # noqa: E402
from fastkd.losses.embedding import EmbeddingLoss  # noqa: E402
from fastkd.losses.fcd import FCDLoss  # noqa: E402
from fastkd.losses.glmd import GLMDLoss  # noqa: E402
from fastkd.losses.kd import HintonKDLoss  # noqa: E402
from fastkd.losses.minilm import MiniLMLoss, MiniLMv2Loss  # noqa: E402
from fastkd.losses.pkd import PKDLoss  # noqa: E402
from fastkd.losses.projection import Projection  # noqa: E402
from fastkd.losses.tinybert import TinyBERTLoss  # noqa: E402
from fastkd.vocab import VocabMap  # noqa: E402

if TYPE_CHECKING:
    from fastkd.train.trainer import DistillTrainer as DistillTrainer

__all__ = [
    "BertEMDLoss",
    "CCLoss",
    "CKALoss",
    "CRDLoss",
    "CoDIRLoss",
    "DISTLoss",
    "DecoupledKDLoss",
    "DistilBERTLoss",
    "EmbeddingLoss",
    "FCDLoss",
    "GLMDLoss",
    "HintonKDLoss",
    "MemoryBank",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "NegativeQueue",
    "PKDLoss",
    "PKTLoss",
    "Projection",
    "RKDLoss",
    "SPLoss",
    "TinyBERTLoss",
    "TopK",
    "TransportPlan",
    "VocabMap",
    "attention_costs",
    "divergence",
    "emd",
    "emd_with_flow",
    "gram_correlation_loss",
    "info_nce_loss",
    "layer_costs",
    "linear_divergence",
    "nce_loss",
    "patch",
    "relation_kl_loss",
    "transport",
]


def __getattr__(name: str):
    if name == "DistillTrainer":  # transformers, which it needs, is an extra, and takes seconds to import
        from fastkd.train.trainer import DistillTrainer

        return DistillTrainer
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
