"""Recipes: every source is found, read as it is laid out, listed, and can be done without."""

import dataclasses
import gzip
import io
import json
import lzma
import pathlib
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder, prepare
from stablelm_jax.data import manifest
from stablelm_jax.preparation import chunks, recipes
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import find_files
from stablelm_jax.preparation.keeping import NotKept
from stablelm_jax.preparation.recipes import load_recipe
from stablelm_jax.run.console import make_console

STABLELM = load_recipe("stablelm_2")
NAMES = [source.name for source in STABLELM.sources]
PILE = {
    "philpapers": "PhilPapers",
    "hackernews": "HackerNews",
    "europarl": "EuroParl",
    "freelaw": "FreeLaw",
    "dm_math": "DM Mathematics",
}
OSCAR = ["OSCAR-2019", "OSCAR-2109", "OSCAR-2201", "OSCAR-2301"]


def texts_of(name, count=12):
    return [f"{name}, document {number}: Grüße {number * number}\nline" for number in range(count)]


# what each source looks like where it lies


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def parquet(records):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=5)
    return sink.getvalue()


def tar(members, mode="w"):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def records(texts, key="text", **fields):
    return [{key: text, **fields} for text in texts]


def halves(texts):
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def mixed(texts, own, others, place):
    """Records of a shared data set: each of the source's, then one of another source."""
    found = []
    for number, text in enumerate(texts):
        found.append({"text": text, **place(own[number % len(own)])})
        found.append({"text": f"another's {number}", **place(others[number % len(others)])})
    return found


def redpajama(part, name):
    def files(texts):
        meta = {"meta": {"url": "http://a.b/c", "language": "en"}}
        return {
            f"{part}/{name}": jsonl(records(texts, **meta)),
            "github/other.jsonl": jsonl(records(["no such source"])),
        }

    return files


def pile(set_name):
    def files(texts):
        shards = [
            mixed(half, [set_name], ["Pile-CC", "Github"], lambda v: {"meta": {"pile_set_name": v}})
            for half in halves(texts)
        ]
        places = {"train/00.jsonl.zst": shards[0], "train/29.jsonl.zst": shards[1]}
        other = {"val.jsonl.zst": zstd(jsonl(shards[0]))}
        return {place: zstd(jsonl(shard)) for place, shard in places.items()} | other

    return files


def culturax(language):
    def files(texts):
        found = {}
        for number, half in enumerate(halves(texts)):
            rows = mixed(half, OSCAR, ["mC4"], lambda value: {"source": value})
            more = {"timestamp": "2018/11/19 07:24:51", "url": "http://a.b/c"}
            name = f"{language}/{language}_part_{number:05d}.parquet"
            found[name] = parquet([row | more for row in rows])
        return found | {"zu/zu_part_00000.parquet": parquet(records(["no"], source="OSCAR-2301"))}

    return files


def split_parquet(first, second, key="text", **fields):
    def files(texts):
        one, two = (parquet(records(half, key, **fields)) for half in halves(texts))
        return {first: one, second: two}

    return files


def dolma_schema(prefix):
    def files(texts):
        fields = {"id": "1", "source": "a", "added": "2024", "created": "2020", "metadata": {}}
        halved = enumerate(halves(texts))
        return {
            f"{prefix}{number:04d}.json.gz": gzip.compress(jsonl(records(half, **fields)))
            for number, half in halved
        } | {"README.md": b"# A card"}

    return files


def c4(texts):
    one, two = (
        gzip.compress(jsonl(records(half, timestamp="2019-04-25T12:57:54Z", url="http://a.b/c")))
        for half in halves(texts)
    )
    names = "en/c4-train.00000-of-01024.json.gz", "en/c4-train.01023-of-01024.json.gz"
    return {names[0]: one, names[1]: two, "en/c4-validation.00000-of-00008.json.gz": one}


def openwebtext2(texts):
    members = {
        f"2020-0{n}.jsonl.zst": zstd(jsonl(records(half, title="A title", meta={"url": "a"})))
        for n, half in enumerate(halves(texts))
    }
    return {"openwebtext2.jsonl.zst.tar": tar(members)}


def pile_of_law(texts):
    fields = {"created_timestamp": "2020", "downloaded_timestamp": "2022", "url": "http://a.b/c"}
    one, two = (lzma.compress(jsonl(records(half, **fields))) for half in halves(texts))
    return {
        "data/train.courtlistenerdocketentries.0.jsonl.xz": one,
        "data/train.r_legaldvice.jsonl.xz": two,
        "data/validation.r_legaldvice.jsonl.xz": one,
    }


