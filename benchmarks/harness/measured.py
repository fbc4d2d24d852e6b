"""Training steps that others measured on a GPU: data to hold predictions against (`benchmarks/reference/README.md`)."""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.harness.errors import InputError

T4_LORA = Path(__file__).resolve().parents[1] / "reference" / "t4_lora.csv"


@dataclass(frozen=True)
class MeasuredStep:
    """One LoRA training step on a Tesla T4: the model's configuration, the batch, and what was measured.

    The fields ending in `_mib` are MiB rounded to 0.01, as they were published; peaks include what is resident.
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

    @property
    def label(self) -> str:
        """Model, batch x seq and attention, for people."""
        return f"{self.model.split('/')[-1]}, {self.batch} x {self.seq}, {self.attention}"


_PARSE = {str: str, int: int, float: float, bool: {"True": True, "False": False}.__getitem__}


def measured_steps(path: Path = T4_LORA) -> list[MeasuredStep]:
    """The rows of a table of measured steps, by default the ten on a Tesla T4.

    Raises:
        InputError: if the table cannot be read, or its columns or a value are not those of `MeasuredStep`.
    """
    columns = [field.name for field in fields(MeasuredStep)]
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            found, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise InputError(f"cannot read the measured steps in {path}: {error.strerror}") from error
    if found != columns:
        raise InputError(f"{path} must have the columns {','.join(columns)}, got {','.join(found)}")
    return [_step(row, f"{path}, line {line}") for line, row in enumerate(rows, 2)]


def _step(row: dict[str, str], where: str) -> MeasuredStep:
    values = {}
    for field in fields(MeasuredStep):
        try:
            values[field.name] = _PARSE[field.type](row[field.name])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{where}: {field.name} must be of type {field.type.__name__}, got {row[field.name]!r}"
            ) from error
    return MeasuredStep(**values)
