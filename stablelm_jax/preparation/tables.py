"""Documents out of tables: parquet, Arrow, csv and tsv. One document a row."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stablelm_jax.preparation import streams
from stablelm_jax.preparation.conversations import KEYS, holds_conversation, no_text
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.json_records import document
from stablelm_jax.preparation.streams import Blocks, Damaged, Meter, Rejected, cut_at, too_long
from stablelm_jax.preparation.texts import decode
from stablelm_jax.storage.remote import described

# pyarrow's errors of a damaged file; UnicodeDecodeError comes from column names.
PARQUET_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError)
_ROWS = 256  # that are turned into Python's strings at a time
_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
_TEXT_TYPES = (*_BYTES, *_BYTES.values())


def read_parquet(
    file, reading: Reading, meter: Meter, start: int = 0, end: int | None = None
) -> Iterator[str | Rejected]:
    """One document a row, of the row groups [start, end) of an open file."""
    begins = file.read(4) == b"PAR1"
    file.seek(max(file.seek(0, io.SEEK_END) - 4, 0))
    if begins and file.read() != b"PAR1":
        raise Damaged("parquet file without its ending, the rest of the file is lost")
    table = pq.ParquetFile(file)
    for group in range(start, table.num_row_groups if end is None else end):
        yield from _row_group(table, group, reading, meter)


def _row_group(
    table: pq.ParquetFile, group: int, reading: Reading, meter: Meter
) -> Iterator[str | Rejected]:
    """Every row of a row group, each either a text or the reason why it is none."""
    info = table.metadata.row_group(group)
    before, done = meter.consumed, 0
    try:
        rest = steps = _columns(table.schema_arrow, reading)
        columns = steps if reading.wants_records else [reading.text_key]
        options = {"row_groups": [group], "columns": columns}
        for batch in table.iter_batches(_ROWS, **options) if type(steps) is list else ():
            yield from _rows(batch, steps, reading)
            done += len(batch)
            meter.consumed = before + info.total_byte_size * done // max(info.num_rows, 1)
    except PARQUET_ERRORS as error:
        if isinstance(error, OSError) and not streams.is_of_the_file(error):
            raise
        rest = Rejected(f"row group {group} damaged: {described(error)}"[:200])
    for _ in range(done, info.num_rows):
        yield rest
    meter.consumed = before + info.total_byte_size


def read_arrow(blocks: Blocks, reading: Reading) -> Iterator[str | Rejected]:
    """One document a row of an Arrow stream, or an Arrow file, which is one with an index."""
    head, blocks = streams.peek(blocks, 8)
    with streams.as_file(streams.without_first(blocks, 8 if head == b"ARROW1\0\0" else 0)) as file:
        table = pa.ipc.open_stream(file)
        steps = _columns(table.schema, reading)
        for batch in table:
            batch.validate()
            if isinstance(steps, Rejected):
                yield from itertools.repeat(steps, len(batch))
            for start in range(0, len(batch) if isinstance(steps, list) else 0, _ROWS):
                yield from _rows(batch.slice(start, _ROWS), steps, reading)


def _rows(batch: pa.RecordBatch, steps: list[str], reading: Reading) -> Iterator[str | Rejected]:
    """One document a row: a text, or what whole records hold."""
    if not reading.wants_records:
        yield from _texts(batch, steps, reading.text_key)
        return
    rows = batch.select(steps)
    rows.validate(full=True)
    for row in rows.to_pylist():
        text = document(row, reading)
        if isinstance(text, str) and len(text) > streams.MAX_DOCUMENT_BYTES:
            text = dataclasses.replace(too_long(), values=getattr(text, "values", None))
        yield text


def _texts(batch: pa.RecordBatch, steps: list[str], text_key: str) -> Iterator[str | Rejected]:
    """The texts of a column; of a field of it where there are several steps."""
    column = batch.column(steps[0])
    for step in steps[1:]:
        column = pc.struct_field(column, step)
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    # Arrow does not promise that strings are UTF-8: take the bytes and look. Nor does it look
    # whether they lie within the file: what a damaged one says would end the process.
    column = column.view(_BYTES.get(column.type, column.type))
    column.validate(full=True)
    for cell in column.cast(pa.large_binary()).to_pylist():
        if cell is None:
            yield Rejected(f"{text_key!r} is null")
        else:
            yield decode(cell) if len(cell) <= streams.MAX_DOCUMENT_BYTES else too_long()


def _columns(schema: pa.Schema, reading: Reading) -> list[str] | Rejected:
    """`_steps` to the text, or the columns that whole records are made of; or why not."""
    names = dict.fromkeys(schema.names)
    if reading.chat and not holds_conversation(names):
        return Rejected(f"no conversation (columns: {', '.join(names)[:120] or 'none'})")
    steps = [] if reading.chat else _steps(schema, reading.text_key)
    if isinstance(steps, Rejected) or not reading.wants_records:
        return steps
    keys = [reading.held_out_by or "", *(key for key, _ in reading.keep or ())]
    wanted = {*(KEYS if reading.chat else steps[:1]), *keys, *(key.split(".")[0] for key in keys)}
    return [name for name in names if name in wanted]


def _steps(schema: pa.Schema, text_key: str) -> list[str] | Rejected:
    """The column that holds the texts, or the column and the fields within; or why there is none.

    The key 'a.b' is a column of this name, or the field 'b' of column 'a'.
    """
    names, steps, rest = schema.names, [], text_key
    kind: pa.DataType = pa.struct(list(schema))
    while rest:
        names = [field.name for field in kind] if pa.types.is_struct(kind) else []
        parts = rest.split(".")
        heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        step = next((head for head in heads if head in names), None)
        if step is None:
            return no_text(text_key, schema.names, "column")
        if names.count(step) > 1:
            return Rejected(f"{names.count(step)} columns are named {step!r}")
        kind, rest = kind.field(step).type, rest[len(step) + 1 :]
        steps.append(step)
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if values not in _TEXT_TYPES:
        return Rejected(f"column {text_key!r} holds {str(kind)[:120]}, not strings")
    return steps


# csv


def read_csv(blocks: Blocks, reading: Reading) -> Iterator[str | Rejected]:
    """One document a row below the header; the header tells what stands between two columns."""
    csv.field_size_limit(streams.MAX_DOCUMENT_BYTES)
    lost: list[Rejected] = []
    lines = _lines(blocks, lost)
    first = next(lines, "")
    headers = [(next(csv.reader([first], delimiter=mark), []), mark) for mark in ",\t;|"]
    # The one that gives the column; else the one that gives most.
    header, mark = max(headers, key=lambda found: (reading.text_key in found[0], len(found[0])))
    rows = csv.reader(lines, delimiter=mark, strict=True)
    while True:
        before = rows.line_num
        try:
            row = next(rows, None)
        except csv.Error as error:
            # A quote without its end takes lines with it: each of them counts.
            problem = Rejected(f"not csv: {error} (in the row that begins on line {before + 2})")
            yield from itertools.repeat(problem, max(rows.line_num - before, 1))
            continue
        if row is None:
            break
        if row:  # a blank line is no row
            yield _cell(row, header, reading)
    yield from lost


def _lines(blocks: Blocks, lost: list[Rejected]) -> Iterator[str]:
    """Lines as csv takes them: a byte that is not UTF-8 stays in its place, to cost its own row."""
    for line in cut_at(blocks, b"\n"):
        if isinstance(line, Rejected):
            lost.append(line)
        else:
            yield line.decode(errors="surrogateescape") + "\n"


def _cell(row: list[str], header: list[str], reading: Reading) -> str | Rejected:
    if not reading.chat and (count := header.count(reading.text_key)) != 1:
        twice = Rejected(f"{count} columns are named {reading.text_key!r}")
        return twice if count else no_text(reading.text_key, header, "column")
    if len(row) != len(header):
        return Rejected(f"a row with another number of columns than the header: {len(row)}")
    if reading.wants_records:
        return document({key: cell for key, cell in zip(header, row) if cell}, reading)
    return decode(codecs.encode(row[header.index(reading.text_key)], errors="surrogateescape"))
