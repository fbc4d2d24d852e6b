"""The sparse space: energies known by arithmetic, rows that were planted, and a whole measurement of a tiny encoder."""

import functools
import json
import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from benchmarks import cli
from benchmarks.harness import models, text
from benchmarks.harness.errors import InputError
from benchmarks.quality import space, tasks
from benchmarks.quality.space import RowCounts, Settings, energy_kept, measure, random_basis, row_counts, views
from benchmarks.quality.tasks import load_task
from sparsegrad.basis import TransitionMatrices

D_OUT, D_IN = 16, 8


def hadamard(size):
    """Orthogonal, every entry 1 / sqrt(size) or its negative; rows moved on by one, so that it is not symmetric."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.roll(1, 0) / math.sqrt(size)


# --- energy


def test_the_largest_entries_hold_the_energy_of_their_squares():
    gradient = torch.zeros(10, 20)
    gradient[0, 0], gradient[3, 7], gradient[9, 19] = -4.0, 3.0, 0.5
    # 200 entries: the largest one, two, and a tenth of all.
    assert energy_kept(gradient, [0.005, 0.01, 0.1]) == pytest.approx([16 / 25.25, 25 / 25.25, 1])
    assert energy_kept(torch.full((10, 20), -2.0), [0.1, 0.5]) == pytest.approx([0.1, 0.5])


def test_no_energy_has_no_shares():
    with pytest.raises(ValueError, match="zeros"):
        energy_kept(torch.zeros(3, 3))


def test_what_is_one_entry_in_the_basis_is_spread_by_everything_else():
    basis = TransitionMatrices(hadamard(D_IN), hadamard(D_OUT))
    planted = torch.zeros(D_OUT, D_IN)
    planted[5, 0] = 3.0
    gradient = basis.V.T @ planted @ basis.U
    one = 1 / planted.numel()
    found = {name: energy_kept(m, [one])[0] for name, m in views(gradient, basis, random_basis(D_OUT, D_IN, 0))}
    # Every entry of a Hadamard matrix is as large as the others: G has all of its entries alike, G U^T one column of
    # D_out entries alike, and V G one row of D_in.
    assert found["raw"] == pytest.approx(one)
    assert found["basis"] == pytest.approx(1)
    assert found["U alone"] == pytest.approx(1 / D_OUT)
    assert found["V alone"] == pytest.approx(1 / D_IN)
    # A wrong orientation leaves one side right: u U for the row u of U, one side's Hadamard rotation of a Hadamard row.
    U, V = basis.U, basis.V
    assert found["U transposed"] == pytest.approx(float((U[0] @ U).square().max()))
    assert found["V transposed"] == pytest.approx(float((V[5] @ V).square().max()))
    assert max(found["U transposed"], found["V transposed"], found["random"]) < 0.9


@pytest.mark.parametrize("shape", [(300, 200), (101, 307)])
def test_rotations_of_an_isotropic_gradient_change_nothing(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    normal, density = NormalDist(), 0.05
    beyond = normal.inv_cdf(1 - density / 2)
    # The integral of x^2 over the tails of a standard normal.
    expected = density + 2 * beyond * normal.pdf(beyond)
    found = {name: energy_kept(m, [density])[0] for name, m in views(gradient, *two_bases(shape))}
    assert found == pytest.approx(dict.fromkeys(found, expected), abs=0.01)
    assert len(found) == 7


def two_bases(shape):
    return random_basis(*shape, 2), random_basis(*shape, 3)


def test_a_random_basis_is_orthogonal_and_follows_from_its_seed():
    basis = random_basis(7, 5, 0)
    torch.testing.assert_close(basis.V @ basis.V.T, torch.eye(7))
    torch.testing.assert_close(basis.U @ basis.U.T, torch.eye(5))
    assert torch.equal(basis.U, random_basis(7, 5, 0).U)
    assert not torch.equal(basis.U, random_basis(7, 5, 1).U)


# --- rows of dL/dY


def test_rows_are_counted_by_what_they_are():
    large = torch.tensor([3.0, 4.0])
    dy = torch.stack([large, 0.099 * large, 0.0099 * large, 0.2 * large, 0 * large, 0 * large, 0.001 * large])
    is_text = torch.tensor([True, True, True, True, True, False, False])
    counts = RowCounts()
    counts.add(dy * 1e-3, is_text)
    # At most a tenth of the largest: the second and the third; at most a hundredth: the third. The last is padding.
    assert counts == RowCounts(tokens=7, padding=2, zero=2, zero_padding=1, below_1_pct=1, below_10_pct=2)
    counts.add(torch.full((2, 2), 1e-40), torch.tensor([True, False]))
    assert counts == RowCounts(tokens=9, padding=3, zero=2, zero_padding=1, below_1_pct=1, below_10_pct=2)


def test_rows_of_each_layer_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    masks = [[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]]
    batches = [{"x": torch.randn(2, 3, 3), "attention_mask": torch.tensor(mask)} for mask in masks]

    def backward(model, batch):
        y = model(batch["x"]) * batch["attention_mask"].unsqueeze(2)
        y[:, 0].square().sum().backward()  # the first token alone counts

    found = row_counts(model, {"up": ["0"], "down": ["2"]}, batches, backward)
    # Of 12 rows 4 are padding, and of the 8 of text the 4 first ones count.
    for counts in found.values():
        assert (counts.tokens, counts.padding, counts.zero, counts.zero_padding) == (12, 4, 8, 4)
    assert set(found) == {("up", 1), ("down", 1)}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model)


# --- a whole measurement


@pytest.fixture
def settings(model, monkeypatch):
    """Eight steps of a tiny encoder on one task, with 40 held-out texts."""
    monkeypatch.setattr(tasks, "TEST_EXAMPLES", 40)
    monkeypatch.setattr(tasks, "VALIDATION_EXAMPLES", 40)
    monkeypatch.setattr(text, "load", functools.cache(text.load))
    changes = {"train_size": 16, "epochs": 4, "batch": 8, "longest": 16, "padded_to": 24, "calibration_steps": 3}
    return Settings(model=model, tasks=("amazon",), held_out_batches=2, **changes)


def by(rows, *names):
    return {tuple(row[name] for name in names): row for row in rows}


def test_a_model_that_does_not_learn_ages_no_basis(settings, monkeypatch):
    monkeypatch.setattr(space, "RATES", dict.fromkeys(space.RATES, 1e-12))
    held_out, streamed = [], space.stream_gradients

    def watched(model, layers, batches, *arguments):
        held_out.extend(batches)
        streamed(model, layers, batches, *arguments)

    monkeypatch.setattr(space, "stream_gradients", watched)
    found = measure(settings, lambda _: None)
    rows = by(found["energy"], "training", "step", "kind", "layer", "space")
    assert len(rows) == len(found["energy"]) == 2 * 2 * (7 + 2 * 2 * 3)  # kinds x layers x (start + later)
    for (training, _, kind, layer, name), row in rows.items():
        first = rows["none", 0, kind, layer, "raw" if name == "raw" else "basis"]
        if training != "none":
            assert row["kept"] == pytest.approx(first["kept"], rel=2e-3)
        assert row["kept"] == sorted(row["kept"])
    assert {key[:2] for key in rows} == {("none", 0), *((t, s) for t in ("full", "sparsegrad") for s in (2, 8))}

    # What was looked at are texts of the validation split.
    tokenizer = models.resolve(settings.model).tokenizer()
    seen = {
        ids.tolist().index(tokenizer.sep_token_id) and bare(tokenizer, ids) for b in held_out for ids in b["input_ids"]
    }
    validation = {bare(tokenizer, tokenizer(e.text, truncation=True, max_length=16)["input_ids"]) for e in validated()}
    assert len(seen) == 16
    assert seen <= validation


def bare(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def validated():
    return load_task("amazon").data.validation


def test_rows_of_dy_with_more_padding_and_less(settings):
    found = measure(settings, lambda _: None)
    rows = by(found["zero_rows"], "training", "padded", "kind", "layer")
    assert len(rows) == len(found["zero_rows"]) == 2 * 2 * 2 * 2
    for (training, padded, kind, layer), row in rows.items():
        other = rows[training, "to the longest text", kind, layer]
        texts = other["tokens"] - other["padding"]
        assert row["tokens"] - row["padding"] == texts  # padding adds no text
        assert row["zero_padding"] == row["padding"]
        # The head reads the first token of each text alone: that of the last layer.
        assert row["zero"] == row["padding"] + (texts - 16 if layer == 2 else 0)
        if padded != "to the longest text":
            assert row["tokens"] == 2 * 8 * 24


def test_a_model_that_learns_moves_away_from_its_bases_and_all_is_said_twice_alike(
    settings, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(space, "RATES", {"full": 1e-2, "sparsegrad": 1e-2})
    monkeypatch.setattr(space, "Settings", functools.partial(Settings, **small(settings)))
    arguments = ["quality", "--space", "--out", str(tmp_path / "a"), "--model", settings.model, "--tasks", "amazon"]
    arguments += ["--train-size", "16", "--epochs", "4"]
    assert cli.main([*arguments, "--json", str(tmp_path / "copy.json")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "amazon, sparsegrad: trains to step 8" in err
    found = json.loads((tmp_path / "a" / "space.json").read_text())
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "a" / "space.json").read_bytes()
    assert found["settings"]["steps"] == {"amazon": 8}
    rows = by(found["energy"], "training", "step", "kind", "layer", "space")
    for training in ("full", "sparsegrad"):
        old, new = (rows[training, 8, "up", 1, name]["kept"] for name in ("basis", "basis made anew"))
        assert old != pytest.approx(new, rel=1e-2)
    lines = (tmp_path / "a" / "space-energy.csv").read_text().splitlines()
    assert lines[0] == (
        "task,training,step,kind,layer,space,top_0.1_pct,top_0.5_pct,top_1_pct,top_2_pct,top_5_pct,top_10_pct"
    )
    assert len(lines) == 1 + len(found["energy"])
    assert len((tmp_path / "a" / "space-zero-rows.csv").read_text().splitlines()) == 1 + len(found["zero_rows"])

    again = measure(settings, lambda _: None)
    assert [again[name] for name in ("energy", "zero_rows")] == [found[name] for name in ("energy", "zero_rows")]


def small(settings):
    names = ("batch", "longest", "padded_to", "calibration_steps", "held_out_batches")
    return {name: getattr(settings, name) for name in names}


def test_what_the_measurement_cannot_use_is_refused(settings, tmp_path, capsys):
    assert cli.main(["quality", "--space", "--out", str(tmp_path), "--seeds", "4"]) == 2
    assert "--seeds is of the study" in capsys.readouterr().err
    assert cli.main(["quality", "--space", "--out", str(tmp_path), "--epochs", "0"]) == 2
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(InputError, match="each once, got trec, trec"):
        Settings(tasks=("trec", "trec"))
    (tmp_path / "file").write_text("")
    assert cli.main(["quality", "--space", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
