"""What the package should compute, in NumPy float64, one entry after the other and without its tricks."""

import numpy as np


def norm(arrays, kind="l2", p=None):
    """The norm of all entries of some arrays together."""
    with np.errstate(all="ignore"):
        entries = np.concatenate([np.abs(np.asarray(a).astype(_wide(a))).ravel() for a in arrays])
        match kind:
            case "l1":
                return entries.sum()
            case "linf":
                return entries.max()
            case "rms":
                return np.sqrt(np.mean(entries**2))
            case "lp":
                peak = entries.max()
                return peak * np.sum((entries / peak) ** p) ** (1 / p) if 0 < peak < np.inf else peak
        return np.sqrt(np.sum(entries**2))


def factor(norm, limit, response="clip"):
    """What a group is multiplied by."""
    if norm == 0 or limit == np.inf:
        return 1.0
    match response:
        case "clip":
            return min(1.0, limit / norm)
        case "normalize":
            return limit / norm
        case "zero":
            return float(norm <= limit)
        case "rational":
            return limit / (limit + norm)
        case "sqrt":
            return limit / np.hypot(limit, norm)
    raise ValueError(response)


def rescale(tree, groups, limit, kind="l2", response="clip", p=None):
    """Rescales a dict of arrays; `groups` maps the names of its arrays to those of groups."""
    out = {}
    for group in set(groups.values()):
        names = [name for name in tree if groups[name] == group]
        by = factor(norm([tree[name] for name in names], kind, p), limit, response)
        out |= {name: np.asarray(tree[name]).astype(_wide(tree[name])) * by for name in names}
    return out


def _wide(array):
    return np.complex128 if np.iscomplexobj(np.asarray(array)) else np.float64
