"""Converting whole models, training, merging, saving and loading them, and what is refused.

Run as a script it is the new process that goes on training what a test has saved.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparsegrad
from sparsegrad import (
    FoldedLinear,
    SparseAdam,
    SparseGradError,
    SparseGradLinear,
    TransitionMatrices,
    calibrate,
    convert,
    convert_core,
    convert_fixed,
    convert_folded,
    find_layers,
    load,
    load_optimizers,
    merge,
    save,
)

FAMILIES = ["bert", "roberta", "gpt2", "llama"]
LAYERS = {"up": ["0.up", "1.up"], "down": ["0.down", "1.down"]}
# Relative to the largest magnitude. A whole model of float32 rounds more often than one layer: hence its test in both.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


class Block(nn.Module):
    def __init__(self, d_in: int = 5, d_hidden: int = 7):
        super().__init__()
        self.up = nn.Linear(d_in, d_hidden)
        self.down = nn.Linear(d_hidden, d_in, bias=False)
        self.norm = nn.LayerNorm(d_in)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def blocks(dtype: torch.dtype = torch.float64, d_hidden: int = 7) -> nn.Sequential:
    return nn.Sequential(Block(5, d_hidden), Block(5, d_hidden)).to(dtype)


def random_bases(model: nn.Module, layers, orthogonal) -> dict[str, TransitionMatrices]:
    """Orthogonal matrices of the right sizes: what is tested here holds for any."""
    bases = {}
    for kind, names in layers.items():
        layer = model.get_submodule(names[0])
        stored = tuple(layer.weight.shape)
        d_out, d_in = stored if isinstance(layer, nn.Linear) else stored[::-1]
        dtype = layer.weight.dtype
        bases[kind] = TransitionMatrices(orthogonal(d_in, dtype), orthogonal(d_out, dtype))
    return bases


def sparse_layers(model: nn.Module) -> list[SparseGradLinear | FoldedLinear]:
    return [module for module in model.modules() if isinstance(module, (SparseGradLinear, FoldedLinear))]


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    return model(**batch).loss if isinstance(batch, dict) else model(batch).square().sum()


def output(model: nn.Module, batch) -> torch.Tensor:
    return (model(**batch).logits if isinstance(batch, dict) else model(batch)).detach()


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """As the paper trains: SparseAdam for the weights in the bases, AdamW for the rest."""
    sparse = [layer.weight for layer in sparse_layers(model)]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in sparse)]
    return [SparseAdam(sparse, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)]


def train(model: nn.Module, batch, steppers, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        for optimizer in steppers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def goes_on(model: nn.Module, batch, steppers) -> dict[str, torch.Tensor]:
    """The output, two more steps' losses and the state after them."""
    first = output(model, batch)
    losses = train(model, batch, steppers, 2)
    return {"output": first, "losses": torch.tensor(losses, dtype=torch.float64), **model.state_dict()}


@pytest.fixture
def prepared(tiny, orthogonal):
    """name, dtype -> (model, layers, bases, batch); `blocks` is a model of torch's modules alone."""

    def build(name: str, dtype: torch.dtype = torch.float64):
        if name == "blocks":
            model, batch = blocks(dtype), torch.randn(2, 3, 5, dtype=dtype)
            layers = LAYERS
        else:
            model, batch = tiny(name)
            model = model.to(dtype)
            layers = find_layers(model)
        return model, layers, random_bases(model, layers, orthogonal), batch

    return build


# Conversion


