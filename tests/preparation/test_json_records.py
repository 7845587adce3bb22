"""JSON: every form that records have is told apart and read, and a bad record costs no other."""

import gzip
import io
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_documents import json_lines, random_texts, read, records, write

from stablelm_jax.preparation import chunks, json_records, readers, streams
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import find_files

RECORDS = [{"id": i, "text": f'story {i} "]}}{{[\\" über\n'} for i in range(40)]
TEXTS = [record["text"] for record in RECORDS]


def pretty(records):
    return "\n".join(json.dumps(record, indent=2) for record in records)


FORMS = {
    "lines": lambda records: "".join(json.dumps(record) + "\n" for record in records),
    "array": json.dumps,
    "array over many lines": lambda records: json.dumps(records, indent=1),
    "array with a record a line": lambda records: (
        "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"
    ),
    "one after the other": lambda records: "".join(map(json.dumps, records)),
    "one after the other over many lines": pretty,
    "lines with commas": lambda records: ",\n".join(map(json.dumps, records)) + ",\n",
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson.gz"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", ["", "\n \n", "\ufeff"])
def test_every_form_of_records_is_told_apart_whatever_the_name(tmp_path, name, form, before):
    data = (before + FORMS[form](RECORDS)).encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    found = read(path)
    blank = before.count("\n") if form == "lines" and before.isspace() else 0
    assert found == ["empty line"] * blank + TEXTS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [70_000, 1_200_000])
def test_the_length_of_the_first_record_does_not_change_what_it_is(tmp_path, form, length):
    long = [{"text": "x" * length}, *RECORDS]
    path = write(tmp_path / "a.json", FORMS[form](long))
    assert read(path) == ["x" * length, *TEXTS]


def test_one_object_a_file_is_a_record(tmp_path):
    for indent in (None, 2):
        record = {"meta": {"text": "no"}, "text": "one"}
        path = write(tmp_path / "a.json", json.dumps(record, indent=indent))
        assert read(path) == ["one"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"name": "x", "version": 1}', "no key 'text' (keys: name, version)"),
        ('{\n"name": "x",\n"version": 1}\n', "no key 'text' (keys: name, version)"),
        (
            "const x = 1;",
            "JSON damaged: 'const' is no JSON at byte 0; the rest of the file is",
        ),
        ("{ // settings\n}", "not JSON: Expecting property name"),
        ('{"text": "cut', "JSON cut short: the record that begins at byte 0 has no end"),
        ('"a text"', "a JSON string, not an object"),
    ],
)
def test_json_that_is_no_record_is_rejected_and_told_how_it_can_be_kept(tmp_path, data, reason):
    path = write(tmp_path / "a.json", data)
    (found,) = read(path)
    assert found.startswith(reason)
    assert found.endswith("(--format text takes the file as it is)")
    assert read(path, file_format="text") == [data]


@pytest.mark.parametrize("first", ['{"text": "cut of\n', '{"text": "a", "meta":\n', "oops\n"])
def test_lines_below_a_damaged_first_line_are_read(tmp_path, first):
    data = first + FORMS["lines"](RECORDS)
    (tmp_path / "b").mkdir()
    for name in ("a.json", "b/a.jsonl"):
        damaged, *rest = read(write(tmp_path / name, data))
        assert damaged.startswith("not JSON")
        assert rest == TEXTS


