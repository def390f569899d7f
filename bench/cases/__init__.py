"""What is measured: every case is registered by the module that defines it, and all modules are listed here."""

from fastkd.bench.cases import accuracy, contrast, scale, stems

__all__ = ["accuracy", "contrast", "scale", "stems"]
