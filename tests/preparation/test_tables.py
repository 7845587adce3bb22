"""Tables: a document a row, whatever its column is made of, and one odd file costs no other."""

import gzip
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_documents import random_texts, read, records, write

from stablelm_jax.preparation import streams

# parquet


def write_parquet(path, values, kind=None, rows=100, name="text") -> str:
    table = pa.table({"id": list(range(len(values))), name: pa.array(values, kind)})
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


@pytest.mark.parametrize(
    'kind',
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)  # fmt: skip
def test_parquet_texts_come_back_from_every_kind_of_string_column(tmp_path, kind):
    texts = random_texts(450)
    values = [text.encode() for text in texts] if kind == pa.binary() else texts
    path = write_parquet(tmp_path / "a.parquet", values, kind)
    assert records(path) == texts
    halves = [records(path, part=(0, 2)), records(path, part=(2, 5))]
    assert [text for half in halves for text in half] == texts


def test_parquet_rows_without_usable_text_are_rejected_one_by_one(tmp_path):
    values = [b"one", None, b"caf\xe9", b"", b"two"]
    path = write_parquet(tmp_path / "a.parquet", values, pa.binary(), rows=2)
    assert read(path) == [
        'one', "'text' is null", 'not UTF-8: 0xe9 at byte 3', 'empty document', 'two',
    ]  # fmt: skip