@pytest.mark.parametrize("product", ["sparse-by-dense", "dense"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["blocks", *FAMILIES])
def test_a_converted_model_gives_the_same_outputs_and_gradients(prepared, distance, name, dtype, product):
    model, layers, bases, batch = prepared(name, dtype)
    twin = copy.deepcopy(model)
    assert convert(model, layers, bases, density=1.0, product=product) is model
    names = [n for kind in layers.values() for n in kind]
    assert {n for n, m in model.named_modules() if isinstance(m, SparseGradLinear)} == set(names)
    assert distance(output(model, batch), output(twin, batch)) < ROUNDING[dtype]
    for one in (model, twin):
        loss_of(one, batch).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    within = ROUNDING[dtype]
    for n, parameter in twin.named_parameters():
        owner = n.removesuffix(".weight")
        # A key's bias moves all scores of a query alike: its gradient is zero but for rounding.
        if parameter.grad is None or n.endswith("key.bias"):
            continue
        if owner not in names:
            assert distance(gradients[n], parameter.grad) < within
            continue
        basis = model.get_submodule(owner).basis
        gradient = parameter.grad if isinstance(twin.get_submodule(owner), nn.Linear) else parameter.grad.T
        expected = basis.V.double() @ gradient.double() @ basis.U.double().T
        assert distance(gradients[n].to_dense(), expected) < within


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_everything_else_stay(prepared, training):
    model, layers, bases, _ = prepared("blocks")
    model.train(training)
    model[0].norm.eval()
    others = {n: id(p) for n, p in model.named_parameters() if not n.endswith(("up.weight", "down.weight"))}
    convert(model, layers, bases, nnz=3)
    assert [layer.training for layer in sparse_layers(model)] == [training] * 4
    assert not model[0].norm.training
    assert {n: id(p) for n, p in model.named_parameters() if n in others} == others


def test_layers_of_a_kind_share_one_basis_and_keep_sharing_it(prepared):
    model, layers, bases, _ = prepared("blocks")
    convert(model, layers, bases, nnz=3)

    def check(model, dtype):
        for kind, names in layers.items():
            first, second = (model.get_submodule(name).basis for name in names)
            assert first is second
            assert first.U.dtype == first.V.dtype == dtype
            assert first.U.shape == bases[kind].U.shape
        matrices = [buffer for name, buffer in model.named_buffers() if "basis" in name]
        assert len({matrix.untyped_storage().data_ptr() for matrix in matrices}) == len(matrices) == 4

    check(model, torch.float64)
    check(copy.deepcopy(model), torch.float64)
    assert copy.deepcopy(model)[0].up.basis is not model[0].up.basis
    check(model.to(torch.float32), torch.float32)
    model.to("meta")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert all(model.get_submodule(a).basis is model.get_submodule(b).basis for a, b in layers.values())


@pytest.mark.parametrize(("budget", "expected"), [({"nnz": 3}, 3), ({"density": 0.2}, 7), ({"density": 1.0}, 35)])
def test_each_layer_gets_the_budget(prepared, budget, expected):
    model, layers, bases, batch = prepared("blocks")
    convert(model, layers, bases, **budget)
    loss_of(model, batch).backward()
    assert [layer.weight.grad._nnz() for layer in sparse_layers(model)] == [expected] * 4


# From calibration to the merged model


@pytest.mark.parametrize("name", ["blocks", *FAMILIES])
def test_calibrate_convert_train_merge(prepared, distance, name):
    model, layers, _, batch = prepared(name)
    types = {n: type(module) for n, module in model.named_modules()}
    shapes = {n: value.shape for n, value in model.state_dict().items()}
    if name == "blocks":
        bases = calibrate(model, layers, [batch] * 2, lambda model, batch: loss_of(model, batch).backward())
    else:
        bases = calibrate(model, layers, [batch] * 2)
    untrained = output(model, batch)
    convert(model, layers, bases, density=0.05)
    losses = train(model, batch, optimizers(model), 12)
    assert losses[-1] < losses[0]
    trained = output(model, batch)
    assert distance(trained, untrained) > 1e-2
    assert merge(model) is model
    assert distance(output(model, batch), trained) < 1e-12
    assert {n: type(module) for n, module in model.named_modules()} == types
    assert {n: value.shape for n, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["blocks", "gpt2"])
def test_a_merged_model_can_be_converted_again(prepared, distance, name):
    model, layers, bases, batch = prepared(name)
    before = output(model, batch)
    for _ in range(2):
        merge(convert(model, layers, bases, nnz=3))
    assert distance(output(model, batch), before) < 1e-12
    convert(model, find_layers(model, {kind: names[0] for kind, names in layers.items()}), bases, nnz=3)
    assert len(sparse_layers(model)) == len(layers)


def test_merge_needs_a_converted_layer(unchanged):
    model = blocks()
    with unchanged(model), pytest.raises(SparseGradError, match="Sequential holds no converted layer to merge"):
        merge(model)


def test_bfloat16_model_trains(prepared, distance):
    model, layers, bases, batch = prepared("bert", torch.bfloat16)
    twin = copy.deepcopy(model).double()
    expected = output(twin, batch)
    rounding = distance(output(model, batch), expected)  # of the unconverted model in the same dtype
    convert(model, layers, bases, density=0.05)
    # A converted layer rounds six times (U, V, W~, X~, Y~, Y) where the linear one rounds once.
    assert distance(output(model, batch), expected) < 6 * max(rounding, 2**-8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, batch, optimizers(model), 3)
    assert all(p.isfinite().all() for p in model.parameters())
    for name in (f"{n}.weight" for kind in layers.values() for n in kind):
        assert not torch.equal(model.get_parameter(name), before[name])


# What convert refuses, before it changes anything


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of nnz and density"),
        ({"nnz": 3, "density": 0.1}, "exactly one of nnz and density"),
        ({"nnz": 0}, "nnz must be an integer from 1 to 35 .* got 0"),
        ({"nnz": 36}, "nnz must be an integer from 1 to 35 .* got 36"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": -1}, r"density must be in \(0, 1\], got -1"),
        ({"nnz": 3, "blocks": 0}, "blocks must be an integer of at least 1, got 0"),
        ({"nnz": 3, "product": "sparse"}, "product must be one of sparse-by-dense, dense, got 'sparse'"),
    ],
)
def test_options_that_do_not_fit(prepared, unchanged, options, message):
    model, layers, bases, _ = prepared("blocks")
    with unchanged(model), pytest.raises(SparseGradError, match=message):
        convert(model, layers, bases, **options)


