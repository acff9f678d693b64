"""A small training run over all devices of all processes; as a script, one of the processes."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaxclip as oc

STEPS, SAVED, KILLED = 8, 4, 6  # updates in a run, before its checkpoint, and before it is killed
SPIKES = {3: 30.0, 7: 100.0}  # one before the checkpoint, and the last update
SHAPES = {
    "dense": {"kernel": (8, 16), "bias": (16,)},
    "head": {"kernel": (16, 4), "scale": ()},
}
LAYOUT = {
    "dense": {"kernel": P("data"), "bias": P()},
    "head": {"kernel": P("data"), "scale": P()},
}
GROUPS = oc.groups.layer()


class Job(NamedTuple):
    """What one process is told.

    Attributes:
      rank: which process it is.
      processes: of how many.
      port: where the first one is reached.
      devices: how many devices each has.
      results: the file it writes its results to.
      checkpoint: the folder of the checkpoint.
      part: "all" steps; "killed", to write a checkpoint on the way and lose the last process after it; or the
        "rest", from the checkpoint on.
      told: whether the optimizer is told how parameters are split.
    """

    rank: int
    processes: int
    port: int
    devices: int
    results: str
    checkpoint: str = ""
    part: str = "all"
    told: bool = False


def optimizer(specs):
    return optax.chain(
        oc.record(capacity=STEPS, stretches=2, params=True, specs=specs),
        oc.zclip(decay=0.8, z=2.0, max_norm=None, warmup=2, groups=GROUPS, specs=specs),
        optax.adamw(1e-2),
    )


def values(seed, shapes):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def put(tree, shardings):
    """NumPy arrays as arrays over the devices of all processes, each of which has the whole at hand."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        tree,
        shardings,
    )


def loss_of(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    found = params["head"]["scale"] * (hidden @ params["head"]["kernel"])
    return jnp.mean(jnp.square(found - batch["y"]))


class Trainer:
    """Parameters split as in FSDP, the state of AdamW as they are, and the batch over the same axis."""

    def __init__(self, devices, told=False):
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self.tx = optimizer(LAYOUT if told else None)
        self.batched, self.whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        params = jax.tree.map(
            lambda shape, spec: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec)),
            SHAPES,
            LAYOUT,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        state = optax.tree.map_params(
            self.tx,
            lambda x, param: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param.sharding),
            jax.eval_shape(self.tx.init, params),
            params,
            transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.whole),
        )
        self.abstract = params, state
        self.update = jax.jit(self._update, donate_argnums=(0, 1))

    def _update(self, params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = self.tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def start(self):
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        params = put(values(0, SHAPES), shardings[0])
        return params, jax.jit(self.tx.init, out_shardings=shardings[1])(params)

    def step(self, params, state, number):
        batch = values(1 + number, {"x": (16, 8), "y": (16, 4)})
        batch["y"] *= np.float32(SPIKES.get(number, 1))
        return self.update(params, state, put(batch, {"x": self.batched, "y": self.batched}))

    def steps(self, params, state, numbers):
        for number in numbers:
            params, state = self.step(params, state, number)
        return params, state

    def results(self, params, state):
        """All numbers by name, as this process sees them."""
        history = oc.History.from_state(state, params)
        fields = ("steps", "norms", "loss", "params", "start")
        seen = {f"history/{name}": getattr(history, name) for name in fields}
        seen |= oc.metrics(state, params, GROUPS)
        whole = jax.jit(lambda x: x, out_shardings=self.whole)({"params": params, "state": state})
        named, _ = jax.tree.flatten_with_path(jax.device_get(whole))
        return seen | {jax.tree_util.keystr(path): x for path, x in named}

    def split(self, params, state):
        """What History says to norms that are split over devices, and which it reads once they are whole."""
        norm = jax.jit(lambda x: x, out_shardings=self.batched)(state[0].norm)
        split = state[0]._replace(norm=norm)
        try:
            said = str(oc.History.from_state(split, params))
        except ValueError as error:
            said = str(error)
        whole = multihost_utils.process_allgather(split, tiled=True)
        return {"said": said, "whole": oc.History.from_state(whole, params).norms}


def save(folder, tree):
    import orbax.checkpoint as ocp  # not wanted by all runs, and slow

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder), tree)


def restored(folder, abstract):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder), abstract)


def train(trainer, job):
    """The parameters and the state after the last step, of a run or of what is left of it."""
    if job.part == "rest":
        found = restored(job.checkpoint, trainer.abstract)
    else:
        found = trainer.steps(*trainer.start(), range(SAVED))
    if job.part == "killed":
        save(job.checkpoint, found)
    found = trainer.steps(*found, range(SAVED, KILLED))
    if job.part == "killed" and job.rank == job.processes - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return trainer.steps(*found, range(KILLED, STEPS))


def main():
    job = Job(**json.loads(sys.argv[1]))
    jax.config.update("jax_num_cpu_devices", job.devices)
    if job.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{job.port}", job.processes, job.rank)
    trainer = Trainer(jax.devices(), job.told)
    found = train(trainer, job)
    np.savez(job.results, **trainer.split(*found), **trainer.results(*found))
    if job.processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
