import dataclasses
import importlib.util
import json
import sys
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers")
from memtl import assets, backends
from memtl.demo import command, experiments, main, results
from memtl.demo.experiments import EXPERIMENTS, FULL, build
from memtl.tasks import Split
from memtl.training import Settings, fit

KEYS = [key for key in EXPERIMENTS if key[1] not in ("package", "pair")]  # they are as "kind" is
METHODS = {key: experiments.methods(EXPERIMENTS[key], [0.1, 0.03]) for key in KEYS}
PARTS = [method.name for method in experiments.PARTS]
WHOLE = [
    FULL,
    "full + checkpointing",
    "Back Razor 0.1",
    "Back Razor 0.03",
    "Back Razor 0.1, small",
    "4 bits, once",
]
NAMES = {
    ("vit", "digits"): [PARTS[0], *WHOLE],
    ("cnn", "digits"): [*PARTS, *WHOLE],
    ("cnn", "segmentation"): [PARTS[0], PARTS[2], *PARTS[4:], *WHOLE],
}
TICKETS = ["ticket 50 %", "ticket 50 % + Back Razor 0.1", "ticket 50 % + 4 bits, once"]
NAMES |= {key: [*WHOLE, *TICKETS] for key in KEYS if key[0] == "bert"}
BATCH = {"digits": 8, "segmentation": 2, "kind": 8, "mlm": 8}
CLASSES = {"digits": 10, "segmentation": 11, "kind": 4, "mlm": 0}
every = pytest.mark.parametrize("key", KEYS, ids="-".join)


def small(task, train=64, rest=20):
    """The task, with fewer images."""
    counts = {"train": train, "val": rest, "test": rest}
    few = {
        name: Split(getattr(task, name).images[:n], getattr(task, name).labels[:n])
        for name, n in counts.items()
    }
    return dataclasses.replace(task, **few)


@pytest.fixture(scope="module")
def tasks():
    sizes = {"segmentation": (8, 4)}
    return {key: small(EXPERIMENTS[key].load_task(), *sizes.get(key[1], ())) for key in KEYS}


def built(key, name, seed=0):
    """A model ready for the method of that name."""
    method = next(m for m in METHODS[key] if m.name == name)
    return build(EXPERIMENTS[key], method, CLASSES[key[1]], seed)


