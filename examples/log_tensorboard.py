"""Logs what clipping measures to TensorBoard. It needs tensorboardX, but neither TensorFlow nor PyTorch.

After `python examples/log_tensorboard.py runs`, look at it: `tensorboard --logdir runs`. Each run has a
folder of its own there, by the time it began. The writers of `flax.metrics.tensorboard` and
`torch.utils.tensorboard` are used in the same way.
"""

import argparse
import datetime
from pathlib import Path

from log_jsonl import train
from tensorboardX import SummaryWriter


def main(folder: Path, steps: int = 200) -> None:
    """Writes a curve for each statistic of each group: `clip/norm_before/hidden/kernel` and so on."""
    began = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    with SummaryWriter(str(folder / began)) as writer:
        for logs in train(steps):
            step = logs.pop("step")
            for key, value in logs.items():
                writer.add_scalar(key, float(value), step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains, and writes curves for TensorBoard.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    main(parser.parse_args().folder)
