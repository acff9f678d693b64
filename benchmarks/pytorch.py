"""Clipping by PyTorch, over the memory of JAX's arrays."""

import importlib.metadata
import importlib.util
import time
from typing import Any

import jax


def unavailable() -> str | None:
    """Why PyTorch is left out; None if it is not."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch  # pyright: ignore[reportMissingImports]

    backend = jax.default_backend()
    if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
        return None
    return f"has no {backend}"


def version() -> str:
    """PyTorch's version, or why it is left out."""
    return unavailable() or importlib.metadata.version("torch")


class Clip:
    """`torch.nn.utils.clip_grad_norm_` over a tree of JAX's arrays, which it writes into.

    Of its two implementations, `foreach` or not, the one that takes less time here is used.
    Nobody else may hold or read the arrays meanwhile.
    """

    def __init__(self, tree: Any, threads: int, each: bool):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.leaves = [jax.block_until_ready(leaf) for leaf in jax.tree.leaves(tree)]
        params = [_parameter(torch.from_dlpack(leaf)) for leaf in self.leaves]
        self.groups = [[param] for param in params] if each else [params]
        self.cuda = params[0].is_cuda
        self.foreach = True
        self.foreach = min((True, False), key=self._seconds)

    def __call__(self, limit: float) -> None:
        """Scales all entries so that their norm, or each leaf's, is at most `limit`; waits for the device."""
        import torch  # pyright: ignore[reportMissingImports]

        for group in self.groups:
            torch.nn.utils.clip_grad_norm_(group, limit, foreach=self.foreach)
        if self.cuda:
            torch.cuda.synchronize()

    def _seconds(self, foreach: bool) -> float:
        self.foreach = foreach
        self(float("inf"))
        start = time.perf_counter()
        self(float("inf"))
        return time.perf_counter() - start


def _parameter(grad: Any) -> Any:
    """Something that has the gradient; its own entries are never read."""
    import torch  # pyright: ignore[reportMissingImports]

    param = torch.nn.Parameter(grad)
    param.grad = grad
    return param
