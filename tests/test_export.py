"""Exported files: they give the packed network's answers in their engines, or are refused."""

import functools
import json

import onnx
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import taut
from taut.activations import decoded
from taut.errors import ExportError, TraceError
from taut.export import check, onnx_file, targets
from taut.export.job import as_example
from taut.export.plain import ToLevels
from taut.kernels import Levels
from taut.pack import packed_copy


@pytest.fixture(autouse=True, scope="module")
def _the_exporters_table_is_read_once():
    """torch.onnx reads its table of some 500 operations at every export, which takes seconds."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(_registration.onnxscript_apis.get_torchlib_ops)
        patch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", read)
        yield


class Digits(nn.Module):
    """A convolution with its norm, and a linear layer; its input is called `image`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 10)

    def forward(self, image):
        return self.last(F.relu(self.norm(self.conv(image))).mean((2, 3)))


class Words(nn.Module):
    """An embedding that is tied to the last layer, attention, a recurrent layer of two ways."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.cell = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.gates = nn.GRU(16, 8, batch_first=True)
        self.out = nn.Linear(8, 40)
        self.out.weight = self.words.weight

    def forward(self, tokens):
        found = self.encoder(self.words(tokens))
        return self.out(self.gates(self.cell(found)[0])[0])


def a_task(example, **options):
    """A task of one batch, whose loss is of no account."""
    batches = [(example, torch.zeros(len(example), dtype=torch.long))]
    loss = lambda output, target: output.square().mean()  # noqa: E731
    return taut.Task(train=batches, test=batches, loss=loss, score=lambda o, t: 0.5, **options)


def a_digits_net():
    net = Digits().eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    net.norm.weight.data.normal_()
    net.norm.bias.data.normal_()
    return net


IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))


def nodes(path):
    return [(n.op_type, n.name) for n in onnx.load(path).graph.node]


# ---- what agrees ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Digits with 8-bit weights and inputs, as ONNX."""
    torch.manual_seed(0)
    net = taut.apply(a_digits_net(), "quantize(activations=8)", a_task(IMAGES))
    about = {"labels": list("0123456789")}
    path = tmp_path_factory.mktemp("quantized") / "net.onnx"
    return net, taut.export(net, path, IMAGES[:1], about=about)


def test_whole_numbers_stay_whole_and_norms_go_into_their_steps(quantized):
    _, found = quantized
    model = onnx.load(found.path)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 5  # two inputs, two weights, a bias
    assert "Gemm" in kinds  # with its bias, as ONNX Runtime has it for whole numbers
    assert "BatchNormalization" not in kinds
    stored = {i.name: i for i in model.graph.initializer}
    assert stored["conv.weight.numbers"].data_type == onnx.TensorProto.INT8
    assert list(stored["conv.weight.numbers"].dims) == [6, 1, 3, 3]
    assert stored["last.bias.numbers"].data_type == onnx.TensorProto.INT32
    assert stored.keys() <= {name for n in model.graph.node for name in n.input}
    dequantized = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert {n.input[0] for n in dequantized if len(n.input) != 3} == {"last.bias.numbers"}
    assert [n.name for n in model.graph.node if n.op_type == "Conv"] == ["norm:Conv"]
    assert model.opset_import[0].version == 21


def test_the_file_gives_the_packed_answers_at_any_batch(quantized):
    net, found = quantized
    packed = packed_copy(net)
    assert found.engine == "onnx"
    assert found.agreement.holds
    assert found.size_bytes == found.path.stat().st_size
    for batch in (1, 3, 4):
        wanted = packed(IMAGES[:batch])
        assert (found.network(IMAGES[:batch]) - wanted).abs().max() < 0.02 * wanted.abs().max()
        assert torch.equal(found.network(image=IMAGES[:batch]), found.network(IMAGES[:batch]))


