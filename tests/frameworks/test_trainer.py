"""transformers' Trainer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import memtl
from memtl.memory import saved_bytes
from tests.frameworks.small import FEW, assert_as, weights

SIZES = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}


def bert():
    config = transformers.BertConfig(
        vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, num_labels=3, **SIZES
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def vit():
    config = transformers.ViTConfig(
        num_hidden_layers=2, image_size=32, patch_size=8, num_labels=3, **SIZES
    )
    return transformers.ViTForImageClassification(config)


def data(name, count=8):
    """Random examples, with a column that no model takes."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        ids = torch.randint(64, (33,), generator=generator)
        labels = int(ids[0]) % 3
        examples.append(
            {
                "bert": {"input_ids": ids, "labels": labels},
                "gpt2": {"input_ids": ids, "labels": ids},
                "vit": {"pixel_values": torch.randn(3, 32, 32, generator=generator),
                        "labels": labels},
            }[name] | {"row": index}
        )  # fmt: skip
    return examples


BUILDERS = {"bert": bert, "gpt2": gpt2, "vit": vit}


def build(name, config=None):
    transformers.set_seed(0)
    model = BUILDERS[name]()
    if config is not None:
        memtl.apply(model, config)
    return model


def trainer(model, examples, folder, **options):
    options = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, **options}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        logging_strategy="no", seed=1, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=examples, eval_dataset=examples
    )


def trained(model, examples, folder, **options):
    """Its weights afterwards, and the loss that the trainer finds then."""
    before = weights(model)
    it = trainer(model, examples, folder, **options)
    it.train()
    after = weights(model)
    moved = [n for n, p in model.named_parameters() if not torch.equal(before[n], after[n])]
    assert len(moved) >= len(before) - 1  # BERT's pooled position of one token, say
    return after, it.evaluate()["eval_loss"]


OPTIONS = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "accumulation_and_clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "all": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True},
}


@pytest.mark.parametrize(
    ("name", "options"), [*(("bert", o) for o in OPTIONS), ("gpt2", "all"), ("vit", "all")]
)
def test_trains_as_stock(name, options, tmp_path):
    examples, options = data(name), OPTIONS[options]
    stock, loss = trained(build(name), examples, tmp_path, **options)
    exact, same = trained(build(name, memtl.FrozenConfig()), examples, tmp_path, **options)
    assert_as(exact, stock)
    assert same == loss


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("name", BUILDERS)
def test_keeps_less(name, method, tmp_path):
    model, examples = build(name), data(name, 4)
    batch = {
        key: torch.stack([torch.as_tensor(e[key]) for e in examples])
        for key in examples[0]
        if key != "row"
    }
    stock = saved_bytes(model.train(), **batch)
    memtl.apply(model, FEW[method])
    assert stock >= 5 * saved_bytes(model, **batch)
    _, loss = trained(model, examples, tmp_path, max_steps=1, bf16=True)
    assert math.isfinite(loss)


def test_resumes(tmp_path):
    """From a checkpoint in the middle: the same weights as without the interruption."""
    examples, config = data("bert"), FEW["LowBit"]
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build("bert", config)
    trainer(whole, examples, tmp_path, **options).train()
    saved = tmp_path / "checkpoint-2" / "model.safetensors"
    assert saved.is_file()
    resumed = build("bert", config)
    trainer(resumed, examples, tmp_path, **options).train(resume_from_checkpoint=str(saved.parent))
    assert_as(weights(resumed), weights(whole))
    # What it saved is a model like any other, with the name of the model's own class.
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(saved.parent)
    assert type(fresh) is transformers.BertForSequenceClassification
    assert fresh.state_dict().keys() == whole.state_dict().keys()


class OwnCode(nn.Module):
    """A model whose own forward calls what memtl serves."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(33, 64), nn.Linear(64, 3)

    def forward(self, input_ids, labels=None):
        logits = self.last(F.gelu(self.first(input_ids / 64)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_the_signature_of_a_model_is_its_own(tmp_path):
    """The trainer reads from it which columns there are to be, and how losses are averaged."""
    examples = data("bert")
    found = []
    for config in (None, memtl.FrozenConfig()):
        transformers.set_seed(0)
        model = OwnCode()
        if config is not None:
            memtl.apply(model, config)
        it = trainer(model, examples, tmp_path, gradient_accumulation_steps=2)
        it.train()
        found.append((it.model_accepts_loss_kwargs, it.label_names, it.evaluate()["eval_loss"]))
    assert found[0] == found[1]
