"""What every method owes the harness: budgets, what trains, unchanged outputs, claimed bytes, learning, export."""

import copy
import itertools

import pytest
import torch
from torch import nn

from baselines import nf4
from baselines.method import EntryMethod, MethodError, Setting, target_shapes
from baselines.registry import get, methods
from sparsegrad import AdaptedLinear, SparseAdam, find_layers, merge
from sparsegrad.adapted import adapted_layers, source_weight

METHODS = list(methods())
BUDGETED = [name for name in METHODS if get(name).knob is not None]
WITHOUT = [name for name in METHODS if get(name).knob is None]
DENSITY = [name for name in BUDGETED if get(name).knob.accepts_density]
COUNTED = [name for name in BUDGETED if name not in DENSITY]
CORE_COUNTED = ["lora", "meprop-example", "meprop-unified", "smt", "galore", "apollo"]
CORE_DENSITY = ["meprop-weight", "random-mask", "sparsegrad", "sparsegrad-compact", "sparsegrad-fixed"]
CORE_DENSITY += ["sparsegrad-folded", "gmt", "sift"]

# What a method trains of every target layer, beside the bias: the ends of the parameters' names. Of `smt` some layers
# train nothing; what it trains is in its own test.
OWN = {
    "apollo": ("weight",),
    "galore": ("weight",),
    "gmt": ("weight",),
    "sift": ("values",),
    "dora": ("lora_A", "lora_B", "m"),
    "lora": ("lora_A", "lora_B"),
    "lora-fa": ("lora_B",),
    "lora-xs": ("R",),
    "meprop-example": ("weight",),
    "meprop-unified": ("weight",),
    "meprop-weight": ("weight",),
    "pissa": ("lora_A", "lora_B"),
    "qlora": ("lora_A", "lora_B"),
    "random-mask": ("values",),
    "sparsegrad": ("weight",),
    "sparsegrad-compact": ("weight",),
    "sparsegrad-core": ("core",),
    "sparsegrad-directions": ("core",),
    "sparsegrad-fixed": ("values",),
    "sparsegrad-folded": ("weight",),
    "vera": ("lambda_d", "lambda_b"),
}
SPARSE = ("meprop-unified", "meprop-weight", "sparsegrad", "sparsegrad-compact", "sparsegrad-folded")


