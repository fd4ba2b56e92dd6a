"""The ``memtl`` command."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import memtl
from memtl import _ops, bench
from memtl.cli import COMMANDS, main, overview
from tests.helpers import ROOT


def test_what_there_is_without_a_command(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    for flag in ("--help", "-h", "help"):
        assert main([flag]) == 0
        assert capsys.readouterr().out == alone
    lines = alone.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.help.split()] for line in lines)


def test_the_script_says_what_there_is_without_torch():
    program = (
        "import memtl_command, sys; sys.argv = ['memtl', '--help']; memtl_command.main(); "
        "assert not {'torch', 'memtl'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{overview()}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "memtl", "--help"], stdout=writing, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_pipe_of_the_commands_own_that_breaks_is_an_error(monkeypatch):
    def broken(argv):
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(memtl.cli, "doctor", broken)
    with pytest.raises(BrokenPipeError, match="a worker has gone"):
        main(["doctor"])


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    for op in _ops.NAMES:
        assert op in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memtl {memtl.__version__}\n"


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "memtl", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "operator" in done.stdout


HERE = [n for n, c in COMMANDS.items() if importlib.util.find_spec("memtl" + c.module)]
"""Commands whose module is in this tree."""


@pytest.mark.parametrize("name", HERE)
def test_every_command_says_what_it_takes(name, capsys):
    try:
        status = main([name, "--help"])
    except SystemExit as exit:  # argparse's
        status = exit.code
    assert not status
    assert f"usage: memtl {name}" in capsys.readouterr().out


def test_the_table_names_functions_that_there_are():
    for name in HERE:
        command = COMMANDS[name]
        module = importlib.import_module("memtl" + command.module)
        assert callable(getattr(module, command.function))


@pytest.fixture
def tiny_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128,
    ).save_pretrained(tmp_path)  # fmt: skip
    return f"hf:{tmp_path}"


def row(text, label):
    return next(line for line in text.splitlines() if line.startswith(label)).split()


def test_profile_of_a_configuration_on_disk(tiny_bert, capsys):
    assert main(["profile", tiny_bert, "--tokens", "20", "--batch-size", "2", "--coverage"]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.*.intermediate.dense x2" in text  # the coverage table
    stock, converted, ratio = row(text, "saved for backward")[-3:]
    assert float(stock) > 5 * float(converted)
    assert ratio.endswith("x")
    assert float(row(text, "seconds of a step")[-2]) > 0


def test_profile_of_a_timm_model_by_preset(capsys):
    pytest.importorskip("timm")
    assert main(["profile", "vit_tiny_patch16_224", "--preset", "paper", "--keep", "0.2"]) == 0
    assert row(capsys.readouterr().out, "saved for backward")[-3] == "28.63"  # MiB


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope_patch16"], "timm has no model 'nope_patch16'"),
        (["vit_tiny_patch16_224", "--keep", "0"], "keep must be in (0, 1], got 0"),
        (["vit_tiny_patch16_224", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["hf:nope"], "nope"),
    ],
)
def test_profile_says_what_is_wrong(arguments, said, capsys):
    assert main(["profile", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("memtl profile: ")
    assert captured.out == ""


def test_profile_by_other_methods(tiny_bert, capsys):
    line = ["profile", tiny_bert, "--tokens", "20"]
    kept = []
    for options in (["low-bit", "--bits", "8"], ["low-bit"], ["frozen"], ["frozen", "--bits", "4"]):
        assert main([*line, "--method", *options]) == 0
        kept.append(float(row(capsys.readouterr().out, "saved for backward")[-2]))
    assert kept[1] < kept[0] < kept[2] and kept[3] < kept[2]


def test_profile_of_checkpointed_blocks(tiny_bert, capsys):
    line = ["profile", tiny_bert, "--tokens", "20", "--method"]
    kept = []
    for method in ("back-razor", "checkpoint", "back-razor,checkpoint"):
        assert main([*line, method, "--coverage"]) == 0
        text = capsys.readouterr().out
        assert ("input 8-bit" in text) == ("checkpoint" in method)
        kept.append(float(row(text, "saved for backward")[-2]))
    assert kept[2] < kept[0] and kept[2] < kept[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["low-bit", "--keep", "0.1"], "--keep is no option of --method low-bit"),
        (["low-bit,checkpoint", "--bits", "8"], "--bits is an option of each method in"),
        (["back_razor"], "--method must be among back-razor, low-bit, frozen, checkpoint, got 'b"),
        (["checkpoint,low-bit"], "already converted"),
    ],
)
def test_profile_of_methods_that_do_not_go(options, said, tiny_bert, capsys):
    assert main(["profile", tiny_bert, "--method", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "memtl: there is no command 'trian': do you mean train?"),
        (["xyzzy"], "memtl: there is no command 'xyzzy': there are doctor, profile"),
        (["bench", "fidelty"], "memtl bench: there is no measurement 'fidelty': do you mean fid"),
        (["bench", "xyzzy"], "there are fidelity, kernels, training"),
    ],
)
def test_an_unknown_command(arguments, said, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said) or said in captured.err
    assert captured.out == ""


def test_bench_says_what_there_is(capsys):
    assert main(["bench"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("fidelity", *bench.SCRIPTS))


def test_bench_runs_the_scripts_of_a_checkout(monkeypatch, tmp_path, capsys):
    for _, script in bench.SCRIPTS.values():
        assert (bench.CHECKOUT / "benchmarks" / script).is_file()
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench", "kernels"]) == 2
    assert "benchmarks come with memtl's source" in capsys.readouterr().err
    script = tmp_path / "benchmarks" / "kernels" / "table.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    assert main(["bench", "kernels", "7"]) == 7


def test_the_demo_gets_the_rest_of_the_line(tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["demo", "--quick", "--json", str(path), "--html", str(tmp_path / "page.html")]
    assert main(arguments) == 0
    assert len(json.loads(path.read_text())["methods"]) == 7
