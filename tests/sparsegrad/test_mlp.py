"""Which layers are found in the families, by name, and what is said where none is."""

import pytest
import torch
from torch import nn

from sparsegrad import SparseGradError, calibrate, convert, find_layers
from sparsegrad.mlp import FAMILIES

# What each target names in block i, kind by kind, in the order of the model; from the published architectures.
BERT = {
    "mlp": {"up": ["intermediate.dense"], "down": ["output.dense"]},
    "attention": {
        "query": ["attention.self.query"],
        "key": ["attention.self.key"],
        "value": ["attention.self.value"],
        "out": ["attention.output.dense"],
    },
}
GPT2 = {
    "mlp": {"up": ["mlp.c_fc"], "down": ["mlp.c_proj"]},
    "attention": {"qkv": ["attn.c_attn"], "out": ["attn.c_proj"]},
}
LLAMA = {
    "mlp": {"gate": ["mlp.gate_proj"], "up": ["mlp.up_proj"], "down": ["mlp.down_proj"]},
    "attention": {
        "query": ["self_attn.q_proj"],
        "key": ["self_attn.k_proj"],
        "value": ["self_attn.v_proj"],
        "out": ["self_attn.o_proj"],
    },
}
BLOCKS = {
    "bert": ("bert.encoder.layer", BERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "xlm-roberta": ("roberta.encoder.layer", BERT),
    "gpt2": ("transformer.h", GPT2),
    "llama": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "gemma": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
}
AUTO = {"xlm-roberta": "AutoModelForSequenceClassification"}


def in_blocks(prefix: str, kinds: dict[str, list[str]]) -> dict[str, list[str]]:
    return {kind: [f"{prefix}.{i}.{end}" for i in range(2) for end in ends] for kind, ends in kinds.items()}


@pytest.fixture
def model(tiny, request):
    small = {"head_dim": 6, "num_key_value_heads": 1} if request.param in ("qwen3", "gemma", "gemma2") else {}
    return tiny(request.param, AUTO.get(request.param), **small)[0]


def test_every_family_is_tested():
    assert set(BLOCKS) == set(FAMILIES)


@pytest.mark.parametrize("targets", ["mlp", "attention"])
@pytest.mark.parametrize(("model", "model_type"), [(name, name) for name in BLOCKS], indirect=["model"])
def test_families(model, model_type, targets):
    prefix, kinds = BLOCKS[model_type]
    expected = in_blocks(prefix, kinds[targets])
    found = find_layers(model, targets)
    assert found == expected
    assert list(found) == list(expected)
    if targets == "mlp":
        assert find_layers(model) == expected


@pytest.mark.parametrize("targets", ["mlp", "attention"])
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_every_nth_block_from_the_first_on(model, targets):
    expected = {kind: [f"model.layers.0.{end}" for end in ends] for kind, ends in LLAMA[targets].items()}
    assert find_layers(model, f"{targets}/2") == expected
    assert find_layers(model, f"{targets}/1") == find_layers(model, targets)
    with pytest.raises(SparseGradError, match="matches target mlp/0"):
        find_layers(model, "mlp/0")


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForQuestionAnswering"])
def test_a_family_is_found_under_other_heads(tiny, auto):
    model = tiny("bert", auto)[0]
    prefix = "encoder.layer" if auto == "AutoModel" else "bert.encoder.layer"
    assert find_layers(model) == in_blocks(prefix, BERT["mlp"])


@pytest.mark.parametrize(("model", "model_type"), [(name, name) for name in ("gpt2", "llama")], indirect=["model"])
def test_all_linear_is_every_linear_layer_but_the_head(model, model_type):
    prefix, kinds = BLOCKS[model_type]
    ends = [end for group in ("attention", "mlp") for found in kinds[group].values() for end in found]
    assert find_layers(model, "all-linear") == in_blocks(prefix, {end: [end] for end in ends})


def test_all_linear_of_an_encoder_leaves_its_classifier_out(tiny):
    ends = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    ends += ["intermediate.dense", "output.dense"]
    expected = in_blocks("roberta.encoder.layer", {end: [end] for end in ends})
    assert find_layers(tiny("roberta")[0], "all-linear") == expected
    expected = in_blocks("bert.encoder.layer", {end: [end] for end in ends})
    expected["bert.pooler.dense"] = ["bert.pooler.dense"]
    assert find_layers(tiny("bert")[0], "all-linear") == expected
    # The output embeddings of a masked language model are called decoder, and no name says that they are a head.
    masked = find_layers(tiny("bert", "AutoModelForMaskedLM")[0], "all-linear")
    assert [name for names in masked.values() for name in names if "decoder" in name] == []


@pytest.mark.parametrize(
    ("model", "targets", "expected"),
    [
        ("bert", "intermediate.dense", {"intermediate.dense": ["intermediate.dense"]}),
        ("bert", " self.query , value ", {"self.query": ["attention.self.query"], "value": ["attention.self.value"]}),
        ("bert", "output.dense", {"output.dense": ["attention.output.dense", "output.dense"]}),
        ("gpt2", "mlp.c_proj,c_fc", {"mlp.c_proj": ["mlp.c_proj"], "c_fc": ["mlp.c_fc"]}),
        ("gpt2", {"both": r"attn\.c_proj|mlp\.c_proj"}, {"both": ["attn.c_proj", "mlp.c_proj"]}),
    ],
    indirect=["model"],
)
def test_layers_by_name(model, targets, expected):
    prefix = BLOCKS[model.config.model_type][0]
    assert find_layers(model, targets) == in_blocks(prefix, expected)


def test_a_name_is_whole_and_not_an_expression(tiny):
    model = tiny("bert")[0]
    for part in ("ense", "output.d.nse", "output.den"):
        with pytest.raises(SparseGradError, match="no linear layer of BertForSequenceClassification matches"):
            find_layers(model, part)
    assert find_layers(model, "bert.encoder.layer.1.output.dense") == {
        "bert.encoder.layer.1.output.dense": ["bert.encoder.layer.1.output.dense"]
    }


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 7), nn.Linear(7, 5)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(5, 2)