def test_input_names_and_what_it_tells_of_itself_are_in_the_file(quantized):
    _, found = quantized
    model = onnx.load(found.path)
    assert [i.name for i in model.graph.input] == ["image"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert json.loads(onnx_file.about(found.path)["labels"]) == list("0123456789")
    assert "/" not in "".join(p.value for n in model.graph.node for p in n.metadata_props)


def test_sequences_of_any_length_tied_and_recurrent(tmp_path):
    net = taut.apply(Words().eval(), "quantize()", a_task(TOKENS))
    found = taut.export(net, tmp_path / "net.onnx", TOKENS, dynamic_length=True)
    assert found.agreement.error < 1e-5
    longer = torch.randint(0, 40, (3, 9))
    wanted = packed_copy(net)(longer)
    assert (found.network(longer) - wanted).abs().max() < 0.02 * wanted.abs().max()
    stored = [i for i in onnx.load(found.path).graph.initializer if 40 in i.dims and 8 in i.dims]
    assert [i.name for i in stored] == ["out.weight.numbers"]  # once, for both
    floats = [i for i in onnx.load(found.path).graph.initializer if i.data_type == 1]
    assert max(len(onnx.numpy_helper.to_array(i).ravel()) for i in floats) <= 128  # biases


class Cells(nn.Module):
    """Every kind of recurrent layer, deep and both ways, with and without biases and states."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(8, 4, num_layers=2, bias=False)
        self.tanh = nn.RNN(4, 3, bidirectional=True, batch_first=True)
        self.relu = nn.RNN(6, 2, nonlinearity="relu", num_layers=2)

    def forward(self, x, hidden):
        found, (last, cell) = self.lstm(x, (hidden, 2 * hidden))
        found, end = self.gru(found)
        found, _ = self.tanh(found.transpose(0, 1))
        return self.relu(found.transpose(0, 1))[0], last, cell, end


@pytest.mark.parametrize(("shape", "channels", "dim"), [((5, 7), 7, -1), ((2, 3, 4), 3, 1)])
def test_levels_are_those_that_their_definition_gives(shape, channels, dim):
    thresholds = torch.randn(3, channels).sort(0).values
    pattern = torch.tensor([2, 0, 3, 1], dtype=torch.uint8)
    levels = Levels(
        thresholds=thresholds, pattern=pattern, scale=torch.tensor([0.5, 1.5]), offset=0.25
    )
    x = torch.randn(shape)
    torch.testing.assert_close(ToLevels(levels)(x, dim), decoded(levels, x, dim))


def test_recurrent_layers_of_every_kind(tmp_path):
    net, x, hidden = Cells().eval(), torch.randn(5, 3, 3), torch.randn(4, 3, 4)
    found = taut.export(net, tmp_path / "net.onnx", (x, hidden), dynamic_batch=False)
    assert found.agreement.error < 1e-5
    outputs = found.network(x, hidden)
    assert [o.shape for o in outputs] == [o.shape for o in net(x, hidden)]
    kinds = [n.op_type for n in onnx.load(found.path).graph.node]
    assert [kinds.count(k) for k in ("LSTM", "GRU", "RNN")] == [2, 2, 3]


def test_inputs_rounded_by_a_step_of_their_own_and_to_signs(tmp_path):
    net, x = (
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4)).eval(),
        torch.randn(4, 8),
    )
    task = a_task(x)
    net = taut.apply(net, "quantize(activations=8, ranges='dynamic', only='0')", task)
    traced = taut.trace(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4)), task.example()
    )
    net = taut.apply(net, "binarize(activations='signs', only='1')", task, traced)
    found = taut.export(net, tmp_path / "net.onnx", x)
    assert found.agreement.error < 0.02
    assert "QuantizeLinear" not in [n.op_type for n in onnx.load(found.path).graph.node]


def test_a_parametrization_of_the_users_own(tmp_path):
    net, x = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    found = taut.export(net, tmp_path / "net.pt2", x)
    torch.testing.assert_close(found.network(x), net(x))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_floats_of_half_precision_take_half(tmp_path, precision):
    net, x = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval(),
        torch.randn(2, 64),
    )
    found = taut.export(net, tmp_path / "net.onnx", x, precision=precision)
    assert found.size_bytes < 0.6 * 4 * sum(p.numel() for p in net.parameters())
    assert 0 < found.agreement.error < check.EXACT[precision]


def test_openvino_runs_what_onnx_runtime_runs(quantized, tmp_path):
    net, by_onnx = quantized
    found = taut.export(
        net, tmp_path / "net.xml", IMAGES, task=a_task(IMAGES, about={"labels": [1]})
    )
    assert (tmp_path / "net.bin").is_file()
    assert found.engine == "openvino"
    assert (found.score, found.packed_score) == (0.5, 0.5)
    gap = (found.network(IMAGES) - by_onnx.network(IMAGES)).abs().max()
    assert gap < 0.02 * by_onnx.network(IMAGES).abs().max()
    told = targets.TARGETS["openvino"].module().about(found.path)
    assert json.loads(told["labels"]) == [1]


def test_pytorch_runs_what_runs_packed_by_tauts_products(tmp_path):
    net = taut.apply(
        nn.Sequential(nn.Linear(64, 64)).eval(), "share_values(bits=4)", a_task(torch.randn(2, 64))
    )
    packed = packed_copy(net)
    packed[0].run_dense(False)
    x = torch.randn(5, 64)
    found = taut.export(packed, tmp_path / "net.pt2", x)
    called = {str(n.target) for n in torch.export.load(str(found.path)).graph.nodes}
    assert any("lookup_matmul" in c for c in called) or not taut.kernels.native.LOADED
    torch.testing.assert_close(found.network(x[:3]), packed(x[:3]))


@pytest.mark.filterwarnings("ignore")  # of its own imports
def test_a_free_length_is_refused_where_sizes_are_fixed(tmp_path):
    with pytest.raises(ExportError, match="files for executorch have a fixed length"):
        taut.export(a_digits_net(), tmp_path / "net.pte", IMAGES, dynamic_length=True)


def test_executorch_runs_what_is_written_for_it(tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    net = taut.apply(a_digits_net(), "quantize(activations=8)", a_task(IMAGES))
    found = taut.export(net, tmp_path / "net.pte", IMAGES[:2])
    assert found.engine == "executorch"
    assert found.agreement.error < 1e-3
    x = IMAGES[2:4]
    torch.testing.assert_close(found.network(x), packed_copy(net)(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(
        ExportError, match=r"does not run net.pte on inputs of shapes .*planned for"
    ):
        found.network(IMAGES[:3])  # its memory is planned for two
    with pytest.raises(ExportError, match="files for ExecuTorch hold float32, got precision='flo"):
        taut.export(net, tmp_path / "net.pte", IMAGES[:2], precision="float16")
    (tmp_path / "net.pte").write_bytes(b"no program")
    with pytest.raises(ExportError, match=r"ExecuTorch cannot read net\.pte"):
        targets.TARGETS["executorch"].module().opened(tmp_path / "net.pte")


def test_tensors_for_other_tools(tmp_path):
    net = taut.apply(Words().eval(), "quantize(only='cell, words')", a_task(TOKENS))
    found = taut.export(net, tmp_path / "net.safetensors", TOKENS, about={"labels": [1, 2]})
    assert found.network is None
    assert found.agreement.error < 1e-6
    with safe_open(found.path, "pt") as file:
        names, told = set(file.keys()), file.metadata()
        assert file.get_tensor("words.weight.numbers").dtype is torch.int8
        assert file.get_tensor("cell.weight_hh_l0.step").shape == (32,)
    assert json.loads(told["labels"]) == [1, 2]
    assert "gates.weight_hh_l0" in names
    assert "out.weight" not in names  # it is words.weight
    with pytest.raises(ExportError, match="holds tensors and no network"):
        targets.TARGETS["safetensors"].module().opened(found.path)


def test_four_bits_take_half_of_eight(tmp_path):
    sizes, x = [], torch.randn(2, 64)
    for bits in (8, 4):
        net = taut.apply(nn.Linear(64, 256).eval(), f"quantize(bits={bits})", a_task(x))
        found = taut.export(net, tmp_path / f"{bits}.onnx", x)
        assert found.agreement.error < 1e-5
        sizes.append(found.size_bytes)
    assert sizes[0] - sizes[1] == pytest.approx(64 * 256 / 2, rel=0.1)


class Attends(nn.Module):
    """Attention, a layer of three dimensions, and a recurrent one."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 12)
        self.cell = nn.LSTM(12, 6, batch_first=True)
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x):
        found, _ = self.attention(x, x, x, need_weights=False)
        return self.cell(F.relu(self.wide(found)))[0]


