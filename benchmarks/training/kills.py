"""What a kill does to a run: processes that train are killed at random moments, and called again.

    python benchmarks/training/kills.py [--kills N] [--output JSON]

A run of a small network that saves after every step is started in a process of its own, which is
sent SIGKILL after a random time, wherever it is: training, evaluating, writing a line or a
checkpoint. Then the folder is looked at, and the same call goes on, to be killed again or to end.
A run that has ended is compared with one that was never interrupted: every loss, every score and
every weight, bit for bit. All is written to results/kills.json.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it, which takes longer than the run
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from memtl import runs  # noqa: E402
from memtl.files import sha256_of  # noqa: E402
from memtl.report import environment  # noqa: E402
from memtl.runs import folder, records  # noqa: E402
from memtl.runs.state import POINTER  # noqa: E402

SEED = 0
SETTINGS = runs.RunSettings(
    model="two layers", data="noise", steps=24, batch_size=8, device="cpu", ema=0.9,
    learning_rate=0.01, eval_every=3, save_every=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Noise:
    """Samples drawn from their index; with a seed there is noise on them."""

    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        x = _normal(self.first + index)
        label = (x[:4].sum() > 0).long()
        return (x if seed is None else x + 0.1 * _normal(seed)), label


def _normal(seed: int) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Data:
    """As `memtl.runs.data` has it."""

    train: Noise = Noise(0, 100)
    val: Noise = Noise(1000, 40)
    test: Noise | None = None
    classes: tuple[str, ...] = ("no", "yes")
    metric: str = "accuracy"
    kind: str = "image"


def network() -> nn.Module:
    """With what a resume has to bring back: running statistics, dropout; 2 MB, so that a
    checkpoint takes as long to write as a step to compute."""
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Linear(64, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 2),
    )  # fmt: skip


def train(out: Path) -> None:
    """The run, from wherever it is to its end."""
    torch.set_num_threads(1)
    runs.train(SETTINGS, out, model=network(), data=Data(), say=None)  # type: ignore[arg-type]


def process(out: Path) -> Any:
    """A process that does so. It is forked, so that what is killed is the run and not its
    imports."""
    started = multiprocessing.get_context("fork").Process(target=train, args=(out,))
    started.start()
    return started


def losses(out: Path) -> list[dict[str, Any]]:
    """The records of a run but for its times."""
    times = ("seconds", "samples_per_second")
    return [{k: v for k, v in row.items() if k not in times}
            for row in records.rows(out / records.JSONL)]  # fmt: skip


def table(out: Path) -> list[list[str]]:
    """The records in the CSV, but for its times."""
    lines = [line.split(",") for line in (out / records.CSV).read_text().splitlines()]
    return [line[:4] + line[6:] for line in lines]


def damage(out: Path) -> list[str]:
    """What is wrong in the folder of a run that was killed: a file that the pointer names and that
    is not what it says, half a line."""
    found = []
    pointer = out / folder.CHECKPOINTS / POINTER
    if pointer.exists():
        record = json.loads(pointer.read_text())
        for entry in (*record["checkpoints"], *filter(None, [record["best"]])):
            path = pointer.parent / entry["file"]
            if not path.exists() or sha256_of(path) != entry["sha256"]:
                found.append(entry["file"])
    for name in (records.JSONL, records.CSV):
        path = out / name
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            found.append(name)
    return found


def campaign(kills: int, place: Path, seed: int = SEED) -> dict[str, Any]:
    """Kill that many times; what came of it."""
    draw = random.Random(seed)
    whole = place / "whole"
    started = time.perf_counter()
    (child := process(whole)).join()
    assert child.exitcode == 0, "the uninterrupted run failed"
    duration = time.perf_counter() - started
    wanted = losses(whole), table(whole), sha256_of(whole / folder.WEIGHTS)
    done: dict[str, Any] = {
        "kills": 0, "while_saving": 0, "resumed": 0, "damaged": [], "failed": 0, "runs": 0,
        "identical": 0,
    }  # fmt: skip
    out, killed = place / "killed", False
    while done["kills"] < kills or killed:
        child = process(out)
        # Some calls get a tenth of the time that a run takes, some all of it.
        child.join(draw.uniform(0, duration) if done["kills"] < kills else None)
        if child.exitcode is None:
            child.kill()
            child.join()
        if child.exitcode == -9:
            done["resumed"] += killed  # this call went on from a kill, until it was killed itself
            done["kills"] += 1
            done["while_saving"] += any((out / folder.CHECKPOINTS).glob(".*"))
            done["damaged"] += damage(out)
            killed = True
            continue
        done["runs"] += 1
        if child.exitcode:
            done["failed"] += 1
        else:
            done["resumed"] += killed
            found = losses(out), table(out), sha256_of(out / folder.WEIGHTS)
            done["identical"] += found == wanted
        shutil.rmtree(out)
        killed = False
    return done | {"steps": SETTINGS.steps, "losses": len(wanted[0])}


def main() -> int:
    """Kill, print, write; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kills.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = campaign(options.kills, Path(place))
    command = f"python benchmarks/training/kills.py --kills {options.kills}"
    record = {"command": command, "environment": environment(), **found}
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"{found['kills']} kills, {found['while_saving']} of them while a checkpoint was written: "
        f"{found['resumed']} resumes, {len(found['damaged'])} damaged files, "
        f"{found['failed']} failed runs; of {found['runs']} finished runs {found['identical']} "
        "equal the uninterrupted one bit for bit"
    )
    good = found["runs"] == found["identical"] and found["resumed"] == found["kills"]
    return 0 if good and not found["damaged"] else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
