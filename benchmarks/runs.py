"""What holds the arrays that timed programs hand on: seconds per call of a step, of training, of a clip."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from benchmarks import programs
from benchmarks.methods import Method
from benchmarks.trees import Tree

REGROWTH = 4  # exact in every dtype


class Training:
    """Parameters and AdamW's moments, which each program takes over from the one that ran before it.

    So there is one copy of them, and no program has buffers that are better placed than another's.

    Args:
      params: the parameters, which the programs take over.
      clips: the transformation of each method.
      fixed: the last argument of each step, the same at every step and never donated.
    """

    def __init__(self, params: Any, clips: Mapping[str, optax.GradientTransformation], fixed: Any):
        self.params = params
        self.adam = programs.ADAMW.init(params)
        self.clip = {name: clip.init(params) for name, clip in clips.items()}
        self.fixed = fixed

    def measure(self, name: str, step: Callable[..., Any], calls: int) -> float:
        """Seconds per step, over some steps in a row."""
        params, adam, clip = self.params, self.adam, self.clip[name]
        start = time.perf_counter()
        for _ in range(calls):
            params, adam, clip = step(params, adam, clip, self.fixed)
        jax.block_until_ready((params, adam, clip))
        seconds = (time.perf_counter() - start) / calls
        self.params, self.adam, self.clip[name] = params, adam, clip
        return seconds


class Clipping:
    """Gradients that one program clips in place again and again.

    What was clipped is at its limit and would not be clipped again. So between two calls, and out of the
    time, all entries are multiplied by `REGROWTH`, in place, if `grows`: every group comes in with that many
    times its limit each time, whatever the method's groups. Gradients that are not clipped stay as they are.
    """

    def __init__(self, grads: Any, grows: bool, tree: Tree, method: Method, params: Any, program: Any):
        self.grads = grads
        self.state = method.build(tree).init(grads)
        self.params = params if method.needs_params else None
        self.program = program
        self.grows = grows

    def measure(self, calls: int) -> float:
        """Seconds per call, over some calls."""
        seconds = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            self.grads, self.state = self.program(self.grads, self.state, self.params)
            jax.block_until_ready((self.grads, self.state))
            seconds += time.perf_counter() - start
            if self.grows:
                self.grads = jax.block_until_ready(jax.tree.map(_regrown, self.grads))
        return seconds / calls


# Leaf by leaf, since a program for a whole tree of 2,000 leaves takes long to compile.
_regrown = jax.jit(lambda leaf: REGROWTH * leaf, donate_argnums=0)
