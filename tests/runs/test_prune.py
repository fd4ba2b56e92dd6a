"""``memtl prune``."""

import pytest
import torch

from memtl import Ticket, TicketConfig, assets, draw_ticket
from memtl.cli import main
from memtl.runs.networks import create


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--sparsity", "0.9"], TicketConfig(sparsity=0.9)),
        (["--pattern", "2:4"], TicketConfig(sparsity=0.5, pattern="2:4")),
        (
            ["--sparsity", "0.6", "--scheme", "random", "--seed", "3", "--level", "layer"],
            TicketConfig(sparsity=0.6, scheme="random", seed=3, level="layer"),
        ),
        (
            ["--sparsity", "0.5", "--scope", "blocks.*.mlp.*", "blocks.0.*"],
            TicketConfig(sparsity=0.5, scope=("blocks.*.mlp.*", "blocks.0.*")),
        ),
    ],
    ids=["magnitude", "2:4", "random", "scope"],
)
def test_is_draw_ticket(arguments, config, tmp_path, capsys):
    out = tmp_path / "new" / "ticket"
    if config.pattern == "2:4":  # the patches have one channel
        arguments, config = (
            [*arguments, "--scope", "blocks.*"],
            TicketConfig(sparsity=0.5, pattern="2:4", scope=("blocks.*",)),
        )
    assert main(["prune", "vit", *arguments, "--out", str(out)]) == 0
    ticket = Ticket.load(out / "ticket.safetensors")
    assert ticket.config == config and ticket.values is None
    assert ticket == draw_ticket(assets.load("vit_glyphs"), config)
    text = capsys.readouterr().out
    kept = sum(layer.kept for layer in ticket.layers)
    last = next(line for line in text.splitlines() if line.startswith("all "))
    assert last.split()[1:] == [
        f"{kept:,}", f"{sum(layer.size for layer in ticket.layers):,}",
        f"{100 * ticket.sparsity:.1f}",
    ]  # fmt: skip
    for layer in ticket.layers:
        assert f"{layer.kept:,}" in next(x for x in text.splitlines() if x.startswith(layer.name))


def test_what_it_says_to_do_works(tmp_path, capsys):
    out = tmp_path / "t"
    assert main(["prune", "bert", "--sparsity", "0.5", "--weights", "--out", str(out)]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    model = create("bert", num_classes=4, pretrained=False)
    own = create("bert", num_classes=2).model.base_model.encoder.layer[0].output.dense.weight
    names = {"memtl": __import__("memtl"), "model": model}
    exec("\n".join(said), names)
    weight = model.model.base_model.encoder.layer[0].output.dense.weight
    kept = weight != 0
    assert 0.2 < kept.float().mean() < 0.9
    assert torch.equal(weight[kept], own[kept])
    assert Ticket.of(model) == names["ticket"]


def test_a_file_of_weights(tmp_path):
    torch.save(create("cnn", num_classes=4, pretrained=False).state_dict(), tmp_path / "w.pth")
    line = ["prune", "cnn", "--sparsity", "0.5", "--pretrained", str(tmp_path / "w.pth")]
    assert main([*line, "--out", str(tmp_path / "t")]) == 0
    model = create("cnn", num_classes=2, pretrained=tmp_path / "w.pth")
    expected = draw_ticket(model, TicketConfig(sparsity=0.5))
    assert Ticket.load(tmp_path / "t" / "ticket.safetensors") == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--sparsity must be given"),
        (["--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
        (["--sparsity", "0.9", "--pattern", "blocks"], "pattern must be one of"),
        (["--sparsity", "0.9", "--pattern", "2:4"], "has a sparsity of 1 - 2/4"),
        (["--sparsity", "0.9", "--scope", "nope"], "'nope' matches no weight"),
        (["--sparsity", "0.9", "--pretrained", "/nope.pth"], "there is no file /nope.pth"),
    ],
)
def test_wrong_calls(arguments, said, tmp_path, capsys):
    out = tmp_path / "t"
    assert main(["prune", "vit", *arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("memtl prune: ") and said in captured.err
    assert captured.out == "" and not out.exists()


def test_a_ticket_is_not_overwritten(tmp_path, capsys):
    line = ["prune", "vit", "--sparsity", "0.9", "--out", str(tmp_path)]
    (tmp_path / "ticket.safetensors").write_bytes(b"precious")
    assert main(line) == 2
    assert "is there already: delete it" in capsys.readouterr().err
    assert (tmp_path / "ticket.safetensors").read_bytes() == b"precious"