def change(bases, layers, orthogonal, what):
    """One thing that does not fit, in the second kind: the first must not be converted either."""
    if what == "missing":
        del bases["down"]
    elif what == "swapped":
        bases["down"] = TransitionMatrices(bases["down"].V, bases["down"].U)
    elif what == "too large":
        bases["down"] = TransitionMatrices(orthogonal(8), orthogonal(5))
    elif what == "dtype":
        bases["down"].to(torch.float32)
    elif what == "named twice":
        layers["down"] = ["0.down", "0.down"]
    elif what == "two kinds":
        layers["again"], bases["again"] = ["0.up"], bases["up"]
    elif what == "unknown":
        layers["down"] = ["0.down", "2.down"]
    elif what == "not linear":
        layers["down"] = ["0.norm"]
    elif what == "mixed":
        layers.update(up=["0.up"], down=["0.down", "1.up"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no transition matrices are given for kind 'down'; there are some for: up"),
        ("swapped", "a weight of 5 x 7 .* needs U with 7 columns, got 5 x 5"),
        ("too large", "needs U with 7 columns, got 8 x 8"),
        ("dtype", "U is torch.float32 .* the weight torch.float64"),
        ("named twice", "'0.down' is named twice"),
        ("two kinds", "'0.up' is named twice"),
        ("unknown", "Sequential has no layer '2.down'; its linear layers end in: up, down"),
        ("not linear", "'0.norm' is a LayerNorm, not a plain linear layer"),
        ("mixed", "kind 'down' must share one shape .* '0.down' is 5 x 7, '1.up' is 7 x 5"),
    ],
)
def test_layers_and_bases_that_do_not_fit(prepared, unchanged, orthogonal, what, message):
    model, layers, bases, _ = prepared("blocks")
    layers = dict(layers)
    change(bases, layers, orthogonal, what)
    with unchanged(model), pytest.raises(SparseGradError, match=message):
        convert(model, layers, bases, nnz=3)


