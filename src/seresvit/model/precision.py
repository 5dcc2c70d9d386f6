"""Which arithmetic a processor has: what training and prediction compute in by themselves depends on it."""

from typing import Any

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether the processor itself multiplies bfloat16; those that do not may emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