def amps(texts):
    folders = "amps/khan/504", "amps/mathematica/algebra"
    members = {f"{folders[n % 2]}/{n:04d}.txt": text.encode() for n, text in enumerate(texts)}
    return {"amps.tar.gz": tar(members, "w:gz")}


def starcoder(texts):
    """The number of stars has another type in another folder."""
    one, two = halves(texts)
    fields = {"id": "0", "max_stars_repo_path": "a.py", "max_stars_repo_name": "a/b"}
    return {
        "github-issues-filtered-structured/train-00000-of-00067.parquet": parquet(
            records(one, "content", **fields)
        ),
        "python/train-00000-of-00059.parquet": parquet(
            records(two, "content", max_stars_count=3, **fields)
        ),
    }


PG19 = {"publication_date": 1880, "url": "http://a.b/c", "short_book_title": "A book"}
WEB = {"url": "http://a.b/c", "timestamp": "2020", "dump": "CC-MAIN-2020-05", "segment": "1"}
MATHS = {"url": "http://a.b/c", "date": "2020-01-01T00:00:00", "metadata": '{"extraction_info": 1}'}
LAYOUTS = {
    "arxiv": redpajama("arxiv", "arxiv_023827cd-7ee8-42e6-aa7b-661731f4c70f.jsonl"),
    "pubmed": split_parquet("data/pubmed/PubMed_0.parquet", "data/pubmed/PubMed_46.parquet"),
    "s2orc": dolma_schema("data/v1/train-0"),
    "bookcorpus_open": split_parquet(
        "data/train-00000-of-00010.parquet", "data/train-00009-of-00010.parquet", title="A book"
    ),
    "pg19": split_parquet(
        "data/train-00000-of-00023-1a2b.parquet", "data/train-00022-of-00023-3c4d.parquet", **PG19
    ),
    "fanfics": split_parquet(
        "part-00000-0a1b-c000.snappy.parquetpart.0.parquet",
        "part-00001-0a1b-c000.snappy.parquetpart.0.parquet",
        key="TEXT",
    ),
    "c4": c4,
    "openwebtext2": openwebtext2,
    "refinedweb": split_parquet(
        "data/train-00000-of-05534-b8fc5348cbe605a5.parquet",
        "data/train-05533-of-05534-b8fc5348cbe605a5.parquet",
        key="content",
        image_urls=[["http://a.b/c.png", "a picture"]],
        **WEB,
    ),
    "stackexchange": redpajama("stackexchange", "stackexchange.jsonl"),
    "pile_of_law": pile_of_law,
    "amps": amps,
    "openwebmath": split_parquet(
        "data/train-00000-of-00114-a.parquet", "data/train-00113-of-00114-b.parquet", **MATHS
    ),
    "redpajama_wiki": redpajama("wikipedia", "wiki.jsonl"),
    "starcoder": starcoder,
    "restruct_v1": dolma_schema("dpi-"),
    **{name: pile(set_name) for name, set_name in PILE.items()},
    **{f"culturax_{code}": culturax(code) for code in "en es de fr it nl pt".split()},
}