def test_a_budget_that_one_kind_cannot_hold(orthogonal, unchanged):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).double()
    layers = {"large": ["0"], "small": ["1"]}
    bases = random_bases(model, layers, orthogonal)
    with unchanged(model), pytest.raises(SparseGradError, match="from 1 to 7 for a weight of 1 x 7, got 8"):
        convert(model, layers, bases, nnz=8)


def test_no_layers_at_all(prepared, unchanged):
    model, _, bases, _ = prepared("blocks")
    with unchanged(model), pytest.raises(SparseGradError, match="layers is empty"):
        convert(model, {}, bases, nnz=3)


def test_a_tied_weight_is_not_converted(tiny, orthogonal, unchanged):
    model, _ = tiny("gpt2")
    layers = {"head": ["lm_head"]}
    bases = random_bases(model, layers, orthogonal)
    with unchanged(model), pytest.raises(SparseGradError, match=r"'lm_head' shares its weight with 'transformer\.wte'"):
        convert(model, layers, bases, nnz=3)


def test_a_converted_model_is_not_converted_again(prepared, unchanged):
    model, layers, bases, _ = prepared("blocks")
    convert(model, {"up": layers["up"]}, bases, nnz=3)
    with unchanged(model), pytest.raises(SparseGradError, match=r"converted already \('0\.up' is a SparseGradLinear\)"):
        convert(model, {"down": layers["down"]}, bases, nnz=3)


# Saving and loading


def in_new_process(folder: Path) -> dict[str, torch.Tensor]:
    """Runs this file as a script on what is in the folder."""
    root = Path(sparsegrad.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment, timeout=120)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize(("name", "dtype"), [("blocks", torch.float64), ("gpt2", torch.float32)])
def test_a_new_process_goes_on_as_if_nothing_happened(prepared, tmp_path, name, dtype):
    model, layers, bases, batch = prepared(name, dtype)
    blank = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.normal_()
    torch.save((blank, batch), tmp_path / "blank.pt")
    convert(model, layers, bases, nnz=9)
    steppers = optimizers(model)
    train(model, batch, steppers, 3)
    save(model, tmp_path / "model.safetensors", steppers)
    expected = goes_on(model, batch, steppers)
    found = in_new_process(tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def trained(prepared, name="blocks", dtype=torch.float64):
    model, layers, bases, batch = prepared(name, dtype)
    blank = copy.deepcopy(model)
    convert(model, layers, bases, nnz=9, blocks=3)
    steppers = optimizers(model)
    train(model, batch, steppers, 2)
    return model, blank, steppers, batch


@pytest.mark.parametrize("name", ["blocks", *FAMILIES])
def test_load_gives_what_was_saved(prepared, tmp_path, name):
    model, blank, _, batch = trained(prepared, name)
    biases = {n: id(p) for n, p in blank.named_parameters() if n.endswith("bias")}
    save(model, tmp_path / "model.safetensors")
    loaded = load(blank, tmp_path / "model.safetensors")
    assert loaded is blank
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for n, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[n], value), n
    for before, after in zip(sparse_layers(model), sparse_layers(loaded), strict=True):
        assert (after.nnz, after.product, after.transposed) == (before.nnz, before.product, before.transposed)
        assert after.blocks == before.blocks == 3
        assert after.training == before.training
    assert {n: id(p) for n, p in loaded.named_parameters() if n in biases} == biases
    # It can be merged as the one that was saved.
    assert torch.equal(output(merge(loaded), batch), output(merge(model), batch))


def some(bases, k_out, k_in):
    """The leading directions; 0: that side is not rotated."""
    return {
        kind: TransitionMatrices(basis.U[:k_in] if k_in else None, basis.V[:k_out] if k_out else None)
        for kind, basis in bases.items()
    }


