import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from memtl.memory import SavedTensors
from memtl.models.bert import Classifier, MaskedLM, Regressor, corrupt, inputs
from memtl.tasks import Split
from memtl.tasks.text import encode
from memtl.training import Settings, evaluate, fit

from ..tasks import encoders

WORDS = encoders.tokenizer()
TEXTS = [("the cat sat", "a dog"), ("the big red bird flew", "who is the small cat ?")]


def test_inputs_are_what_the_tokenizer_gives():
    ids = encode(WORDS, TEXTS)
    expected = WORDS(*map(list, zip(*TEXTS, strict=True)), padding="longest", return_tensors="pt")
    found = inputs(ids, WORDS)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_columns_of_padding_are_cut():
    ids = F.pad(encode(WORDS, TEXTS), (0, 5), value=WORDS.pad_token_id)
    assert inputs(ids, WORDS)["input_ids"].shape == (2, ids.shape[1] - 5)
    torch.manual_seed(0)
    model = Classifier(encoders.classifier(), WORDS).eval()
    assert torch.equal(model(ids), model(ids[:, :-5]))


def test_a_classifier_is_the_model():
    torch.manual_seed(0)
    model = encoders.classifier().eval()
    ids = encode(WORDS, TEXTS)
    assert torch.equal(Classifier(model, WORDS)(ids), model(**inputs(ids, WORDS)).logits)


def test_corruption():
    torch.manual_seed(0)
    ids = torch.randint(5, len(encoders.WORDS), (400, 50))
    ids[:, 0], ids[:, 40:] = WORDS.cls_token_id, WORDS.pad_token_id
    corrupted, chosen = corrupt(ids, WORDS)
    assert not chosen[:, 0].any() and not chosen[:, 40:].any()
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    share = chosen[:, 1:40].float().mean().item()
    assert share == pytest.approx(0.15, abs=0.015)
    masked = corrupted[chosen] == WORDS.mask_token_id
    specials = 0.1 * 5 / len(encoders.WORDS)  # of those at random, which are masked instead
    assert masked.float().mean().item() == pytest.approx(0.8 + specials, abs=0.03)
    left = corrupted[chosen] == ids[chosen]
    assert left.float().mean().item() == pytest.approx(0.1 + 0.1 / len(WORDS), abs=0.03)


def test_chance_puts_no_special_token_anywhere():
    torch.manual_seed(0)
    ids = torch.randint(5, len(encoders.WORDS), (2000, 20))
    corrupted, chosen = corrupt(ids, WORDS)
    special = torch.isin(corrupted, torch.tensor(WORDS.all_special_ids))
    assert special.any() and (corrupted[special] == WORDS.mask_token_id).all()


def test_at_least_one_token_is_masked():
    ids = encode(WORDS, ["cat"])
    for _ in range(20):
        _, chosen = corrupt(ids, WORDS)
        assert chosen.tolist() == [[False, True, False]]


def test_masked_words_are_learned_and_scored_alike():
    torch.manual_seed(0)
    ids = encode(WORDS, ["the cat sat on the mat", "a dog ran in the house"] * 16)
    split = Split(ids, ids)
    model = MaskedLM(encoders.masked_lm(), WORDS)
    before = evaluate(model, split)
    assert before == evaluate(model, split)
    history = fit(model, split, split, Settings(60, 16, 5e-3), progress=False)
    assert history.val_score > max(0.5, before + 0.2)


def test_logits_are_made_of_masked_places_alone():
    torch.manual_seed(0)
    ids = encode(WORDS, TEXTS * 8)
    model = MaskedLM(encoders.masked_lm(), WORDS)
    _, chosen = corrupt(ids, WORDS)
    logits = model(ids, chosen)
    assert logits.shape == (int(chosen.sum()), len(WORDS))
    whole = model.model.eval()(**inputs(ids, WORDS)).logits
    assert torch.allclose(model.eval()(ids, chosen), whole[chosen], atol=1e-6)


def test_masked_words_need_berts_head():
    with pytest.raises(ValueError, match="`cls`, which BertForSequenceClassification does not"):
        MaskedLM(encoders.classifier(), WORDS)


def test_a_number_is_learned():
    torch.manual_seed(0)
    ids = encode(WORDS, ["the cat", "a dog"] * 16)
    labels = torch.tensor([1.0, -1.0] * 16)
    model = Regressor(encoders.classifier(1), WORDS)
    history = fit(model, Split(ids, labels), None, Settings(40, 16, 3e-3), progress=False)
    assert history.losses[-1] < 0.3 * history.losses[0]


def test_checkpointing_keeps_less_and_changes_no_gradient():
    torch.manual_seed(0)
    ids = encode(WORDS, TEXTS * 4)
    model = Classifier(encoders.classifier(), WORDS).eval()
    model.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def run():
        model.zero_grad()
        with SavedTensors(model) as saved:
            loss = model(ids).square().sum()
        kept = saved.bytes
        loss.backward()
        return kept, model.model.bert.embeddings.word_embeddings.weight.grad.clone()

    plain, expected = run()
    model.set_grad_checkpointing()
    less, found = run()
    assert less < 0.5 * plain
    assert torch.allclose(found, expected, atol=1e-6)
    model.set_grad_checkpointing(False)
    assert run()[0] == plain