@pytest.mark.parametrize("form", ["array", "array over many lines", "one after the other"])
def test_what_lies_before_damage_is_kept_and_the_rest_is_one_rejected_record(tmp_path, form):
    data = FORMS[form](RECORDS)
    for cut in (len(data) // 2, len(data) - 1):
        *kept, last = read(write(tmp_path / "a.json", data[:cut]))
        assert kept == TEXTS[: len(kept)]
        assert len(kept) >= 40 * cut // len(data) - 2
        assert last.startswith("JSON cut short")
    middle = data.index("story 20")
    *kept, last = read(write(tmp_path / "a.json", data[:middle] + "\n" + data[middle:]))
    assert kept == TEXTS[:20]
    assert last == (
        f"JSON damaged: a line ends inside a string at byte {len(data[:middle].encode())};"
        " the rest of the file is lost"
    )


def test_a_bad_record_of_an_array_costs_no_other(tmp_path):
    data = '[{"text": "a"}, {"text": }, 7, {"text": NaN}, {"text": "\\ud800"}, {"text": "b"}]'
    assert [text.split(":")[0] for text in read(write(tmp_path / "a.json", data))] == [
        "a", "not JSON", "a JSON number, not an object", "'text' is a JSON number, not a string",
        "not Unicode", "b",
    ]  # fmt: skip


def test_a_record_too_long_for_memory_is_one_rejected_record(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 300_000)
    held = []

    class Watched(streams.Held):
        def add(self, part):
            super().add(part)
            held.append(sum(map(len, self._parts)))

    monkeypatch.setattr(json_records, "Held", Watched)
    records = [{"text": "a"}, {"text": "x" * 5_000_000}, {"text": "b"}]
    first, rejected, last = read(write(tmp_path / "a.json", json.dumps(records)))
    assert (first, last) == ("a", "b")
    assert rejected.startswith("longer than")
    assert max(held) < 400_000


@pytest.mark.parametrize(
    "odd",
    [
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "a"}',
        b'{"x": ' + b'{"x": ' * 50_000 + b"1" + b"}" * 50_000 + b', "text": "a"}',
        b"[" * 1_000_000,
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_deep_nesting_costs_its_own_record(tmp_path, odd, name):
    good = b'{"text": "one"}\n'
    first, deep, last = read(write(tmp_path / name, good + odd + b"\n" + good))
    assert (first, last) == ("one", "one")
    assert deep.startswith("not JSON")
    in_array = b"[" + good + b"," + odd + b"," + good + b"]"
    assert read(write(tmp_path / name, in_array))[0] == "one"


@pytest.mark.parametrize(
    "number", ["1e999", "-1e999", "9" * 5000, "NaN", "-Infinity", "1" + "0" * 400]
)
def test_absurd_numbers_beside_a_text_do_no_harm(tmp_path, number):
    data = f'{{"n": {number}, "text": "a"}}'
    assert read(write(tmp_path / "a.jsonl", data)) == ["a"]
    assert read(write(tmp_path / "a.json", f"[{data}, {data}]")) == ["a", "a"]


def test_a_key_with_a_dot_reaches_into_records_and_a_literal_one_wins(tmp_path):
    data = (
        '{"a": {"b": {"c": "deep"}}}\n{"a.b": {"c": "half"}}\n'
        '{"a.b.c": "whole", "a": {"b": {"c": 1}}}\n'
        '{"a": "text"}\n{"a": {"b": {"c": 1}}}\n'
    )
    assert read(write(tmp_path / "a.jsonl", data), "a.b.c") == [
        "deep", "half", "whole", "no key 'a.b.c' (keys: a)",
        "'a.b.c' is a JSON number, not a string",
    ]  # fmt: skip


def test_large_lines_are_divided_and_large_arrays_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 1000)
    for form, divided in [("lines", True), ("array", False), ("array over many lines", False)]:
        for name in ("a.json", "a.jsonl"):
            path = write(tmp_path / name, FORMS[form](RECORDS))
            cut = chunks.cut(find_files([path]))
            assert (len(cut) > 1) == divided
            found = [
                record.content for chunk in cut for record in chunks.read_chunk(chunk, Reading())
            ]
            assert found == TEXTS


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON_VALUES), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 50))
def test_an_array_is_cut_into_what_was_put_in_wherever_blocks_end(items, indent, ascii_only, size):
    data = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    blocks = (data[start : start + size] for start in range(0, len(data), size))
    found = [json.dumps(json.loads(value)) for value in json_records.values(blocks)]
    assert found == [json.dumps(item) for item in json.loads(data)]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80) | st.text('[]{}",:\\ \n1atrue', max_size=60).map(str.encode))
