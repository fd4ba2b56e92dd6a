"""Pre-train the networks of :mod:`memtl.assets` on rendered glyphs: how the shipped ones were made.

    python -m memtl.assets.pretrain {vit,cnn} --out DIR
    python -m memtl.assets.pretrain cnn --objective {standard,noise,fast,pgd} --out DIR

The second goes on from the shipped network, with an objective that makes it robust; "standard" does
so without, and is what the others are compared with. It needs no network and no GPU, and takes half
an hour on an idle core, or as long as its objective. The result depends on the seed, the number of
threads and the versions recorded in the JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memtl.assets import build, load
from memtl.models import Normalized
from memtl.report.arguments import count
from memtl.tasks.digits import MEAN, STD, Split
from memtl.tasks.glyphs import CLASSES, HELDOUT_FONTS, Glyphs
from memtl.training import Adversarial, Attack, Noisy, Watched, loss_of, robust_accuracy
from memtl.training.loop import Objective


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network, what it is stored as, and what differs in how each is trained."""

    name: str
    architecture: dict[str, Any]
    learning_rate: float
    steps: int


RECIPES = {
    "vit": Recipe(
        name="vit_glyphs",
        architecture={
            "kind": "vit",
            "img_size": 32,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 128,
            "depth": 6,
            "num_heads": 4,
            "num_classes": len(CLASSES),
        },
        learning_rate=1e-3,
        steps=5500,
    ),
    "cnn": Recipe(
        name="cnn_glyphs",
        architecture={
            "kind": "mobilenet_v2",
            "in_chans": 1,
            "stem_size": 16,
            "stem_stride": 1,
            # In timm's notation: r repeats, k kernel, s stride, e expansion, c channels.
            "stages": [
                "ds_r1_k3_s1_c8",
                "ir_r2_k3_s2_e6_c16",
                "ir_r3_k3_s2_e6_c32",
                "ir_r3_k3_s2_e6_c96",
                "ir_r2_k3_s1_e6_c128",
            ],
            "num_features": 512,
            "num_classes": len(CLASSES),
        },
        # Runs of 600 steps without three of the training fonts, accuracies on those, in %:
        # 2e-3: 73.4, 4e-3: 79.1, 8e-3: 79.0.
        learning_rate=4e-3,
        steps=5500,
    ),
}
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1

EPS = 0.1
"""Radius of the ball, in the maximum norm, of ink in 0..1."""

FAST, PGD = Attack(EPS, 1), Attack(EPS, 3, step_size=2 * EPS / 3)
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "standard": lambda: loss_of,
    "noise": lambda: Noisy(0.25),
    "fast": lambda: Watched(Adversarial(FAST), FAST, every=100),
    "pgd": lambda: Adversarial(PGD),
}
"""What goes on from the network that is shipped: with nothing, with noise as for randomized
smoothing, with fast adversarial training (watched for catastrophic overfitting), with three steps
of projected gradient descent."""

CONTINUED: dict[str, Any] = {"learning_rate": 2e-3, "steps": 2000}
REPORTED = Attack(EPS, 20, step_size=EPS / 4)
"""What robustness is recorded against."""


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over a twentieth, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(
    recipe: Recipe,
    glyphs: Glyphs,
    steps: int,
    batch_size: int,
    seed: int,
    objective: Objective = loss_of,
    start: nn.Module | None = None,
) -> nn.Module:
    """Train a network, a fresh one or ``start``, on batches of ``glyphs``, whose ink it normalises;
    return it, parameters rounded to float16.

    The rounding makes the network returned exactly the one that :func:`write` stores. The global
    random state is left as it was.

    Raises:
        ValueError: ``glyphs`` are normalised already.
    """
    if glyphs.normalised:
        raise ValueError("the glyphs are normalised, which the network is to do")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(recipe.architecture) if start is None else start
        return _train(model.train(), recipe, glyphs, steps, batch_size, seed, objective)


