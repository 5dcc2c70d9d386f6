"""SE-ResViT: medical image synthesis whose transformer and CNN are balanced, image by image, by a gate."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "altered_gates", "load", "record_gates"]


def __getattr__(name: str) -> Any:
    """What of the package needs torch is imported on first use, so that `--help` need not."""
    if name == "load":
        from seresvit.model.checkpoint import load

        return load
    if name in ("altered_gates", "record_gates"):
        from seresvit.model import fusion

        return getattr(fusion, name)
    raise AttributeError(f"module 'seresvit' has no attribute {name!r}")
