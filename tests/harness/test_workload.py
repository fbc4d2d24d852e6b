"""Workloads: what their batches are, and that a layer's input and upstream gradient are what the definitions say."""

import json
import weakref
from itertools import islice

import pytest
import torch

from baselines.method import OPTIMIZER_IMPLS, adamw
from benchmarks.harness.errors import InputError
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.workload import DTYPES
from sparsegrad import SparseGradError


def workload(**options):
    return RunSpec(method="full", **options).workload()


@pytest.fixture
def config(tmp_path):
    """The path of a tiny LLaMA's config.json."""
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 97,
                "max_position_embeddings": 64,
            }
        )
    )
    return str(path)


@pytest.mark.parametrize(("shape", "width"), [({"layer": (5, 7)}, 7), ({"block": (5, 7)}, 5)])
def test_shape_batches(shape, width):
    w = workload(batch=2, seq=3, **shape)
    (x, dy), again = next(w.batches()), next(w.batches())
    assert x.shape == (2, 3, 5)
    assert x.requires_grad
    assert dy.shape == (2, 3, width)
    assert dy.is_contiguous()
    assert dy.untyped_storage().nbytes() == 4 * dy.numel()  # dense: no zero-stride gradient flatters anybody
    assert torch.equal(x, again[0])
    first, second = islice(w.batches(), 2)
    assert not torch.equal(first[0], second[0])


def test_batches_that_were_drawn_are_held_by_nobody_else():
    batches = workload(layer=(5, 7)).batches()
    x, dy = next(batches)
    held = [weakref.ref(x), weakref.ref(dy)]
    del x, dy
    assert [reference() for reference in held] == [None, None]


def test_a_model_in_which_nothing_trains_has_a_loss_and_no_backward(config):
    w = workload(model=config, batch=1, seq=4)
    model = w.build().requires_grad_(False)
    assert w.backward(w.forward(model, next(w.batches()))) > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_block_is_up_gelu_down_twice():
    w = workload(block=(5, 7), batch=1, seq=2, dtype="float64")
    model = w.build()
    x = torch.randn(2, 5, dtype=torch.float64)
    expected = x
    for i in range(2):
        up, down = (model.get_submodule(f"blocks.{i}.{kind}") for kind in ("up", "down"))
        hidden = expected @ up.weight.T + up.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        expected = hidden @ down.weight.T + down.bias
    torch.testing.assert_close(model(x), expected)
    assert w.layers(model) == {"up": ["blocks.0.up", "blocks.1.up"], "down": ["blocks.0.down", "blocks.1.down"]}


def test_the_same_weights_every_time():
    w = workload(layer=(5, 7))
    assert torch.equal(w.build().linear.weight, w.build().linear.weight)
    other = workload(layer=(5, 7), seed=1)
    assert not torch.equal(w.build().linear.weight, other.build().linear.weight)


def test_encoder_batches_are_padded_questions():
    w = workload(model="minilm-l6", batch=4, seq=24)
    batch = next(w.batches())
    assert batch["input_ids"].shape == (4, 24)
    words = w.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    squeezed = {"".join(e.text.lower().split()): e.label for e in w.text.train}
    assert squeezed["".join(words.split())] == batch["labels"][0]
    padding = (batch["input_ids"] == w.tokenizer.pad_token_id).double().mean().item()
    assert w.padding_fraction(batch) == pytest.approx(padding)
    assert w.data == "trec"


def test_regression_labels_are_floats():
    w = workload(model="minilm-l6", data="movie", batch=2, seq=8)
    assert next(w.batches())["labels"].dtype == torch.float32
    assert w.num_labels == 1


def test_a_config_reads_random_tokens_without_padding(config):
    w = workload(model=config, batch=3, seq=8)
    batch = next(w.batches())
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 8)
    assert int(batch["input_ids"].max()) < 97
    assert w.padding_fraction(batch) == 0
    assert w.data == "random tokens"
    model = w.build()
    assert w.backward(w.forward(model, batch)) > 0
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.grad is not None


