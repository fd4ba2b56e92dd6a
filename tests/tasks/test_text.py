import pytest
import torch

from memtl.tasks import docstrings, text
from memtl.tasks.text import encode, load_docstrings, load_docstrings_mlm, outputs

pytest.importorskip("transformers")
from . import encoders

WORDS = encoders.tokenizer()


def test_encode():
    ids = encode(WORDS, ["the cat sat", "a dog"])
    assert ids.dtype == torch.int64
    assert WORDS.convert_ids_to_tokens(ids[0].tolist()) == "[CLS] the cat sat [SEP]".split()
    assert WORDS.convert_ids_to_tokens(ids[1].tolist()) == "[CLS] a dog [SEP] [PAD]".split()


def test_encode_cuts_the_longer_of_a_pair():
    ids = encode(WORDS, [("the cat sat on the mat", "a dog")], max_length=8)
    assert WORDS.convert_ids_to_tokens(ids[0].tolist()) == (
        "[CLS] the cat sat [SEP] a dog [SEP]".split()
    )


def test_encode_does_not_depend_on_how_many_are_made_at_once(monkeypatch):
    texts = ["the cat sat", "a dog", "the big red bird flew", "a", "the mat"]
    expected = WORDS(texts, padding="longest", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(text, "CHUNK", 2)
    assert torch.equal(encode(WORDS, texts), expected)


def test_encode_needs_padding():
    words = encoders.tokenizer()
    words.pad_token = None
    with pytest.raises(ValueError, match="no token for padding"):
        encode(words, ["a dog"])


def test_encode_nothing():
    with pytest.raises(ValueError, match="at least one text"):
        encode(WORDS, [])


def test_docstrings_are_encoded_with_their_labels():
    task = load_docstrings("kind", WORDS, 16)
    assert task.num_classes == 4
    found = docstrings.texts("kind", "val")
    assert task.val.labels.tolist() == found.labels
    assert torch.equal(task.val.images, encode(WORDS, found.texts, 16))
    assert task.train.images.shape[1] == 16


def test_long_docstrings_are_several_samples():
    task = load_docstrings_mlm(WORDS, 16)
    assert task.head == "mlm"
    assert torch.equal(task.val.images, task.val.labels)
    documents = docstrings.in_split("val")
    assert len(task.val) > len(documents)
    # No token is lost: those of all samples are those of all texts.
    inside = ~torch.isin(task.val.images, torch.tensor([0, 2, 3]))
    whole = [WORDS(d.text, add_special_tokens=False)["input_ids"] for d in documents]
    assert task.val.images[inside].tolist() == [i for ids in whole for i in ids]


def test_outputs_are_those_of_evaluation():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.Dropout(0.5), torch.nn.ReLU().eval()
    )
    x = torch.randn(5, 3)
    found = torch.cat(outputs(model, x, 2))
    assert model.training and not model[2].training
    with torch.no_grad():
        assert torch.equal(found, model.eval()(x))
