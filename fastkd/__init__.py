"""fastkd: distillation losses for transformers, with fused kernels behind plain PyTorch functions."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, kernels/ and bench/ lie beside this package; installed, they lie in it (setup.py maps them there).
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
