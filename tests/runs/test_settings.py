"""The settings of a run: where they come from, what is wrong with them."""

from __future__ import annotations

import pytest

from memtl import BackRazorConfig, CheckpointConfig, FrozenConfig, LowBitConfig
from memtl.runs import RunSettings
from memtl.runs import settings as s
from memtl.runs.lora import LoRA
from memtl.storage import Quantized

GIVEN = {"model": "vit", "data": "digits"}


def of(*words: str, **given: object) -> RunSettings:
    return s.read(s.override({**GIVEN, **given}, words))


def test_a_word_of_the_line_in_every_way():
    read = of("--batch-size", "16", "steps=3", "--learning_rate=1e-4", "--compile", "seed=7")
    assert (read.batch_size, read.steps, read.learning_rate) == (16, 3, 1e-4)
    assert read.compile is True and read.seed == 7 and read.epochs is None
    assert of().epochs == 10.0
    assert of("--batch-size", "16", "batch_size=8").batch_size == 8  # the last one
    assert of("--pretrained", "false").pretrained is False
    assert of("pretrained=weights.pth").pretrained == "weights.pth"
    assert of("data=2024").data == "2024"  # a folder may be called so
    assert of("clip_norm=none", clip_norm=3).clip_norm is None


def test_a_file_and_the_line_on_top(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: vit\ndata: digits\nlearning_rate: 3e-4\nsteps: 5\nmethod: low-bit\n")
    read = s.read(s.override(s.read_file(path), ["steps=6", "method.bits=3"]))
    assert read.learning_rate == 3e-4  # which is a string to YAML
    assert read.steps == 6 and read.method == (LowBitConfig(bits=3),)
    s.write_file(tmp_path / "again.yaml", read)
    assert s.read(s.read_file(tmp_path / "again.yaml")) == read


def test_methods():
    assert of().method == () and of().methods == "full"
    assert of("--method", "full").method == of("method=none").method == ()
    assert of("--method", "back-razor", "method.keep=0.05").method == (BackRazorConfig(keep=0.05),)
    small = of("--method.preset=small", "--method.norm", "none", method="back-razor").method[0]
    assert small.linear == BackRazorConfig.preset("small").linear and small.norm is None
    several = of(method=[{"method": "bitfit"}, "frozen"])
    assert [config.method for config in several.method] == ["bitfit", "frozen"]
    assert several.methods == "bitfit + frozen"
    formats = of(method={"method": "back_razor", "norm": Quantized(2).to_dict()})
    assert formats.method[0].norm == Quantized(2)
    assert of(method=FrozenConfig(linear=8)).method == (FrozenConfig(linear=8),)


@pytest.mark.parametrize("method", [[], ["bitfit", "frozen"], "back-razor", FrozenConfig(norm=4)])
def test_what_is_written_reads_back(method, tmp_path):
    read = of("ema=0.9", "epochs=3", "--fsdp", "lora.targets=qkv", method=method)
    s.write_file(tmp_path / "run.yaml", read)
    assert s.read(s.read_file(tmp_path / "run.yaml")) == read


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learing_rate=1"], "unknown setting 'learing_rate': did you mean 'learning_rate'?"),
        (["--zzz", "1"], "unknown setting 'zzz'"),
        (["steps"], "expected --setting value or setting=value, got 'steps'"),
        (["steps=many"], "steps must be int or none, got 'many'"),
        (["steps=1.5"], "steps must be int or none, got '1.5'"),
        (["batch_size=none"], "batch_size must be int, got 'none'"),
        (["compile=3"], "compile must be bool, got '3'"),
        (["seed=true"], "seed must be int, got 'true'"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["steps=3", "epochs=2"], "epochs and steps say the same thing twice"),
        (["epochs=0"], "epochs must be positive, got 0"),
        (["batch_size=0"], "batch_size must be at least 1, got 0"),
        (["learning_rate=-1"], "learning_rate must be positive"),
        (["optimizer=lion"], "optimizer must be one of adamw, adam, sgd"),
        (["precision=half"], "precision must be fp32, bf16 or fp16, got half"),
        (["ema=1"], "ema must be between 0 and 1"),
        (["workers=-1"], "workers must be at least 0"),
        (["val_fraction=1"], "val_fraction must be between 0 and 1"),
        (["method=backrazor"], "unknown method 'backrazor': did you mean 'back_razor'?"),
        (["method=back-razor", "method.kep=1"], "'back_razor' has no option 'kep': .*'keep'"),
        (["method=back-razor", "method.keep=2"], r"keep must be in \(0, 1\], got 2"),
        (["method=bitfit", "method.preset=small"], "'bitfit' has no presets"),
        (["method=lora"], "lora is a setting of its own.*--lora 8"),
        (["method=bitfit,frosen"], "unknown method 'frosen': did you mean 'frozen'?"),
        (["method=low-bit,checkpoint", "method.bits=4"], "several of .* have it: method.NAME.bits"),
        (["method=low-bit,checkpoint", "method.vpt.bits=4"], "none of low_bit, checkpoint has it"),
        (["lora=0"], "lora.rank must be at least 1, got 0"),
        (["lora=x"], "lora.rank must be an int"),
        (["lora.aplha=1"], "lora has no option 'aplha': did you mean 'alpha'?"),
        (["lora.alpha=0"], "lora.alpha must be positive"),
        (["lora.alpha=x"], "lora.alpha must be a number or none, got 'x'"),
        (["lora.dropout=1"], r"lora.dropout must be in \[0, 1\), got 1"),
        (["lora.targets=a,,b"], "lora.targets must be names of layers, with a comma"),
        (["lora.targets=3"], "lora.targets must be names of layers or none, got 3"),
        (["method.keep=0.1"], "method 'full' has no options, got .'keep'"),
        (["data.size=3"], "data has no options of its own"),
        (["model="], "model must be given: --model NAME"),
    ],
)
def test_what_is_wrong_is_said(words, said):
    with pytest.raises((TypeError, ValueError), match=said):
        of(*words)