def write_files(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_list(root, files):
    (root / "urls.txt").write_text("".join(f"{root / name}\n" for name in files))


def moved(origin, root):
    """The same place below a folder of this machine, what lists its files too."""
    places = tuple(
        re.sub(r"^(hf://datasets/[^/]+|https:/)/[^/]+", str(root), i) for i in origin.inputs
    )
    listed = origin.listed and (str(root / "urls.txt"), origin.listed[1])
    return dataclasses.replace(origin, inputs=places, listed=listed)


def here(root, apart=False):
    """The recipe with all its places below a folder of this machine, or in one for each source."""

    def place(source):
        folder = root / ("pile" if source.name in PILE else f"of_{source.name}") if apart else root
        return dataclasses.replace(source, origins=tuple(moved(o, folder) for o in source.origins))

    return dataclasses.replace(STABLELM, sources=tuple(map(place, STABLELM.sources)))


def job_of(recipe, name, *more):
    (job,) = jobs_of(recipe, "--source", name, "--output", "data", *more)
    return job


def jobs_of(recipe, *arguments):
    parser, arguments = prepare.make_parser(), ["--recipe", recipe.name, *arguments]
    flags = parser.parse_args(arguments)
    jobs, failures = prepare._jobs(parser, arguments, flags, recipe, make_console())
    assert not failures
    return jobs


def contents(job):
    """What `prepare` reads for a job: texts, and what becomes of the other records."""
    cut = chunks.cut(find_files(job.inputs, job.format))
    reading = Reading.of(vars(job))
    return [record.content for chunk in cut for record in chunks.read_chunk(chunk, reading)]


def test_the_recipe_has_the_sources_of_its_config_in_the_order_of_their_weights_there():
    config = config_lib.load(configs_folder() / STABLELM.config)
    assert set(NAMES) == set(config.data.weights) == set(LAYOUTS)
    total = sum(source.tokens for source in STABLELM.sources)
    assert total == 2_009_831_803_929  # of the table; four fewer than the total it gives
    for source in STABLELM.sources:
        assert source.tokens / total == pytest.approx(config.data.weights[source.name], abs=1.1e-4)
        assert source.epochs > 0


@pytest.mark.parametrize("name", NAMES)
def test_each_source_is_read_as_it_is_laid_out_and_no_document_is_lost(name, tmp_path):
    texts = texts_of(name)
    files = LAYOUTS[name](texts)
    write_files(tmp_path, files)
    write_list(tmp_path, files)
    origin = ("--origin", "substitute") if name == "restruct_v1" else ()
    found = contents(job_of(here(tmp_path), name, *origin))
    assert sorted(content for content in found if isinstance(content, str)) == sorted(texts)
    others = [content for content in found if not isinstance(content, str)]
    assert all(isinstance(content, NotKept) for content in others)
    is_shared = name in PILE or name.startswith("culturax")
    assert len(others) == (len(texts) if is_shared else 0)


def test_every_other_place_is_read_too_by_its_own_pattern_key_and_kind(tmp_path):
    for source in STABLELM.sources:
        for number, origin in enumerate(source.origins, 1):
            if origin.state == recipes.GONE or number == 1:
                continue
            root = tmp_path / f"{source.name}{number}"
            places = moved(origin, root).inputs or (f"{root}/{origin.listed[1]}",)
            fill = str.maketrans({"*": "x"})
            names = [place.replace("**", "a.jsonl").translate(fill) for place in places]
            names = [name.removeprefix(f"{root}/") for name in names]
            rows = records(texts_of(source.name), origin.text_key)
            for key, pattern in origin.keep:
                field, _, inner = key.partition(".")
                rows = [{**row, field: {inner: pattern}} for row in rows]
            data, expected = packed(names[0], rows), texts_of(source.name) * len(names)
            if names[0].endswith(".tar.gz"):
                data, expected = tar({"v1.0/easy/a.txt": b"2 + 2?\n4\n"}, "w:gz"), ["2 + 2?\n4"]
            write_files(root, dict.fromkeys(names, data))
            if origin.listed:
                write_list(root, names)
            found = contents(job_of(here(root), source.name, "--origin", str(number)))
            assert found == expected, (source.name, number)


def packed(name, rows):
    """A file of records as its name says."""
    data = parquet(rows) if name.endswith("parquet") else jsonl(rows)
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}
    return pack.get(pathlib.PurePath(name).suffix, bytes)(data)


def test_what_is_given_by_hand_wins_over_the_recipe():
    flags = ('--input', 'mine.jsonl', '--text-key', 'body', '--keep', 'a=b', '--licence', 'MIT',
             '--language', 'fr')  # fmt: skip
    job = job_of(STABLELM, "culturax_en", *flags)
    assert (job.inputs, job.text_key, job.keep) == (["mine.jsonl"], "body", [["a", "b"]])
    assert (job.licence, job.languages) == ("MIT", ["fr"])
    assert job.facts["inputs"] == "given by hand"
    plain = job_of(STABLELM, "culturax_en")
    assert plain.inputs == ["hf://datasets/uonlp/CulturaX/en/*.parquet"]
    assert (plain.keep, plain.languages) == ([["source", "OSCAR*"]], ["en"])
    assert (plain.facts["state"], plain.facts["certainty"]) == ("as published", "seen")


def test_of_a_source_without_a_substitute_the_first_place_is_read_and_that_is_said(capsys):
    names = ("culturax_de", "hackernews", "restruct_v1")
    jobs = jobs_of(STABLELM, "--source", *names, "--origin", "substitute", "--output", "data")
    assert "fineweb-2/data/deu_Latn" in jobs[0].inputs[0]
    assert [job.facts["place"] for job in jobs] == [2, 1, 2]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("hackernews: has no substitute; its first place is read")


def test_a_whole_commit_is_pinned_and_no_other():
    pinned = {
        source.name: re.findall("@([^/]+)/", "".join(origin.inputs))
        for source in STABLELM.sources
        for origin in source.origins
        if "@" in "".join(origin.inputs)
    }
    assert set(pinned) == {"europarl", "pile_of_law"}
    assert all(re.fullmatch("[0-9a-f]{40}", found[0]) for found in pinned.values())