@pytest.mark.parametrize("name", ["net.onnx", "net.xml"])
@pytest.mark.parametrize("any_batch", [True, False])
def test_attention_and_recurrent_layers_beside_rounded_ones(tmp_path, name, any_batch):
    torch.manual_seed(0)
    x = torch.randn(12, 5, 8)
    task = a_task(x)
    net = taut.apply(Attends().eval(), "quantize(activations=8)", task)
    found = taut.export(net, tmp_path / name, x[:1], task=task, dynamic_batch=any_batch)
    assert 1e-4 < found.agreement.error < 0.05
    if name == "net.onnx":
        graph = onnx.load(found.path).graph
        kinds = [n.op_type for n in graph.node]
        assert kinds.count("Gemm") == 3  # attention's two, and the layer
        assert kinds.count("QuantizeLinear") == 3
        types = {i.name: i.data_type for i in graph.initializer}
        zeros = [n.input[2] for n in graph.node if n.op_type == "QuantizeLinear"]
        assert {types[z] for z in zeros} == {onnx.TensorProto.UINT8}


def test_sums_between_rounded_layers_are_rounded_too(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Conv2d(4, 2, 3)

        def forward(self, x):
            found = F.max_pool2d(F.relu(self.first(x)), 2)
            return self.last(F.relu(found + self.second(found)))

    task = a_task(IMAGES)
    net = taut.apply(Branches().eval(), "quantize(activations=8)", task)
    counts = {}
    for between in (False, True):
        found = taut.export(net, tmp_path / "net.onnx", task=task, round_between=between)
        counts[between] = [n.op_type for n in onnx.load(found.path).graph.node]
        assert found.agreement.error < 0.03
    assert counts[False].count("QuantizeLinear") == 3  # before each layer
    assert counts[True].count("QuantizeLinear") == 5  # before the pool, and the second's output
    into = {o: n for n in onnx.load(found.path).graph.node for o in n.output}
    (added,) = (n for n in onnx.load(found.path).graph.node if n.op_type == "Add")
    assert [into[i].op_type for i in added.input] == ["DequantizeLinear"] * 2


# ---- what is refused ------------------------------------------------------------------------


def test_a_file_that_disagrees_is_kept_under_another_name(tmp_path, monkeypatch):
    net = a_digits_net()
    honest = onnx_file.model_of

    def wrong(job, opened, suit):
        model = honest(job, opened, suit)
        weight = model.graph.initializers["last.weight"]
        array = weight.const_value.numpy() * 1.5
        weight.const_value = onnx_file.ir.tensor(array, name="last.weight")
        return model

    for module in (onnx_file, targets.TARGETS["onnx"].module()):
        monkeypatch.setattr(module, "model_of", wrong)
    with pytest.raises(ExportError, match=r"off by up to .*from layer 'last' on.*onnx\.disagrees"):
        taut.export(net, tmp_path / "net.onnx", IMAGES)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx.disagrees"]


@torch.no_grad()
def test_what_may_differ_follows_from_what_the_rounding_costs(quantized):
    net, found = quantized
    packed = packed_copy(net)
    exact = check.plain(packed, rounded=False).network
    _, cost = check.difference([exact(IMAGES[:2])], [packed(IMAGES[:2])])
    assert 0.001 < cost < 0.02
    samples = [((IMAGES[:2],), {})]
    most = check.allowed(packed, samples, "float32")
    assert most == pytest.approx(1e-3 + 4 * cost)
    assert found.agreement.error < found.agreement.allowed < 0.08
    assert check.allowed(a_digits_net(), samples, "bfloat16") == check.EXACT["bfloat16"]
    coarse = taut.apply(a_digits_net(), "quantize(bits=2, activations=2)", a_task(IMAGES))
    assert check.allowed(packed_copy(coarse), samples, "float32") <= 1e-3 + check.MOST_COARSE


def test_an_operation_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    net = nn.Sequential(nn.Linear(4, 4), Odd())
    with pytest.raises(
        ExportError,
        match=r"no operation for aten.special_airy_ai.default, which layer '1' calls; .*to='torch'",
    ):
        taut.export(net, tmp_path / "net.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


class FixedBatch(nn.Module):
    """A network that only takes four examples."""

    def forward(self, x):
        return x + torch.arange(4.0)[:, None]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_batch_that_the_network_fixes(tmp_path, suffix):
    with pytest.raises(
        ExportError, match=r"fixes the batch of its input 'x' at 4; .*dynamic_batch=False"
    ):
        taut.export(FixedBatch(), tmp_path / f"net{suffix}", torch.randn(4, 6))
    found = taut.export(
        FixedBatch(), tmp_path / f"net{suffix}", torch.randn(4, 6), dynamic_batch=False
    )
    assert found.agreement.error < 1e-6


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "give an example, the input of one forward, or a task"),
        ("text", "a tuple or dict of tensors, or .args, kwargs., got a str"),
        ((torch.zeros(2, 1, 8, 8), torch.zeros(2)), "Digits.forward does not take the example"),
        (torch.zeros(2, 3, 8, 8), "Digits does not run on the example: RuntimeError"),
    ],
)
def test_a_wrong_example(tmp_path, example, message):
    with pytest.raises(ExportError, match=message):
        taut.export(a_digits_net(), tmp_path / "net.onnx", example)