def test_decoder_text_is_packed(config):
    class Tokenizer:
        eos_token_id = 0

        def __call__(self, text):
            return {"input_ids": [len(word) for word in text.split()]}

    w = workload(model=config, batch=2, seq=5)
    w.tokenizer = Tokenizer()
    w.text = type("Text", (), {"train": [type("Example", (), {"text": "a bb ccc"})()]})()
    first, second = islice(w.batches(), 2)
    stream = [1, 2, 3, 0] * 5
    assert first["input_ids"].flatten().tolist() == stream[:10]
    assert second["input_ids"].flatten().tolist() == stream[10:20]


def test_skeletons_have_shapes_and_no_memory(config):
    for w in (workload(layer=(5, 7)), workload(block=(5, 7)), workload(model=config, seq=8)):
        skeleton, real = w.skeleton(), w.build()
        assert all(p.is_meta for p in skeleton.parameters())
        assert [p.shape for p in skeleton.parameters()] == [p.shape for p in real.parameters()]
        assert w.layers(skeleton) == w.layers(real)


def test_checkpointing_does_not_send_a_frozen_body_backwards(config):
    w = workload(model=config, batch=2, seq=8, checkpointing=True)
    model = w.build()
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    hidden = []
    model.model.layers[-1].register_forward_hook(lambda *arguments: hidden.append(arguments[2]))
    w.run_backward(model, next(w.batches()))
    assert model.get_output_embeddings().weight.grad is not None
    assert not hidden[0].requires_grad


def test_checkpointing_recomputes_the_same_gradients(config):
    gradients = []
    for checkpointing in (False, True):
        w = workload(model=config, batch=2, seq=8, checkpointing=checkpointing, attention="eager")
        model = w.build()
        w.run_backward(model, next(w.batches()))
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --model, --layer and --block"),
        ({"layer": (2, 3), "block": (2, 3)}, "exactly one"),
        ({"layer": (2, 3), "batch": 0}, "batch must be at least 1, got 0"),
        ({"layer": (2, 3), "seq": -1}, "seq must be at least 1, got -1"),
        ({"layer": (2, 3), "dtype": "int8"}, "dtype must be one of"),
        ({"layer": (2, 3), "device": "cpu", "gpu": "t4"}, "--gpu and --gpu-memory go with"),
        ({"layer": (2, 3), "device": "cuda", "gpu": "abacus"}, "unknown card 'abacus'"),
        ({"layer": (2, 3), "data": "trec"}, "go with --model"),
        ({"model": "minilm-l6", "seq": 513}, "seq must be at most 512"),
        ({"model": "roberta-base", "seq": 513}, "seq must be at most 512"),  # of its 514 positions
        ({"model": "minilm-l6", "data": "poems"}, "unknown data set 'poems'"),
        ({"model": "nowhere"}, "unknown model 'nowhere'"),
        ({"model": "bert-base", "data": "trec"}, "no tokenizer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        workload(**options)


def test_a_config_without_a_longest_sequence(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert", "max_position_embeddings": -1}')
    assert workload(model=str(path), seq=513).longest_seq is None
    path.write_text('{"model_type": "bert", "max_position_embeddings": 513}')
    assert workload(model=str(path), seq=513).longest_seq == 513


@pytest.mark.parametrize("impl", OPTIMIZER_IMPLS)
def test_dtypes_are_the_real_ones_that_adamw_steps(impl):
    def steps(dtype):
        try:
            parameter = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
            parameter.grad = torch.zeros(3, dtype=dtype)
            adamw([parameter], 1e-3, impl).step()
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return False
        return True

    dtypes = {value for name, value in vars(torch).items() if isinstance(value, torch.dtype) and name[0] != "q"}
    assert {dtype for dtype in dtypes if not dtype.is_complex and steps(dtype)} == set(DTYPES.values())


def test_targets_that_match_nothing():
    w = workload(layer=(2, 3), targets="attention")
    with pytest.raises(SparseGradError, match="no family is known"):
        w.layers(w.build())