def bare(name, budget=None, **setting):
    """A method without layers, to ask for what it says of itself."""
    return get(name)(budget, Setting(layers={}, **setting))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def picture(model):
    """All that must not change when a method refuses a model."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same_picture(model, before):
    now = picture(model)
    assert now[:2] == before[:2]
    assert now[2].keys() == before[2].keys()
    assert all(torch.equal(now[2][name], value) for name, value in before[2].items())


# --- the setting


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("train_rest", "some", "all, none"),
        ("train_rest", None, "all, none"),
        ("adapter_dtype", "float16", "same, float32"),
        ("optimizer_impl", "loop", "for-loop, foreach, fused"),
    ],
)
def test_an_unknown_word_in_the_setting_is_refused(name, value, known):
    with pytest.raises(MethodError, match=f"{name} must be one of {known}, got {value!r}"):
        Setting(layers={}, **{name: value})


# --- budgets


def test_every_core_method_is_tested_here():
    assert set(OWN) | {"full", "head"} <= set(METHODS)
    assert set(CORE_COUNTED) <= set(COUNTED)
    assert set(CORE_DENSITY) <= set(DENSITY)


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("budget", [1, 0.5, "82x326", 0, False])
def test_a_budget_for_a_method_without_one(name, budget):
    with pytest.raises(MethodError) as error:
        bare(name, budget)
    assert str(error.value) == f"{name} has no budget, got {name}[{budget}]"


@pytest.mark.parametrize("name", DENSITY)
@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_density_outside_its_range(name, budget):
    with pytest.raises(MethodError) as error:
        bare(name, budget)
    assert str(error.value) == f"density must be in (0, 1], got {name}[{budget}]"


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("budget", [0, -1, -7])
def test_a_count_below_one(name, budget):
    with pytest.raises(MethodError) as error:
        bare(name, budget)
    assert "must be at least 1" in str(error.value)
    assert f"{name}[{budget}]" in str(error.value)


@pytest.mark.parametrize("name", CORE_COUNTED + CORE_DENSITY)
@pytest.mark.parametrize("budget", ["82x326", "7", True, [7]])
def test_a_budget_of_the_wrong_kind(name, budget):
    kinds = "an integer count or a density in (0, 1]" if name in CORE_DENSITY else "an integer"
    with pytest.raises(MethodError) as error:
        bare(name, budget)
    assert f"is {kinds}, got {name}[{budget}]" in str(error.value)


@pytest.mark.parametrize("name", CORE_COUNTED)
def test_a_density_where_none_is_taken(name):
    with pytest.raises(MethodError, match=rf"is an integer, got {name}\[0.5\]"):
        bare(name, 0.5)


@pytest.mark.parametrize("name", CORE_DENSITY)
def test_ends_of_the_density_range(name):
    assert bare(name, 1.0).budget_params([(5, 7)]) == 35
    # A density that stands for less than one entry keeps one.
    assert bare(name, 1e-9).budget_params([(5, 7)]) == 1
    assert bare(name, 1).budget_params([(5, 7)]) == 1


SHAPES = [(24, 16), (16, 24), (5, 7)]


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("lora", 3, 3 * (24 + 16) + 3 * (16 + 24) + 3 * (5 + 7)),  # r (D_in + D_out)
        ("meprop-example", 3, 3 * 16 + 3 * 24 + 3 * 7),  # k D_in
        ("meprop-unified", 3, 3 * 16 + 3 * 24 + 3 * 7),
        ("meprop-weight", 10, 10 + 10 + 10),
        ("random-mask", 10, 10 + 10 + 10),
        ("sparsegrad", 10, 10 + 10 + 10),
        ("sparsegrad-compact", 10, 10 + 10 + 10),
        ("sparsegrad-fixed", 10, 10 + 10 + 10),
        ("sparsegrad-core", 10, 10 + 10 + 10),
        ("sparsegrad-directions", 3, 3 * 24 + 3 * 16 + 3 * 5),  # k D_out
        ("sparsegrad-folded", 10, 10 + 10 + 10),
        ("gmt", 10, 10 + 10 + 10),
        ("sift", 10, 10 + 10 + 10),
        ("smt", 3, 3 * 1),  # blocks of 1 x 1: larger ones leave too much of 5 or 7 over
        ("galore", 3, 3 * 24 + 3 * 24 + 3 * 7),  # r max(D_in, D_out)
        ("apollo", 3, 3 * 24 + 3 * 24 + 3 * 7),
        ("gmt", 0.1, 38 + 38 + 4),
        ("sift", 0.1, 38 + 38 + 4),
        ("meprop-weight", 0.1, 38 + 38 + 4),  # round(38.4), round(3.5) is even
        ("random-mask", 0.1, 38 + 38 + 4),
        ("sparsegrad", 0.1, 38 + 38 + 4),
        ("sparsegrad-compact", 0.1, 38 + 38 + 4),
        ("sparsegrad-fixed", 0.1, 38 + 38 + 4),
        ("sparsegrad-folded", 0.1, 38 + 38 + 4),
    ],
)
def test_budget_params(name, budget, expected):
    assert bare(name, budget).budget_params(SHAPES) == expected


@pytest.mark.parametrize("name", WITHOUT)
def test_no_budget_no_budget_params(name):
    assert bare(name).budget_params(SHAPES) is None


@pytest.mark.parametrize(
    ("name", "budget"),
    [("lora", 7), ("meprop-example", 14), ("meprop-unified", 14), ("smt", 1), ("galore", 8), ("apollo", 8)]
    + [(name, 0.01) for name in CORE_DENSITY],
)
def test_default_budgets(name, budget):
    # Rank 7 and 1 % are the paper's for BERT.
    method = bare(name)
    assert method.budget == budget
    assert type(method.budget) is type(budget)


def test_default_budgets_are_near_each_other_on_bert():
    # One up and one down projection: 2 * 7 * (768 + 3072) for LoRA, 14 * (768 + 3072) for MeProp.
    shapes = [(3072, 768), (768, 3072)]
    assert bare("lora").budget_params(shapes) == bare("meprop-unified").budget_params(shapes) == 53_760
    # "About 22 000 kept elements per 768 x 3072 layer (1 %)".
    assert bare("sparsegrad").budget_params(shapes[:1]) == round(0.01 * 768 * 3072) == 23_593


@pytest.mark.parametrize(
    ("name", "largest"),
    [("lora", 5), ("meprop-example", 5), ("meprop-unified", 5), ("galore", 5), ("apollo", 5)]
    + [(name, 35) for name in CORE_DENSITY],
)
def test_largest_budget_is_the_smallest_layers(name, largest):
    # The smallest of min(shape), D_out, and D_out D_in.
    assert get(name).largest_budget(SHAPES) == largest
    bare(name, largest).check_budget_fits(SHAPES)
    with pytest.raises(MethodError, match=rf"must be at most {largest} for these layers, got {name}\[{largest + 1}\]"):
        bare(name, largest + 1).check_budget_fits(SHAPES)


@pytest.mark.parametrize("name", ["meprop-example", "meprop-unified"])
def test_largest_number_of_outputs_is_not_bound_by_the_inputs(name):
    assert get(name).largest_budget([(24, 16)]) == 24


@pytest.mark.parametrize("name", BUDGETED)
def test_the_largest_budget_works_and_one_more_changes_nothing(name, build_model, batches, apply):
    model = build_model("bert")
    layers = find_layers(model)
    model.bert.pooler.requires_grad_(False)
    before = picture(model)
    largest = get(name).largest_budget(target_shapes(model, layers))

    def unread():
        pytest.fail("a budget that does not fit is refused before any batch is drawn")
        yield

    with pytest.raises(MethodError, match=f"at most {largest} for these layers"):
        get(name)(largest + 1, Setting(layers=layers)).prepare(model, unread())
    assert_same_picture(model, before)
    apply(name, model, budget=largest)
    model(**next(batches(model))).loss.backward()


# --- what prepare does


def in_four_bits(model):
    """The model with each target weight as NF4 has it; tests/baselines/test_nf4.py says what that is."""
    tables = nf4.Tables.made(torch.device("cpu"))
    for name in itertools.chain(*find_layers(model).values()):
        weight = source_weight(model.get_submodule(name))
        stored = nf4.quantize(weight, tables)
        weight.copy_(nf4.dequantize(stored, tables, tuple(weight.shape), weight.dtype))
    return model


# LLaMA's layers have no biases: bitfit refuses them.
ON_FAMILIES = [
    (family, name) for family in ("bert", "gpt2", "llama") for name in METHODS if (family, name) != ("llama", "bitfit")
]


@pytest.mark.parametrize(("family", "name"), ON_FAMILIES)
def test_outputs_are_unchanged_right_after_prepare(family, name, build_model, apply, logits):
    model = build_model(family)
    # QLoRA begins at the model in four bits.
    before = logits(in_four_bits(build_model(family)) if name == "qlora" else model)
    apply(name, model)
    after = logits(model)
    # LoRA-XS does not begin at the model but next to it: with entries of 1e-5 between its matrices.
    near = 1e-4 if name == "lora-xs" else 1e-5
    assert float((after - before).abs().max()) <= near * float(before.abs().max())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_outputs_depend_on_the_target_layers(family, build_model, logits):
    # What makes the test above mean something: an MLP that is off by a hundredth moves the outputs far more.
    model = build_model(family)
    before = logits(model)
    name = next(iter(find_layers(model).values()))[0]
    model.get_submodule(name).weight.data.mul_(1.01)
    assert float((logits(model) - before).abs().max()) > 1e-3 * float(before.abs().max())


def target_weights(model):
    return {f"{name}.weight" for names in find_layers(model).values() for name in names}


BERT_TARGETS = [f"bert.encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
BERT_HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_what_trains_of_a_classifier(name, rest, build_model, apply):
    model = build_model("bert")
    everything = {name for name, _ in model.named_parameters()}
    assert target_weights(model) == {f"{target}.weight" for target in BERT_TARGETS}
    outside = {name for name in everything if not name.startswith(tuple(f"{t}." for t in BERT_TARGETS))}
    biases = {f"{target}.bias" for target in BERT_TARGETS}
    # Embeddings and their norm, two layers of attention and norms, pooler, head.
    assert len(outside) == 5 + 2 * (8 + 4) + 2 + 2
    model.requires_grad_(False)
    apply(name, model, train_rest=rest)
    if name == "full":
        assert trainable(model) == everything
    elif name == "head":
        assert trainable(model) == BERT_HEAD
    elif name in OWN:
        own = {f"{target}.{end}" for target in BERT_TARGETS for end in OWN[name]}
        assert trainable(model) == own | (outside | biases if rest == "all" else BERT_HEAD)
    else:
        assert trainable(model) & outside == (outside if rest == "all" else BERT_HEAD)


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_trains_of_a_language_model(family, name, rest, build_model, apply):
    model = build_model(family)
    everything = {name for name, _ in model.named_parameters()}
    targets = target_weights(model)
    apply(name, model, train_rest=rest)
    own = {f"{target.removesuffix('.weight')}.{end}" for target in targets for end in OWN[name]}
    # A language model has no head that its task added.
    assert trainable(model) == own | (everything - targets if rest == "all" else set())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("first", ["lora", "sparsegrad"])
def test_a_model_adapted_already_is_refused(first, name, build_model, apply):
    model = build_model("bert")
    layers = find_layers(model)
    apply(first, model)
    before = picture(model)
    with pytest.raises(MethodError, match=rf"{name} cannot be applied: the model is converted already.*merge it first"):
        apply(name, model, layers=layers)
    assert_same_picture(model, before)
    merge(model)
    apply(name, model, layers=layers)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_peft_adapted_is_refused(name, build_model, apply):
    peft = pytest.importorskip("peft")
    model = build_model("bert")
    layers = find_layers(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=BERT_TARGETS), model)
    before = picture(model)
    with pytest.raises(MethodError, match="not a plain linear layer"):
        apply(name, model, layers=layers)
    assert_same_picture(model, before)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_of_two_kinds_is_refused(name, build_model, apply):
    model = build_model("bert")
    layers = {"up": BERT_TARGETS[::2], "again": BERT_TARGETS[:1]}
    before = picture(model)
    with pytest.raises(MethodError, match="named 2 times"):
        apply(name, model, layers=layers)
    assert_same_picture(model, before)


def test_target_shapes_are_d_out_by_d_in(build_model):
    for family in ("bert", "gpt2"):
        model = build_model(family)
        layers = find_layers(model)
        assert target_shapes(model, layers) == [(24, 16)] * 2 + [(16, 24)] * 2


# --- optimizers


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_parameter_has_one_optimizer(name, rest, build_model, batches, apply):
    model = build_model("bert")
    method = apply(name, model, train_rest=rest)
    optimizers = method.optimizers(model, 3e-4)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["lr"] == 3e-4 for optimizer in optimizers for group in optimizer.param_groups)
    # Each kind of gradient reaches the optimizer that can take it.
    model(**next(batches(model))).loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            assert all(gradient.is_sparse == isinstance(optimizer, SparseAdam) for gradient in gradients)
    assert any(isinstance(optimizer, SparseAdam) for optimizer in optimizers) == (name in SPARSE)


@pytest.mark.parametrize(
    ("impl", "foreach", "fused"), [("for-loop", False, False), ("foreach", True, False), ("fused", False, True)]
)
def test_adamw_is_the_implementation_asked_for(impl, foreach, fused, build_model, apply):
    model = build_model("bert")
    method = apply("full", model, optimizer_impl=impl)
    (optimizer,) = method.optimizers(model, 1e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["foreach"], optimizer.defaults["fused"]) == (foreach, fused)


def test_adamw_does_not_decay_weights(build_model, apply):
    model = build_model("bert")
    method = apply("full", model)
    (optimizer,) = method.optimizers(model, 0.1)
    before = model.classifier.weight.detach().clone()
    model.classifier.weight.grad = torch.zeros_like(model.classifier.weight)
    optimizer.step()
    assert torch.equal(model.classifier.weight, before)


# --- counts


@pytest.mark.parametrize(
    ("name", "budget", "added", "own"),
    [
        ("full", None, 0, 4 * 384),
        ("gmt", 10, 0, 4 * 384),
        ("sift", 10, 4 * 10, 4 * 10),
        ("smt", 3, 3 * 64, 3 * 64),  # blocks of 8 x 8, in all layers together
        ("galore", 3, 0, 4 * 384),
        ("apollo", 3, 0, 4 * 384),
        ("lora", 3, 4 * 3 * 40, 4 * 3 * 40),
        ("meprop-example", 3, 0, 4 * 384),
        ("meprop-unified", 3, 0, 4 * 384),
        ("meprop-weight", 10, 0, 4 * 384),
        ("random-mask", 10, 4 * 10, 4 * 10),
        ("sparsegrad", 10, 0, 4 * 384),
        ("sparsegrad-compact", 10, 0, 4 * 384),
        ("sparsegrad-core", 10, 4 * 10, 4 * 10),
        ("sparsegrad-directions", 3, 2 * 3 * 40, 2 * 3 * 40),
        ("sparsegrad-fixed", 10, 4 * 10, 4 * 10),
        ("sparsegrad-folded", 10, 0, 4 * 384),
    ],
)
def test_counts_of_a_classifier(name, budget, added, own, build_model, apply):
    model = build_model("bert")
    everything = sum(p.numel() for p in model.parameters())
    shapes = target_shapes(model, find_layers(model))
    method = apply(name, model, budget=budget)
    counts = method.counts(model, shapes)
    assert counts.total_params == everything + added
    assert counts.trainable_params == everything - 4 * 384 + own
    assert counts.budget_params == method.budget_params(shapes)


# --- the claimed bytes


class OneLinear(nn.Module):
    """A layer without bias, as `formula` speaks of it."""

    def __init__(self, d_out, d_in, dtype, bias=False):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.linear(x)


def backward_from(model, batch):
    x, dy = batch
    model(x).backward(dy)


def storages(tensors):
    """Bytes by storage: a view counts as its whole storage, a COO tensor as its indices and its values."""
    found = {}
    for tensor in tensors:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def forward_and_saved(model, x):
    """Y, and every tensor that the graph keeps for backward."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return model(x), kept


