"""Training steps that others measured on a GPU: data to hold predictions against (`benchmarks/reference/README.md`)."""

import csv
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from benchmarks.harness.errors import InputError

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
T4_LORA, T4_MORE = REFERENCE / "t4_lora.csv", REFERENCE / "t4_more.csv"


@dataclass(frozen=True)
class MeasuredStep:
    """One training step on a Tesla T4: the model's configuration, how it was trained, and what was measured.

    The fields ending in `_mib` are MiB rounded to `resolution_mib`, as they were published; peaks include what is
    resident.
    """

    model: str
    family: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    batch: int
    seq: int
    attention: str  # eager, or sdpa with the memory-efficient kernel
    trainable_params: int
    before_first_step_mib: float
    peak_forward_mib: float
    peak_backward_mib: float
    peak_optimizer_mib: float
    peak_reserved_mib: float
    # A table that says nothing of these has LoRA steps in float16 with checkpointing.
    rank: int = 32  # of LoRA on the attention's four matrices; 0 for full fine-tuning
    dtype: str = "float16"  # of the frozen weights; what trains is float32
    checkpointing: bool = True
    resolution_mib: float = 0.01
    torch: str = "2.14.0"

    @property
    def label(self) -> str:
        """Model, batch x seq and attention, for people."""
        how = [f"LoRA {self.rank}" if self.rank else "full", self.dtype]
        how += [] if self.checkpointing else ["no checkpointing"]
        return f"{self.model.split('/')[-1]}, {self.batch} x {self.seq}, {self.attention}, {', '.join(how)}"


_PARSE = {str: str, int: int, float: float, bool: {"True": True, "False": False}.__getitem__}


def measured_steps(path: Path = T4_LORA) -> list[MeasuredStep]:
    """The rows of a table of measured steps, by default the ten on a Tesla T4.

    Raises:
        InputError: if the table cannot be read, or its columns or a value are not those of `MeasuredStep`, of which all
            with a default may be missing.
    """
    columns = [field.name for field in fields(MeasuredStep)]
    needed = [field.name for field in fields(MeasuredStep) if field.default is MISSING]
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            found, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise InputError(f"cannot read the measured steps in {path}: {error.strerror}") from error
    if found not in (needed, columns):
        raise InputError(f"{path} must have the columns {','.join(columns)}, got {','.join(found)}")
    return [_step(row, f"{path}, line {line}") for line, row in enumerate(rows, 2)]


def _step(row: dict[str, str], where: str) -> MeasuredStep:
    values = {}
    for field in fields(MeasuredStep):
        if field.name not in row and field.default is not MISSING:
            continue
        try:
            values[field.name] = _PARSE[field.type](row[field.name])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{where}: {field.name} must be of type {field.type.__name__}, got {row[field.name]!r}"
            ) from error
    return MeasuredStep(**values)
