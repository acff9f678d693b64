"""Logs what clipping measures to TensorBoard. It needs tensorboardX, but neither TensorFlow nor PyTorch.

After `python examples/log_tensorboard.py runs`, look at it: `tensorboard --logdir runs`. The writers of
`flax.metrics.tensorboard` and `torch.utils.tensorboard` are used in the same way.
"""

import sys
from pathlib import Path

from log_jsonl import train
from tensorboardX import SummaryWriter


def main(folder: Path, steps: int = 200) -> None:
    """Writes a curve for each statistic of each group: `clip/norm_before/hidden/kernel` and so on."""
    with SummaryWriter(str(folder)) as writer:
        for logs in train(steps):
            step = logs.pop("step")
            for key, value in logs.items():
                writer.add_scalar(key, float(value), step)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