BUDGETS = {name: [None, 1] for name in METHODS}
BUDGETS |= {name: [None] for name in WITHOUT}
# VeRA's default is more than the small layer can take.
BUDGETS |= {"vera": [5, 1]}
BUDGETS |= {"lora": [3, 1], "meprop-example": [5, 1], "meprop-unified": [5, 1], "sparsegrad-directions": [5, 1]}
BUDGETS |= {"galore": [5, 1], "apollo": [5, 1], "smt": [1]}
BUDGETS |= {name: [0.07, 29, 1, 1.0] for name in CORE_DENSITY}
BUDGETS["sparsegrad-core"] = [0.07, 29, 1, 1.0, "5x3", "0x3"]
FORMULA_CASES = [(name, budget) for name in METHODS for budget in BUDGETS[name]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("d_out", "d_in", "batch", "seq"), [(19, 13, 2, 5), (7, 23, 1, 1)])
@pytest.mark.parametrize(("name", "budget"), FORMULA_CASES)
@pytest.mark.parametrize("adapter_dtype", ["same", "float32"])
def test_formula_is_what_a_step_holds(name, budget, d_out, d_in, batch, seq, dtype, adapter_dtype):
    torch.manual_seed(0)
    # The bias is what bitfit trains, and its formula counts it.
    model = OneLinear(d_out, d_in, dtype, bias=name == "bitfit")
    setting = Setting(
        layers={"linear": ["linear"]}, calibration_steps=3, backward=backward_from, adapter_dtype=adapter_dtype
    )

    def batches():
        while True:
            x = torch.randn(batch, seq, d_in, dtype=dtype, requires_grad=True)
            yield x, torch.randn(batch, seq, d_out, dtype=dtype)

    method = get(name)(budget, setting)
    method.prepare(model, batches())
    claim = method.formula((d_out, d_in), batch * seq, dtype)

    basis = storages(method.basis_tensors(model))
    parameters = storages(model.parameters())
    assert sum(basis.values()) == claim.basis
    assert sum(parameters.values()) == claim.parameter
    # Nothing else is kept in the model.
    assert storages(model.buffers()).keys() <= basis.keys() | parameters.keys()

    optimizers = method.optimizers(model, 1e-3)
    for _ in range(2):
        x, dy = next(batches())
        y, kept = forward_and_saved(model, x)
        saved = storages(kept)
        # With every saved tensor alive in `kept`, no two storages share an address.
        given = storages([x]) | parameters | basis
        assert sum(size for address, size in saved.items() if address not in given) == claim.activation
        assert (x.untyped_storage().data_ptr() in saved) == claim.keeps_input
        model.zero_grad(set_to_none=True)
        y.backward(dy)
        method.after_backward(model)
        gradients = storages(p.grad for p in model.parameters() if p.grad is not None)
        assert sum(gradients.values()) == claim.gradient
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(model)

    # AdamW keeps its step count as a 4-byte tensor for each parameter; SparseAdam's is a plain number.
    dense = [o for o in optimizers if isinstance(o, torch.optim.AdamW)]
    steps = 4 * sum(len(group["params"]) for optimizer in dense for group in optimizer.param_groups)
    state = storages(
        value
        for optimizer in optimizers
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    assert sum(state.values()) == claim.optimizer + steps
    assert claim.resident == sum((storages(model.parameters()) | basis).values()) + claim.optimizer


# --- learning


class Student(nn.Module):
    """An MLP with two target layers and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.classifier = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.classifier(x + self.down(nn.functional.gelu(self.up(x))))


LAYERS = {"up": ["up"], "down": ["down"]}
BUDGET = {"dora": 4, "lora-fa": 12, "lora-xs": 12, "pissa": 4, "qlora": 4, "vera": 240}
BUDGET |= {"lora": 4, "meprop-example": 8, "meprop-unified": 8}
BUDGET |= {"meprop-weight": 0.2, "random-mask": 0.5, "sparsegrad": 0.2, "sparsegrad-core": 0.7, "sparsegrad-fixed": 0.5}
BUDGET |= {"sparsegrad-compact": 0.2, "sparsegrad-directions": 9, "sparsegrad-folded": 0.2}
BUDGET |= {"gmt": 0.2, "sift": 0.5, "galore": 12, "apollo": 4}


# The loss must fall to less than this share of what it was, and of what the rest of the model reaches by itself.
SHARE = 0.25


def own_parameters(name, student):
    """What trains because the method says so, in the regime where everything but the target weights trains."""
    if name == "full":
        return list(student.parameters())
    if name == "head":
        return list(student.classifier.parameters())
    return [getattr(layer, end) for layer in (student.up, student.down) for end in OWN[name]]


def regression_loss(name, train_own):
    """The loss before and after training, the method's own parameters among the trained ones or frozen."""
    torch.manual_seed(0)
    student = Student()
    teacher = copy.deepcopy(student)
    # The teacher differs where the method can follow, and nowhere else.
    moved = [teacher.classifier] if name == "head" else [teacher.up, teacher.down]
    for layer in moved:
        layer.weight.data.add_(torch.randn_like(layer.weight), alpha=0.3)
    inputs = torch.randn(64, 12)
    with torch.no_grad():
        targets = teacher(inputs)

    def loss_of(model):
        # X requires grad, so that there is a backward pass even where nothing trains.
        return nn.functional.mse_loss(model(inputs.clone().requires_grad_()), targets)

    setting = Setting(layers=LAYERS, calibration_steps=1, backward=lambda model, _: loss_of(model).backward())
    method = get(name)(BUDGET.get(name), setting)
    method.prepare(student, iter([None]))
    before = loss_of(student).item()
    if not train_own:
        for parameter in own_parameters(name, student):
            parameter.requires_grad_(False)
    # SparseAdam holds its weights even then, but leaves alone what gets no gradient.
    optimizers = method.optimizers(student, 1e-2)
    for _ in range(150):
        student.zero_grad(set_to_none=True)
        loss_of(student).backward()
        method.after_backward(student)
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(student)
    return before, loss_of(student).item()


@pytest.mark.parametrize("name", ["full", "head", *OWN])
def test_each_method_learns_by_its_own_parameters(name):
    before, after = regression_loss(name, train_own=True)
    same, without = regression_loss(name, train_own=False)
    assert before == same
    assert after < SHARE * before
    assert after < SHARE * without


# --- export


@pytest.mark.parametrize(("family", "name"), ON_FAMILIES)
def test_export_computes_what_was_trained(family, name, build_model, apply, train, logits):
    model = build_model(family, torch.float64)
    before = logits(model)
    kinds = [(key, type(module)) for key, module in model.named_modules()]
    keys = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
    method = apply(name, model)
    train(method, model, count=3, lr=1e-2)
    trained = logits(model)
    moved = float((trained - before).abs().max() / before.abs().max())
    assert moved > 1e-3
    exported = method.export(model)
    assert exported is model
    torch.testing.assert_close(logits(exported), trained, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, AdaptedLinear) for module in exported.modules())
    assert [(key, type(module)) for key, module in exported.named_modules()] == kinds
    assert sorted((key, value.shape, value.dtype) for key, value in exported.state_dict().items()) == sorted(keys)


@pytest.mark.parametrize("name", OWN)
def test_export_holds_what_the_own_parameters_learned(name, build_model, apply, train):
    # In this regime the target weights move by the method alone.
    model = build_model("bert", torch.float64)
    before = {target: model.get_submodule(target).weight.detach().clone() for target in BERT_TARGETS}
    method = apply(name, model, train_rest="none")
    assert {target for target, _ in adapted_layers(model)} == set(BERT_TARGETS)
    train(method, model, count=3, lr=1e-2)
    method.export(model)
    for target, weight in before.items():
        assert float((model.get_submodule(target).weight - weight).detach().abs().max()) > 1e-4


# --- the interface itself


def test_a_method_with_a_budget_must_say_what_it_stands_for():
    class Silent(EntryMethod):
        name = "silent"
        layer_params = get("full").layer_params
        largest_budget = get("full").largest_budget

        def prepare(self, model, batches):
            pass

        def formula(self, shape, tokens, dtype):
            pass

    method = Silent(3, Setting(layers={}))
    with pytest.raises(TypeError, match="silent has a budget but does not say its parameters"):
        method.budget_params([(5, 7)])
