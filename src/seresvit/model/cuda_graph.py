"""A computation on a GPU recorded once and then replayed: hundreds of launches become one.

At a batch of one to eight images the processor launches the network's small kernels more slowly than a GPU runs them.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
WARM_UP = 3


def recorded(compute: Callable[..., Result], *example: torch.Tensor) -> Callable[..., Result]:
    """`compute` as a CUDA graph; what comes back takes tensors of the shapes of `example`.

    Its results stand where those of every replay do: clone what is to outlast the next one.

    `compute` runs a few times while it is recorded, on the example. It may read and change other tensors in place, by
    which it is to be recorded only as often as that is harmless; what it allocates, gradients among it, stays where it
    is and holds the values of the last replay. Random numbers are drawn anew in each replay. Raises RuntimeError for a
    computation that waits for the GPU, such as one that branches on a value.
    """
    inputs = [tensor.clone() for tensor in example]
    # As torch's notes on CUDA graphs have it: libraries set themselves up on another stream before the recording.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            compute(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: a loader's may take page-locked memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute(*inputs)

    def replay(*batch: torch.Tensor) -> Result:
        for static, tensor in zip(inputs, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        graph.replay()
        return result

    return replay
