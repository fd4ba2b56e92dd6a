"""A BERT of two layers with a vocabulary of its own, as a folder."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    from tokenizers import BertWordPieceTokenizer

    from memtl.tasks import docstrings

    learner = BertWordPieceTokenizer(lowercase=True)
    texts = [document.text for document in docstrings.in_split("val")]
    learner.train_from_iterator(texts, vocab_size=500, show_progress=False)
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertTokenizer(
        vocab=learner.get_vocab(), do_lower_case=True, model_max_length=64
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForPreTraining(config).save_pretrained(folder)
    return str(folder)
