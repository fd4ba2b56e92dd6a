"""Lightning's Trainer."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import memtl
from memtl.memory import SavedTensors
from tests.frameworks.small import FEW, assert_as, assert_gradients, images, loss_of, vit, weights

lightning = pytest.importorskip("pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Task(lightning.LightningModule):
    """A network with its loss; notes what a step keeps."""

    def __init__(self, config=None):
        super().__init__()
        self.model = vit()
        self.kept = []
        if config is not None:
            memtl.apply(self.model, config)

    def training_step(self, batch, index):
        with SavedTensors(self) as saved:
            loss = loss_of(self.model, *batch)
        self.kept.append(saved.bytes)
        return loss

    def on_before_optimizer_step(self, optimizer):
        assert_gradients(self.model)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(task, folder, resume=None, **options):
    """Two steps an epoch."""
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    loader = DataLoader(TensorDataset(*images(8)), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, **options,
        )  # fmt: skip
        trainer.fit(task, loader, ckpt_path=resume)
    return weights(task.model), task.kept[-1]


OPTIONS = {
    "plain": {},
    "accumulation_and_clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_trains_as_stock_and_keeps_less(options, tmp_path):
    options = OPTIONS[options]
    stock, kept = fit(Task(), tmp_path, **options)
    exact, _ = fit(Task(memtl.FrozenConfig()), tmp_path, **options)
    assert_as(exact, stock)
    for config in FEW.values():
        assert kept >= 5 * fit(Task(config), tmp_path, **options)[1]


def test_resumes(tmp_path):
    """At the end of the first of two epochs."""
    config = FEW["LowBit"]
    whole, _ = fit(Task(config), tmp_path, max_epochs=2)
    save = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(Task(config), tmp_path, callbacks=[save], enable_checkpointing=True)
    saved = tmp_path / "last.ckpt"
    assert torch.load(saved)["state_dict"].keys() == Task().state_dict().keys()
    resumed, _ = fit(Task(config), tmp_path, max_epochs=2, resume=str(saved))
    assert_as(resumed, whole)


def test_a_method_applied_by_the_module_itself(tmp_path):
    task = Task(memtl.VQTConfig(num_classes=10))
    before = weights(task.model)
    after, _ = fit(task, tmp_path)
    moved = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert moved == {"head.queries", "head.linear.weight", "head.linear.bias"}
