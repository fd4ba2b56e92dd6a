"""Rep-Net and lite residual modules: nothing at first, then the papers' formulas, at few bytes."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import LiteResidualConfig, RepNetConfig, memory
from memtl.methods.base.side import SideModule
from memtl.nn.layers import Layer
from tests.helpers import assert_same
from tests.methods.convnets import CLASSES, NAMES, SIZE, build, images, moved
from tests.methods.models import assert_close, gradients, trained

pytest.importorskip("timm")

CONFIGS = {"rep_net": RepNetConfig, "lite_residual": LiteResidualConfig}
both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def applied(config, name="mobilenetv2_035", spread=True, **fields):
    """With modules that add something."""
    model = build(name)
    memtl.apply(model, config(**{"image_size": SIZE, **fields}))
    if spread:
        moved(model.get_submodule(config.name))
    return model


@both
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_at_first_the_model_is_what_it_was(name, mode, config):
    model, x = build(name), images()
    with torch.no_grad():
        before = model(x)
    memtl.apply(model, config(image_size=SIZE))
    assert_same(model.train(mode)(x).detach(), before)


def test_the_modules_of_rep_net_are_the_papers():
    model = build("mobilenetv2_100")
    memtl.apply(model, RepNetConfig())
    shapes = []
    for module in model.rep_net:
        conv, last = module.conv1, module.conv2
        pool = module.pool.kernel_size
        shapes.append((conv.in_channels, conv.out_channels, last.out_channels))
        shapes[-1] += (pool, conv.kernel_size[0], conv.groups)
        assert conv.stride == (1, 1) and conv.bias is None and last.bias is None
        assert module.bn1.eps == module.bn2.eps == 1e-3
        assert not module.bn2.weight.any() and module.bn1.weight.eq(1).all()
    # in, middle, out, pooling, kernel, groups; the stem reads the image at 1/8 of its size
    assert shapes == [
        (3, 8, 24, 8, 5, 1),
        (24, 24, 32, 2, 5, 2),
        (32, 32, 64, 2, 5, 2),
        (64, 64, 96, 2, 5, 2),
        (96, 96, 160, 2, 3, 2),
        (160, 160, 320, 2, 3, 2),
    ]


def test_the_modules_of_lite_residual_are_the_papers():
    model = build("mobilenetv2_100")
    memtl.apply(model, LiteResidualConfig())
    assert len(model.lite_residual) == 16  # every block but the one at half the image's size
    first, *_, last = model.lite_residual
    assert first.conv1.kernel_size == (5, 5) and first.conv1.stride == (2, 2)
    assert first.pool.kernel_size == 2 and first.conv1.groups == 2
    assert last.conv1.kernel_size == (3, 3) and last.conv1.stride == (1, 1)  # 7x7 pooled is 3x3
    assert not any(module.bn2.bias.requires_grad for module in model.lite_residual)


def standardized(w):
    w = w - w.mean((1, 2, 3), keepdim=True)
    return w / (w.std((1, 2, 3), keepdim=True) + 1e-5)


def batch_norm(bn, x):
    """In training, by the batch."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = x.var((0, 2, 3), keepdim=True, unbiased=False)
    x = (x - mean) / (var + bn.eps).sqrt()
    return x * bn.weight[:, None, None] + bn.bias[:, None, None]


def module_formula(module, x, size, standardize=True):
    weight = standardized if standardize else lambda w: w
    conv1, conv2 = module.conv1, module.conv2
    x = F.avg_pool2d(x, module.pool.kernel_size)
    half = conv1.kernel_size[0] // 2
    x = F.conv2d(x, weight(conv1.weight), None, conv1.stride, half, groups=conv1.groups)
    x = batch_norm(module.bn1, x).clamp_min(0)
    x = batch_norm(module.bn2, F.conv2d(x, weight(conv2.weight)))
    return F.interpolate(x, size, mode="bilinear")


@pytest.mark.parametrize("standardize", [True, False], ids=["standardized", "plain"])
def test_rep_net_is_the_formula(standardize):
    model = applied(RepNetConfig, weight_standardization=standardize).double().train()
    x = images().double()
    memory_of_image = x
    y = model.bn1(model.conv_stem(x))
    modules = iter(model.rep_net)
    for index, stage in enumerate(model.blocks):
        for place, block in enumerate(stage):
            hooks = dict(block._forward_hooks)
            block._forward_hooks.clear()
            out = block(y)
            block._forward_hooks.update(hooks)
            if index and not place:
                reads = memory_of_image if index == 1 else y
                out = out + module_formula(next(modules), reads, out.shape[2:], standardize)
            y = out
    expected = model.classifier(model.global_pool(model.bn2(model.conv_head(y))))
    assert next(modules, None) is None
    assert_close(model(x), expected, 1e-10)


