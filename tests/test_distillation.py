"""Distillation: what is matched, by which names, with which shapes, and what is refused."""

import copy

import pytest
import torch
from conftest import digits_task, small_net
from nets import Net
from torch import nn
from torch.nn import functional as F

import taut
from taut import distances
from taut.distillation import Distillation, Teachers
from taut.errors import RecipeError
from taut.modules import clone
from taut.recover import Recover, recover
from taut.watched import Watched


def teachers_of(student, networks, task, share=0.5, **options):
    return Teachers(
        student, networks, task, Distillation(**options), share=share, temperature=2.0,
        autocast=torch.no_grad, precision=torch.float32, folder=None,
    )  # fmt: skip


def loss_by(teachers, student, batch, task):
    """The whole loss as recover computes it, the student in eval mode."""
    output = student.eval()(*batch.args, **batch.kwargs)
    return teachers(task.loss_of(output, batch.target), output, batch)


def number(tensor):
    return float(tensor.detach())


def wide_net():
    return nn.Sequential(
        nn.Linear(64, 60), nn.ReLU(), nn.Dropout(0.2), nn.Linear(60, 20), nn.ReLU(),
        nn.Linear(20, 10),
    )  # fmt: skip


@pytest.fixture
def batch(task):
    return next(task.batches("test"))


@pytest.mark.parametrize("kind", ["auto", *distances.LOGITS])
def test_outputs_are_mixed_by_the_share(trained, task, batch, kind):
    student = small_net().eval()
    got = loss_by(teachers_of(student, [trained], task, 0.3, loss=kind), student, batch, task)
    output, wanted = student(*batch.args), trained(*batch.args)
    known = "kl" if kind == "auto" else kind
    soft = distances.between_outputs(known, output, wanted, 1, 2.0, None)
    hard = F.cross_entropy(output, batch.target)
    assert number(got) == pytest.approx(number(0.7 * hard + 0.3 * soft), rel=1e-5)


def test_several_teachers_count_alike(trained, task, batch):
    student, other = small_net().eval(), small_net().eval()
    both = loss_by(teachers_of(student, [trained, other], task, 1.0), student, batch, task)
    each = [
        number(loss_by(teachers_of(student, [t], task, 1.0), student, batch, task))
        for t in (trained, other)
    ]
    assert number(both) == pytest.approx(sum(each) / 2, rel=1e-5)


def test_hints_of_other_widths_go_through_a_projection_that_is_trained(trained, task, batch):
    student = wide_net()
    teachers = teachers_of(student, [trained], task, 0.0, features="0, 3:3")
    assert [tuple(p.shape) for p in teachers.parameters()] == [(48, 60), (48,), (32, 20), (32,)]
    hard = F.cross_entropy(student.eval()(*batch.args), batch.target)
    got = loss_by(teachers, student, batch, task) - hard
    x = batch.args[0]
    first = teachers.projections["0:0:0"](student[0](x)), trained[0](x)
    second = teachers.projections["0:3:3"](student[:4](x)), trained[:4](x)
    wanted = (F.mse_loss(*first) + F.mse_loss(*second)) / 2
    assert number(got) == pytest.approx(number(wanted), rel=1e-4)
    teachers.close()
    seen = []
    recover(
        student, task, Recover(epochs=2, distill=0.0), teacher=trained,
        settings=[Distillation(features="0, 3", feature_weight=10.0)],
        on_epoch=lambda record, state: seen.append(copy.deepcopy(state["projections"])),
    )  # fmt: skip
    name = "0:0:0.weight"
    assert set(seen[0]) == {f"0:{n}:{n}.{p}" for n in (0, 3) for p in ("weight", "bias")}
    assert not torch.equal(seen[0][name], seen[1][name])
    assert not student[0]._forward_hooks


def test_features_alone_pull_the_layers_together(trained, task):
    def distance(weight):
        torch.manual_seed(0)
        net = taut.apply(clone(trained), taut.techniques.PruneWeights(sparsity=0.8), task)
        settings = [Distillation(features="auto", feature_weight=weight)]
        options = Recover(epochs=4, distill=0.0, learning_rate=5e-3)
        recover(net, task, options, teacher=trained, settings=settings)
        x = next(task.batches("test")).args[0]
        with torch.no_grad():
            return float(F.mse_loss(net.eval()[:4](x), trained[:4](x)))

    assert distance(100.0) < 0.7 * distance(0.0)


