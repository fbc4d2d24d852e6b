"""What is trained: one linear layer, two MLP blocks, or a transformers model; its batches, its forward and backward.

A layer or block is measured as it sits inside a network: X requires a gradient and is held by the workload, as are Y
and a DENSE upstream gradient dL/dY. dL/dX, which the layer below would consume, is freed when backward ends. Because
the workload itself holds X, a lone layer cannot show what saving less of X is worth; the block can.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from benchmarks.harness import models, text
from benchmarks.harness.errors import InputError
from sparsegrad.mlp import FAMILIES, find_layers
from sparsegrad.products import skips

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Parameters and what trains them in float32, forward and loss under autocast to bfloat16.
MIXED = "bf16-mixed"

# Activations whose derivative is zero at single points only: with others a whole column of dL/dY can be zero.
SMOOTH_ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "swish",
    "mish",
    "tanh",
)
# Encoders (model types) whose classification head reads the first token of the last layer.
FIRST_TOKEN_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")

# Torch counts the bytes of a tensor in 64 bits.
MOST_ENTRIES = 2**59

# What a packaged checkpoint is trained on by default.
DEFAULT_DATA = {"encoder": "trec", "decoder": "movie"}


@dataclass
class Pass:
    """What one forward returned, as a training loop holds it until it lets go."""

    held: object  # outputs, and whatever the loop needs for backward

    def release(self) -> None:
        """Let go."""
        self.held = None


class Workload(ABC):
    """A model, where its inputs come from, and one forward and backward of it."""

    name: str
    data: str | None = None
    longest_seq: int | None = None  # None: as long as memory allows
    # Whether Y outlives backward: a layer's next neighbour holds it, a model's outputs are dropped.
    keeps_outputs: bool = False

    def __init__(self, batch: int, seq: int, dtype: str, device: str, seed: int, targets: str):
        for what, value in (("batch", batch), ("seq", seq)):
            if value < 1:
                raise InputError(f"{what} must be at least 1, got {value}")
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, which AdamW steps, got {dtype!r}")
        self.batch, self.seq, self.seed, self.targets = batch, seq, seed, targets
        self.dtype, self.device, self.mixed = DTYPES[dtype], torch.device(device), dtype == MIXED

    @abstractmethod
    def build(self) -> nn.Module:
        """The model in training mode, on the workload's device; the same weights every time."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The same model on the meta device: shapes without memory."""

    def layers(self, model: nn.Module) -> dict[str, list[str]]:
        """Kind -> names of the target layers."""
        return find_layers(model, self.targets)

    @abstractmethod
    def batches(self) -> Iterator[object]:
        """Endless, the same every time; each batch is made when it is drawn."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: object) -> Pass:
        """One forward pass in the model's mode, loss included, in `precision`."""

    def precision(self) -> AbstractContextManager:
        """Autocast to bfloat16 for a mixed dtype; otherwise nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.mixed else nullcontext()

    @abstractmethod
    def backward(self, result: Pass, passes: int = 1) -> float | None:
        """One backward pass from what `forward` returned; gives the loss where there is one.

        Of a mean loss gradients are divided by `passes`, the number of passes that they are accumulated over.
        """

    def run_backward(self, model: nn.Module, batch: object) -> None:
        """Forward and backward, as calibration needs them."""
        self.backward(self.forward(model, batch))
        for tensor in self.inputs(batch):
            tensor.grad = None

    def inputs(self, batch: object) -> Sequence[Tensor]:
        """Tensors of the batch that receive a gradient."""
        return ()

    def padding_fraction(self, batch: object) -> float | None:
        """Share of the batch's tokens that are padding."""
        return 0.0

    # --- what a prediction, whose tensors have no values, must be told

    def batches_alike(self, count: int) -> bool:
        """Whether the first `count` batches differ in nothing that decides what a step allocates."""
        return True

    # Whether, dropout apart, no column of dL/dY is zero throughout.
    columns_hold: bool = True

    def gradient_rows(self) -> Mapping[str, int | None]:
        """How many rows of dL/dY (one for each of batch x seq tokens) are not zero throughout, in the first batch.

        A regular expression that is searched for in a layer's name -> rows; the first that matches counts. None, or no
        match: it is not known.
        """
        return {"": self.batch * self.seq}