def _train(
    model: nn.Module,
    recipe: Recipe,
    glyphs: Glyphs,
    steps: int,
    batch_size: int,
    seed: int,
    objective: Objective,
) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    whole = Normalized(model, MEAN, STD)
    # As usual, biases, norms and embeddings are not decayed.
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        keep = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        (others if keep else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    with tqdm(range(steps), desc="pre-training", mininterval=5) as progress:
        for _ in progress:
            images, labels = glyphs.batch(batch_size, generator)
            loss = objective(whole, images, labels, LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Accuracies in 0..1, of ink: over the 62 classes, and with upper and lower case taken as
    one."""
    model = Normalized(model, MEAN, STD).eval()
    guess = torch.cat([model(images).argmax(1) for images in split.images.split(256)])
    fold = torch.tensor([CLASSES.index(character.upper()) for character in CLASSES])

    def agreement(first: Tensor, second: Tensor) -> float:
        return (first == second).double().mean().item()

    return {
        "accuracy": agreement(guess, split.labels),
        "case_folded_accuracy": agreement(fold[guess], fold[split.labels]),
    }


def write(model: nn.Module, record: dict, directory: Path, name: str) -> None:
    """Write the state and the record, each aside and then renamed into place.

    Parameters are stored in float16. Buffers are stored as they are: a variance may be beyond
    float16, and they are few.
    """
    parameters = {key for key, _ in model.named_parameters()}
    weights = {
        key: (value.half() if key in parameters else value).contiguous()
        for key, value in model.state_dict().items()
    }
    content = safetensors.torch.save(weights)
    record = record | {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    directory.mkdir(parents=True, exist_ok=True)
    for path, data in (
        (directory / f"{name}.safetensors", content),
        (directory / f"{name}.json", json.dumps(record, indent=2).encode() + b"\n"),
    ):
        aside = path.with_name(path.name + ".partial")
        aside.write_bytes(data)
        os.replace(aside, path)


def _about(name: str | None, objective: Objective) -> dict[str, Any]:
    """What a record says of an objective."""
    if name is None:
        return {}
    said: dict[str, Any] = {"objective": name, "start": "cnn_glyphs"}
    if isinstance(objective, Watched):
        said["accuracies_under_one_and_ten_steps"] = objective.accuracies
        objective = objective.objective
    if dataclasses.is_dataclass(objective) and not isinstance(objective, type):
        said["objective_settings"] = dataclasses.asdict(objective)
    return said


def _versions() -> dict[str, str]:
    import matplotlib
    import PIL
    import timm

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: pre-train, evaluate on held-out fonts, write the two files."""
    parser = argparse.ArgumentParser(
        prog="python -m memtl.assets.pretrain",
        description="Pre-train a small network of memtl.assets on rendered glyphs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("network", choices=RECIPES, help="a vision transformer or a MobileNetV2")
    parser.add_argument(
        "--objective", choices=OBJECTIVES,
        help="go on from the shipped network, cnn_glyphs, with this one (default: a fresh network)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=count, default=argparse.SUPPRESS,
        help="optimiser steps (default: as the shipped network)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=count, default=64, help="glyphs per step")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the two files")
    options = parser.parse_args(arguments)

    recipe, name, start = RECIPES[options.network], options.objective, None
    objective: Objective = loss_of
    chosen = []
    if name is not None:
        if options.network != "cnn":
            parser.error("--objective is for the cnn")
        start, objective = (
            load(recipe.name).to(memory_format=torch.channels_last),
            OBJECTIVES[name](),
        )
        recipe = dataclasses.replace(recipe, name=f"{recipe.name}_{name}", **CONTINUED)
        chosen = [f"--objective {name}"]
    steps = getattr(options, "steps", recipe.steps)
    glyphs = Glyphs(normalised=False)
    started = time.perf_counter()
    model = pretrain(recipe, glyphs, steps, options.batch_size, options.seed, objective, start)
    seconds = time.perf_counter() - started
    scores = evaluate(model, glyphs.heldout)
    robust = robust_accuracy(Normalized(model, MEAN, STD), glyphs.heldout, REPORTED)
    scores["robust_accuracy"] = robust
    record = {
        "architecture": recipe.architecture,
        "task": "62 alphanumerics rendered from the fonts of matplotlib (memtl.tasks.Glyphs)",
        "classes": CLASSES,
        "command": " ".join(
            [
                f"python -m memtl.assets.pretrain {options.network}",
                *chosen,
                f"--steps {steps} --batch-size {options.batch_size} --seed {options.seed}",
            ]
        ),
        **_about(name, objective),
        "steps": steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "optimizer": {
            "name": "AdamW",
            "learning_rate": recipe.learning_rate,
            "weight_decay": WEIGHT_DECAY,
            "label_smoothing": LABEL_SMOOTHING,
        },
        "wall_time_seconds": round(seconds, 1),
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "training_fonts": list(glyphs.fonts),
        "heldout_fonts": list(HELDOUT_FONTS),
        "heldout_images": len(glyphs.heldout),
        **{f"heldout_{key}": round(value, 4) for key, value in scores.items()},
        "attack": str(REPORTED),
    }
    write(model, record, options.out, recipe.name)
    print(
        f"held-out fonts: accuracy {scores['accuracy']:.1%} over {len(CLASSES)} classes, "
        f"{scores['case_folded_accuracy']:.1%} with case folded, {robust:.1%} under {REPORTED}; "
        f"{steps} steps in {seconds:.0f} s; written to {options.out.resolve()}"
    )


if __name__ == "__main__":
    main()