def test_auto_takes_the_blocks_that_hold_weights_but_the_output(trained, task):
    compressed = taut.apply(clone(trained), taut.techniques.PruneWeights(sparsity=0.5), task)
    teachers = teachers_of(compressed, [trained], task, features="auto")
    assert teachers.pairs == [[("0", "0"), ("3", "3")]]

    def run(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))))

    def blocks():
        blocks = (nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))
        stem, head = nn.Linear(64, 16), nn.Linear(16, 10)
        return Net(run, stem=stem, blocks=nn.Sequential(*blocks), head=head)

    net = blocks()
    found = teachers_of(clone(net), [net], task, features="auto").pairs
    assert found == [[(n, n) for n in ("stem", "blocks.0", "blocks.1")]]


def conv_net(channels, stride):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, stride, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["hint", "attention", "relational"])
def test_maps_of_another_size_are_averaged_to_the_networks(task, batch, kind):
    student, teacher = conv_net(3, 2), conv_net(5, 1)
    teachers = teachers_of(student, [teacher], task, 0.0, features="1", feature_loss=kind)
    hard = F.cross_entropy(student(*batch.args), batch.target)
    got = loss_by(teachers, student, batch, task) - hard
    x, y = student[:2](*batch.args), teacher[:2](*batch.args)
    if kind == "hint":
        x = teachers.projections["0:1:1"](x.movedim(1, -1)).movedim(-1, 1)
    if kind != "relational":
        y = F.adaptive_avg_pool2d(y, 4)
    wanted = getattr(distances, kind)(x, y)
    assert number(got) == pytest.approx(number(wanted), rel=1e-3)


# Sequences


def tagger(width=12, heads=2):
    """[n, steps] words → [n, steps, 5] tags, by one Transformer layer."""

    def run(self, words, attention_mask=None):
        padding = None if attention_mask is None else attention_mask == 0
        return self.head(self.layer(self.embed(words), src_key_padding_mask=padding))

    layer = nn.TransformerEncoderLayer(width, heads, 16, 0.0, batch_first=True)
    return Net(run, embed=nn.Embedding(20, width), layer=layer, head=nn.Linear(width, 5)).eval()