class TwoBlocks(nn.Module):
    """Up projection, GELU, down projection, twice: (..., D_in) -> (..., D_in)."""

    def __init__(self, d_in: int, d_hidden: int, **options):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(d_in, d_hidden, **options), "down": nn.Linear(d_hidden, d_in, **options)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_in)."""
        for block in self.blocks:
            x = block["down"](F.gelu(block["up"](x)))
        return x


class OneLayer(nn.Module):
    """A lone linear layer with a bias: (..., D_in) -> (..., D_out)."""

    def __init__(self, d_in: int, d_out: int, **options):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        return self.linear(x)


class ShapeWorkload(Workload):
    """A layer or a block of a given shape on normal random input and a normal random upstream gradient."""

    keeps_outputs = True
    kinds: Mapping[str, str]
    module: type[nn.Module]

    def __init__(self, d_in: int, d_out: int, **options):
        super().__init__(**options)
        if d_in * d_out > MOST_ENTRIES:
            raise InputError(f"{self.label} {d_in}x{d_out} has more entries than torch can count: give a smaller one")
        self.d_in, self.d_out = d_in, d_out
        self.name = f"{self.label} {d_in}x{d_out}"

    def build(self):
        """New weights under the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.module(self.d_in, self.d_out, dtype=self.dtype, device=self.device).train()

    def skeleton(self):
        """Shapes alone."""
        return self.module(self.d_in, self.d_out, dtype=self.dtype, device="meta")

    def layers(self, model):
        """The layers of the workload for `mlp`; otherwise as for any model."""
        return find_layers(model, dict(self.kinds) if self.targets == "mlp" else self.targets)

    def batches(self):
        """X (batch, seq, D_in), which requires a gradient, and dL/dY."""
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        options = {"generator": generator, "device": self.device}
        # Y is autocast's, and so is its gradient.
        dtype_of_y = torch.bfloat16 if self.mixed else self.dtype
        while True:
            # No names: a generator that waits keeps what it has named alive.
            yield (
                torch.randn(self.batch, self.seq, self.d_in, dtype=self.dtype, **options).requires_grad_(),
                torch.randn(self.batch, self.seq, self.width, dtype=dtype_of_y, **options),
            )

    def forward(self, model, batch):
        """Y."""
        x, dy = batch
        with self.precision():
            return Pass((model(x), dy))

    def backward(self, result, passes=1):
        """From dL/dY; there is no loss, so that gradients of several passes add up."""
        y, dy = result.held
        # Not where nothing that trains leads to Y.
        if y.requires_grad:
            torch.autograd.backward(y, dy)

    def inputs(self, batch):
        """X."""
        return batch[:1]


class LayerWorkload(ShapeWorkload):
    """One linear layer D_in -> D_out."""

    label, module, kinds = "layer", OneLayer, {"linear": "linear"}

    @property
    def width(self) -> int:
        """The last dimension of Y."""
        return self.d_out


class BlockWorkload(ShapeWorkload):
    """Two MLP blocks D_in -> D_out -> D_in."""

    label, module, kinds = "block", TwoBlocks, {"up": "up", "down": "down"}

    @property
    def width(self) -> int:
        """The last dimension of Y."""
        return self.d_in


