"""Several processes, each with CPU devices of its own, train one model and go on from one checkpoint."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest

LIMIT = 120  # seconds after which a run hangs; it takes about five
WORKER = Path(processes.__file__)
# gRPC would look for the first process behind a proxy.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
ENVIRONMENT |= {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
}

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="needs ports as POSIX has them")


@contextlib.contextmanager
def reserved_port():
    """A free port. Until the end it stays bound, so that nobody else is given it; gRPC may listen on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def started(folder, job):
    """One process, its output in a file; it does not outlive the block."""
    with (folder / f"{job.rank}.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, WORKER, json.dumps(job._asdict())],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait()


def run(folder, count, devices, **options):
    """The exit codes of all processes when all are done or one has failed; None of those that still ran."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        jobs = [
            processes.Job(rank, count, port, devices, str(folder / f"{rank}.npz"), **options)
            for rank in range(count)
        ]
        children = [stack.enter_context(started(folder, job)) for job in jobs]
        deadline = time.monotonic() + LIMIT
        while not any(child.poll() for child in children) and any(child.poll() is None for child in children):
            if time.monotonic() > deadline:
                pytest.fail(f"{count} processes do not end within {LIMIT} s.\n{output(folder)}")
            time.sleep(0.05)
        codes = [child.poll() for child in children]
    said = output(folder)
    if any(codes) and "make_gloo_tcp_collectives" in said:
        pytest.skip(f"JAX has no gloo collectives here: {said.strip().splitlines()[-1]}")
    return codes


def output(folder):
    """What all processes of a run printed."""
    logs = sorted(folder.glob("*.log"))
    return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')}" for log in logs)


def results(folder, count, devices, **options):
    """The numbers of each process of a run that ends well."""
    codes = run(folder, count, devices, **options)
    assert codes == [0] * count, output(folder)
    found = []
    for rank in range(count):
        with np.load(folder / f"{rank}.npz") as file:
            found.append(dict(file))
    return found


def assert_same(found, expected, rtol=1e-6):
    """Up to rounding: each number of devices adds up the gradients of the batch in an order of its own.

    What has one number for each entry, in which terms cancel, is as right as its largest entry.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        entries = name.startswith(("['params']", "['state'][2]"))  # of parameters, and of AdamW's moments
        largest = np.abs(value).max() if entries else 0
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * largest, err_msg=name)


@pytest.fixture(scope="module")
def expected():
    """The numbers of one process with one device, never interrupted."""
    trainer = processes.Trainer(jax.devices("cpu")[:1])
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        return trainer.results(*trainer.steps(*trainer.start(), range(processes.STEPS)))


@pytest.mark.parametrize(("count", "devices", "told"), [(2, 2, False), (4, 1, True)])
def test_processes_together_get_what_one_gets(count, devices, told, expected, tmp_path):
    """Parameters, state, recording and metrics do not depend on how many processes train, and all see them.

    Nor do they on whether the optimizer is told, in `specs`, how parameters are split.
    Of a recording that is split over processes, History says so, and how to put it together.
    """
    assert expected["clip/factor/whole"] < 0.5  # the limit that was learned is what the last update is cut to
    for found in results(tmp_path / "run", count, devices, told=told):
        said, whole = str(found.pop("said")), found.pop("whole")
        assert said.startswith("History.from_state: 'norm' in the RecordState is split over the devices of")
        assert "process_allgather(state, tiled=True)" in said
        np.testing.assert_array_equal(whole, found["history/norms"])
        assert_same(found, expected)


@pytest.mark.parametrize(("before", "after"), [(4, (2, 1)), (2, (4,))])
def test_a_killed_run_goes_on_with_other_devices(before, after, expected, tmp_path):
    """From a checkpoint of four processes, two go on, or one, with the numbers of a run left in peace.

    From one of two, four go on.
    """
    checkpoint = str(tmp_path / "checkpoint")
    codes = run(tmp_path / "killed", before, 1, checkpoint=checkpoint, part="killed")
    assert codes[-1] == -signal.SIGKILL, output(tmp_path / "killed")
    assert 0 not in codes
    for count in after:
        for found in results(tmp_path / f"rest of {count}", count, 1, checkpoint=checkpoint, part="rest"):
            del found["said"], found["whole"]
            assert_same(found, expected)