def test_no_bytes_end_the_reader_and_none_are_passed_over_in_silence(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.json", "any.jsonl"):
        found = read(write(folder / name, data))
        if not found:  # an empty array, or blank
            assert not data.translate(None, b"[], \t\r\n\x0b\x0c\xef\xbb\xbf\xff\xfe")


# a record a line


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_no_document_of_its_topic(text):
    record = {"text": text, "page": 1}
    expected = json_records.document(record, Reading())
    assert json_records.document(record, Reading(held_out_by="page")) == expected
    assert expected.reason == "empty document"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8: 0xe9 at byte 13"),
        (b'{"text": ""}', "empty document"),
        (b'{"text": " \\n\\t"}', "empty document"),
        (b"", "empty line"),
        (b"  \r", "empty line"),
        (b'{"body": "a", "id": 1}', "no key 'text' (keys: body, id)"),
        (b"{}", "no key 'text' (keys: none)"),
        (b'{"text": 7}', "'text' is a JSON number, not a string"),
        (b'{"text": null}', "'text' is a JSON null, not a string"),
        (b'{"text": ["a"]}', "'text' is a JSON array, not a string"),
        (b'["a"]', "a JSON array, not an object"),
        (b'"a"', "a JSON string, not an object"),
        (b"true", "a JSON boolean, not an object"),
        (b'{"text": "\\ud800"}', "not Unicode: an unpaired surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"\x00\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason_and_costs_no_other_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", json_lines(["one"]) + line + b"\n" + json_lines(["two"]))
    first, rejected, last = records(path)
    assert (first, last) == ("one", "two")
    assert rejected.reason.startswith(reason)


def test_what_python_and_windows_write_is_read(tmp_path):
    data = (
        b'\xef\xbb\xbf{"text": "after a byte order mark"}\r\n'
        b'{"score": NaN, "most": Infinity, "text": "not quite JSON"}\n'
        b'{"n": 123456789012345678901234567890, "text": "a large number"}\n'
        b'{"text": "no newline at the end"}'
    )
    assert records(write(tmp_path / 'a.jsonl', data)) == [
        'after a byte order mark', 'not quite JSON', 'a large number', 'no newline at the end',
    ]  # fmt: skip


def test_texts_come_back_as_they_were_written(tmp_path):
    texts = random_texts(500)
    path = write(tmp_path / "a.jsonl", json_lines(texts))
    assert records(path) == texts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b'{"text":"a"}', b'{"text":"bb\\n"}', b"oops", b"\r"])),
    st.booleans(),
    st.lists(st.integers(0, 100)),
)
def test_ranges_give_every_line_once_wherever_they_are_cut(tmp_path_factory, lines, ends, cuts):
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    path = write(tmp_path_factory.getbasetemp() / "ranges.jsonl", data)
    whole = records(path)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [records(path, part=(start, end)) for start, end in itertools.pairwise(edges)]
    assert [record for piece in pieces for record in piece] == whole
    assert len(whole) == data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def test_a_range_within_a_long_line_does_not_read_to_its_end(tmp_path):
    path = write(tmp_path / "a.jsonl", b"x" * 5_000_000 + b"\n" + json_lines(["end"]))

    class Counting(io.FileIO):
        total = 0

        def read(self, size=-1):
            data = super().read(size)
            Counting.total += len(data)
            return data

    with Counting(path) as file:
        begin, _ = readers.line_range(file, 1_000_000, 1_100_000)
    assert begin >= 1_100_000
    assert Counting.total < 300_000


def test_a_line_too_long_for_memory_is_one_rejected_record(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 3_000_000)
    long_line = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    path = write(tmp_path / "a.jsonl", json_lines(["one"]) + long_line + json_lines(["two"]))
    first, rejected, last = records(path)
    assert (first, last) == ("one", "two")
    assert "longer than" in rejected.reason
    assert "split it" in rejected.reason