@pytest.mark.parametrize("targets", ["mlp", "attention"])
def test_an_unknown_model_is_told_how_to_name_its_layers(targets):
    with pytest.raises(SparseGradError) as refused:
        find_layers(Unknown(), targets)
    message = str(refused.value)
    assert "no family is known for Unknown" in message
    assert "bert, roberta" in message
    assert "targets={'up': 'ffn.fc1', 'down': 'ffn.fc2'}" in message
    assert message.endswith("its linear layers end in: fc1, fc2, classifier")


def test_an_unknown_model_works_with_names():
    model = Unknown()
    fc1, fc2 = ["blocks.0.fc1", "blocks.1.fc1"], ["blocks.0.fc2", "blocks.1.fc2"]
    assert find_layers(model, {"up": "fc1", "down": "fc2"}) == {"up": fc1, "down": fc2}
    assert find_layers(model, "fc1,fc2") == {"fc1": fc1, "fc2": fc2}
    assert find_layers(model, "all-linear") == {"fc1": fc1, "fc2": fc2}
    # The same with the blocks at the root, where their number is the name's first part.
    root = nn.Sequential(Block(), Block())
    assert find_layers(root, "all-linear") == {"fc1": ["0.fc1", "1.fc1"], "fc2": ["0.fc2", "1.fc2"]}


@pytest.mark.parametrize("targets", ["fc3", "fc1,fc3", {"up": "fc1", "down": "fc3"}, "", {}, ","])
def test_targets_that_match_nothing(targets):
    with pytest.raises(SparseGradError, match=r"matches target .*; its linear layers end in: fc1, fc2, classifier"):
        find_layers(Unknown(), targets)


def test_a_layer_has_one_kind(tiny):
    with pytest.raises(SparseGradError, match=r"'.*0\.attention\.output\.dense' matches two targets"):
        find_layers(tiny("bert")[0], "dense,output.dense")


def test_a_model_without_linear_layers():
    with pytest.raises(SparseGradError, match="no linear layer outside its head"):
        find_layers(nn.Sequential(nn.LayerNorm(3)), "all-linear")
    with pytest.raises(SparseGradError, match=r"\(it has none\)"):
        find_layers(nn.Sequential(nn.LayerNorm(3)), "fc1")


@pytest.mark.parametrize("targets", ["mlp", "attention", "all-linear", "fc2"])
def test_a_converted_model_is_refused(targets, unchanged):
    model = Unknown()
    layers = find_layers(model, {"up": "fc1"})
    batch = torch.randn(4, 5)
    bases = calibrate(model, layers, [batch], lambda m, x: sum(b.fc1(x).square().sum() for b in m.blocks).backward())
    convert(model, layers, bases, nnz=3)
    with unchanged(model), pytest.raises(SparseGradError, match=r"converted already \('blocks\.0\.fc1' is"):
        find_layers(model, targets)
