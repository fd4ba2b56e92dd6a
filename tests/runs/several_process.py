"""The same run by DDP and by FSDP, whole and by LoRA; the first two again from their first
checkpoint. Under torchrun.

torchrun --nproc-per-node 2 several_process.py FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import nn

from memtl import runs
from memtl.runs import folder
from memtl.runs.state import POINTER
from tests.runs import small

LORA = {"lora": {"rank": 2}, "method": "frozen"}
FIELDS = {"steps": 6, "eval_every": 3, "save_every": 3, "ema": 0.8}


def train(out: Path, **fields: object) -> None:
    """As :func:`tests.runs.small.settings`, of a network whose loss no split of a batch changes."""
    model = transformer() if "lora" in fields else small.network(norm=False, dropout=0.0)
    runs.train(small.settings(**FIELDS, **fields), out, model=model, data=small.data(), say=None)


def transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=4, patch_size=2, in_chans=1, num_classes=3, embed_dim=32, depth=2, num_heads=2
        )


def back_to_the_first(out: Path, again: Path) -> None:
    """A copy of a finished run, as if it had been killed behind its first checkpoint."""
    shutil.copytree(out, again)
    pointer = again / folder.CHECKPOINTS / POINTER
    first = json.loads(pointer.read_text())["checkpoints"][0]
    pointer.write_text(json.dumps({"checkpoints": [first], "best": first}))
    (again / folder.SUMMARY).unlink()


def interrupt(out: Path, rank: int, training: bool) -> int:
    """Ctrl-C, twice, in one process: in a step, or in an evaluation, of which there is one at
    least. Returns after which step the run ended, in this process."""
    model = small.network(norm=False, dropout=0.0)

    def before(model, _):
        if model.training == training and dist.get_rank() == rank:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    model.register_forward_pre_hook(before)
    try:
        runs.train(small.settings(**FIELDS, batch_size=4), out, model=model, data=small.data(),
                   say=None)  # fmt: skip
    except runs.Interrupted as ended:
        return ended.step
    raise AssertionError("it was not interrupted")


def main() -> None:
    place = Path(sys.argv[1])
    train(place / "ddp", batch_size=4)  # joins the other
    train(place / "fsdp", batch_size=4, fsdp=True)  # where it is joined already
    train(place / "parts", batch_size=2, accumulate=2)
    train(place / "lora-ddp", batch_size=4, **LORA)
    train(place / "lora-fsdp", batch_size=4, fsdp=True, **LORA)
    for name in ("ddp", "fsdp"):
        if dist.get_rank() == 0:
            back_to_the_first(place / name, place / f"{name}-again")
        dist.barrier()
        train(place / f"{name}-again", batch_size=4, fsdp=name == "fsdp")
    # In steps 1 and 2, and in the score after 3, which is owed and given up once more.
    ends = [
        interrupt(place / "cut", *how) for how in ((0, True), (1, True), (1, False), (0, False))
    ]
    train(place / "cut", batch_size=4)
    (place / f"ends-{dist.get_rank()}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