def test_bytes_that_are_not_utf8_in_a_parquet_string_column_are_rejected(tmp_path):
    values = pa.array([b"one", b"caf\xe9", b"two"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    path = write_parquet(tmp_path / "a.parquet", strings)
    assert read(path) == [
        'one', 'not UTF-8: 0xe9 at byte 3', 'two',
    ]  # fmt: skip


def test_a_parquet_column_that_is_missing_or_no_text_rejects_every_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [1, 2, 3])
    for key, reason in [
        ("body", "no column 'body' (columns: id, text)"),
        ("text", "column 'text' holds int64, not strings"),
    ]:
        assert read(path, key) == [reason] * 3


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    texts = random_texts(1000)
    path = tmp_path / "a.parquet"
    write_parquet(path, texts, rows=200)
    column = pq.ParquetFile(path).metadata.row_group(2).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = random.Random(2).randbytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    found = records(path)
    assert len(found) == 1000
    assert found[:400] + found[600:] == texts[:400] + texts[600:]
    assert all(record.reason.startswith("row group 2 damaged") for record in found[400:600])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all, by no means"])
def test_a_file_that_is_no_parquet_is_one_rejected_record(tmp_path, data):
    (reason,) = read(write(tmp_path / "a.parquet", data))
    assert reason.startswith(("damaged parquet", "parquet file without its ending"))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ([["one"], ["two"]], "2 columns are named 'text'"),
        ([[["one"]]], "column 'text' holds list<element: string>, not strings"),
        ([[{"a": "one"}]], "column 'text' holds struct<a: string>, not strings"),
        ([[None]], "column 'text' holds null, not strings"),
    ],
)
def test_a_parquet_file_of_odd_columns_is_rejected_by_name(tmp_path, columns, reason):
    odd = pa.Table.from_arrays(list(map(pa.array, columns)), names=["text"] * len(columns))
    pq.write_table(odd, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [reason]


def test_a_parquet_file_without_columns_or_rows_has_no_record(tmp_path):
    for table in (pa.table({}), pa.table({"text": pa.array([], pa.string())})):
        pq.write_table(table, tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == []


def test_parquet_that_is_cut_encrypted_compressed_or_something_else_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one"])
    data = (tmp_path / "a.parquet").read_bytes()
    for content, name in [
        (data[:-10], "parquet file without its ending"),
        (b"PARE" + data[4:-4] + b"PARE", "encrypted parquet file"),
        (b"SQLite format 3\0" + bytes(100), "SQLite database"),
        (b"<html>not found</html>", "damaged parquet"),
    ]:
        (reason,) = read(write(tmp_path / "b.parquet", content))
        assert reason.startswith(name)
    (reason,) = read(write(tmp_path / "a.parquet.gz", gzip.compress(data)))
    assert reason == "a compressed parquet file: decompress it first"
    assert read(path) == ["one"]


def test_no_damage_to_a_parquet_or_arrow_file_ends_the_reader(tmp_path):
    texts = random_texts(300)
    write_parquet(tmp_path / "a.parquet", texts, rows=50)
    write_arrow(tmp_path / "a.arrow", texts)
    source = random.Random(3)
    for name in ("a.parquet", "a.arrow"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(source.randint(1, 5)):
                data[source.randrange(len(data))] = source.randrange(256)
            if source.random() < 0.3:
                del data[source.randrange(len(data)) :]
            read(write(tmp_path / name, bytes(data)))


# Arrow


def write_arrow(path, values, kind=None, is_file=False) -> str:
    table = pa.table({"id": list(range(len(values))), "text": pa.array(values, kind)})
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return str(path)


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_arrow_texts_come_back_from_streams_and_files(tmp_path, is_file, kind):
    texts = random_texts(450)
    for name in ("a.arrow", "a.feather"):
        assert records(write_arrow(tmp_path / name, texts, kind, is_file)) == texts
    data = (tmp_path / "a.arrow").read_bytes()
    assert records(write(tmp_path / "a.arrow.gz", gzip.compress(data))) == texts


def test_arrow_that_is_cut_or_something_else_is_named_and_what_lies_before_is_kept(tmp_path):
    texts = random_texts(450)
    for is_file in (False, True):
        write_arrow(tmp_path / "a.arrow", texts, is_file=is_file)
        data = (tmp_path / "a.arrow").read_bytes()
        *kept, reason = read(write(tmp_path / "a.arrow", data[: len(data) * 2 // 3]))
        assert kept == texts[: len(kept)]
        assert len(kept) >= 200
        assert reason.startswith("damaged arrow, the rest of the file is lost")
    assert read(write(tmp_path / "a.arrow", b"PK\x03\x04" + bytes(50))) == [
        "zip archive, not arrow"
    ]
    (reason,) = read(write(tmp_path / "a.arrow", b""))
    assert reason.startswith("damaged arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_key_with_a_dot_reaches_into_struct_columns_and_a_literal_one_wins(tmp_path, name):
    struct = pa.array([{"b": {"c": "deep"}, "n": 1}, {"b": None, "n": 2}, None])
    for columns, expected in [
        ({"a": struct}, ["deep", "'a.b.c' is null", "'a.b.c' is null"]),
        ({"a.b.c": pa.array(["x", "y", "z"]), "a": struct}, ["x", "y", "z"]),
        ({"a": pa.array(["x"])}, ["no column 'a.b.c' (columns: a)"]),
    ]:
        table = pa.table(columns)
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
        else:
            with pa.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
                writer.write_table(table)
        assert read(tmp_path / name, "a.b.c") == expected


# csv


def test_csv_with_quoted_commas_quotes_and_lines_is_read(tmp_path):
    data = 'id,text,n\r\n1,"one, ""two""\r\nthree",5\r\n\r\n2,plain,6\r\n3,,7\r\n'
    expected = ['one, "two"\r\nthree', "plain", "empty document"]
    assert read(write(tmp_path / "a.csv", data)) == expected


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv.gz", "|")])
def test_the_header_tells_what_stands_between_columns(tmp_path, name, mark):
    data = f"id{mark}body\n1{mark}a, b\n2{mark}c\n".encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert read(path, "body") == ["a, b", "c"]
    assert read(path) == ["no column 'text' (columns: id, body)"] * 2


def test_a_bad_row_of_csv_costs_no_other(tmp_path):
    data = b'id,text\n1,one\n2,a,b\n3,caf\xe9\n4,"x"y\n5,two\n6,"never closed\n7,lost\n'
    assert read(write(tmp_path / "a.csv", data)) == [
        "one",
        "a row with another number of columns than the header: 3",
        "not UTF-8: 0xe9 at byte 3",
        "not csv: ',' expected after '\"' (in the row that begins on line 5)",
        "two",
        # The quote takes the next line, too: both count as not read.
        *["not csv: unexpected end of data (in the row that begins on line 7)"] * 2,
    ]


def test_line_ends_of_an_old_mac_are_told(tmp_path):
    (reason,) = read(write(tmp_path / "a.csv", "text\rone\rtwo\r"))
    assert reason.startswith("damaged csv, the rest of the file is lost: Error: new-line character")


def test_a_header_that_is_not_utf8_is_quoted_as_text(tmp_path):
    path = write(tmp_path / "a.csv", "prénom,texte\na,b\n".encode("latin-1"))
    assert read(path) == ["no column 'text' (columns: pr\\xe9nom, texte)"]


def test_a_column_named_twice_an_empty_file_and_a_cell_too_long_are_told(tmp_path, monkeypatch):
    reason = "2 columns are named 'text'"
    assert read(write(tmp_path / "a.csv", "text,text\na,b\n")) == [reason]
    assert read(write(tmp_path / "a.csv", "")) == []
    (reason,) = read(write(tmp_path / "a.csv", b"\x89PNG\r\n\x1a\n\0\0"))
    assert reason == "PNG image, not csv"
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 100_000)
    data = "id,text\n1," + "x" * 200_000 + "\n2,b\n"
    text, reason = read(write(tmp_path / "a.csv", data))
    assert text == "b"
    assert reason.startswith("longer than")