def fixed(model, layers, bases):
    chosen = {name: torch.tensor([0, 2, 9], dtype=torch.int32) for names in layers.values() for name in names}
    convert_fixed(model, layers, bases, chosen)


OTHER_FORMS = {
    "folded": lambda model, layers, bases: convert_folded(model, layers, bases, nnz=9),
    "folded, inputs not rotated": lambda model, layers, bases: convert_folded(
        model, layers, {k: TransitionMatrices(None, b.V) for k, b in bases.items()}, nnz=9
    ),
    "one side": lambda model, layers, bases: convert(
        model, layers, {k: TransitionMatrices(None, b.V) for k, b in bases.items()}, nnz=9
    ),
    "core": lambda model, layers, bases: convert_core(model, layers, some(bases, 2, 3)),
    "core, outputs not rotated": lambda model, layers, bases: convert_core(model, layers, some(bases, 0, 2)),
    "core in a wider dtype": lambda model, layers, bases: convert_core(model, layers, some(bases, 2, 3), torch.float64),
    "fixed": lambda model, layers, bases: fixed(
        model, layers, {k: TransitionMatrices(b.U[:4], b.V) for k, b in bases.items()}
    ),
    "fixed, inputs not rotated": lambda model, layers, bases: fixed(
        model, layers, {k: TransitionMatrices(None, b.V) for k, b in bases.items()}
    ),
    "fixed, not rotated": lambda model, layers, bases: fixed(model, layers, some(bases, 0, 0)),
}