def test_several_methods_on_the_line():
    read = of("method=back-razor,checkpoint", "method.keep=0.1", "method.bits=4")
    assert read.method == (BackRazorConfig(keep=0.1), CheckpointConfig(bits=4))
    assert read.methods == "back_razor + checkpoint"
    words = (
        "method.checkpoint.bits=none",
        "method.low-bit.bits=2",
        "--method",
        "low-bit,checkpoint",
    )
    assert of(*words).method == (LowBitConfig(bits=2), CheckpointConfig(bits=None))
    preset = of("method.preset=small", "method=back-razor,checkpoint").method[0]
    assert preset == BackRazorConfig.preset("small")


def test_lora():
    assert of().lora is None and of("lora=none").lora is None
    assert of("--lora").lora == of("lora.alpha=none").lora == LoRA(rank=8)
    read = of("--lora", "4", "lora.targets=qkv,proj", "lora.alpha=16", "method=frozen")
    assert read.lora == LoRA(rank=4, targets=("qkv", "proj"), alpha=16)
    assert read.methods == "lora + frozen" and of("lora=4").methods == "lora"
    assert of(lora={"rank": 4, "targets": ["qkv", "proj"], "alpha": 16}).lora == read.lora
    assert s.differences(of("lora=4"), of("lora=8")) == ["lora"]


def test_options_of_one_of_several_methods():
    with pytest.raises(ValueError, match="none of bitfit, frozen has it"):
        of("method.bits=3", method=["bitfit", "frozen"])
    assert of("method.bits=3", method=["low-bit"]).method == (LowBitConfig(bits=3),)


def test_a_file_that_is_no_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must have lines of `setting: value`"):
        s.read_file(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        s.read_file(path)


def test_differences_are_those_that_change_a_run():
    assert s.differences(of(), of("workers=2", "keep=5", "device=cpu", "tensorboard=true")) == []
    assert s.differences(of(), of("seed=1", "batch_size=4", "save_every=1")) == [
        "batch_size",
        "seed",
    ]
    assert s.differences(of(method="back-razor"), of("method=back-razor", "method.keep=0.1")) == []


def test_epochs_are_turned_into_steps():
    assert of("epochs=3", "batch_size=10").training(100).steps == 30
    assert of("epochs=3", "batch_size=10", "accumulate=2").training(100, 3).steps == 5
    assert of("epochs=0.01", "batch_size=10").training(100).steps == 1
    assert of("steps=7").training(100).steps == 7