# the list


def listed(monkeypatch, capsys, columns, *arguments):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert prepare.main(["--recipe", "stablelm_2", "--list", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_the_list_shows_every_source_within_the_columns_there_are(monkeypatch, capsys, columns):
    said = listed(monkeypatch, capsys, columns)
    # What is wider is a path alone, which could not be copied if it were broken.
    assert all(len(line) <= columns or " " not in line.strip() for line in said.splitlines())
    assert "…" not in said
    for source in STABLELM.sources:
        place = next((o for o in source.origins if o.state != recipes.GONE), None)
        for path in (*place.inputs[:1], *(place.listed or ()), place.gate) if place else ():
            assert path in said
    for name in NAMES:
        assert re.search(rf"^ *{name}\b", said, re.MULTILINE), name
    whole = re.sub(r"\s+", "", said)
    for text in (
        'hf://datasets/uonlp/CulturaX/en/*.parquet', 'keepsource=OSCAR*', 'json.gzip',
        'gate:askathttps://huggingface.co/datasets/bigcode/starcoderdata', 'ODC-By',
        'certainty:secondhand', 'likely:medium', 'filters:none:code', 'neverpublished',
        'filters:gopher,fineweb,language', 'keepmeta.pile_set_name=DMMathematics',
    ):  # fmt: skip
        assert text in whole, text
    assert re.search(r"tokens 661.59 B", said) and re.search(r"epochs 1.15\b", said)
    assert "restruct_v1" in next(line for line in said.splitlines() if line.startswith("gone"))


def test_the_list_of_one_source_shows_all_its_places_and_no_other_source(monkeypatch, capsys):
    said = listed(monkeypatch, capsys, 80, "--source", "c4")
    assert "3 of 3: substitute" in said and "note: C4's own rules" in said
    assert "arxiv" not in said


# what cannot be had


def run(capsys, *arguments):
    code = prepare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_source_that_was_never_public_says_what_to_do_and_the_weights_without_it(capsys):
    code, out, err = run(
        capsys, "--recipe", "stablelm_2", "--source", "restruct_v1", "--output", "data"
    )
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("prepare: restruct_v1: never published")
    assert "--origin 2 or 3" in line and "--input" in line
    flags = dict(re.findall(r"--config\.data\.(weights\.\w+)=(\S+)", out))
    config = config_lib.load(configs_folder() / STABLELM.config)
    for name, weight in flags.items():
        config_lib.set_value(config, f"data.{name}", float(weight))
    weights = config_lib.mixture_weights(config)
    assert set(weights) == set(NAMES) - {"restruct_v1"}
    assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
    assert weights["c4"] == pytest.approx(0.0855 / (1.0001 - 0.0102), abs=1e-4)


def test_files_that_are_not_there_and_a_list_that_cannot_be_read_say_so_too(
    capsys, monkeypatch, tmp_path, tokenizer_file
):
    monkeypatch.setattr(prepare, "load_recipe", lambda name: here(tmp_path))
    flags = ("--output", tmp_path / "data", "--tokenizer", tokenizer_file)
    for name, what, *more in [
        ("c4", "nothing there"),
        ("c4", "nothing there", "--sample", "10"),
        ("arxiv", "urls.txt"),
    ]:
        code, out, err = run(capsys, "--recipe", "stablelm_2", "--source", name, *flags, *more)
        assert code == 2
        assert what in err and "--origin 2 or 3" in err
        assert f"--config.data.weights.{name}=0.0" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "stablelm_3", "--list"], "there are demo, stablelm_2, and any Python file"),
        (["--list"], "--list: only with --recipe"),
        (
            ["--recipe", "stablelm_2", "--source", "c4", "--list", "--origin", "7"],
            "--origin: not with --list",
        ),
        (["--recipe", "stablelm_2", "--source", "C5"], "did you mean c4?"),
        (["--recipe", "stablelm_2", "--source", "c4", "--origin", "9"], "1 (as published)"),
        (["--recipe", "stablelm_2"], "--source: is missing"),
        (["--source", "a", "b", "--input", "x"], "several only out of a --recipe"),
        (["--source", "a", "--input", "x", "--origin", "2"], "--origin: only with --recipe"),
        (["--source", "a", "--input", "x", "--sample", "1"], "--sample: from 2"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line_that_helps(capsys, arguments, said):
    code, _, err = run(capsys, *arguments, *([] if "--list" in arguments else ["--output", "data"]))
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_a_recipe_of_ones_own_is_a_file_and_what_is_wrong_with_it_is_said(
    capsys, tmp_path, tokenizer_file
):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.csv").write_text("body\none\ntwo\nthree\n")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from stablelm_jax.preparation.recipes import Origin, Recipe, RecipeSource\n"
        "place = Origin(('{output}/downloads/a.csv',), text_key='body')\n"
        "one, two = (RecipeSource(name, (place,), ('en',)) for name in 'ab')\n"
        "RECIPE = Recipe('mine', (one, two))"
    )
    code, out, err = run(
        capsys, '--recipe', mine, '--source', 'a', '--output', tmp_path, '--workers', 1,
        '--tokenizer', tokenizer_file,
    )  # fmt: skip
    assert code == 0, err
    made = manifest.read_manifest(tmp_path / "a")
    assert (made.train.documents + made.held_out.documents, made.languages) == (3, ("en",))
    assert made.provenance["recipe"]["name"] == "mine"
    assert run(capsys, "--recipe", mine, "--list")[0] == 0
    mine.write_text("1 / 0\n")
    assert "ZeroDivisionError" in run(capsys, "--recipe", mine, "--list")[2]
    mine.write_text("")
    assert "sets no RECIPE" in run(capsys, "--recipe", mine, "--list")[2]


