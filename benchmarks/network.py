"""A model of how long an all-reduce takes, of latency and bandwidth: nothing here is measured."""

import math
from typing import NamedTuple


class Network(NamedTuple):
    """What an all-reduce costs on some machines, in microseconds and bytes per microsecond.

    Attributes:
      name: what tables call it.
      start: to launch a collective.
      near: per step within a node, or per hop on a torus.
      far: per step between nodes.
      node: devices in a node; 0 for a torus.
      bandwidth: bytes per microsecond, in and out of a device, by the slowest link used.
      largest: the most devices that are connected like this.
      source: where the numbers come from.
    """

    name: str
    start: float
    near: float
    far: float
    node: int
    bandwidth: float
    largest: int
    source: str


# NCCL's own model of its tree, protocol LL: baseLat 6.8, hwLat 0.6 (NVLink) and 5.0 (network), in us.
GPU = Network(
    "GPU, NVLink and InfiniBand",
    start=6.8,
    near=0.6,
    far=5.0,
    node=8,
    bandwidth=50e3,  # 400 Gb/s, one network card for each GPU
    largest=10**9,
    source="formula: NCCL, src/graph/tuning.cc; numbers: PyTorch, torch/_inductor/comm_analysis.py",
)
# About 1 us per hop, and 9e10 B/s in each direction of a link, on the three axes of a torus.
TPU = Network(
    "TPU v5p, one pod",
    start=0.0,
    near=1.0,
    far=0.0,
    node=0,
    bandwidth=180e3,
    largest=8960,
    source="Austin et al., How to Scale Your Model, 2025, chapters 2 and 3",
)
NETWORKS = {"gpu": GPU, "tpu": TPU}


def all_reduce(network: Network, devices: int, nbytes: float) -> float:
    """Estimated microseconds of one all-reduce; NaN for more devices than there can be.

    On GPUs a tree: `start + 2 ((node - 1) near + log2(nodes) far) + 2 nbytes / bandwidth`. On a torus of
    three equal axes of length X, there and back: `3 X near`, or `2 nbytes / (3 bandwidth)` if that is longer.
    """
    if devices > network.largest:
        return math.nan
    if devices == 1:
        return 0.0
    if not network.node:
        hops = 3 * devices ** (1 / 3)
        return network.start + max(hops * network.near, 2 * nbytes / (3 * network.bandwidth))
    within, nodes = min(devices, network.node), math.ceil(devices / network.node)
    latency = network.start + 2 * ((within - 1) * network.near + math.log2(nodes) * network.far)
    return latency + 2 * nbytes / network.bandwidth


class Scheme(NamedTuple):
    """What a library exchanges in a step that clips, each time between all devices, which takes the longest.

    Attributes:
      name: the library and the setting.
      all_reduces: how many, one after the other; None for one for each group.
      nbytes: in each; None for four for each group.
    """

    name: str
    all_reduces: int | None
    nbytes: int | None

    def microseconds(self, network: Network, devices: int, groups: int) -> float:
        """The estimate for one step."""
        count = groups if self.all_reduces is None else self.all_reduces
        return count * all_reduce(network, devices, 4 * groups if self.nbytes is None else self.nbytes)


SCHEMES = (
    Scheme("optaxclip, any grouping", 1, None),
    Scheme("optaxclip, any grouping, `record` and a limit relative to parameters", 3, None),
    Scheme("optaxclip, any grouping, leaves split over two sets of axes", 2, None),
    Scheme("one global norm: Optax, up to 256 split leaves", 1, 1024),
    Scheme("one global norm: Megatron-LM", 1, 4),
    Scheme("one global norm: Megatron-LM with FSDP, or with an optimizer for experts", 2, 4),
    Scheme("one global norm: FSDP2, a mesh of one axis", 1, 4),
    Scheme("one global norm: FSDP2, leaves split over both axes of a mesh", 2, 4),
    Scheme("one global norm: torchtitan, leaves split over two axes", 2, 4),
    Scheme("one global norm: torchtitan, the same with experts", 4, 4),
    Scheme("one global norm: torchtitan, the same with experts and pipeline stages", 5, 4),
    Scheme("one call of FSDP2's `clip_grad_norm_` for each group", None, 4),
)