def test_examples_of_every_form():
    x = torch.zeros(2)
    assert as_example(x) == ((x,), {})
    assert as_example({"x": x}) == ((), {"x": x})
    assert as_example((x, x)) == ((x, x), {})
    assert as_example(((x,), {"y": x})) == ((x,), {"y": x})


def test_an_engine_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for to, extra in (("onnx", "onnx"), ("openvino", "openvino"), ("executorch", "executorch")):
        with pytest.raises(ExportError, match=rf"not installed here: pip install taut\[{extra}\]"):
            taut.export(a_digits_net(), tmp_path / "net", IMAGES, to=to)


def test_engines_and_precisions_that_are_not_known(tmp_path):
    with pytest.raises(ExportError, match="no engine 'onx'; did you mean 'onnx'"):
        taut.export(a_digits_net(), tmp_path / "net", IMAGES, to="onx")
    with pytest.raises(ExportError, match=r"net.bin must end in .onnx, .xml, .pt2"):
        taut.export(a_digits_net(), tmp_path / "net.bin", IMAGES)
    with pytest.raises(ExportError, match="no precision 'float8'; did you mean"):
        taut.export(a_digits_net(), tmp_path / "net.onnx", IMAGES, precision="float8")


def test_a_network_that_branches_on_its_numbers(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="not branch on the values"):
        taut.export(Branches(), tmp_path / "net.onnx", IMAGES)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_files_that_are_damaged(tmp_path, name):
    path = tmp_path / f"net{targets.TARGETS[name].suffix}"
    path.write_bytes(b"no network")
    with pytest.raises(ExportError, match="does not run net"):
        targets.TARGETS[name].module().opened(path)