def test_the_demo_has_the_sources_of_its_config_where_its_script_leaves_them():
    demo = load_recipe("demo")
    config = config_lib.load(configs_folder() / demo.config)
    assert {source.name for source in demo.sources} == set(config.data.weights)
    jobs = jobs_of(demo, "--source", "all", "--output", "D")
    assert [job.inputs for job in jobs][0] == ["D/downloads/libreoffice_help_en.jsonl"]
    assert jobs[1].languages == ["de"] and jobs[1].licence == "MPL-2.0"


# a sample


def test_a_sample_reads_a_few_documents_here_and_there_and_is_another_source(
    capsys, tmp_path, tokenizer_file
):
    for number in range(20):
        texts = texts_of(f"file{number}", 50)
        (tmp_path / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(jsonl(records(texts))))
    flags = ['--recipe', 'stablelm_2', '--source', 'c4', '--input', tmp_path / '*.gz', '--output',
             tmp_path / 'data', '--tokenizer', tokenizer_file, '--workers', 1]  # fmt: skip
    code, out, err = run(capsys, *flags, "--sample", 20)
    assert code == 0, err
    assert not (tmp_path / "data" / "c4").exists()
    made = manifest.read_manifest(tmp_path / "data" / "c4_sample")
    assert made.train.documents + made.held_out.documents == 20
    assert made.provenance["settings"]["sample"] == 20
    assert made.provenance["found"]["left out: not in the sample"]["files"] == 12
    assert made.provenance["found"]["read from its beginnings as jsonl.gzip"]["files"] == 8
    assert "already prepared" in run(capsys, *flags, "--sample", 20)[1]
    code, _, err = run(capsys, *flags, "--sample", 30)
    assert (code, "with other sample (20, not 30)" in err) == (1, True)


@pytest.mark.by_hand
def test_one_command_prepares_all_sources_there_are_and_names_the_one_that_is_gone(
    capsys, monkeypatch, tmp_path, tokenizer_file
):
    texts = {name: texts_of(name, 40) for name in NAMES}
    for name in set(NAMES) - set(PILE):
        files = LAYOUTS[name](texts[name])
        write_files(tmp_path / f"of_{name}", files)
        write_list(tmp_path / f"of_{name}", files)
    parts = [
        {"text": text, "meta": {"pile_set_name": set_name}}
        for name, set_name in PILE.items()
        for text in texts[name]
    ]
    shards = {f"train/{n:02d}.jsonl.zst": zstd(jsonl(parts[n::3])) for n in range(3)}
    write_files(tmp_path / "pile", shards)
    monkeypatch.setattr(prepare, "load_recipe", lambda name: here(tmp_path, apart=True))
    data = tmp_path / "prepared"
    code, out, err = run(
        capsys, '--recipe', 'stablelm_2', '--source', 'all', '--output', data, '--tokenizer',
        tokenizer_file, '--workers', 2,
    )  # fmt: skip
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("prepare: restruct_v1: never published")
    assert out.count("reading the files of") == 1  # the components of the Pile
    for name in set(NAMES) - {"restruct_v1"}:
        made = manifest.read_manifest(data / name)
        assert made.train.documents + made.held_out.documents == 40, name
        assert made.rejected == 0, name
        assert made.provenance["recipe"]["source"] == name