def test_lite_residual_is_the_formula():
    model = applied(LiteResidualConfig, "resnet18").double().train()
    x = images().double()
    y = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    modules = iter(model.lite_residual)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            hooks = dict(block._forward_hooks)
            block._forward_hooks.clear()
            out = block(y)
            block._forward_hooks.update(hooks)
            y = out + module_formula(next(modules), y, out.shape[2:])
    assert next(modules, None) is None
    assert_close(model(x), model.fc(model.global_pool(y)), 1e-10)


def test_convnext_modules_read_what_comes_into_the_stage():
    model = applied(RepNetConfig, "convnext_atto").double().eval()
    x, seen = images().double(), {}
    model.stages[2].register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    model.rep_net[2].register_forward_pre_hook(lambda m, args: seen.update(read=args[0]))
    model(x)
    assert seen["x"] is seen["read"] and seen["x"].shape[1] == 80


@both
def test_what_trains(config):
    model = applied(config)
    own = {n for n in trained(model) if n.startswith((f"{config.name}.", "classifier."))}
    if config is RepNetConfig:
        assert trained(model) == own
    else:  # biases of the network too
        others = trained(model) - own
        assert others and all(n.endswith("bias") for n in others)
        assert "bn1.bias" in others and "blocks.3.0.bn3.bias" in others
    model.train()
    with_training = {n for n, m in model.named_modules() if m.training}
    outside = (config.name, "classifier")
    assert {n for n in with_training if n and not n.startswith(outside)} == set()
    assert f"{config.name}.0.bn1" in with_training


@both
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("mobilenetv2_035", False),
        ("mobilenetv2_035", True),
        ("mobilenetv3_small_050", True),
        ("resnet18", False),
        ("convnext_atto", True),
        ("regnetx_002", False),
    ],
)
def test_gradients_are_those_of_pytorch_and_bytes_are_fewer(name, bias, config):
    x, saved = images().double(), {}  # batch norms of a few pixels magnify what is rounded
    stock = applied(config, name, bias=bias, convert=False).double().train()
    assert not any(isinstance(m, Layer) for m in stock.modules())
    model = applied(config, name, bias=bias)
    model.double().load_state_dict(stock.state_dict())
    model.train()
    for kind, m in (("stock", stock), ("ours", model)):
        with memory.SavedTensors(m) as tensors:
            m(x)
        saved[kind] = tensors.bytes
    expected = gradients(stock, x)
    found = gradients(model, x)
    assert found.keys() == expected.keys() == trained(model)
    for key, gradient in found.items():
        assert_close(gradient, expected[key], 1e-7)
    assert saved["ours"] < 0.75 * saved["stock"]


def test_what_rep_net_keeps_of_mobilenetv2():
    model = build("mobilenetv2_100", num_classes=102)
    memtl.apply(model, RepNetConfig())
    model.train()
    with memory.SavedTensors(model) as tensors:
        model(images(1, 224))
    by_layer = {n: b for n, b in tensors.by_layer.items() if not n.startswith("rep_net")}
    masks = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU6) and name in by_layer:
            del by_layer[name]
            masks += 1
    assert masks > 30
    assert by_layer == {"classifier": 4 * 1280}  # its input; frozen layers keep nothing
    assert tensors.bytes < 5 * 2**20 / 2


@both
def test_bad_configurations(config):
    for fields, error, message in (
        ({"expand": 0}, ValueError, "expand must be positive and finite, got 0"),
        ({"expand": "1"}, TypeError, "expand must be a number, got str"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"bias": 1}, TypeError, "bias must be a bool, got int"),
        ({"convert": None}, TypeError, "convert must be a bool, got NoneType"),
        ({"weight_bits": 4}, ValueError, "weight_bits must be None or 8, got 4"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            config(**fields)
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        LiteResidualConfig(kernel=4)


@both
def test_a_network_without_stages_is_refused_and_left_alone(config):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="VisionTransformer has no stages"):
        memtl.apply(model, config())
    assert [p.requires_grad for p in model.parameters()] == before
    assert not hasattr(model, config.name) and memtl.methods.applied(model) == ()
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got NoneType"):
        memtl.apply(None, config())
    model = applied(config)
    with pytest.raises(ValueError, match=f"has a {config.name} already"):
        memtl.apply(model, config(image_size=SIZE))
    with pytest.raises(ValueError, match="a method that trains a part of this"):
        memtl.apply(model, memtl.BitFitConfig())


