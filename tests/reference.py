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


def learnable(norm):
    """Whether an adaptive limit learns from a norm: finite and not zero."""
    return np.isfinite(norm) and norm > 0


def held(norm, limit, eps=0.0):
    """The norm after clipping; NaN where it was not finite."""
    if not np.isfinite(norm):
        return np.nan
    return norm * limit / (norm + eps) if norm + eps > limit else norm


def autoclip(norms, percentile=10.0, window=None, include_current=True, eps=1e-6):
    """Seetharaman 2020: the percentile of all norms, the current one among them."""
    history, out = [], []
    for n in norms:
        past = list(history)
        if learnable(n):
            history.append(n)
        known = history if include_current else past
        known = known[-window:] if window else known
        out.append(held(n, np.percentile(known, percentile) if known else np.inf, eps))
    return out


def zclip(
    norms, decay=0.97, z=2.5, max_norm=1.0, warmup=25, eps=1e-6, mode="reciprocal", factor=1.0, learn=True
):
    """Kumar 2025, from the equations."""
    buffer, mean, var, out = [], None, None, []
    cap = np.inf if max_norm is None else max_norm
    for n in norms:
        if not learnable(n):
            out.append(held(n, cap, eps))
            continue
        limit = np.inf
        if mean is None:
            buffer.append(n)
            if len(buffer) == warmup:
                mean, var = np.mean(buffer), np.var(buffer)
        else:
            std = np.sqrt(var)
            score = (n - mean) / (std + eps)
            if mode == "fixed":
                limit = mean + z * std if n > mean + z * std else np.inf
            elif score > z:
                limit = mean if mode == "mean" else factor * (mean + z * std / (score / z))
            if limit == np.inf or learn:
                x = limit if limit < np.inf else n
                mean = decay * mean + (1 - decay) * x
                var = decay * var + (1 - decay) * (x - mean) ** 2
        out.append(held(n, min(limit, cap), eps))
    return out


def adagc(steps, slack=1.04, decay=0.99, warmup=100, max_norm=1.0, eps=1e-6):
    """Wang 2025, for several tensors: `steps` has one row of norms for each step."""
    least, out = np.full(len(steps[0]), np.inf), []
    for t, row in enumerate(np.asarray(steps, np.float64)):
        total = np.sqrt(np.sum(row[np.isfinite(row)] ** 2))
        after = []
        for k, n in enumerate(row):
            if t < warmup:
                by = min(1.0, max_norm / (total + eps))
                after.append(n * by if np.isfinite(n) else np.nan)
                if learnable(n):
                    least[k] = min(least[k], n * by)
                continue
            limit = slack * least[k]
            after.append(held(n, limit, eps))
            if learnable(n):
                seen = after[-1]
                least[k] = seen if np.isinf(least[k]) else decay * least[k] + (1 - decay) * seen
        out.append(after)
    return out


def historical(norms, k=3.0, window=128, warmup=64, unbiased=False, floor=1e-6):
    """Levanter: mean and k standard deviations of the window before."""
    history, out = [], []
    for n in norms:
        last = history[-window:]
        limit = np.inf
        if len(last) >= warmup:
            limit = np.mean(last) + k * max(np.std(last, ddof=int(unbiased)), floor)
        out.append(held(n, limit))
        if learnable(n):
            history.append(n)
    return out


def adaptive_quantile(norms, target=0.5, rate=0.2, initial=1.0):
    """Andrew 2021, one norm a step."""
    limit, out = initial, []
    for n in norms:
        out.append(held(n, limit))
        if learnable(n):
            limit *= np.exp(-rate * (float(n <= limit) - target))
    return out


def aggc(norms, low=1.0, high=1.0, decay=0.98, most_up=1.1, most_down=0.9):
    """Li 2026, with a mean that the first norm starts; `low` and `high` are numbers or one for each step."""
    mean, out = None, []
    ends = (np.broadcast_to(end, len(norms)) for end in (low, high))
    for n, low, high in zip(norms, *ends, strict=True):
        if not learnable(n):
            out.append(0.0 if n == 0 else np.nan)
            continue
        by = 1.0
        if mean is not None:
            if n > high * mean:
                by = max(high * mean / n, most_down)
            elif n < low * mean:
                by = min(low * mean / n, most_up)
        mean = n * by if mean is None else decay * mean + (1 - decay) * n * by
        out.append(n * by)
    return out


def adanorm(norms, decay=0.95):
    """Dubey 2023, with a mean that the first norm starts."""
    mean, out = None, []
    for n in norms:
        if learnable(n):
            mean = n if mean is None else decay * mean + (1 - decay) * n
        out.append(max(n, mean) if learnable(n) else n if n == 0 else np.nan)
    return out


def gradient_stabilizer(norms, first=0.7, second=0.9, eps=1e-8):
    """Stable-SPAM's AdaGN, whose count is that of its moments."""
    mean = square = t = 0
    out = []
    for n in norms:
        if learnable(n):
            t += 1
            mean = first * mean + (1 - first) * n
            square = second * square + (1 - second) * n * n
            out.append(mean / (1 - first**t) / (np.sqrt(square / (1 - second**t)) + eps))
        else:
            out.append(0.0 if n == 0 else np.nan)
    return out


def running_norm(norms, decay=0.25, eps=1e-6):
    """NovoGrad's second moment."""
    square, out = None, []
    for n in norms:
        if learnable(n):
            square = n * n if square is None else decay * square + (1 - decay) * n * n
        out.append(n / (np.sqrt(square) + eps) if np.isfinite(n) else np.nan)
    return out


def linear(steps, first, last, begin, width):
    """From one number to another between two steps, and constant before and after, for each of `steps`."""
    return first + (last - first) * np.clip((np.arange(steps) - begin) / width, 0, 1)


def by_formula(norms, formula):
    """A method without memory: `formula` is from the norm to the norm after."""
    return [formula(n) if np.isfinite(n) else np.nan for n in norms]
