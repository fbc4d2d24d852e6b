"""What a measured run is asked to do: a flat, JSON-able spec, and the workload that it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from baselines.method import Budget
from benchmarks.harness import cards, models
from benchmarks.harness.errors import InputError
from benchmarks.harness.workload import MIXED, BlockWorkload, LayerWorkload, ModelWorkload, Workload
from reports.record import Record

# From the second micro-batch on each repeats the one before it, in time as well as in memory.
MOST_ACCUMULATED = 1024


@dataclass(frozen=True)
class RunSpec:
    """One measured run: everything that a worker needs to know, as JSON can carry it."""

    method: str
    budget: Budget = None
    matched: bool | None = None
    equal_trainable: str | None = None
    equal_memory: str | None = None
    model: str | None = None
    layer: tuple[int, int] | None = None  # D_in, D_out
    block: tuple[int, int] | None = None
    data: str | None = None
    batch: int = 16
    seq: int = 128
    dtype: str = "float32"
    adapter_dtype: str = "same"
    attention: str = "sdpa"
    optimizer: str = "adamw"
    optimizer_impl: str = "for-loop"
    train_rest: str = "all"
    targets: str = "mlp"
    checkpointing: bool = False
    accumulate: int = 1  # micro-batches of `batch` examples per step
    lr: float = 1e-4
    seed: int = 0
    device: str = "cpu"
    gpu: str | None = None  # predictions for CUDA: one of cards.py
    gpu_memory_bytes: int | None = None  # CUDA: the card's memory; a run's allocator is held to that of such a card
    threads: int | None = None
    calibration_steps: int = 30
    rounds: int = 15
    hub: bool = False
    snapshot: str | None = None  # where the CUDA allocator's history of the measured steps goes

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, object]) -> RunSpec:
        """From JSON: lists become tuples again."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})

    def workload(self, device: str | None = None) -> Workload:
        """The workload that the spec names, on the spec's device if no other is given. Raises `InputError`."""
        named = [what for what in ("model", "layer", "block") if getattr(self, what) is not None]
        if len(named) != 1:
            raise InputError(f"give exactly one of --model, --layer and --block, got {', '.join(named) or 'none'}")
        if self.device == "cpu" and "-" in self.attention:
            raise InputError(f"{self.attention} is a kernel of CUDA's: use --attention eager or sdpa on a CPU")
        if self.device == "cpu" and (self.gpu is not None or self.gpu_memory_bytes is not None):
            raise InputError("--gpu and --gpu-memory go with the semantics of cuda, not with --device cpu")
        if not 1 <= self.accumulate <= MOST_ACCUMULATED:
            raise InputError(f"--accumulate must be from 1 to {MOST_ACCUMULATED}, got {self.accumulate}")
        if self.dtype == MIXED and self.adapter_dtype != "same":
            raise InputError(f"--dtype {MIXED} keeps every parameter in float32: leave --adapter-dtype out")
        if self.gpu is not None:
            cards.card(self.gpu)
        common = {name: getattr(self, name) for name in ("batch", "seq", "dtype", "seed", "targets")}
        common["device"] = device or self.device
        if self.model is None:
            if self.data is not None or self.checkpointing:
                raise InputError("--data and --checkpointing go with --model, not with --layer or --block")
            kind, shape = (LayerWorkload, self.layer) if self.layer else (BlockWorkload, self.block)
            return kind(*shape, **common)
        return ModelWorkload(
            models.resolve(self.model, hub=self.hub),
            data=self.data,
            attention=self.attention,
            checkpointing=self.checkpointing,
            hub=self.hub,
            **common,
        )

    def configuration(self) -> dict[str, object]:
        """The fields of a record that say what was asked for; the name of the workload is not among them."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(Record)} - {"model"}
        return {name: getattr(self, name) for name in shared} | {
            "attention": self.attention if self.model else None,
            "device_semantics": "cuda" if self.device.startswith("cuda") else "cpu",
        }

    def blank(self, workload_name: str, **outcome: object) -> Record:
        """A record with this configuration and whatever else is given."""
        return Record(**{**self.configuration(), "model": workload_name, **outcome})

    @property
    def method_label(self) -> str:
        """The method with its budget in brackets, as the command line writes it."""
        return self.method if self.budget is None else f"{self.method}[{self.budget}]"

    def label(self) -> str:
        """The workload in words, without building it."""
        for kind in ("layer", "block"):
            if getattr(self, kind):
                return f"{kind} {getattr(self, kind)[0]}x{getattr(self, kind)[1]}"
        return str(self.model)