def tagging_task(loss=None, **given):
    words, tags = torch.randint(20, (8, 6)), torch.randint(5, (8, 6))
    tags[:, 4:] = -100

    def by_step(output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    data = [({"words": words, **given}, tags)]
    return taut.Task(train=data, test=data, loss=loss or by_step, score=lambda o, t: 0.0)


def test_steps_are_distilled_one_by_one_and_ignored_ones_not():
    task, student, teacher = tagging_task(), tagger(), tagger()
    batch = next(task.batches("test"))
    got = loss_by(teachers_of(student, [teacher], task, 1.0, loss="kl"), student, batch, task)
    own, theirs = student(**batch.kwargs), teacher(**batch.kwargs)
    p, q = (F.log_softmax(z[:, :4].reshape(-1, 5) / 2.0, 1) for z in (own, theirs))
    wanted = 4 * F.kl_div(p, q, reduction="batchmean", log_target=True)
    assert number(got) == pytest.approx(number(wanted), rel=1e-4)


def test_classes_may_come_before_the_steps():
    def run(self, words):
        return self.inner(words).mT

    task = tagging_task(loss=nn.CrossEntropyLoss())
    a, b = tagger(), tagger()
    student, teacher = Net(run, inner=a).eval(), Net(run, inner=b).eval()
    batch = next(task.batches("test"))
    got = loss_by(teachers_of(student, [teacher], task, 1.0), student, batch, task)
    steps = tagging_task()
    wanted = loss_by(teachers_of(a, [b], steps, 1.0, loss="kl"), a, batch, steps)
    assert number(got) == pytest.approx(number(wanted), rel=1e-5)


def by_hand(net, words, keep, kind):
    """What nn.MultiheadAttention attends with, computed from its weights."""
    x, attention = net.embed(words), net.layer.self_attn
    q, k, v = (F.linear(x, w, b) for w, b in zip(
        attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
    ))  # fmt: skip
    barred = torch.zeros(len(words), 1, 1, 6).masked_fill(~keep[:, None, None], -1e9)
    if kind == "attention":
        return distances.scaled_scores(q, k, 2)
    return distances.relation(q, k, 2, barred), distances.relation(v, v, 2, barred)


@pytest.mark.parametrize("kind", ["attention", "relations"])
def test_attention_layers_are_matched_by_their_scores_and_values(kind):
    marks = torch.ones(8, 6, dtype=torch.long)
    marks[:4, 3:] = 0
    task = tagging_task(attention_mask=marks)
    student, teacher = tagger(8), tagger(12)
    options = {"features": "layer.self_attn", "feature_loss": kind}
    teachers = teachers_of(student, [teacher], task, 0.0, **options)
    batch = next(task.batches("test"))
    output = student.train()(**batch.kwargs)
    got = teachers(torch.zeros(()), output, batch)
    words, keep = batch.kwargs["words"], marks.bool()
    own, theirs = (by_hand(n, words, keep, kind) for n in (student, teacher))
    if kind == "attention":
        counted = (keep[:, None, :, None] & keep[:, None, None, :]).expand(8, 2, 6, 6)
        wanted = (own - theirs)[counted].square().mean()
    else:
        wanted = sum(distances.relations(a, b, keep) for a, b in zip(own, theirs, strict=True))
    assert number(got) == pytest.approx(number(wanted), rel=1e-4)
    got.backward()
    assert float(student.layer.self_attn.in_proj_weight.grad.abs().sum()) > 0


def test_the_fused_attention_of_inference_is_watched_too():
    task = tagging_task()
    student, teacher = tagger(8), tagger(12)
    options = {"features": "layer.self_attn", "feature_loss": "relations"}
    teachers = teachers_of(student, [teacher], task, 0.0, **options)
    assert set(teachers.theirs[0].seen) == {"layer.self_attn"}
    assert torch.backends.mha.get_fastpath_enabled()


def test_relations_of_any_layer_are_those_of_its_outputs_with_themselves():
    task, student, teacher = tagging_task(), tagger(8), tagger(12)
    options = {"features": "embed", "feature_loss": "relations", "relation_heads": 4}
    teachers = teachers_of(student, [teacher], task, 0.0, **options)
    batch = next(task.batches("test"))
    got = teachers(torch.zeros(()), student(**batch.kwargs), batch)
    embedded = (n.embed(batch.kwargs["words"]) for n in (student, teacher))
    own, theirs = (distances.relation(x, x, 4) for x in embedded)
    wanted = distances.relations(own, theirs, batch.target != -100)
    assert number(got) == pytest.approx(number(wanted), rel=1e-4)


def test_masks_of_attention_add_up():
    attention = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 2, 4)  # [steps, n, width]
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    watched = Watched(nn.Sequential(attention), ["0"], attentions=True)
    attention(x, x, x, attn_mask=causal.expand(4, 3, 3), key_padding_mask=padding)
    seen = watched.look("0", "it")
    assert seen.query.shape == (2, 3, 4)
    barred = (seen.mask < -1e8).expand(2, 2, 3, 3)
    wanted = torch.ones(3, 3, dtype=torch.bool).triu(1) | padding[:, None, None]
    assert torch.equal(barred, wanted.expand(2, 2, 3, 3))
    assert torch.equal(seen.keep, ~padding)


# What is refused


def test_a_teacher_of_other_outputs_is_refused(task):
    teacher = nn.Sequential(nn.Linear(64, 12))
    message = r"outputs of shape \[2, 10\] for the task's example, the teacher \[2, 12\]; distil"
    with pytest.raises(RecipeError, match=message):
        recover(small_net(), task, Recover(epochs=1), teacher=teacher)
    student = small_net()
    settings = [Distillation(features="0", feature_loss="relational")]
    recover(student, task, Recover(epochs=1, distill=0.0), teacher=teacher, settings=settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "blocks.0"}, "the network has no layer 'blocks.0'; known: 0, 1, 2"),
        ({"features": "0:33"}, "the teacher has no layer '33'; did you mean '3'"),
        ({"features": "block*"}, r"'block\*' matches no layer that the network and the teacher"),
        ({"features": "0", "feature_loss": "attention"}, r"'0' with the teacher's '0': they give "
         r"\[2, 60\] and \[2, 48\]; attention needs places"),
        ({"features": "0", "feature_loss": "relations"}, r"need \[n, steps, channels\]"),
        ({"features": "auto", "feature_loss": "relations"}, "'auto' finds no layer that relations"),
    ],
)  # fmt: skip
def test_layers_that_are_not_there_or_do_not_fit_are_refused(trained, task, options, message):
    student = wide_net()
    with pytest.raises(RecipeError, match=message):
        teachers_of(student, [trained], task, **options)
    assert not any(m._forward_hooks for m in [*student.modules(), *trained.modules()])


