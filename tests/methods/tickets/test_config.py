"""TicketConfig: what it takes, its rounds, its JSON; and the scope it names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memtl
from memtl import TicketConfig
from memtl.methods.tickets.scope import head_tensors, inner_model, named_weights, weights_in_scope
from tests.methods.tickets.small import bert, convs, vit


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.7},
        {"sparsity": 0, "scheme": "random", "seed": 3, "level": "layer"},
        {"sparsity": 0.5, "scheme": "iterative", "of": "remaining", "amount": 0.2, "head": "reset"},
        {"sparsity": 0.25, "scope": ("encoder.*", "pooler.*"), "rewind_step": 7},
        {"sparsity": 0.8, "scheme": "learned", "level": "layer"},
    ],
    ids=str,
)
def test_json_goes_both_ways(options):
    config = TicketConfig(**options)
    assert TicketConfig.from_json(config.to_json()) == config
    assert TicketConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(TicketConfig(**options))


def test_scope_may_be_a_list():
    assert TicketConfig(sparsity=0.5, scope=["a", "b"]).scope == ("a", "b")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1}, ValueError, r"sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": -0.1}, ValueError, "sparsity must be in"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be in"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({"sparsity": True}, TypeError, "sparsity must be a number"),
        ({"sparsity": 0.5, "amount": 0}, ValueError, r"amount must be in \(0, 1\]"),
        ({"sparsity": 0.5, "amount": 1.5}, ValueError, "amount must be in"),
        ({"sparsity": 0.5, "amount": 1, "of": "remaining"}, ValueError, "amount must be below 1"),
        ({"sparsity": 0.5, "scheme": "snip"}, ValueError, "scheme must be one of .*'snip'"),
        ({"sparsity": 0.5, "level": "channel"}, ValueError, "level must be one of"),
        ({"sparsity": 0.5, "of": "all"}, ValueError, "of must be one of"),
        ({"sparsity": 0.5, "head": None}, ValueError, "head must be one of"),
        ({"sparsity": 0.5, "rewind_step": -1}, ValueError, "rewind_step must be at least 0"),
        ({"sparsity": 0.5, "rewind_step": 1.0}, TypeError, "rewind_step must be an int"),
        ({"sparsity": 0.5, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"sparsity": 0.5, "seed": None}, TypeError, "seed must be an int"),
        ({"sparsity": 0.5, "scope": "encoder.*"}, TypeError, "scope must be None or a tuple"),
        ({"sparsity": 0.5, "scope": (1,)}, TypeError, "scope must be None or a tuple"),
        ({"sparsity": 0.5, "scope": ()}, ValueError, "scope must have a pattern"),
    ],
    ids=str,
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        TicketConfig(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"scheme": "random"}', "sparsity"),
        ('{"sparsity": 0.5, "sparse": 1}', r"unknown fields \['sparse'\]"),
        ("{", "Expecting"),
    ],
)
def test_json_that_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        TicketConfig.from_json(text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sparsity": 0.7}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ({"sparsity": 0.3}, [0.1, 0.2, 0.3]),
        ({"sparsity": 0.25}, [0.1, 0.2, 0.25]),
        ({"sparsity": 0.05}, [0.05]),
        ({"sparsity": 0.0}, [0.0]),
        ({"sparsity": 0.5, "amount": 1}, [0.5]),
        ({"sparsity": 0.271, "of": "remaining"}, [0.1, 0.19, 0.271]),
        ({"sparsity": 0.5, "of": "remaining", "amount": 0.3}, [0.3, 0.5]),
        ({"sparsity": 0.875, "of": "remaining", "amount": 0.5}, [0.5, 0.75, 0.875]),
    ],
    ids=str,
)
def test_rounds(options, expected):
    rounds = TicketConfig(scheme="iterative", **options).rounds()
    assert rounds == pytest.approx(expected, abs=1e-12) and rounds[-1] == options["sparsity"]
    assert TicketConfig(**options).rounds() == (options["sparsity"],)


# scope


def test_of_bert_base_it_is_what_the_paper_prunes():
    import transformers

    with torch.device("meta"):
        model = transformers.BertForQuestionAnswering(transformers.BertConfig())
        pooled = transformers.BertModel(transformers.BertConfig())
    sizes = {n: w.parameter.numel() for n, w in weights_in_scope(pooled, None).items()}
    assert sum(sizes.values()) == 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 768 == 85_524_480
    assert len(sizes) == 73 and "encoder.layer.11.attention.self.key.weight" in sizes
    del sizes["pooler.dense.weight"]
    assert weights_in_scope(model, None).keys() == sizes.keys()


def test_names_are_those_in_the_backbone():
    names = set(weights_in_scope(bert(), None))
    assert names == set(weights_in_scope(bert("Model"), None))
    assert names - {"pooler.dense.weight"} == set(weights_in_scope(bert("ForMaskedLM"), None))
    assert not any("embedding" in name or "Norm" in name or "bias" in name for name in names)
    compiled = torch.compile(bert())
    assert set(weights_in_scope(inner_model(compiled), None)) == names


def test_of_timm_all_but_the_classifier():
    names = set(weights_in_scope(vit(), None))
    assert "patch_embed.proj.weight" in names and "blocks.1.mlp.fc2.weight" in names
    assert len(names) == 1 + 2 * 4 and "head.weight" not in names
    assert {"pos_embed", "cls_token"} <= set(named_weights(vit()))


def test_of_other_networks_all_but_what_is_called_a_classifier():
    assert set(weights_in_scope(convs(), None)) == {f"{i}.weight" for i in (0, 3, 4, 6, 8)}
    model = nn.ModuleDict({"features": nn.Linear(3, 4), "classifier": nn.Linear(4, 2)})
    assert set(weights_in_scope(model, None)) == {"features.weight"}
    model = nn.ModuleDict({"features": nn.Linear(3, 4), "heads": nn.Sequential(nn.Linear(4, 2))})
    assert set(weights_in_scope(model, None)) == {"features.weight"}  # torchvision's transformers
    last = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2), nn.Identity())
    model = nn.ModuleDict({"features": nn.Linear(3, 4), "classifier": last})
    assert set(weights_in_scope(model, None)) == {"features.weight", "classifier.0.weight"}
    assert head_tensors(model) == {"classifier.2.weight", "classifier.2.bias"}


def test_the_head_of_a_language_model_is_its_embedding():
    import transformers

    sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    names = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert set(weights_in_scope(model, None)) == {f"h.0.{name}.weight" for name in names}
    assert head_tensors(model) == set()
    assert head_tensors(bert()) == {"classifier.weight", "classifier.bias"}
    masked = head_tensors(bert("ForMaskedLM"))
    assert "cls.predictions.transform.dense.weight" in masked
    assert not any("embedding" in name for name in masked)


def test_patterns():
    model = bert()
    found = weights_in_scope(model, ("encoder.layer.0.*", "*.1.output.dense.weight"))
    assert len(found) == 7 and "encoder.layer.1.output.dense.weight" in found
    with pytest.raises(ValueError, match=r"'encoder.layers.\*' matches no weight of this BertFor"):
        weights_in_scope(model, ("encoder.layer.0.*", "encoder.layers.*"))
    with pytest.raises(ValueError, match=r"which has\n  encoder.layer.0.attention.self.query.w"):
        weights_in_scope(model, ("nothing",))
    with pytest.raises(ValueError, match="word_embeddings.weight' is an embedding's"):
        weights_in_scope(model, ("*word_embeddings*",))
    with pytest.raises(ValueError, match="matches no weight"):
        weights_in_scope(model, ("classifier.weight",))
    with pytest.raises(ValueError, match="matches no weight"):
        weights_in_scope(model, ("*.bias",))


def test_a_weight_that_an_embedding_holds_too():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4), "out": nn.Linear(4, 5)})
    model["inner"] = nn.Linear(4, 4)
    model["out"].weight = model["words"].weight
    assert set(weights_in_scope(model, None)) == {"inner.weight"}
    with pytest.raises(ValueError, match="'words.weight' is an embedding's"):
        weights_in_scope(model, ("words*",))


def test_nothing_in_scope():
    for model in (nn.Embedding(3, 4), nn.LayerNorm(4), nn.ReLU()):
        with pytest.raises(ValueError, match="no linear layer or convolution"):
            weights_in_scope(model, None)
    with pytest.raises(TypeError, match="Module"):
        memtl.draw_ticket(torch.randn(3), TicketConfig(sparsity=0.5))
    with pytest.raises(ValueError, match="not initialised"):
        weights_in_scope(nn.Sequential(nn.LazyLinear(3)), None)


def test_peft_comes_afterwards():
    import peft

    adapted = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["qkv"]))
    with pytest.raises(ValueError, match="before peft"):
        memtl.draw_ticket(adapted, TicketConfig(sparsity=0.5))
    model = vit()
    ticket = memtl.draw_ticket(model, TicketConfig(sparsity=0.5))
    ticket.apply(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))
    assert memtl.Ticket.of(adapted) == ticket
    ticket.remove(adapted)
