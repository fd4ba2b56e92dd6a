import dataclasses
import importlib.util
import json
from xml.etree import ElementTree

import pytest
import torch

from memtl import assets, backends, demo
from memtl.tasks import Split, load_digits
from memtl.training import Settings, fit

MODELS = list(demo.NETWORKS)
METHODS = {model: demo.methods(network, [0.1, 0.03]) for model, network in demo.NETWORKS.items()}
NAMES = [
    "last layer only",
    "full fine-tuning",
    "full + checkpointing",
    "Back Razor 0.1",
    "Back Razor 0.03",
    "Back Razor 0.1, small",
    "4 bits, once",
]


def small_digits():
    """The digits, with fewer to evaluate on."""
    task = load_digits()
    few = {
        n: Split(s.images[:50], s.labels[:50]) for n, s in (("val", task.val), ("test", task.test))
    }
    return dataclasses.replace(task, **few)


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """A tiny demo of each network, run once: its status and arguments, its JSON and its page."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--model", request.param, "--quick", "--steps", "1", "--seeds", "2"]
    arguments += ["--json", str(folder / "demo.json"), "--html", str(folder / "demo.html")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTL_PROGRESS", "0")
        patch.setattr(demo, "load_digits", small_digits)
        patch.setattr(demo, "BATCH_SIZE", 8)
        status = demo.main(arguments)
    return status, arguments, json.loads((folder / "demo.json").read_text()), folder / "demo.html"


def test_json_has_every_figure_and_where_it_is_from(run):
    status, arguments, record, _ = run
    assert status == 0
    assert [m["name"] for m in record["methods"]] == NAMES
    assert record["seeds"] == [0, 1]
    assert record["command"] == " ".join(["memtl", "demo", *arguments])
    assert record["model"]["name"] == demo.NETWORKS[arguments[1]].asset
    assert record["model"]["sha256"] == assets.metadata(record["model"]["name"])["sha256"]
    assert record["settings"]["steps"] == 1 and record["settings"]["batch_size"] == 8
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["environment"]["backends"]["topk_pack"] == backends.owner("topk_pack", "cpu")
    assert {"device", "platform", "versions", "commit"} <= set(record["environment"])
    for method in record["methods"]:
        assert len(method["test_accuracy"]) == len(method["val_accuracy"]) == 2
        assert all(0 <= a <= 1 for a in method["test_accuracy"])
        assert method["test_accuracy_mean"] == pytest.approx(sum(method["test_accuracy"]) / 2)
        assert method["test_accuracy_std"] >= 0
        assert [len(losses) for losses in method["losses"]] == [1, 1]
        assert method["seconds_per_step"] > 0 and method["learning_rate"] > 0
        assert method["saved_bytes_per_sample"] * 8 == method["saved_bytes"]
    full = record["methods"][1]
    assert full["ratios"]["saved_bytes"] == full["ratios"]["seconds_per_step"] == 1


def test_back_razor_keeps_less_the_less_it_is_told_to_keep(run):
    saved = {m["name"]: m["saved_bytes"] for m in run[2]["methods"]}
    last, full, checkpointed, tenth, thirtieth, small, once = (saved[name] for name in NAMES)
    assert last < thirtieth < tenth < full / 8
    assert last < checkpointed < full / 8
    assert last < small < tenth and once < full / 8


def test_methods_see_the_same_data_from_the_same_weights(run):
    losses = {m["name"]: m["losses"] for m in run[2]["methods"]}
    # With its statistics frozen, batch normalisation is another function.
    names = NAMES[1:] if run[1][1] == "cnn" else NAMES
    for seed in (0, 1):  # the forward is exact, so the first loss tells
        first = [losses[name][seed][0] for name in names]
        assert first == pytest.approx([first[0]] * len(names), rel=1e-5)
    assert losses[NAMES[1]][0] != losses[NAMES[1]][1]


def test_page_shows_every_method(run):
    text = run[3].read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    for name in NAMES:
        assert sum(name == part.strip() for part in root.itertext()) >= 3, "table and both plots"
    assert run[2]["command"] in "".join(root.itertext())
    stripped = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in stripped and "https://" not in stripped


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_seed_decides_the_weights_method_does_not(model, index):
    method, full = METHODS[model][index], METHODS[model][1]
    weights, plain = demo.build(method, 3).state_dict(), demo.build(full, 3).state_dict()
    frozen = {key for key in plain if key.endswith("num_batches_tracked")} if index == 0 else set()
    assert weights.keys() == plain.keys() - frozen
    assert all(torch.equal(weights[key], plain[key]) for key in weights)
    first, other = (demo.build(method, seed).get_classifier().weight for seed in (3, 4))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("model", MODELS)
def test_what_trains(model):
    trainable = {
        m.name: {n for n, p in demo.build(m, 0).named_parameters() if p.requires_grad}
        for m in METHODS[model]
    }
    head = {"vit": "head", "cnn": "classifier"}[model]
    assert trainable.pop("last layer only") == {f"{head}.weight", f"{head}.bias"}
    everything = {n for n, _ in demo.build(METHODS[model][1], 0).named_parameters()}
    assert all(names == everything for names in trainable.values())


def test_last_layer_only_leaves_the_statistics_of_the_source_task_alone():
    task = small_digits()
    source = assets.load("cnn_glyphs").state_dict()
    frozen, full = (demo.build(METHODS["cnn"][i], 0) for i in (0, 1))
    for model in (frozen, full):
        fit(model, task.train, task.val, Settings(steps=1, batch_size=16))
    statistics = [key for key in source if "running" in key]
    assert len(statistics) == 2 * 34
    assert all(torch.equal(frozen.state_dict()[key], source[key]) for key in statistics)
    assert not any(torch.equal(full.state_dict()[key], source[key]) for key in statistics)
    # In training, too, it is a function of one image alone.
    images = task.val.images[:8]
    frozen.train()
    assert torch.allclose(frozen(images)[:1], frozen(images[:1]), atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_checkpointing_changes_no_result(model):
    task = small_digits()
    settings = Settings(steps=2, batch_size=16)
    runs = [fit(demo.build(m, 0), task.train, task.val, settings) for m in METHODS[model][1:3]]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)


def test_missing_extras_are_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    absent = ("timm", "sklearn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else real(name)
    )
    assert demo.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "memtl demo needs timm, scikit-learn: pip install memtl[demo]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "--model: invalid choice: 'resnet'"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--steps", "x"], "--steps: invalid"),
        (["--keep", "1.5"], "--keep: keep must be in (0, 1]"),
        (["--html", "no/such/folder/page.html"], "--html: cannot be written"),
        (["--json", "."], "--json: cannot be written"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_calls_are_refused_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_diverging_run_fails_with_one_line(monkeypatch, capsys, tmp_path):
    def diverge(*arguments, **keywords):
        raise FloatingPointError("the loss is nan at step 1 of 1")

    monkeypatch.setattr(demo, "measure", diverge)
    assert demo.main(["--quick", "--html", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err == "memtl demo: the loss is nan at step 1 of 1\n"
    assert not list(tmp_path.iterdir())


def test_ratios_where_no_peak_was_measured():
    result = demo.Result("a", 1e-3, 10, None, 1.0, [0.5], [0.5], [(1.0,)])
    base = dataclasses.replace(result, name=demo.FULL, saved_bytes=20)
    assert "n/a" in str(demo.table([result, base]))
    figures = demo._figures(result, base)
    assert figures["ratios"] == {"saved_bytes": 0.5, "peak_bytes": None, "seconds_per_step": 1.0}
    assert figures["test_accuracy_std"] is None
