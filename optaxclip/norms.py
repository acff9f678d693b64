"""How a group is measured: L2, L1, Lp, maximum and root mean square.

Every norm is a reduction per leaf, a sum or a maximum across leaves, and a closing function, so that groups,
devices and stacked axes come from one mechanism. Entries are converted to float32 (float64 stays float64)
before anything else, and of complex entries the modulus is measured.
"""

import functools

import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._base import Norm
from optaxclip._singular import spectral

__all__ = ["l1", "l2", "linf", "lp", "rms", "spectral"]


def _abs_squared(x):
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _sum_of_squares(x, axes):
    return jnp.sum(_abs_squared(x), axis=axes)


def _sum(x, axes):
    return jnp.sum(jnp.abs(x), axis=axes)


def _max(x, axes):
    return jnp.max(jnp.abs(x), axis=axes)


def _root(partial, size):
    del size
    # The derivative of the square root at zero is infinite; a group that is all zeros gets 0 instead.
    empty = partial == 0
    return jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, partial)))


def _square(norm, size):
    del size
    return norm * norm


def _same(value, size):
    del size
    return value


def _root_of_mean(partial, size):
    return _root(partial / size, size)


def _square_times_size(norm, size):
    return norm * norm * size


_L2 = Norm(_sum_of_squares, "sum", _root, _square, 2)
_L1 = Norm(_sum, "sum", _same, _same, 1)
_LINF = Norm(_max, "max", _same, _same, 1)
_RMS = Norm(_sum_of_squares, "sum", _root_of_mean, _square_times_size, 2)


def l2() -> Norm:
    r"""The Euclidean norm, the square root of the sum of squares.

    $$n = \sqrt{\textstyle\sum_i |x_i|^2}$$

    Returns:
      A `Norm`; what it gives is float32 (float64 if any leaf is), `(rows,)`.

    References:
      [optax.global_norm](https://optax.readthedocs.io/en/latest/api/transformations.html), which sums in the
      dtype of the leaves.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"w": jnp.array([3.0, 4.0])}, norm=oc.norms.l2())
    {'w': Array(5., dtype=float32)}
    """
    return _L2


def l1() -> Norm:
    r"""The sum of the absolute values.

    $$n = \textstyle\sum_i |x_i|$$

    Returns:
      A `Norm`; what it gives is float32 (float64 if any leaf is), `(rows,)`.

    References:
      [torch.nn.utils.clip_grad_norm_](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html)
      with `norm_type=1`.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"w": jnp.array([3.0, -4.0])}, norm=oc.norms.l1())
    {'w': Array(7., dtype=float32)}
    """
    return _L1


def linf() -> Norm:
    r"""The largest absolute value.

    $$n = \max_i |x_i|$$

    Clipping by it keeps the direction, unlike clipping by value.

    Returns:
      A `Norm`; what it gives is float32 (float64 if any leaf is), `(rows,)`.

    References:
      [torch.nn.utils.clip_grad_norm_](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html)
      with `norm_type='inf'`.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"w": jnp.array([3.0, -4.0])}, norm=oc.norms.linf())
    {'w': Array(4., dtype=float32)}
    """
    return _LINF


def rms() -> Norm:
    r"""The root mean square: the L2 norm divided by the square root of the number of entries.

    $$n = \sqrt{\tfrac{1}{d} \textstyle\sum_{i=1}^{d} |x_i|^2}$$

    A limit on it does not depend on the size of a group.

    Returns:
      A `Norm`; what it gives is float32 (float64 if any leaf is), `(rows,)`.

    References:
      Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018: its update clipping.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"w": jnp.array([3.0, -3.0, 3.0])}, norm=oc.norms.rms())
    {'w': Array(3., dtype=float32)}
    """
    return _RMS


@functools.cache
def lp(p: float) -> Norm:
    r"""The norm of order `p`.

    $$\|x\|_p = \Big(\sum_i |x_i|^p\Big)^{1/p}$$

    Orders above 2 read the update twice: first the largest entry of each leaf, so that no power overflows.

    Args:
      p: the order, a Python number, at least 1 and finite. Above about 40, `linf` says the same.

    Returns:
      A `Norm`; what it gives is float32 (float64 if any leaf is), `(rows,)`.

    Raises:
      TypeError: if `p` is not a Python number.
      ValueError: if `p` is below 1, infinite or NaN.

    References:
      [torch.nn.utils.clip_grad_norm_](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html)
      with `norm_type=p`.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> print(oc.group_norms({"w": jnp.array([1.0, 2.0, 2.0])}, norm=oc.norms.lp(3))["w"])
    2.5712817
    """
    _checks.finite_order("norms.lp", p)
    if p == 1:
        return _L1
    if p == 2:
        return _L2
    p = int(p) if p == int(p) else p  # integer powers are exact to a rounding or two

    def measure(x, axes):
        return jnp.sum(jnp.abs(x) ** p, axis=axes)

    def close(partial, size):
        del size
        empty = partial == 0
        some = jnp.where(empty, 1, partial)
        root = some ** (1 / p)
        # The exponent is rounded, which a step of Newton's method makes good.
        return jnp.where(
            empty, 0, jnp.where(some < jnp.inf, root - (root - some / root ** (p - 1)) / p, root)
        )

    def open(norm, size):
        del size
        return norm**p

    return Norm(measure, "sum", close, open, p)