class ModelWorkload(Workload):
    """A transformers model: an encoder that classifies text, or a decoder that predicts the next token.

    A checkpoint with a tokenizer reads real text; an encoder's is padded to `seq`, a decoder's is packed without
    padding. An architecture without one reads uniformly random tokens, without padding.
    """

    def __init__(
        self,
        source: models.ModelSource,
        data: str | None,
        attention: str,
        checkpointing: bool = False,
        hub: bool = False,
        **options,
    ):
        super().__init__(**options)
        longest = getattr(source.config, "max_position_embeddings", None)
        self.longest_seq = longest if longest is not None and longest > 0 else None  # XLNet's says -1
        if "roberta" in source.config.model_type and self.longest_seq is not None:
            if source.config.pad_token_id is None:
                raise InputError(f"{source.name} has no pad_token_id, where its positions start: correct its config")
            self.longest_seq -= source.config.pad_token_id + 1  # where its positions start
        if self.longest_seq is not None and self.seq > self.longest_seq:
            raise InputError(f"seq must be at most {self.longest_seq} for {source.name}, got {self.seq}")
        self.source, self.attention, self.checkpointing = source, attention, checkpointing
        self.name = source.name
        self.tokenizer = source.tokenizer()
        if self.tokenizer is None:
            if data is not None:
                raise InputError(f"{source.name} has no tokenizer, so it cannot read {data!r}; leave --data out")
            self.text, self.data = None, "random tokens"
        else:
            self.text = text.load(data or DEFAULT_DATA[source.kind], hub=hub)
            self.data = self.text.name
        self.num_labels = self.text.num_labels if self.text else 2

    def build(self):
        """The checkpoint's weights, or new ones under the seed."""
        model = self.source.build(self.num_labels, self.dtype, self.attention, self.seed).to(self.device)
        return self._configured(model)

    def skeleton(self):
        """Shapes alone."""
        with torch.device("meta"):
            model = self.source.without_weights().build(self.num_labels, self.dtype, self.attention, self.seed)
        return self._configured(model)

    def _configured(self, model: nn.Module) -> nn.Module:
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers makes the embeddings' output require gradients, which this kind of checkpointing does not
            # need and which would send `head` backwards through the whole body.
            model.disable_input_require_grads()
        return model

    def batches(self):
        """Keyword arguments of the model, labels among them."""
        if self.text is None:
            return self._random_batches()
        return self._padded_batches() if self._pads else self._packed_batches()

    def _random_batches(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        # The tokens below are special ones in most vocabularies; a padding token would be taken for padding.
        low = min(1000, self.source.config.vocab_size // 2)
        while True:
            size = (self.batch, self.seq)
            tokens = torch.randint(low, self.source.config.vocab_size, size, generator=generator)
            if self.source.kind == "encoder":
                labels = torch.randint(self.num_labels, (self.batch,), generator=generator)
            else:
                labels = tokens
            yield self._placed({"input_ids": tokens, "labels": labels})

    def _examples(self) -> Iterator[text.Example]:
        """The training split over and over, in a new order each time."""
        order = random.Random(self.seed)
        examples = list(self.text.train)
        while True:
            order.shuffle(examples)
            yield from examples

    def _padded_batches(self) -> Iterator[dict[str, Tensor]]:
        examples = self._examples()
        label_dtype = self.dtype if self.num_labels == 1 else torch.long
        while True:
            chosen = [next(examples) for _ in range(self.batch)]
            pairs = [e.pair for e in chosen]
            tokens = self.tokenizer(
                [e.text for e in chosen],
                pairs if all(pair is not None for pair in pairs) else None,
                padding="max_length",
                truncation=True,
                max_length=self.seq,
                return_tensors="pt",
            )
            yield self._placed({**tokens, "labels": torch.tensor([e.label for e in chosen], dtype=label_dtype)})

    def _packed_batches(self) -> Iterator[dict[str, Tensor]]:
        examples = self._examples()
        stream: list[int] = []
        need = self.batch * self.seq
        while True:
            while len(stream) < need:
                stream += [*self.tokenizer(next(examples).text)["input_ids"], self.tokenizer.eos_token_id]
            tokens = torch.tensor(stream[:need]).view(self.batch, self.seq)
            del stream[:need]
            yield self._placed({"input_ids": tokens, "labels": tokens})

    def _placed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def forward(self, model, batch):
        """Outputs, loss included."""
        with models.attention_kernel(self.attention), self.precision():
            return Pass(model(**batch))

    def backward(self, result, passes=1):
        """From the loss."""
        loss = result.held.loss
        # Not where nothing trains: a method may find nothing of its own in a model.
        if loss.requires_grad:
            # Checkpointing runs forward again.
            with models.attention_kernel(self.attention):
                loss.backward(None if passes == 1 else torch.full_like(loss, 1 / passes))
        # A prediction's loss is fake: it has no value.
        return None if isinstance(loss, FakeTensor) else float(loss.detach())

    def batches_alike(self, count):
        """Whether all are padded or none is: transformers builds no mask for a batch without padding."""
        if not self._pads:
            return True
        masks = (batch["attention_mask"] for batch in itertools.islice(self.batches(), count))
        return len({bool(mask.all()) for mask in masks}) == 1

    def gradient_rows(self):
        """By how a token's output reaches the loss.

        The last position of a decoder predicts nothing, and no other attends to it. Of an encoder with a classification
        head the last layer's output counts at each example's first token alone, and the layers before it at every token
        that is not padding.
        """
        config = self.source.config
        if self.source.kind == "decoder":
            # The first query has one key only: the gradient of its softmax is zero, or what rounding makes of that.
            unsure = None if skips(2, self.seq) else self.batch * (self.seq - 1)
            query = FAMILIES[config.model_type].attention.get("query", "$^") if config.model_type in FAMILIES else ".*"
            return {rf"(^|\.)({query})$": unsure, "": self.batch * (self.seq - 1)}
        if config.model_type in FIRST_TOKEN_ENCODERS:
            others = r"(?!attention\.(self\.(key|value)|[kv]_lin)$)"
            last = rf"(encoder|transformer)\.layer\.{config.num_hidden_layers - 1}\.{others}"
            tokens = int(next(self.batches())["attention_mask"].sum()) if self._pads else self.batch * self.seq
            return {last: self.batch, r"(encoder|transformer)\.layer\.": tokens, "": self.batch}
        return {}

    @property
    def columns_hold(self):
        """Whether the activation's derivative is zero at single points only."""
        return getattr(self.source.config, self._activation, None) in SMOOTH_ACTIVATIONS

    @property
    def _pads(self) -> bool:
        return self.text is not None and self.source.kind == "encoder"

    @property
    def _activation(self) -> str:
        """The name of the config's entry that names the MLP's activation."""
        names = ("hidden_act", "activation_function", "hidden_activation", "activation")
        return next((name for name in names if hasattr(self.source.config, name)), names[0])

    def padding_fraction(self, batch):
        """Where the attention mask is zero."""
        mask = batch.get("attention_mask")
        return 0.0 if mask is None else 1.0 - mask.double().mean().item()
