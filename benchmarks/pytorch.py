"""Clipping by PyTorch and packages for it, over the memory of JAX's arrays."""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax

GROWTH = 4  # of gradients that a package clipped, before it clips them again
WARM_UP = 30  # calls; ZClip knows its mean after 25
PACKAGES = {"torch_zclip": "zclip", "torch_autoclip": "autoclip"}


def unavailable(package: str = "torch") -> str | None:
    """Why PyTorch, or a package for it, is left out; None if it is not."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", package)):
        return "not installed"
    import torch  # pyright: ignore[reportMissingImports]

    backend = jax.default_backend()
    if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
        return None
    return f"has no {backend}"


def versions() -> dict[str, str]:
    """The versions of PyTorch and the packages, or why they are left out."""
    names = ("torch", *PACKAGES.values())
    return {name: unavailable(name) or importlib.metadata.version(name) for name in names}


class Gradients:
    """Parameters of PyTorch whose gradients are JAX's arrays, which may be written into.

    Nobody else may hold or read the arrays meanwhile.
    """

    def __init__(self, tree: Any, threads: int):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.leaves = [jax.block_until_ready(leaf) for leaf in jax.tree.leaves(tree)]
        self.params = [_parameter(torch.from_dlpack(leaf)) for leaf in self.leaves]

    def wait(self) -> None:
        """Waits for the device."""
        import torch  # pyright: ignore[reportMissingImports]

        if self.params[0].is_cuda:
            torch.cuda.synchronize()

    def clip(self, limit: float, foreach: bool) -> None:
        """Scales all entries so that their norm is at most `limit`."""
        import torch  # pyright: ignore[reportMissingImports]

        torch.nn.utils.clip_grad_norm_(self.params, limit, foreach=foreach)

    def clip_each(self, limit: float) -> None:
        """Scales each leaf so that its norm is at most `limit`, one after the other."""
        import torch  # pyright: ignore[reportMissingImports]

        for param in self.params:
            torch.nn.utils.clip_grad_norm_([param], limit, foreach=False)


def measure_clip(grads: Gradients, clip: Callable[[], None], calls: int) -> float:
    """Seconds per call of what takes the same time whatever the entries; each call is waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        clip()
        grads.wait()
    return (time.perf_counter() - start) / calls


class Packaged:
    """A package's own clipping: `ZClip` of `zclip`, `QuantileClip` of `autoclip` over all gradients.

    What they do depends on the norms: what is to be clipped grows before each call, out of the time.
    """

    def __init__(self, package: str, grads: Gradients, grows: bool):
        import torch  # pyright: ignore[reportMissingImports]

        # `QuantileClip` multiplies in any case, by a little less than 1 if nothing is above its quantile.
        self.grads, self.grows = grads, grows or package == "autoclip"
        if package == "zclip":
            from zclip import ZClip  # pyright: ignore[reportMissingImports]

            clip, model = ZClip(), torch.nn.ParameterList(grads.params)
            self.step = lambda: clip.step(model)
        else:
            from autoclip.torch import QuantileClip  # pyright: ignore[reportMissingImports]

            self.step = QuantileClip(iter(grads.params), quantile=0.1, global_threshold=True).step
        self.measure(WARM_UP)

    def measure(self, calls: int) -> float:
        """Seconds per call."""
        seconds = 0.0
        for _ in range(calls):
            for param in self.grads.params if self.grows else ():
                param.grad.mul_(GROWTH)
            self.grads.wait()
            start = time.perf_counter()
            self.step()
            self.grads.wait()
            seconds += time.perf_counter() - start
        return seconds / calls


class Training:
    """Steps of PyTorch's AdamW, in its fused form, over gradients that stay where they are."""

    def __init__(self, grads: Gradients):
        import torch  # pyright: ignore[reportMissingImports]

        self.grads = grads
        for param in grads.params:  # which shared the memory of its gradient
            param.data = torch.randn_like(param.grad)
        self.optimizer = torch.optim.AdamW(grads.params, lr=1e-3, weight_decay=1e-4, fused=True)

    def measure(self, clip: Callable[[], None], calls: int) -> float:
        """Seconds per step behind a clip, over some steps in a row."""
        start = time.perf_counter()
        for _ in range(calls):
            clip()
            self.optimizer.step()
        self.grads.wait()
        return (time.perf_counter() - start) / calls


def _parameter(grad: Any) -> Any:
    """Something that has the gradient; its own entries are never read, unless others take their place."""
    import torch  # pyright: ignore[reportMissingImports]

    param = torch.nn.Parameter(grad)
    param.grad = grad
    return param
