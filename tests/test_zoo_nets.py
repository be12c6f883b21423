"""The zoo's networks by name: published counts, documented figures, small images, bad options."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn
from torch.nn import functional as F

import taut
from taut import zoo
from taut.errors import ZooError
from taut.zoo.blocks import Parallel, Residual, Shuffle, conv
from taut.zoo.shufflenet import _Half
from taut.zoo.squeezenet import fire

IMAGES = [n for n in zoo.names() if "language" not in n]
TWINS = {"densenet_169", "densenet_201"}  # they differ from densenet_121 in numbers only
STEMS = [
    n for n in IMAGES if "stem" in getattr(zoo, n).__wrapped__.__kwdefaults__ and n not in TWINS
]


def blank(name, **options):
    """A network without numbers: shapes are all that counting needs."""
    with torch.device("meta"):
        return zoo.create(name, **options).eval()


def images(*shape):
    return torch.zeros(*shape, device="meta")


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def work(net, x):
    """MACs of convolutions and layers, counted from what each gives, and values normed."""
    counts = {"macs": 0, "normed": 0}

    def count(module, _, y):
        if isinstance(module, nn.BatchNorm2d):
            counts["normed"] += y.numel()
        else:
            counts["macs"] += y.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(count)
    net(x)
    return counts["macs"], counts["normed"]


# Figures


def test_names_are_functions_of_the_zoo():
    assert list(zoo.names()) == sorted(n for n in zoo.__all__ if n in zoo.names())
    assert len(zoo.names()) == 25
    lower = {n for n in zoo.__all__ if n == n.lower()} - {"create", "names"}
    assert lower == set(zoo.names())


PUBLISHED = [
    ("lenet_300_100", {}, 266_610),
    ("lenet_5", {}, 431_080),
    ("mobilenet_v1", {}, 4_231_976),
    ("mobilenet_v1", {"width": 0.75}, 2_585_560),
    ("mobilenet_v1", {"width": 0.5}, 1_331_592),
    ("mobilenet_v1", {"width": 0.25}, 470_072),
    ("squeezenet_1_0", {}, 1_248_424),
    ("squeezenet_1_1", {}, 1_235_496),
    ("shufflenet_v1", {"groups": 1}, 1_531_936),
    ("shufflenet_v1", {"groups": 2}, 1_733_848),
    ("shufflenet_v1", {"groups": 3}, 1_865_728),
    ("shufflenet_v1", {"groups": 4}, 1_968_344),
    ("shufflenet_v1", {"groups": 8}, 2_434_768),
    ("shufflenet_v2", {"width": 0.5}, 1_366_792),
    ("shufflenet_v2", {"width": 1}, 2_278_604),
    ("shufflenet_v2", {"width": 1.5}, 3_503_624),
    ("shufflenet_v2", {"width": 2}, 7_393_996),
    ("densenet_121", {}, 7_978_856),
    ("densenet_169", {}, 14_149_480),
    ("densenet_201", {}, 20_013_928),
    ("densenet_bc_100_12", {}, 769_162),
    ("inception_v1", {}, 6_998_552),
    ("inception_v1", {"aux": True}, 13_378_280),
    ("inception_v3", {"aux": True}, 27_161_264),
    ("inception_v3", {}, 23_834_568),
    ("inception_v4", {}, 42_679_816),
    ("resnet_20", {}, 269_722),
    ("resnet_56", {}, 853_018),
    ("resnet_110", {}, 1_727_962),
    ("resnet_18", {}, 11_689_512),
    ("resnet_50", {}, 25_557_032),
    ("nin", {}, 966_986),
]


@pytest.mark.parametrize(("name", "options", "count"), PUBLISHED)
def test_parameters_are_the_published_ones_exactly(name, options, count):
    assert parameters(blank(name, **options)) == count


def test_inception_v2_with_biases_has_the_published_parameters():
    net = blank("inception_v2")
    biases = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    assert parameters(net) + biases == 11_295_240


WORK = [
    ("mobilenet_v1", {}, 568.7),
    ("mobilenet_v1", {"resolution": 192 / 224}, 418.1),
    ("mobilenet_v1", {"resolution": 160 / 224}, 290.7),
    ("mobilenet_v1", {"resolution": 128 / 224}, 186.4),
    ("mobilenet_v1", {"width": 0.75}, 325.4),
    ("mobilenet_v1", {"width": 0.5}, 149.5),
    ("mobilenet_v1", {"width": 0.25}, 41.0),
    ("squeezenet_1_0", {}, 820),
    ("squeezenet_1_1", {}, 350),
    ("shufflenet_v1", {"groups": 3}, 137.5),
    ("shufflenet_v1", {"groups": 8}, 138.4),
    ("shufflenet_v2", {"width": 1}, 146),
    ("inception_v3", {}, 5740),
    ("inception_v4", {}, 12300),
    ("resnet_18", {}, 1814),
    ("resnet_50", {}, 4089),
]


@pytest.mark.parametrize(("name", "options", "millions"), WORK)
def test_work_is_the_published_one(name, options, millions):
    size = 299 if "inception" in name else 224
    macs, _ = work(blank(name, **options), images(1, 3, size, size))
    assert macs == pytest.approx(1e6 * millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("densenet_121", {}, 2870),
        *(
            ("shufflenet_v2", {"width": w}, n)
            for w, n in ((0.5, 41), (1, 146), (1.5, 299), (2, 591))
        ),
    ],
)
def test_published_work_that_counts_more_than_multiplications_of_weights(name, options, millions):
    """These figures lie 0.7 to 1.3 % above the weights' own multiply-accumulates.

    One operation more for each value that a ReLU gives, and all five are within 1 %; for DenseNet,
    two for each value normed come nearer still. Taut's own count, as everywhere, is the weights'.
    """
    net = blank(name, **options)
    rectified = []
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _module, _, y: rectified.append(y.numel()))
    macs, normed = work(net, images(1, 3, 224, 224))
    assert macs < 0.993 * 1e6 * millions
    assert macs + sum(rectified) == pytest.approx(1e6 * millions, rel=0.01)
    if name == "densenet_121":
        assert macs + 2 * normed == pytest.approx(2.87e9, rel=0.002)


@pytest.mark.parametrize("name", zoo.names())
def test_the_docstring_tells_the_papers_year_and_the_true_figures(name):
    said = getattr(zoo, name).__doc__
    assert re.search(r"\b(19|20)\d\d\b", said)
    assert "→" in said
    number, factor, size = re.search(
        r"([\d,]+)\s+parameters;\s+([\d.,]+[MG]?)\s+MACs\s+at\s+(\d+)", said
    ).groups()
    net = blank(name)
    assert f"{parameters(net):,}" == number
    if name in IMAGES:
        channels = getattr(zoo, name).__wrapped__.__kwdefaults__["in_channels"]
        macs, _ = work(net, images(1, channels, int(size), int(size)))
    else:
        macs = taut.trace(net, ((torch.zeros(1, int(size), dtype=torch.long),), {})).macs
    scale = {"M": 1e6, "G": 1e9}.get(factor[-1], 1)
    digits = factor.rstrip("MG").replace(",", "")
    assert macs == pytest.approx(float(digits) * scale, rel=0 if scale == 1 else 5e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilenet_v1", {"stem": "small", "resolution": 0.75}),
        ("shufflenet_v1", {"stem": "small"}),
        ("squeezenet_1_1", {"stem": "small"}),
        ("inception_v3", {"stem": "small", "aux": True}),
    ],
)
def test_trace_counts_what_the_layers_do(name, options):
    net = blank(name, classes=10, in_channels=1, **options)
    x = images(2, 1, 28, 28)
    found = taut.trace(net, ((x,), {}))
    assert 2 * found.macs == work(net, x)[0]
    assert found.parameters == parameters(net)


GOLDEN = Path(__file__).parent / "golden" / "zoo" / "layers.json"


def test_layers_keep_their_names_and_shapes():
    """A file of a student names them. Written anew by `TAUT_WRITE_GOLDEN=1`."""
    found = {}
    for name in zoo.names():
        shapes = [(n, list(t.shape)) for n, t in blank(name).state_dict().items()]
        found[name] = xxhash.xxh3_64_hexdigest(json.dumps(shapes).encode())
    if os.environ.get("TAUT_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


# Images


@pytest.mark.parametrize("name", IMAGES)
def test_every_net_takes_small_grey_images(name):
    held = getattr(zoo, name).__wrapped__.__kwdefaults__
    options = {"size": 28} if "size" in held else {"stem": "small"} if "stem" in held else {}
    net = blank(name, classes=7, in_channels=1, **options)
    assert net(images(2, 1, 28, 28)).shape == (2, 7)


SMALLEST = [
    ("densenet_121", "paper", 29),
    ("densenet_121", "small", 8),
    ("densenet_bc_100_12", None, 4),
    ("inception_v3", "paper", 75),
    ("inception_v3", "small", 15),
    ("inception_v4", "paper", 75),
    ("inception_v4", "small", 15),
    ("nin", None, 4),
    ("squeezenet_1_0", "paper", 21),
    ("squeezenet_1_0", "small", 4),
    ("squeezenet_1_1", "paper", 17),
    ("squeezenet_1_1", "small", 4),
    ("vgg_small", None, 32),
]


@pytest.mark.parametrize(("name", "stem", "least"), SMALLEST)
def test_below_the_smallest_image_is_a_clear_error(name, stem, least):
    net = blank(name, **({"stem": stem} if stem else {}))
    assert net(images(1, 3, least, least)).dim() == 2
    remedy = "stem='small' takes smaller ones" if stem == "paper" else "scale them up"
    said = rf"^{name}: images must have at least {least} × {least} pixels, got {least} × "
    with pytest.raises(ZooError, match=rf"{said}{least - 1}; {remedy}$"):
        net(images(1, 3, least, least - 1))
    net.smallest = 0  # one pixel fewer leaves nothing, in truth
    with pytest.raises(RuntimeError):
        net(images(1, 3, least - 1, least - 1))


@pytest.mark.parametrize("name", sorted(set(STEMS) - {n for n, *_ in SMALLEST}))
def test_the_others_take_any_image(name):
    for stem in ("paper", "small"):
        assert blank(name, stem=stem)(images(1, 3, 1, 1)).shape == (1, 1000)


@pytest.mark.parametrize("name", STEMS)
def test_the_small_stem_leaves_more_pixels_and_the_parameters_almost(name):
    paper, small = blank(name), blank(name, stem="small")
    x = images(1, 3, 96, 96)
    assert work(small, x)[0] > 3 * work(paper, x)[0]
    assert parameters(small) == pytest.approx(parameters(paper), rel=0.02)


# What they compute


def test_a_shuffle_is_its_formula():
    x = torch.rand(2, 6, 3, 4)
    y = Shuffle(3)(x)
    for g in range(3):
        for i in range(2):
            assert torch.equal(y[:, i * 3 + g], x[:, g * 2 + i])


def test_branches_stand_side_by_side():
    a, b, x = conv(2, 3), conv(2, 4, 3), torch.rand(5, 2, 6, 6)
    y = Parallel(a, b).eval()(x)
    assert torch.equal(y[:, :3], a(x))
    assert torch.equal(y[:, 3:], b(x))


def test_a_residual_is_its_formula():
    body, x = conv(2, 2, 3, relu=False), torch.randn(5, 2, 6, 6)
    assert torch.equal(Residual(body).eval()(x), (body(x) + x).relu())
    skip = conv(2, 2, relu=False)
    assert torch.equal(Residual(body, skip).eval()(x), (body(x) + skip(x)).relu())


def test_a_convolution_keeps_the_size_unless_it_is_valid():
    x = torch.rand(1, 2, 9, 8)
    assert conv(2, 3, (1, 7))(x).shape == (1, 3, 9, 8)
    assert conv(2, 3, (1, 7), valid=True)(x).shape == (1, 3, 9, 2)
    assert conv(2, 3, 3, 2)(x).shape == (1, 3, 5, 4)
    plain = conv(2, 3, 3, norm=False)
    assert torch.equal(plain(x), F.conv2d(x, plain[0].weight, plain[0].bias, padding=1).relu())


def test_a_fire_module_is_its_formula():
    module, x = fire(8, 2, 5), torch.randn(3, 8, 6, 6)
    squeezed = module[0](x)
    (one, _), (three, _) = module[1]
    wanted = [
        F.conv2d(squeezed, one.weight, one.bias),
        F.conv2d(squeezed, three.weight, three.bias, padding=1),
    ]
    assert squeezed.shape == (3, 2, 6, 6)
    assert torch.equal(module(x), torch.cat(wanted, 1).relu())


def test_a_shuffle_unit_keeps_one_half():
    unit, x = _Half(8).eval(), torch.rand(2, 8, 5, 5)
    y = unit(x)
    assert torch.equal(y[:, ::2], x[:, :4])
    assert torch.equal(y[:, 1::2], unit.branch(x[:, 4:]))


def test_the_resolution_scales_the_image():
    options = {"width": 0.1, "classes": 3, "in_channels": 1, "stem": "small"}
    net = zoo.create("mobilenet_v1", resolution=0.5, **options).eval()
    x = torch.rand(2, 1, 28, 20)
    scaled = F.interpolate(x, (14, 10), mode="bilinear")
    full = zoo.create("mobilenet_v1", **options).eval()
    full.load_state_dict(net.state_dict())
    assert torch.equal(net(x), full(scaled))
    assert not torch.allclose(net(x), full(x))


def test_every_layer_of_a_dense_block_reads_all_before_it():
    net = blank("densenet_bc_100_12")
    first = [m for m in net.features if isinstance(m, Parallel)][:16]
    assert [m[1][0][0].num_features for m in first] == [24 + 12 * i for i in range(16)]
    x = torch.rand(1, 24, 4, 4)
    layer = zoo.create("densenet_bc_100_12").eval().features[1]
    assert torch.equal(layer(x)[:, :24], x)


def test_further_heads_speak_in_training_only():
    net = zoo.create("inception_v1", classes=5, in_channels=1, stem="small", aux=True)
    x = torch.rand(2, 1, 28, 28)
    outputs = net.train()(x)
    assert [y.shape for y in outputs] == 3 * [(2, 5)]
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 5)
    net = zoo.create("inception_v1", classes=5, in_channels=1, stem="small").train()
    assert net(x).shape == (2, 5)


LEARN = {
    "mobilenet_v1": {"width": 0.1, "stem": "small"},
    "squeezenet_1_1": {"stem": "small", "dropout": 0},
    "nin": {"dropout": 0},
    "shufflenet_v1": {"width": 0.25, "stem": "small"},
    "shufflenet_v2": {"width": 0.5, "stem": "small"},
    "vgg_small": {"width": 0.1, "size": 16},
    "resnet_18": {"stem": "small"},
    "densenet_121": {"stem": "small"},
    "inception_v2": {"stem": "small", "dropout": 0},
}


@pytest.mark.parametrize("name", LEARN)
def test_they_learn(name):
    torch.manual_seed(0)
    net = zoo.create(name, classes=2, in_channels=1, **LEARN[name])
    x, y = torch.randn(8, 1, 16, 16), torch.arange(8) % 2
    optimizer = torch.optim.Adam(net.parameters(), 5e-4)
    losses = []
    while len(losses) < 2 or losses[-1] > 0.7 * losses[0]:
        assert len(losses) < 60, losses
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())


def test_one_is_compressed_and_comes_back(tmp_path):
    def build():
        return zoo.create(
            "shufflenet_v2", width=0.5, classes=10, in_channels=1, stem="small"
        ).eval()

    net, x = build(), torch.rand(2, 1, 16, 16)
    data = taut.data.Batches(torch.rand(8, 1, 16, 16), torch.arange(8) % 10, 4)
    taut.apply(net, "share_values(bits=3)", taut.Task(train=data, test=data))
    size = taut.pack(net, tmp_path / "net.taut")
    assert size < 4 * parameters(build()) / 7
    loaded = taut.load(tmp_path / "net.taut", build())
    wanted = net.eval()(x)  # the file holds the tables in half precision
    assert (loaded(x) - wanted).norm() < 0.1 * wanted.norm()


# Bad names and options


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mobilenet", {}, "the zoo has no network 'mobilenet'; did you mean 'mobilenet_v1'"),
        ("inception", {}, r"'inception'; did you mean 'inception_v\d' or 'inception_v\d' or 'inc"),
        ("zzz", {}, "the zoo has no network 'zzz'; known: densenet_121, .*, vgg_small"),
        ("mobilenet_v1", {"widht": 1}, r"mobilenet_v1 has no option 'widht'; did you mean 'width'"),
        ("nin", {"groups": 1}, "nin has no option 'groups'; known: classes, dropout, in_channels"),
        ("mobilenet_v1", {"width": 0}, "mobilenet_v1: width must be from 0.05 to 8, got 0; 1 is"),
        ("mobilenet_v1", {"width": float("nan")}, "width must be from 0.05 to 8, got nan; 1 is"),
        ("mobilenet_v1", {"width": "1"}, "width must be float, got '1'; 1 is the paper's"),
        ("mobilenet_v1", {"resolution": 2}, "resolution must be from 0.1 to 1, got 2; 0.5 halves"),
        ("shufflenet_v1", {"groups": 5}, "groups must be one of 1, 2, 3, 4, 8, got 5; more groups"),
        ("shufflenet_v1", {"groups": True}, "groups must be int, got True; more groups"),
        ("shufflenet_v2", {"width": 0.7}, r"one of 0.5, 1.0, 1.5, 2.0, got 0.7; these are the"),
        ("resnet_18", {"stem": "tiny"}, "one of 'paper', 'small', got 'tiny'; 'small' is for"),
        ("resnet_20", {"classes": 0}, "classes must be at least 1, got 0; it is the number of"),
        ("resnet_20", {"in_channels": 1.0}, "in_channels must be int, got 1.0; it is 3 for colour"),
        ("lenet_5", {"size": 15}, "lenet_5: size must be at least 16, got 15; scale the images up"),
        ("inception_v3", {"aux": 1}, "aux must be bool, got 1; True adds the heads"),
        ("nin", {"dropout": 1}, "dropout must be from 0 to 0.95, got 1; it is a probability"),
        ("lstm_language_model", {"vocabulary": 1}, "vocabulary must be at least 2, got 1; it is"),
        ("transformer_language_model", {"heads": 3}, "got width=128 and heads=3; round the width"),
    ],
)  # fmt: skip
def test_bad_names_and_options_are_told(name, options, said):
    with pytest.raises(ZooError, match=said):
        zoo.create(name, **options)
    if name in zoo.names():
        with pytest.raises(ZooError, match=said):
            getattr(zoo, name)(**options)


def test_lenet5_itself_refuses_what_leaves_no_pixel():
    with pytest.raises(ZooError, match="lenet_5: size must be at least 16, got 15; scale the"):
        zoo.LeNet5(size=15)
    assert zoo.LeNet5(size=16)(torch.rand(1, 1, 16, 16)).shape == (1, 10)
