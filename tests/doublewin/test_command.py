"""The whole of it, on few images, and what an interruption leaves."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from memtl import Ticket
from memtl.cli import main
from memtl.doublewin import Cell, Run, Setup, domain, work
from memtl.doublewin.plan import Draw
from memtl.report import Journal
from memtl.tasks import Split, Task
from memtl.tasks.pictures import Pixels

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = (
    "--pretrainings", "standard", "pgd", "--drawings", "one-shot", "iterative-adversarial",
    "--levels", "1", "2", "--percents", "2", "--seeds", "1", "--steps", "2", "--round-steps", "1",
    "--batch-size", "8",
)  # fmt: skip


def arguments(out, *more) -> list[str]:
    return ["doublewin", *SMALL, "--out", str(out), *more]


def runs(out) -> dict:
    """Every finished run without its time."""
    with Journal(out / "runs.jsonl", Run) as journal:
        return {run.key: dataclasses.replace(run, seconds=0.0) for run in journal}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few images, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = domain.task(domain.Domain())

    def few(split: Split, n: int) -> Split:
        return Split(split.images[:n], split.labels[:n])

    task = dataclasses.replace(whole, test=few(whole.test, 12), val=few(whole.val, 12))
    with pytest.MonkeyPatch.context() as patch:
        letters = domain.letters(normalised=False)
        patch.setattr(domain, "task", lambda _: task)
        patch.setattr(domain, "letters", lambda **_: few(letters, 12))
        for cached in (domain.outside, domain.fingerprint_of_data):
            cached.cache_clear()
        yield
    for cached in (domain.outside, domain.fingerprint_of_data):
        cached.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished grid."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(out, "--json", str(out / "all.json"))) == 0
    return out


def test_what_it_leaves(whole):
    found = runs(whole)
    # two networks, two regimes: whole; two drawings at two levels
    assert len(found) == 2 * 2 * (1 + 2 * 2)
    for key, run in found.items():
        assert run.error is None
        assert 0 <= run.robust <= run.accuracy <= 1
        assert run.nll > 0 and 0 <= run.ece <= 1
        assert 0 <= run.auc_noise <= 1 and 0 <= run.auc_letters <= 1
        assert bool(key.drawn) == (key.drawing == "iterative-adversarial")
        assert bool(key.trained_with) == (key.regime == "adversarial")
        assert key.measured_by == "PGD-20, L-inf 0.1"
    record = json.loads((whole / "all.json").read_text())
    assert len(record["runs"]) == len(found) and len(record["double_win"]) == 4
    assert record["sparsities"] == {"1": pytest.approx(0.2), "2": pytest.approx(0.36)}
    assert set(record["domain_gap"]) == {"standard", "pgd"}
    assert all(gap["target"] > gap["source"] > 0 for gap in record["domain_gap"].values())
    page = (whole / "report.html").read_text()
    assert page.count("<svg") == 2 * 2 * 2  # metrics, regimes, drawings
    assert "Whether robust tickets transfer better" in page
    assert "Not finished" not in page and record["missing"] == 0
    assert "double-win sparsity, pgd, 2 % of the data" in page


def test_tickets_are_those_that_the_cells_say(whole):
    folders = sorted((whole / "tickets").iterdir())
    assert [folder.name.rpartition("-")[0] for folder in folders] == [
        "pgd-iterative-adversarial", "standard-iterative-adversarial",
    ]  # fmt: skip
    for folder in folders:
        first, second = (Ticket.load(folder / f"round-0{n}.safetensors") for n in (1, 2))
        assert first.sparsity == pytest.approx(0.2, abs=1e-4)
        assert second.sparsity == pytest.approx(0.36, abs=1e-4)
        assert second.source.task == "digits"


def test_an_interrupted_grid_goes_on(whole, tmp_path, monkeypatch):
    done = []

    def stops(setup, key, what, run=work.run):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(key)
        return run(setup, key, what)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("memtl.doublewin.command.run", stops)
        main(arguments(tmp_path))
    assert len(runs(tmp_path)) == 7
    journal = tmp_path / "runs.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # as if the last line were half written
    assert main(arguments(tmp_path)) == 0
    assert runs(tmp_path) == runs(whole)


def test_reports_on_what_is_finished(whole, tmp_path, capsys):
    lines = (whole / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-3]))
    assert main(arguments(tmp_path, "--report")) == 0
    assert "3 of 20 runs are not finished: - in the tables" in capsys.readouterr().out
    assert "Not finished, 3 runs are missing" in (tmp_path / "report.html").read_text()
    assert len(runs(tmp_path)) == 17
    assert main(arguments(tmp_path / "none", "--report")) == 2
    assert "has no finished run of this grid" in capsys.readouterr().err


def test_plans(tmp_path, capsys):
    assert main(arguments(tmp_path, "--plan")) == 0
    text = capsys.readouterr().out
    assert "20 runs, 20 left, 2 drawings" in text
    assert not runs(tmp_path)


def test_tunes(tmp_path, capsys):
    assert main(arguments(tmp_path, "--tune", "--regimes", "standard")) == 0
    found = runs(tmp_path)
    assert len(found) == 3 * 2  # rates, networks
    assert {key.split for key in found} == {"val"}
    assert {key.seed for key in found} == {100}
    text = capsys.readouterr().out
    table = text[text.index("validation split") :]
    assert table.count("standard, 2 %") == 3 and table.count("taken") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--drawings", "omp"), "drawings are one-shot, random, .* got 'omp'"),
        (("--pretrainings", "standard", "best"), "networks are standard, .* got 'best'"),
        (("--pretrainings", "standard", "mine=/tmp/x.pt"), "either shipped ones or NAME=PATH"),
        (("--eps", "8"), r"pixel units of \[0, 1\], got 8.0: of 256 levels 8 are 8/255"),
        (("--percents", "0.5"), "leaves 5 classes .* empty"),
        (("--tolerance", "-1"), "tolerance must be at least 0"),
        (("--reference", "fast"), "reference must be one of standard, pgd"),
        (("--data", "cifar10"), "need a root, the folder that has them, got None"),
        (("--learning-rate", "0"), "learning_rate must be positive, got 0.0"),
        (("--round-steps", "2", "--batch-size", "4", "--learning-rate", "-1"), "must be positive"),
        (("--device", "nonsense"), "--device nonsense cannot be used"),
        (("--levels", "2", "1"), "levels must be at least 1 and rise"),
    ],
)
def test_bad_calls(more, said, whole, tmp_path, capsys):
    import re

    out = tmp_path / "out"
    assert main(arguments(out, *more)) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not out.exists()


def test_autoattack(whole, tmp_path, monkeypatch, capsys):
    """Asked for, it is a figure of its own, of runs of their own."""
    call = arguments(tmp_path, "--autoattack", "--drawings", "one-shot", "--levels", "1")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name != "pyautoattack" or None)
        assert main(call) == 2
    assert "pip install memtl[robust]" in capsys.readouterr().err
    asked = []

    def attack(model, split, eps, norm):
        asked.append((len(split), eps, norm))
        return 0.25

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(work, "autoattack", attack)
    assert main(call) == 0
    found = runs(tmp_path)
    assert asked == [(12, 0.1, "linf")] * 8 and len(found) == 8
    assert {run.autoattack for run in found.values()} == {0.25}
    assert {key.measured_by for key in found} == {"PGD-20, L-inf 0.1, AutoAttack"}
    assert "Accuracy under AutoAttack" in (tmp_path / "report.html").read_text()
    plain = {dataclasses.replace(key, measured_by="PGD-20, L-inf 0.1") for key in found}
    assert plain <= runs(whole).keys()
    assert {run.autoattack for run in runs(whole).values()} == {None}


def test_checkpoints_have_no_source(tmp_path, capsys):
    call = ["doublewin", "--data", "cifar10", "--root", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main([*call, "--pretrainings", f"mine={tmp_path}/x.pt"]) == 2
    text = capsys.readouterr().err
    assert "ask for the images that networks were pre-trained on" in text
    assert "here; one-shot, random, iterative-target, " in text
    assert "iterative" in text and not (tmp_path / "o").exists()


def test_checkpoints_on_pictures(tmp_path, monkeypatch):
    """The whole way of real data but for the files, whose reading has tests of its own."""
    timm = pytest.importorskip("timm")
    generator = torch.Generator().manual_seed(3)

    def pictures(n: int) -> Split:
        images = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(Pixels(images, 32), torch.arange(n) % 10)

    task = Task("cifar10", 10, pictures(40), pictures(10), pictures(10))
    monkeypatch.setattr(domain, "task", lambda _: task)
    checkpoints = []
    for name in ("natural", "robust"):
        torch.manual_seed(len(name))
        torch.save(timm.create_model("resnet18").state_dict(), tmp_path / f"{name}.pt")
        checkpoints.append(f"{name}={tmp_path / name}.pt")
    call = [
        *arguments(tmp_path / "out", "--data", "cifar10", "--root", str(tmp_path), "--percents"),
        *("50", "--drawings", "one-shot", "iterative-target", "--levels", "1", "--arch"),
        *("resnet18", "--size", "32", "--json", str(tmp_path / "all.json")),
        *("--pretrainings", *checkpoints),
    ]
    assert main(call) == 0
    found = runs(tmp_path / "out")
    assert len(found) == 2 * 2 * (1 + 2)
    assert {key.pretraining for key in found} == {"natural", "robust"}
    assert {key.measured_by for key in found} == {"PGD-20, L-inf 0.0313725"}
    assert {run.auc_letters for run in found.values()} == {None}
    assert {run.error for run in found.values()} == {None}
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["domain_gap"] == {} and record["data"]["name"] == "cifar10"
    assert len({*record["networks"].values()}) == 2
    here = domain.Domain("cifar10", tmp_path, (("natural", f"{tmp_path}/natural.pt"),), "resnet18")
    assert here.build("natural", 0).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "one architecture" in page and "glyphs" not in page
    weights = torch.load(tmp_path / "natural.pt")
    other = {f"model.{name}": x for name, x in weights.items()}
    other |= {f"normalizer.new_{kind}": torch.full((3, 1, 1), 0.5) for kind in ("mean", "std")}
    torch.save(other, tmp_path / "other.pt")  # the same weights, for other images
    there = dataclasses.replace(here, networks=(("natural", f"{tmp_path}/other.pt"),))
    assert there.build("natural", 0).mean.flatten().tolist() == [0.5] * 3
    assert record["networks"]["natural"] == domain.fingerprint_of_network(here, "natural")
    assert record["networks"]["natural"] != domain.fingerprint_of_network(there, "natural")


def test_one_thing_instead_at_a_time(tmp_path, capsys):
    for pair in (("--tune", "--plan"), ("--tune", "--report"), ("--plan", "--report")):
        with pytest.raises(SystemExit):
            main(arguments(tmp_path / "out", *pair))
        assert "not allowed with argument" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tickets_stay_in_their_folder(tmp_path):
    setup = Setup(tmp_path)
    shipped = setup.folder(Draw("pgd", "iterative-adversarial", 2, 0))
    assert shipped.name.startswith("pgd-iterative-adversarial-")
    networks = (("../../mine", "x.pt"),)
    setup = Setup(tmp_path, domain.Domain("cifar10", tmp_path, networks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain, "fingerprint_of_network", lambda *_: "of it")
        patch.setattr(domain, "source", lambda _: domain.task(setup.domain).test)
        folder = setup.folder(Draw("../../mine", "iterative", 2, 0))
    assert folder.parent == tmp_path / "tickets" and folder.name.startswith("-mine-iterative-")


def test_a_higher_level_goes_on_from_the_tickets_that_are_there(whole, tmp_path, monkeypatch):
    """And runs of the lower ones stay what they are."""
    few = ("--pretrainings", "pgd", "--regimes", "standard", "--drawings", "iterative-adversarial")
    assert main(arguments(tmp_path, *few, "--levels", "1")) == 0
    (folder,) = (tmp_path / "tickets").iterdir()
    first = (folder / "round-01.safetensors").stat().st_mtime_ns
    assert main(arguments(tmp_path, *few, "--levels", "1", "2")) == 0
    assert [*(tmp_path / "tickets").iterdir()] == [folder]
    assert (folder / "round-01.safetensors").stat().st_mtime_ns == first
    found = runs(tmp_path)
    assert len(found) == 3 and found.items() <= runs(whole).items()
    assert main(arguments(tmp_path, *few, "--levels", "1")) == 0
    assert runs(tmp_path) == found


def test_a_drawing_that_diverges_leaves_what_needs_none(whole, tmp_path, monkeypatch, capsys):
    def diverges(*_):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr("memtl.doublewin.command.draw", diverges)
    assert main(arguments(tmp_path, "--pretrainings", "pgd", "--regimes", "standard")) == 1
    assert "the loss is nan" in capsys.readouterr().err
    found = runs(tmp_path)
    assert [key.drawing for key in found] == ["dense", "one-shot", "one-shot"]
    assert found.items() <= runs(whole).items()


def test_the_same_part_of_the_data_for_all():
    here = domain.Domain()
    a, b = domain.part(here, 10), domain.part(dataclasses.replace(here), 10)
    assert torch.equal(a.images, b.images)
    counts = a.labels.bincount()
    assert len(a) == 100 and counts.max() - counts.min() <= 1
    first = domain.part(dataclasses.replace(here, subset="first"), 10)
    assert torch.equal(first.images, domain.task(here).train.images[:100])


def test_the_head_alone_depends_on_the_seed():
    here = domain.Domain()
    one, two = (dict(here.build("standard", seed).named_parameters()) for seed in (0, 1))
    assert [name for name in one if not torch.equal(one[name], two[name])] == [
        "model.classifier.weight", "model.classifier.bias",
    ]  # fmt: skip


def test_runs_have_no_seed_of_a_drawing():
    from memtl.doublewin.experiments import DRAWING_SEED
    from memtl.doublewin.plan import Plan

    cells = Plan(("standard",), seeds=20).cells()
    assert DRAWING_SEED not in {cell.seed for cell in cells}
    assert Cell("standard", "dense", 0, "standard", 100, 0) in cells