@pytest.fixture(scope="module", params=KEYS, ids="-".join)
def run(request, tmp_path_factory, tasks):
    """A tiny demo of each kind, run once: its arguments, its JSON and its page."""
    folder, key = tmp_path_factory.mktemp("demo"), request.param
    arguments = ["--model", key[0], "--task", key[1], "--quick", "--steps", "1", "--seeds", "2"]
    arguments += ["--json", str(folder / "demo.json"), "--html", str(folder / "demo.html")]
    batch = BATCH[key[1]]
    tiny = dataclasses.replace(EXPERIMENTS[key], load_task=lambda: tasks[key], batch_size=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTL_PROGRESS", "0")
        patch.setitem(EXPERIMENTS, key, tiny)
        assert main(arguments) == 0
    return key, arguments, json.loads((folder / "demo.json").read_text()), folder / "demo.html"


def test_json_has_every_figure_and_where_it_is_from(run):
    key, arguments, record, _ = run
    assert [m["name"] for m in record["methods"]] == NAMES[key]
    assert record["seeds"] == [0, 1]
    assert record["command"] == " ".join(["memtl", "demo", *arguments])
    assert record["model"]["name"] == EXPERIMENTS[key].asset
    assert record["model"]["sha256"] == assets.sha256(record["model"]["name"])
    assert record["task"]["metric"] == ("mean_iou" if key[1] == "segmentation" else "accuracy")
    assert record["settings"]["steps"] == 1 and record["settings"]["batch_size"] == BATCH[key[1]]
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["environment"]["backends"]["topk_pack"] == backends.owner("topk_pack", "cpu")
    assert {"device", "platform", "versions", "commit"} <= set(record["environment"])
    for method in record["methods"]:
        assert len(method["test_score"]) == len(method["val_score"]) == 2
        assert all(0 <= a <= 1 for a in method["test_score"])
        assert method["test_score_mean"] == pytest.approx(sum(method["test_score"]) / 2)
        assert method["test_score_std"] >= 0
        assert [len(losses) for losses in method["losses"]] == [1, 1]
        assert method["seconds_per_step"] > 0 and method["learning_rate"] > 0
        assert method["saved_bytes_per_sample"] * BATCH[key[1]] == method["saved_bytes"]
        whole = method["name"] not in PARTS
        assert (method["trainable"] == record["model"]["parameters"]) == whole
    full = next(m for m in record["methods"] if m["name"] == FULL)
    assert full["ratios"]["saved_bytes"] == full["ratios"]["seconds_per_step"] == 1


def test_what_is_kept(run):
    key, _, record, _ = run
    saved = {m["name"]: m["saved_bytes"] for m in record["methods"]}
    full, checkpointed, tenth, thirtieth, smallest, once = (saved[name] for name in WHOLE)
    if key[0] == "bert":
        ticket, pruned_tenth, pruned_once = (saved[name] for name in TICKETS)
        assert checkpointed < full / 3 and thirtieth < tenth < full / 3 and smallest <= tenth
        assert once < full / 3 and ticket <= full and pruned_tenth < full / 3 > pruned_once
        return
    assert saved["last layer only"] < thirtieth < tenth < full / 8
    assert checkpointed < full / 8
    assert smallest < tenth and once < full / 7
    if "Rep-Net" in saved:
        assert saved["last layer only"] < saved["Rep-Net"] < saved["Rep-Net + biases"] < full / 5
    if "norms + last layer" in saved:
        assert saved["biases + last layer"] < saved["norms + last layer"] / 10 < full / 15


def test_methods_see_the_same_data_from_the_same_weights(run):
    key, _, record, _ = run
    losses = {m["name"]: m["losses"] for m in record["methods"]}
    # With its statistics frozen, batch normalisation is another function.
    frozen = [name for name in NAMES[key] if name in PARTS]
    others = [name for name in NAMES[key] if name not in frozen]
    groups = {"vit": (NAMES[key],), "cnn": (frozen, others), "bert": (WHOLE, TICKETS)}
    for names in groups[key[0]]:
        for seed in (0, 1):  # the forward is exact, so the first loss tells
            first = [losses[name][seed][0] for name in names]
            assert first == pytest.approx([first[0]] * len(names), rel=1e-5)
    assert losses[FULL][0] != losses[FULL][1]


def test_page_shows_every_method(run):
    key, _, record, path = run
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    for name in NAMES[key]:
        assert sum(name == part.strip() for part in root.itertext()) >= 3, "table and both plots"
    said = "".join(root.itertext())
    assert record["command"] in said
    assert ("mean IoU" in said) == (key[1] == "segmentation")
    stripped = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in stripped and "https://" not in stripped


@every
def test_seed_decides_the_weights_method_does_not(key):
    plain = built(key, FULL, 3).state_dict()
    for method in METHODS[key]:
        weights = built(key, method.name, 3).state_dict()
        assert weights.keys() >= plain.keys()
        pruned = {name for name in plain if not torch.equal(weights[name], plain[name])}
        assert bool(pruned) == (method.name in TICKETS)
        assert all(".weight" in name and not weights[name].all() for name in pruned)
        again = built(key, method.name, 3).state_dict()  # what it adds, too
        assert all(torch.equal(weights[name], again[name]) for name in weights)
    first, other = (built(key, FULL, seed).state_dict() for seed in (3, 4))
    fresh = any(not torch.equal(first[name], other[name]) for name in first)
    assert fresh == (key[1] != "mlm")  # whose head is pre-trained, too


@every
def test_what_trains(key):
    trainable = {
        m.name: {n for n, p in built(key, m.name).named_parameters() if p.requires_grad}
        for m in METHODS[key]
    }
    everything = {n for n, _ in built(key, FULL).named_parameters()}
    for name in set(trainable) - set(PARTS):
        assert trainable[name] == everything
    head = "head." if key[0] == "vit" else "classifier."
    last = {n for n in everything if n.startswith(head)}
    if key[0] != "bert":
        assert trainable["last layer only"] == last
    for name in set(trainable) & set(PARTS[1:]):
        assert last < trainable[name] != everything


def test_last_layer_only_leaves_the_statistics_of_the_source_task_alone(tasks):
    key = ("cnn", "digits")
    task, source = tasks[key], assets.load("cnn_glyphs").state_dict()
    frozen, full = (built(key, name) for name in ("last layer only", FULL))
    for model in (frozen, full):
        fit(model, task.train, task.val, Settings(steps=1, batch_size=16))
    statistics = [name for name in source if "running" in name]
    assert len(statistics) == 2 * 34
    assert all(torch.equal(frozen.state_dict()[name], source[name]) for name in statistics)
    assert not any(torch.equal(full.state_dict()[name], source[name]) for name in statistics)
    # In training, too, it is a function of one image alone.
    images = task.val.images[:8]
    frozen.train()
    assert torch.allclose(frozen(images)[:1], frozen(images[:1]), atol=1e-4)


@pytest.mark.parametrize("key", KEYS[:2], ids="-".join)
def test_checkpointing_changes_no_result(key, tasks):
    settings = Settings(steps=2, batch_size=16)
    runs = [fit(built(key, name), tasks[key].train, tasks[key].val, settings) for name in WHOLE[:2]]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)