@both
def test_a_small_image(config):
    model = build()
    memtl.apply(model, config(image_size=32))
    moved(model.get_submodule(config.name))
    assert model.train()(images(4, 32)).isfinite().all()  # maps of one pixel at the end


@both
def test_other_sizes_than_it_was_made_for(config):
    model = applied(config).eval()
    for size in (48, 72, 97):
        assert model(images(2, size)).shape == (2, CLASSES)


@both
def test_batch_norms_of_the_network_do_not_move(config):
    model, x = applied(config), images(4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    moves = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    own = {n for n in moves if n.startswith((config.name, "classifier"))}
    assert f"{config.name}.1.bn1.running_mean" in own and f"{config.name}.0.conv1.weight" in own
    assert all(n.endswith("bias") for n in moves - own)


@both
def test_copies_and_threads(config):
    model, x = applied(config).eval(), images()
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied(x), expected)
        with torch.no_grad():  # its own modules, not those of the original
            copied.get_submodule(config.name)[1].bn2.bias.add_(1)
        assert not torch.equal(copied(x), expected)
        assert_same(model(x), expected)
    inputs = [images() for _ in range(4)]
    wanted = [model(i).detach() for i in inputs]
    got: dict[int, torch.Tensor] = {}

    def run(index):
        for _ in range(5):
            got[index] = model(inputs[index]).detach()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, value in got.items():
        assert_close(value, wanted[index], 1e-6)


@both
def test_saved_and_loaded(config, tmp_path):
    torch.manual_seed(7)
    model = applied(config, num_classes=3)
    memtl.save(model.eval(), tmp_path)
    torch.manual_seed(7)
    again = build()
    memtl.load(again, tmp_path)
    x = images()
    assert_same(again.eval()(x), model(x))
    names = set(again.state_dict())
    assert names == set(model.state_dict())
    assert {n for n in names if not n.startswith((config.name, "classifier"))} == {
        n for n in build().state_dict() if not n.startswith("classifier")
    }


@both
def test_a_conversion_of_ones_own_comes_first(config):
    model, x = build(), images()
    memtl.apply(model, memtl.LowBitConfig(bits=8))
    memtl.apply(model, config(image_size=SIZE))
    kinds = {type(m).memtl_layer for m in model.blocks.modules() if isinstance(m, Layer)}
    assert kinds  # as it was
    assert not any(isinstance(m, Layer) for m in model.get_submodule(config.name).modules())
    model.train()(x).sum().backward()


@both
def test_compiled(config):
    torch._dynamo.reset()
    model, x = applied(config, "resnet10t").double().train(), images().double()
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    y = compiled(x)
    generator = torch.Generator().manual_seed(0)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, expected[name], 1e-7)


def test_checkpointed():
    model, x = applied(RepNetConfig, bias=True).double().train(), images().double()
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    for name, gradient in gradients(model, x).items():
        assert_close(gradient, expected[name], 1e-7)
    # Where a region is run again whole, what the stem's module made for it is gone.
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        with pytest.raises(RuntimeError, match="cannot be checkpointed here"):
            model(x).sum().backward()
    model.set_grad_checkpointing(False)
    model(x).sum().backward()


def test_images_by_keyword_and_accumulated_gradients():
    model, x = applied(RepNetConfig).train(), images(4)
    single = gradients(model, x)
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        y = model(x=x)
        generator = torch.Generator().manual_seed(0)
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, 2 * single[name], 1e-4)


def test_a_side_module_alone():
    from memtl.methods.base.side import Site

    site = Site("a", "b", (5, 6, 6), (3, 6, 6), pool=2, kernel=3)
    module = SideModule(RepNetConfig(groups=2), site)
    assert module.conv1.groups == 1  # 5 channels cannot be halved
    assert module(torch.randn(2, 5, 6, 6)).shape == (2, 3, 3, 3)


