from .attention import attention_cost_bwd, attention_cost_fwd
from .hidden import layer_cost_bwd, layer_cost_fwd

__all__ = ["attention_cost_bwd", "attention_cost_fwd", "layer_cost_bwd", "layer_cost_fwd"]
