"""The ceiling and the floor: everything trains, or the head alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "bert-qa": {"qa_outputs.weight", "qa_outputs.bias"},
    "roberta": {"classifier.dense.weight", "classifier.dense.bias"}
    | {"classifier.out_proj.weight", "classifier.out_proj.bias"},
    "llama-score": {"score.weight"},
    # A language model's head is its output embeddings; GPT-2's are its input embeddings too.
    "llama": {"lm_head.weight"},
    "gpt2": {"transformer.wte.weight"},
}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("family", HEADS)
def test_full_trains_everything(family, rest, build_model, apply):
    model = build_model(family)
    model.requires_grad_(False)
    apply("full", model, train_rest=rest)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("family", HEADS)
def test_head_trains_only_the_head(family, rest, build_model, apply):
    model = build_model(family)
    apply("head", model, train_rest=rest)
    assert trainable(model) == HEADS[family]


@pytest.mark.parametrize(("name", "moving"), [("full", 4), ("head", 2)])
def test_a_step_moves_what_trains_and_nothing_else(name, moving, apply):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(5, 4), nn.Linear(4, 2)

    torch.manual_seed(0)
    model = Classifier()
    method = apply(name, model, layers={"body": ["body"]})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizers = method.optimizers(model, 1e-2)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]
    model.classifier(model.body(torch.randn(3, 5))).square().sum().backward()
    optimizers[0].step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(moved) == moving
    assert moved == trainable(model)


def test_head_replaces_nothing(build_model, apply):
    model = build_model("bert")
    modules = [id(module) for module in model.modules()]
    method = apply("head", model)
    assert [id(module) for module in model.modules()] == modules
    assert method.export(model) is model
    assert [id(module) for module in model.modules()] == modules


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_full_is_plain_training(family, build_model, apply, train, logits):
    model, plain = build_model(family), build_model(family)
    method = apply("full", model)
    train(method, model, 3, 1e-2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, foreach=False, fused=False)
    train(SimpleNamespace(optimizers=lambda *_: [optimizer], after_backward=id, after_step=id), plain, 3, 1e-2)
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    exported = method.export(model)
    assert [type(module) for module in exported.modules()] == [type(module) for module in plain.modules()]
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)


def test_a_lone_layer_has_no_head_and_no_optimizer(apply):
    model = nn.Sequential(nn.Linear(3, 2))
    method = apply("head", model, layers={"linear": ["0"]})
    assert not trainable(model)
    assert method.optimizers(model, 1e-3) == []
    assert method.counts(model, [(2, 3)]).trainable_params == 0


@pytest.mark.parametrize("name", ["full", "head"])
def test_no_budget_is_counted(name, apply):
    model = nn.Sequential(nn.Linear(3, 2))
    method = apply(name, model, layers={"linear": ["0"]})
    assert method.counts(model, [(2, 3)]).budget_params is None
    assert method.counts(model, [(2, 3)]).total_params == 8