def test_tuning_tries_every_candidate(monkeypatch, capsys, tasks):
    key = ("cnn", "segmentation")
    tiny = dataclasses.replace(EXPERIMENTS[key], load_task=lambda: tasks[key], batch_size=4)
    monkeypatch.setitem(EXPERIMENTS, key, tiny)
    tried = []

    def train(experiment, task, method, *, learning_rate, seed, test, **others):
        tried.append((method.name, learning_rate, seed))
        assert not test
        return learning_rate, float("nan"), ()

    monkeypatch.setattr(command, "train", train)
    arguments = ["--model", key[0], "--task", key[1], "--tune", "--seeds", "2"]
    assert main(arguments) == 0
    rates = {m.name: tiny.rates[m.kind] for m in METHODS[key]}
    firsts = [*NAMES[key][:4], FULL]
    assert tried == [
        (name, rate, seed)
        for name in firsts
        for rate in rates[name].candidates
        for seed in (100, 101)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.rstrip().endswith("taken") for line in lines) == len(firsts)


@every
def test_what_was_chosen_was_a_candidate(key):
    for rate in EXPERIMENTS[key].rates.values():
        assert rate.chosen in rate.candidates and len(rate.candidates) == 3
    assert {m.kind for m in METHODS[key]} == set(EXPERIMENTS[key].rates)


def test_missing_extras_are_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    absent = ("timm", "sklearn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else real(name)
    )
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "memtl demo needs timm, scikit-learn: pip install memtl[demo]\n"


def test_what_one_network_needs_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["--model", "bert", "--task", "kind"]) == 2
    said = "memtl demo: encoders need transformers: pip install memtl[models]\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "--model: invalid choice: 'resnet'"),
        (["--task", "cars"], "--task: invalid choice: 'cars'"),
        (["--task", "segmentation"], "--task segmentation is not for --model vit"),
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
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_diverging_run_fails_with_one_line(monkeypatch, capsys, tmp_path):
    def diverge(*arguments, **keywords):
        raise FloatingPointError("the loss is nan at step 1 of 1")

    monkeypatch.setattr(command, "measure", diverge)
    assert main(["--quick", "--html", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err == "memtl demo: the loss is nan at step 1 of 1\n"
    assert not list(tmp_path.iterdir())


def test_ratios_where_no_peak_was_measured():
    result = results.Result("a", 1e-3, 5, 2, 10, None, 1.0, [0.5], [0.5], [(1.0,)])
    base = dataclasses.replace(result, name=FULL, saved_bytes=20)
    assert "n/a" in str(results.table([result, base], "accuracy"))
    figures = results.figures(result, base)
    assert figures["ratios"] == {"saved_bytes": 0.5, "peak_bytes": None, "seconds_per_step": 1.0}
    assert figures["test_score_std"] is None
