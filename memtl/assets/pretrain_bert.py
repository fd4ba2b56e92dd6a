"""Pre-train the encoder ``bert_docstrings``: how the shipped one was made.

    python -m memtl.assets.pretrain_bert --out DIR

A small BERT is trained by masked-language modelling on the docstrings of Python's standard library
that are in the training split (:mod:`memtl.tasks.docstrings`), with a WordPiece vocabulary learned
from them. It needs no network and no GPU, and takes most of an hour on a core. What is written is a
folder that ``transformers`` loads: the encoder with its pooler, which is as it was drawn, and the
head that predicts masked tokens; parameters in float16.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memtl.models.bert import MaskedLM
from memtl.report.arguments import count
from memtl.tasks import docstrings
from memtl.tasks.text import load_docstrings_mlm
from memtl.training import Settings, evaluate, fit

NAME = "bert_docstrings"
VOCABULARY = 4096
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
}
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


def tokenizer() -> Any:
    """A tokenizer of transformers, with the WordPiece vocabulary of the training texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    texts = [document.text for document in docstrings.in_split("train")]
    learner.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    return BertTokenizer(
        vocab=learner.get_vocab(),
        do_lower_case=True,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )


def pretrain(steps: int, batch_size: int, seed: int) -> tuple[Any, dict[str, float]]:
    """The trained ``BertForPreTraining``, and its accuracy on masked tokens."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    words = tokenizer()
    config = BertConfig(vocab_size=VOCABULARY, pad_token_id=words.pad_token_id, **ARCHITECTURE)
    torch.manual_seed(seed)
    whole = BertForPreTraining(config)  # its pooler, which nothing trains, is shipped as well
    task = load_docstrings_mlm(words)
    model: Any = MaskedLM(BertForMaskedLM(config), words)
    model.model.bert.embeddings = whole.bert.embeddings
    model.model.bert.encoder = whole.bert.encoder
    model.model.cls.predictions = whole.cls.predictions
    settings = Settings(
        steps,
        batch_size,
        LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip_norm=1.0,
        seed=seed,
    )
    val = fit(model, task.train, task.val, settings, description="pre-training").val_score
    return whole, {"val": val, "test": evaluate(model, task.test)}


def write(model: Any, record: dict[str, Any], directory: Path) -> None:
    """The folder that transformers loads, and ``memtl.json``, which says how it was made."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(directory)  # a fresh one: use leaves lengths in it
    model.half().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    # Files hold float16; what is loaded trains in float32, unless it is asked for otherwise.
    config = directory / "config.json"
    settings = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (directory / "memtl.json").write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: pre-train, evaluate, write the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m memtl.assets.pretrain_bert",
        description="Pre-train a small BERT on the docstrings of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=count, default=6000, help="optimiser steps")
    parser.add_argument("--batch-size", type=count, default=64, help="texts per step")
    parser.add_argument("--seed", type=int, default=0, help="of weights, masks and batches")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the folder")
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    model, scores = pretrain(options.steps, options.batch_size, options.seed)
    seconds = time.perf_counter() - started
    import tokenizers
    import transformers

    record = {
        "task": "masked-language modelling of the docstrings of Python's standard library",
        "command": (
            f"python -m memtl.assets.pretrain_bert --steps {options.steps} "
            f"--batch-size {options.batch_size} --seed {options.seed}"
        ),
        "docstrings": {name: len(docstrings.in_split(name)) for name in ("train", "val", "test")},
        "optimizer": {
            "name": "AdamW",
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "clip_norm": 1.0,
        },
        "wall_time_seconds": round(seconds, 1),
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        **{f"{name}_masked_accuracy": round(score, 4) for name, score in scores.items()},
    }
    write(model, record, options.out / NAME)
    print(
        f"masked tokens predicted: {scores['val']:.1%} (val), {scores['test']:.1%} (test); "
        f"{options.steps} steps in {seconds:.0f} s; written to {(options.out / NAME).resolve()}"
    )


if __name__ == "__main__":
    main()
