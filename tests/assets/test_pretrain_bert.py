import json

import pytest
import torch

pytest.importorskip("transformers")
import safetensors.torch

from memtl import assets
from memtl.assets import pretrain_bert
from memtl.tasks import docstrings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes, of a tiny encoder and a few texts."""
    few = docstrings.docstrings()[:400]
    out = tmp_path_factory.mktemp("encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "docstrings", lambda: few)
        patch.setattr(pretrain_bert, "VOCABULARY", 300)
        patch.setitem(pretrain_bert.ARCHITECTURE, "hidden_size", 32)
        patch.setitem(pretrain_bert.ARCHITECTURE, "num_hidden_layers", 1)
        pretrain_bert.main(["--steps", "8", "--batch-size", "16", "--out", str(out)])
    return out / pretrain_bert.NAME


def test_what_is_written_is_loaded(folder):
    mlm = assets.load_encoder("mlm", source=folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    state = mlm.model.state_dict()
    for name, value in weights.items():
        if name in state:
            assert torch.equal(state[name], value.float()), name
    assert {name for name in weights if name not in state} == {
        "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    }  # fmt: skip
    assert {p.dtype for p in mlm.parameters()} == {torch.float32}
    ids = torch.randint(5, 300, (2, 9))
    _, chosen = ids, torch.ones_like(ids, dtype=torch.bool)
    assert mlm(ids, chosen).shape == (18, 300)


def test_the_pooler_is_the_same_for_every_head(folder):
    first, second = (assets.load_encoder("classifier", 3, folder).model for _ in range(2))
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_the_tokenizer_is_of_the_texts(folder):
    words = assets.load_tokenizer(folder)
    assert words.vocab_size <= 300
    assert words("the")["input_ids"][0] == words.cls_token_id
    assert words(["the value of", "the"])["input_ids"][1][-1] == words.sep_token_id  # no padding


def test_the_record_says_how(folder):
    record = json.loads((folder / "memtl.json").read_text())
    assert record["command"].endswith("--steps 8 --batch-size 16 --seed 0")
    assert 0 <= record["test_masked_accuracy"] <= 1


def test_unknown_heads_and_encoders():
    with pytest.raises(ValueError, match="head must be one of classifier, mlm, .*, got 'tagger'"):
        assets.load_encoder("tagger")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        assets.load_encoder("classifier", 0)
    with pytest.raises(ValueError, match="unknown encoder 'bert': there is "):
        assets.encoder("bert")