def test_attention_layers_that_do_not_fit_are_refused():
    task = tagging_task()

    def refused(student, teacher, message, features="layer.self_attn", kind="attention"):
        with pytest.raises(RecipeError, match=message):
            teachers_of(student, [teacher], task, 0.0, features=features, feature_loss=kind)

    refused(tagger(12, 3), tagger(12, 2), "they have 3 and 2 heads")
    refused(tagger(8, 2), tagger(12, 3), "width 8 does not split into 3 heads", kind="relations")
    refused(tagger(), tagger(), "one is an nn.MultiheadAttention and the other is not",
            "layer.self_attn:embed")  # fmt: skip
    options = {"feature_loss": "relations", "relation_heads": 5}
    with pytest.raises(RecipeError, match="width 12 does not split into 5 heads"):
        teachers_of(tagger(), [tagger()], task, 0.0, features="embed", **options)


def test_a_layer_that_never_runs_or_gives_no_tensor_is_refused(task):
    def idle(self, x):
        return self.used(x)

    net = Net(idle, used=nn.Linear(64, 10), unused=nn.Linear(64, 10))
    with pytest.raises(RecipeError, match="the network does not run its layer 'unused'"):
        teachers_of(net, [clone(net)], task, features="unused")

    class Pair(nn.Module):
        def forward(self, x):
            return {"x": x}

    def paired(self, x):
        return self.last(self.pair(x)["x"])

    net = Net(paired, pair=Pair(), last=nn.Linear(64, 10))
    with pytest.raises(RecipeError, match="layer 'pair' gives a dict, and only tensors"):
        teachers_of(net, [clone(net)], task, features="pair")


def test_outputs_that_are_no_tensor_are_refused(trained):
    def run(self, x):
        return {"scores": self.inner(x)}

    task = digits_task(loss=lambda o, t: F.cross_entropy(o["scores"], t), score=lambda o, t: 0.0)
    net = Net(run, inner=clone(trained))
    with pytest.raises(RecipeError, match=r"must be a tensor, a tuple that starts.* got dict"):
        teachers_of(net, [clone(net)], task)


def test_networks_may_give_more_than_their_outputs(tmp_path, trained, task):
    def run(self, x):
        return self.inner(x), x

    def first(function):
        return lambda output, target: function(output[0], target)

    pair = digits_task(loss=first(F.cross_entropy), score=_Accuracy())
    net, teacher = Net(run, inner=small_net()), Net(run, inner=trained)
    settings = [Distillation(loss="kl", cache="kept")]
    for _ in range(2):
        recover(net, pair, Recover(epochs=1, distill=1.0), teacher=teacher, settings=settings,
                folder=tmp_path)  # fmt: skip
    batch = next(task.batches("test"))
    got = loss_by(teachers_of(net, [teacher], pair, 1.0, loss="kl"), net, batch, pair)
    inner = loss_by(teachers_of(net.inner, [trained], task, 1.0), net.inner, batch, task)
    assert number(got) == pytest.approx(number(inner), rel=1e-5)


class _Accuracy:
    """A metric of networks that give pairs."""

    higher_is_better = True

    def reset(self):
        self.right = self.seen = 0

    def update(self, output, target):
        self.right += int((output[0].argmax(1) == target).sum())
        self.seen += len(target)

    def compute(self):
        return self.right / self.seen


def test_options_that_contradict_each_other_are_refused(trained, task):
    with pytest.raises(RecipeError, match="cache keeps the teacher's outputs, but features need"):
        Distillation(cache="x", features="auto")
    with pytest.raises(RecipeError, match="no choice 'kll'; did you mean 'kl'"):
        Distillation(loss="kll")
    with pytest.raises(RecipeError, match="features='auto' need a network to match; give recover"):
        recover(trained, task, Recover(epochs=1), settings=[Distillation(features="auto")])


def test_patterns_take_every_layer_of_one_name(trained, task):
    teachers = teachers_of(wide_net(), [trained], task, features="[03]*")
    assert teachers.pairs == [[("0", "0"), ("3", "3")]]
