"""SE-ResViT: medical image synthesis whose transformer and CNN are balanced, image by image, by a gate."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "record_gates"]


def __getattr__(name: str) -> Any:
    """`seresvit.load` and `seresvit.record_gates` import torch on first use, so that `--help` need not."""
    if name == "load":
        from seresvit.model.checkpoint import load

        return load
    if name == "record_gates":
        from seresvit.model.fusion import record_gates

        return record_gates
    raise AttributeError(f"module 'seresvit' has no attribute {name!r}")