class Overwriting(nn.Module):
    """A block that begins with an activation in place."""

    def __init__(self, channels):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return self.conv(self.act(x))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stages = nn.Sequential(nn.Sequential(*(Overwriting(8) for _ in range(2))))
        self.head = nn.Linear(8, CLASSES)
        self.feature_info = [{"module": "stages.0", "num_chs": 8, "reduction": 4}]

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def test_a_module_reads_what_its_block_reads_though_the_block_changes_it():
    model, x = PreActivation(), images().double()
    memtl.apply(model, LiteResidualConfig(image_size=SIZE))
    moved(model.lite_residual)
    model.double().train()
    y = model.stem(x)
    for block, module in zip(model.stages[0], model.lite_residual, strict=True):
        y = block.conv(y.clamp_min(0)) + module_formula(module, y, y.shape[2:])
    assert_close(model(x), model.head(y.mean((2, 3))), 1e-10)


@both
@pytest.mark.parametrize("fields", [{"weight_bits": 8}, {"groups": 64}], ids=str)
def test_what_fails_changes_nothing(config, fields):
    model, x = build(), images()
    expected = model(x).detach()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    weight = model.blocks[3][0].conv_pw.weight
    if "weight_bits" in fields:
        value = weight[0, 0].clone()
        weight.data[0, 0] = float("nan")
    elif config is RepNetConfig:
        pytest.skip("its kernels are never of one element")
    with pytest.raises(ValueError, match=r"blocks.3.0.conv_pw.weight|needs two elements"):
        memtl.apply(model, config(image_size=32, num_classes=3, **fields))
    if "weight_bits" in fields:
        weight.data[0, 0] = value
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same(model(x).detach(), expected)
    memtl.apply(model, config(image_size=SIZE))  # and again, with success
    assert_same(model(x).detach(), expected)


def test_a_name_that_is_taken():
    model = build()
    model.rep_net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has a rep_net already"):
        memtl.apply(model, RepNetConfig(image_size=SIZE))
    assert isinstance(model.rep_net, nn.Linear)


@both
def test_grey_images(config):
    model = build(in_chans=1)
    memtl.apply(model, config(image_size=SIZE))
    assert model(torch.randn(2, 1, SIZE, SIZE)).shape == (2, CLASSES)


@both
@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet18", "convnext_atto"])
def test_a_network_that_is_checkpointed_already(config, name):
    plain, model = build(name), build(name)
    model.load_state_dict(plain.state_dict())
    model.set_grad_checkpointing()
    for m in (plain, model):
        memtl.apply(m, config(image_size=SIZE))
    key = config.name
    assert model.get_submodule(key).sites == plain.get_submodule(key).sites


@both
def test_smaller_and_narrower_images_than_it_was_made_for(config):
    model = applied(config, image_size=224).eval()
    for height, width in ((32, 32), (64, 48), (40, 97)):
        assert model(torch.randn(2, 3, height, width)).shape == (2, CLASSES)


@both
def test_one_small_image_in_training(config):
    model = applied(config).train()
    with pytest.raises(ValueError, match="takes more than one image"):
        model(images(1, 32))
    model.eval()(images(1, 32))


def test_a_forward_that_did_not_end_leaves_nothing():
    model, x = applied(RepNetConfig), images()
    expected = model.eval()(x).detach()
    handle = model.blocks[1][0].register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert model.rep_net.state.now.maps
    assert_same(model(x).detach(), expected)
    assert not model.rep_net.state.now.maps


def test_channels_are_rounded_as_published():
    from memtl.methods.base.side import divisible

    assert [divisible(c) for c in (3, 8, 20, 24, 36, 52, 96)] == [8, 8, 24, 24, 40, 56, 96]


@both
def test_statistics_of_a_norm_that_was_put_into_training_are_saved(config, tmp_path):
    model, x = applied(config), images(4)
    base = build()
    base.load_state_dict({n: t for n, t in model.state_dict().items() if config.name not in n})
    model.train()
    model.bn1.train()
    before = model.bn1.running_mean.clone()
    model(x)
    assert not torch.equal(model.bn1.running_mean, before)
    memtl.save(model, tmp_path)
    memtl.load(base, tmp_path)
    assert_same(base.eval()(x).detach(), model.eval()(x).detach())


@both
def test_a_compiled_model_is_refused(config):
    model = torch.compile(build())
    with pytest.raises(ValueError, match="apply the method first, torch.compile"):
        memtl.apply(model, config(image_size=SIZE))
