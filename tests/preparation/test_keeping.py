"""--keep: of a data set that several sources share, each source takes its own records."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_documents import random_texts, write

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.preparation import chunks, keeping
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import find_files
from stablelm_jax.preparation.keeping import NotKept
from stablelm_jax.preparation.streams import Rejected

SETS = ["PhilPapers", "HackerNews", "Pile-CC"]
RECORDS = [
    {"text": text, "meta": {"pile_set_name": SETS[number % 3]}, "n": number % 2}
    for number, text in enumerate(random_texts(90))
]
ODD = (
    '{"text": "", "of": "a"}\n{"text": 5, "of": "b"}\n{"text": "c"}\noops\n'
    '{"text": "d", "of": "a"}\n'
)
PHIL = [record["text"] for record in RECORDS[::3]]


def contents(path, *keep, **reading):
    cut = chunks.cut(find_files([str(path)]))
    found = Reading(keep=[list(pair) for pair in keep], **reading)
    return [record.content for chunk in cut for record in chunks.read_chunk(chunk, found)]


def kept(path, *keep, **reading):
    return [text for text in contents(path, *keep, **reading) if isinstance(text, str)]


def write_table(path, records=RECORDS):
    table = pa.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=40)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.fixture
def files(tmp_path):
    """The same records in every kind of file that has fields."""
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    rows = "".join(
        f'"{r["text"]}",{r["meta"]["pile_set_name"]}\n'
        for r in RECORDS
        if '"' not in r["text"] and "\r" not in r["text"]
    )
    return {
        "jsonl": write(tmp_path / "a.jsonl", lines),
        "json": write(tmp_path / "a.json", json.dumps(RECORDS)),
        "parquet": write_table(tmp_path / "a.parquet"),
        "arrow": write_table(tmp_path / "a.arrow"),
        "csv": write(tmp_path / "a.csv", f"text,meta.pile_set_name\n{rows}"),
    }


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "csv"])
def test_of_every_kind_of_records_those_that_fit_are_kept_and_no_others(files, kind):
    expected = [text for text in PHIL if kind != "csv" or '"' not in text]
    assert kept(files[kind], ("meta.pile_set_name", "philpapers")) == expected
    assert kept(files[kind], ("meta.pile_set_name", "Phil*")) == expected
    assert kept(files[kind], ("meta.pile_set_name", "Phil")) == []


def test_several_keys_must_all_fit_and_of_a_key_one_pattern(files):
    name = "meta.pile_set_name"
    both = kept(files["jsonl"], (name, "PhilPapers"), (name, "HackerNews"))
    assert both == [r["text"] for r in RECORDS if r["meta"]["pile_set_name"] != "Pile-CC"]
    even = kept(files["jsonl"], (name, "PhilPapers"), ("n", "0"))  # a number, as JSON writes it
    assert even == [r["text"] for r in RECORDS[::6]]


def test_of_a_parquet_file_only_the_text_and_the_column_that_decides_are_read(
    tmp_path, monkeypatch
):
    path = write_table(tmp_path / "a.parquet")
    read, iterate = [], pq.ParquetFile.iter_batches

    def watched(self, *arguments, columns, **options):
        read.append(columns)
        return iterate(self, *arguments, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    kept(path, ("meta.pile_set_name", "*"))
    assert [set(columns) for columns in read] == [{"text", "meta"}] * 3


def test_a_record_of_another_source_is_no_rejected_one_whatever_is_wrong_with_its_text(tmp_path):
    found = contents(write(tmp_path / "a.jsonl", ODD), ("of", "a"))
    assert found[0] == Rejected("empty document")
    assert found[1] == NotKept({"of": "b"})
    assert found[2] == NotKept({"of": None})
    assert found[3].reason.startswith("not JSON")
    assert found[4] == "d"


def test_what_another_source_would_see_follows_from_one_reading(tmp_path):
    """One pass for several sources gives each what its own would give, rejected records too."""
    path = write(tmp_path / "a.jsonl", ODD)
    shared = contents(path, ("of", "*"))
    for pattern in ("a", "b"):
        own = contents(path, ("of", pattern))
        assert [keeping.for_source(content, [("of", pattern)]) for content in shared] == own


def test_counts_show_the_most_frequent_values_and_the_others_together():
    counts = {}
    for number in range(3000):
        keeping.count(counts, {"url": str(number)})
        keeping.count(counts, {"url": "often"})
    total = keeping.total([counts, {"often": 1}])
    assert len(total) == 21
    assert (total["often"], sum(total.values())) == (3001, 6001)


def run(capsys, *arguments):
    code = prepare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_manifest_counts_by_value_and_another_pattern_is_another_source(
    files, tmp_path, capsys, tokenizer_file
):
    flags = ['--source', 'phil', '--input', files['jsonl'], '--output', tmp_path / 'data',
             '--tokenizer', tokenizer_file, '--workers', 1]  # fmt: skip
    code, _, err = run(capsys, *flags, "--keep", "meta.pile_set_name=Phil")
    assert code == 1
    assert "(not kept: PhilPapers: 30; not kept: HackerNews: 30; not kept: Pile-CC: 30)" in err
    assert "--keep meta.pile_set_name=Phil fits no record" in err
    flags += ["--keep", "meta.pile_set_name=PHIL*"]
    code, out, err = run(capsys, *flags)
    assert code == 0, err
    assert "not kept by --keep: HackerNews: 30, Pile-CC: 30" in out
    made = manifest.read_manifest(tmp_path / "data" / "phil")
    assert made.train.documents + made.held_out.documents == 30
    assert made.rejected == 0
    counts = {"kept": {"PhilPapers": 30}, "not_kept": {"HackerNews": 30, "Pile-CC": 30}}
    assert made.provenance["keep"] == counts
    assert "already prepared" in run(capsys, *flags)[1]
    code, _, err = run(capsys, *flags, "--keep", "n=0")
    assert (code, "with other keep" in err) == (1, True)


def test_a_pattern_without_its_key_is_told_at_once(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        prepare.main(["--source", "a", "--input", "a", "--output", "b", "--keep", "OSCAR*"])
    assert exit.value.code == 2
    assert "OSCAR*: write KEY=PATTERN, as in source=OSCAR*" in capsys.readouterr().err