@pytest.mark.parametrize("name", ["blocks", "gpt2", "llama"])
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_go_on_after_load(prepared, tmp_path, form, name):
    dtype = torch.float32 if "wider" in form else torch.float64
    model, layers, bases, batch = prepared(name, dtype)
    blank = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.normal_()

    def steppers(of):
        sparse = [layer.weight for layer in sparse_layers(of)]
        rest = [p for p in of.parameters() if p.requires_grad and all(p is not q for q in sparse)]
        return [*([SparseAdam(sparse, lr=1e-2, capacity=2)] if sparse else []), torch.optim.AdamW(rest, lr=1e-2)]

    OTHER_FORMS[form](model, layers, bases)
    before = steppers(model)
    train(model, batch, before, 3)
    save(model, tmp_path / "model.safetensors", before)
    loaded = load(blank, tmp_path / "model.safetensors")
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    after = steppers(loaded)
    load_optimizers(after, tmp_path / "model.safetensors")
    for (key, expected), found in zip(
        goes_on(model, batch, before).items(), goes_on(loaded, batch, after).values(), strict=True
    ):
        assert torch.equal(found, expected), key
    assert torch.equal(output(merge(loaded), batch), output(merge(model), batch))


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("core", ("0.up.core", (3, 3)), r"'0\.up\.core' is \(3, 3\) in the file and \(2, 3\) in the model"),
        ("core", ("0.up.core", None), r"'0\.up\.core' is missing in the file"),
        ("core", ("0.up.basis.U", (3, 6)), r"'0\.up\.basis\.U' is \(3, 6\) in the file and \(3, 5\) in the model"),
        ("fixed", ("1.down.values", (4,)), r"'1\.down\.values' is \(4,\) in the file and \(3,\) in the model"),
        ("fixed", ("1.down.index", (2,)), r"'1\.down\.values' is \(3,\) in the file and \(2,\) in the model"),
    ],
)
def test_other_forms_that_do_not_fit_are_refused(prepared, tmp_path, unchanged, form, change, message):
    model, layers, bases, _ = prepared("blocks")
    blank = copy.deepcopy(model)
    OTHER_FORMS[form](model, layers, bases)
    path = tmp_path / "model.safetensors"
    save(model, path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    name, shape = change
    tensors.pop(f"model.{name}")
    if shape is not None:
        tensors[f"model.{name}"] = torch.zeros(shape)
    save_file(tensors, path, metadata=metadata)
    with unchanged(blank), pytest.raises(SparseGradError, match=message):
        load(blank, path)


def test_bases_are_stored_once_and_shared_after_load(prepared, tmp_path):
    model, blank, _, _ = trained(prepared)
    save(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        bases = [name for name in file.keys() if ".basis." in name]
    assert sorted(name.rsplit(".", 1)[1] for name in bases) == ["U", "U", "V", "V"]  # two kinds
    loaded = load(blank, tmp_path / "model.safetensors")
    assert loaded[0].up.basis is loaded[1].up.basis
    assert loaded[0].down.basis is loaded[1].down.basis
    assert loaded[0].up.basis is not loaded[0].down.basis
    assert len({m.untyped_storage().data_ptr() for n, m in loaded.named_buffers() if "basis" in n}) == 4


def test_tied_embeddings_stay_tied(prepared, tmp_path):
    model, blank, steppers, batch = trained(prepared, "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    save(model, tmp_path / "model.safetensors", steppers)
    loaded = load(blank, tmp_path / "model.safetensors")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(output(loaded, batch), output(model, batch))


@pytest.mark.parametrize("saved_tied", [True, False])
def test_a_tie_that_one_of_them_lacks_is_refused(tiny, orthogonal, tmp_path, unchanged, saved_tied):
    model, _ = tiny("gpt2", tie_word_embeddings=saved_tied)
    other, _ = tiny("gpt2", tie_word_embeddings=not saved_tied)
    layers = find_layers(model)
    convert(model, layers, random_bases(model, layers, orthogonal), nnz=3)
    save(model, tmp_path / "model.safetensors")
    with unchanged(other), pytest.raises(SparseGradError, match=r"'lm_head\.weight' is tied in one of them"):
        load(other, tmp_path / "model.safetensors")


def test_load_casts_to_the_models_dtype(prepared, tmp_path, distance):
    model, blank, _, batch = trained(prepared)
    save(model, tmp_path / "model.safetensors")
    loaded = load(blank.to(torch.float32), tmp_path / "model.safetensors")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert distance(output(loaded, batch.float()), output(model, batch)) < ROUNDING[torch.float32]


def test_frozen_parameters_stay_frozen(prepared, tmp_path):
    model, blank, _, _ = trained(prepared)
    save(model, tmp_path / "model.safetensors")
    blank[0].up.bias.requires_grad_(False)
    blank[0].norm.weight.requires_grad_(False)
    load(blank, tmp_path / "model.safetensors")
    frozen = {n for n, p in blank.named_parameters() if not p.requires_grad}
    assert frozen == {"0.up.bias", "0.norm.weight"}


def test_saving_leaves_one_file_and_replaces_an_old_one(prepared, tmp_path):
    model, blank, _, batch = trained(prepared)
    path = tmp_path / "model.safetensors"
    path.write_text("an old file")
    save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(output(load(blank, path), batch), output(model, batch))


@pytest.mark.parametrize("where", ["nowhere/model.safetensors", "folder"])
def test_a_place_that_cannot_be_written(prepared, tmp_path, where):
    (tmp_path / "folder").mkdir()
    model, _, _, _ = trained(prepared)
    with pytest.raises(SparseGradError, match=f"cannot write .*{where}"):
        save(model, tmp_path / where)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_only_a_converted_model_is_saved(tmp_path):
    with pytest.raises(SparseGradError, match="Sequential holds no SparseGrad layer to save"):
        save(blocks(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def spoil(path: Path, how: str) -> Path:
    """A file that `load` must refuse."""
    whole = path.read_bytes()
    if how == "missing":
        return path.with_name("nowhere")
    if how == "folder":
        return path.parent
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text(json.dumps({"format": "sparsegrad-1"}))
    elif how == "pickle":
        torch.save({"format": "sparsegrad-1"}, path)
    elif how == "foreign":
        save_file({"0.up.weight": torch.ones(7, 5)}, path)
    elif how == "header cut":
        path.write_bytes(whole[:100])
    elif how == "data cut":
        path.write_bytes(whole[:-8])
    return path


@pytest.mark.parametrize("how", ["missing", "folder", "empty", "text", "pickle", "foreign", "header cut", "data cut"])
def test_files_that_are_not_what_was_saved(prepared, tmp_path, unchanged, how):
    model, blank, steppers, _ = trained(prepared)
    save(model, tmp_path / "model.safetensors", steppers)
    path = spoil(tmp_path / "model.safetensors", how)
    message = "was not written by sparsegrad.save" if how == "foreign" else "cannot read"
    with unchanged(blank), pytest.raises(SparseGradError, match=message):
        load(blank, path)
    with pytest.raises(SparseGradError, match=message):
        load_optimizers(steppers, path)


def other_architecture(how: str) -> nn.Module:
    if how == "wider":
        return blocks(d_hidden=11)
    if how == "deeper":
        return nn.Sequential(*blocks(), Block().double())
    if how == "shallower":
        return blocks()[:1]
    model = blocks()
    if how == "bias":
        model[1].down = nn.Linear(7, 5).double()
    elif how == "not linear":
        model[1].down = nn.Identity()
    elif how == "norm":
        model[1].norm = nn.LayerNorm(7).double()
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wider", r"'0\.down\.basis\.U' is \(7, 7\) in the file and \(11, 11\) in the model"),
        ("deeper", r"'2\.down\.weight' is missing in the file and \(5, 7\) in the model"),
        ("shallower", r"layer '1\.up', which is no linear layer of this model"),
        ("bias", r"'1\.down\.bias' is missing in the file and \(5,\) in the model"),
        ("not linear", r"layer '1\.down', which is no linear layer"),
        ("norm", r"'1\.norm\.bias' is \(5,\) in the file and \(7,\) in the model"),
    ],
)
def test_a_file_of_another_architecture(prepared, tmp_path, unchanged, how, message):
    model, _, _, _ = trained(prepared)
    save(model, tmp_path / "model.safetensors")
    other = other_architecture(how)
    with unchanged(other), pytest.raises(SparseGradError, match=message):
        load(other, tmp_path / "model.safetensors")


def test_a_converted_model_is_not_loaded_into(prepared, tmp_path, unchanged):
    model, _, _, _ = trained(prepared)
    save(model, tmp_path / "model.safetensors")
    with unchanged(model), pytest.raises(SparseGradError, match="converted already"):
        load(model, tmp_path / "model.safetensors")


def test_optimizers_that_do_not_fit_keep_their_state(prepared, tmp_path):
    model, _, steppers, _ = trained(prepared)
    save(model, tmp_path / "model.safetensors", steppers)
    with pytest.raises(SparseGradError, match="holds the state of 2 optimizers, got 1 to fill"):
        load_optimizers(steppers[:1], tmp_path / "model.safetensors")
    # The first one fits: it must not be filled when the second does not.
    fresh = optimizers(model)
    fresh[1] = torch.optim.AdamW(fresh[1].param_groups[0]["params"][:2])
    with pytest.raises(SparseGradError, match=r"does not fit optimizer 1: groups of \[6\] parameters .*, \[2\] here"):
        load_optimizers(fresh, tmp_path / "model.safetensors")
    assert not fresh[0].state
    assert not fresh[1].state


# The package


def test_the_package_imports_no_other_room():
    code = "import sys, sparsegrad; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    root = Path(sparsegrad.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stdout.split())
    assert {"sparsegrad", "torch"} <= imported
    assert imported & {"transformers", "baselines", "benchmarks", "reports"} == set()


def continue_training(folder: Path) -> None:
    blank, batch = torch.load(folder / "blank.pt", weights_only=False)
    model = load(blank, folder / "model.safetensors")
    steppers = optimizers(model)
    load_optimizers(steppers, folder / "model.safetensors")
    torch.save(goes_on(model, batch, steppers), folder / "result.pt")


if __name__ == "__main__":
    continue_training(Path(sys.argv[1]))
