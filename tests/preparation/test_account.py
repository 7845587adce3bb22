"""The account: every file that is found, and every byte, is read, rejected or left out."""

import gzip
import http.server
import io
import json
import os
import random
import tarfile
import threading

import fsspec
import pytest

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.preparation import chunks, executors, held_out
from stablelm_jax.preparation.account import Account, Tally
from stablelm_jax.preparation.finding import InputFile, LeftOut


def tally(*records):
    """Of records that are read (None) or rejected (a reason, or a reason and what follows it)."""
    made = Tally()
    for record in records:
        reason, left = record if isinstance(record, tuple) else (record, 0)
        made.add(reason, left)
    return made


def tar_of(members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def file(name, size=100, kind="jsonl", compression=None):
    return InputFile(name, name, size, "", kind, compression)


def test_a_file_counts_as_unread_by_the_share_of_its_records_and_by_what_a_damage_lost():
    assert tally(None, None, None).unread(100) == 0
    assert tally("not UTF-8: 0xe9").unread(100) == 100
    assert tally(None, None, None, "no key 'text'").unread(100) == 25
    lost = "gzip stream damaged, the rest of the file is lost: bad"
    assert tally(*[None] * 999, (lost, 60)).unread(100) == 60
    assert tally("not JSON", (lost, 60)).unread(100) == 100


@pytest.mark.parametrize(
    "reason",
    ["empty line", "empty document", "'text' is null", "'a.b' is a JSON null, not a string"],
)
def test_records_that_hold_nothing_are_no_loss(reason):
    assert tally(None, *[reason] * 50).unread(100) == 0
    assert tally(reason).unread(100) == 0


@pytest.mark.parametrize(
    "reason",
    [
        "hidden in an archive (member ._a.txt)",
        "a link or device in an archive (member a)",
        "no key 'text' (keys: width) (--format text takes the file as it is) (member 1.json)",
    ],
)
def test_what_lies_beside_the_texts_of_an_archive_is_no_loss_but_by_itself_it_is(reason):
    assert tally(None, *[reason] * 50).unread(100) == 0
    account = Account.of([file("a.tar", kind="tar")], [{"a.tar": tally(reason, reason)}], [])
    (end,) = account.ends
    assert end.startswith("rejected: ") and account.unread_bytes == 100


def test_the_parts_of_a_file_in_several_chunks_are_counted_together():
    parts = [{"a": tally(None, None)}, {"a": tally("not JSON: x", None), "b": tally("not JSON: y")}]
    account = Account.of([file("a"), file("b", 7)], parts, [])
    assert account.ends == {"read as jsonl": [1, 100], "rejected: not JSON": [1, 7]}
    assert (account.unread_bytes, account.found) == (32, 107)


def test_what_is_left_out_by_a_rule_is_counted_and_no_loss_but_what_cannot_be_opened_is():
    left_out = [
        LeftOut("in/.git", "hidden", 5000, 12),
        LeftOut("in/link", "another name of a file that is read: in/a", 0),
        LeftOut("in/link2", "another name of a file that is read: in/b", 0),
        LeftOut("in/secret", "no permission to read it", 40, is_loss=True),
    ]
    files = [file("in/a", 360), file("in/b.gz", 0, "text", "gzip")]
    account = Account.of(files, [{"in/a": tally(None)}], left_out)
    assert account.ends == {
        "read as jsonl": [1, 360],
        "empty": [1, 0],
        "left out: hidden": [12, 5000],
        "left out: another name of a file that is read": [2, 0],
        "left out: no permission to read it": [1, 40],
    }
    assert (account.unread_bytes, account.found, account.refusal()) == (40, 400, None)


def test_more_than_a_tenth_unread_is_refused_and_the_worst_are_named():
    names = [f"{letter}.bin" for letter in "abcde"]
    files = [
        file("a.txt", 100_000, "text"),
        *(file(name, 3000 + n) for n, name in enumerate(names)),
    ]
    parts = [{"a.txt": tally(None), **{name: tally("binary, not text") for name in names}}]
    said = Account.of(files, parts, []).refusal()
    assert said.startswith(
        "15,010 of 115,010 bytes were not read as text: e.bin (binary, not text), "
    )
    assert said.endswith(" and 2 more")
    small = [each._replace(size=each.size // 4) for each in files]
    assert Account.of(small, parts, []).refusal() is None  # a few kB, whatever their share
    parts[0]["a.bin"] = parts[0]["b.bin"] = tally(None)
    assert Account.of(files, parts, []).refusal() is None


# through the verb


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / f"in/{number}.txt").write_text(f"text number {number}, quite ordinary\n" * 9)
    return tmp_path


@pytest.fixture
def call(folder, tokenizer_file, capsys):
    """Prepares what lies in `in`; returns exit code, stdout and stderr."""

    def prepared(*flags, inputs=(folder / "in",), output=folder / "out"):
        names = [os.fspath(name) for name in inputs]
        arguments = ["--source", "s", "--input", *names, "--output", str(output)]
        code = prepare.main([*arguments, "--tokenizer", tokenizer_file, "--workers", "1", *flags])
        return code, *capsys.readouterr()

    return prepared


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_source_of_which_too_much_was_not_read_is_refused_and_goes_on_with_the_flag(folder, call):
    (folder / "in/library.so").write_bytes(b"\x7fELF\0\0" + random.Random(0).randbytes(6000))
    directory = folder / "out/s"
    code, _, err = call()
    assert code == 1
    assert "6,006 of 7,086 bytes were not read as text: " in err
    assert "library.so (" in err and "--allow-unread" in err and err.count("\n") == 1
    assert not (directory / "manifest.json").exists()
    made = {path.stat().st_ino for path in directory.glob(".work/outputs/*/train.bin")}
    assert made
    code, out, _ = call("--allow-unread")
    assert code == 0
    assert "going on with what was begun" in out
    assert {path.stat().st_ino for path in directory.glob("train*.bin")} == made
    provenance = manifest.read_manifest(directory).provenance
    assert provenance["unread_bytes"] == 6006
    assert provenance["found"]["read as text"] == {"files": 4, "bytes": 1080}
    code, out, _ = call()
    assert code == 0 and "already prepared" in out


def test_what_was_refused_is_begun_anew_with_other_files_and_what_was_stopped_is_not(
    folder, call, monkeypatch
):
    odd = folder / "in/library.so"
    odd.write_bytes(b"\x7fELF\0\0" + random.Random(0).randbytes(6000))
    assert call()[0] == 1
    odd.unlink()  # as the refusal advises
    code, out, err = call()
    assert code == 0, err
    assert "going on" not in out

    def stopped(executor, step, tasks, logs):
        step.run(None, 0, tasks)
        raise executors.TasksFailed("stopped")

    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 200)
    monkeypatch.setattr(executors.Executor, "run", stopped)
    elsewhere = folder / "elsewhere"
    assert "stopped" in call(output=elsewhere)[2]
    code, _, err = call(inputs=[folder / "in/1.txt", folder / "in/2.txt"], output=elsewhere)
    assert code == 1 and "was begun, not finished, with other input files" in err  # it can go on


def test_after_a_wrong_key_the_same_command_with_the_right_one_works(folder, call):
    records = "".join(json.dumps({"body": f"text {number}"}) + "\n" for number in range(9))
    (folder / "in/a.jsonl").write_text(records)
    code, _, err = call(inputs=[folder / "in/a.jsonl"])
    assert code == 1 and "--text-key names the key" in err
    code, _, err = call("--text-key", "body", inputs=[folder / "in/a.jsonl"])
    assert code == 0, err


def test_what_was_refused_is_begun_anew_when_it_is_to_be_read_otherwise(folder, call):
    records = "".join(json.dumps({"text": f"text {number}" * 99}) + "\n" for number in range(20))
    (folder / "in/dump").write_text(records)
    code, _, err = call()
    assert code == 1 and "dump (a text that holds JSON: --format json reads it" in err
    code, out, err = call("--format", "text")
    assert code == 0, err
    assert "5 documents" in out


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.csv", "prénom,texte\na,b\n".encode("latin-1")),
        ("a.jsonl", b'{"\\ud800": 1}\n'),
        ("a.tar", tar_of({"caf\udce9.bin": b"\0\1\2"})),
    ],
)
def test_what_a_reason_quotes_of_a_file_may_be_any_bytes(folder, call, name, data):
    (folder / "in" / name).write_bytes(data)
    code, out, err = call("--allow-unread")
    assert code == 0, err
    assert [each["file"][-len(name) :] for each in rows(folder / "out/s/rejected.jsonl")] == [name]


def test_the_table_and_the_manifest_account_for_every_file_and_byte_that_is_there(folder, call):
    place = folder / "in"
    (place / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (place / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (place / "nothing.jsonl").touch()
    (place / ".hidden").write_text("hidden")
    (place / ".git").mkdir()
    (place / ".git/config").write_text("config")
    os.symlink("gone", place / "nowhere")
    os.link(place / "0.txt", place / "same.txt")
    code, out, _ = call()
    assert code == 0
    found = manifest.read_manifest(folder / "out/s").provenance["found"]
    assert {end: count["files"] for end, count in found.items()} == {
        "read as text": 4,
        "read as jsonl.gzip": 1,
        "rejected: not UTF-8": 1,
        "empty": 1,
        "left out: hidden": 2,
        "left out: a link that leads nowhere": 1,
        "left out: another name of a file that is read": 1,
    }
    files = {path.stat().st_ino: path.stat().st_size for path in place.rglob("*") if path.is_file()}
    assert sum(count["bytes"] for count in found.values()) == sum(files.values())
    for end in found:
        assert f" {end} " in out
    assert {row["reason"] for row in rows(folder / "out/s/left_out.jsonl")} >= {"hidden"}


def test_its_own_output_within_the_input_is_left_out_the_first_time_and_the_second(folder, call):
    output = folder / "in/data"
    code, _, err = call(output=output)
    assert code == 0, err
    found = manifest.read_manifest(output / "s").provenance["found"]
    assert found == {"read as text": {"files": 4, "bytes": 1080}}
    code, out, _ = call(output=output)
    assert code == 0 and "already prepared" in out


def test_a_name_that_is_no_text_is_written_as_text_wherever_names_are_written(folder, call):
    place = folder / "in" / os.fsdecode(b"caf\xe9")
    place.mkdir()
    (place / os.fsdecode(b"\xe9.txt")).write_bytes("Un café".encode("latin-1"))
    (place / "two\nlines.txt").write_text("a document in a file of an odd name")
    os.symlink("gone", place / os.fsdecode(b"nowhere\xe9"))
    flags = ("--licence", place.name, "--provenance", f"from={place.name}")
    names = [*(folder / "in").glob("*.txt"), place]
    code, out, err = call(*flags, inputs=names)
    assert code == 0, err
    (rejected,) = rows(folder / "out/s/rejected.jsonl")
    assert rejected["file"].endswith("caf\\xe9/\\xe9.txt")
    (left_out,) = rows(folder / "out/s/left_out.jsonl")
    assert left_out["file"].endswith("caf\\xe9/nowhere\\xe9")
    (out + err).encode()
    provenance = manifest.read_manifest(folder / "out/s").provenance
    assert provenance["inputs"][-1].endswith("caf\\xe9")
    code, out, _ = call(*flags, inputs=names)
    assert code == 0 and "already prepared" in out


def test_a_folder_that_cannot_be_listed_is_refused_unless_one_can_do_without(
    folder, call, monkeypatch
):
    scandir = os.scandir

    def forbidden(place="."):
        if str(place).endswith("secret"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    (folder / "in/secret").mkdir()
    monkeypatch.setattr(os, "scandir", forbidden)
    code, _, err = call()
    assert code == 2
    assert "secret cannot be listed: Permission denied" in err and "--allow-unread" in err
    code, out, _ = call("--allow-unread")
    assert code == 0 and "left out: cannot be listed" in out


# inputs that change while they are read


@pytest.fixture
def meanwhile(monkeypatch):
    """Has something happen when the first look is done and the workers are about to start."""
    run = executors._run_local

    def happens(action, then=run):
        def changed(*arguments):
            action()
            then(*arguments)

        monkeypatch.setattr(executors, "_run_local", changed)

    yield happens
    monkeypatch.setattr(executors, "_run_local", run)


def grow(path):
    with open(path, "a") as opened:
        opened.write("one more line")


def write_anew(path):
    text = path.read_text()
    path.write_text(text[::-1])  # as long as it was
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "said"), [(grow, "changed"), (write_anew, "changed"), (os.unlink, "went away")]
)
def test_an_input_that_changes_while_it_is_read_is_refused_by_name_and_begun_anew(
    folder, call, meanwhile, change, said
):
    meanwhile(lambda: change(folder / "in/2.txt"))
    code, _, err = call()
    assert code == 1
    assert f"2.txt {said} while it was read: wait until nothing writes" in err
    assert not (folder / "out/s/manifest.json").exists()
    meanwhile(lambda: None)
    code, out, err = call()
    assert code == 0, err
    assert "going on" not in out


def test_a_file_that_comes_while_the_others_are_read_is_named_and_not_in_the_source(
    folder, call, meanwhile
):
    meanwhile(lambda: (folder / "in/late.txt").write_text("late"))
    code, out, _ = call()
    assert code == 0
    assert "left out: came while others were read" in out
    (row,) = rows(folder / "out/s/left_out.jsonl")
    assert row["file"].endswith("late.txt")


class Growing(http.server.BaseHTTPRequestHandler):
    body = b'{"text": "one"}\n{"text": "two"}\n'

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(type(self).body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(type(self).body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_page_that_changes_while_it_is_read_is_refused_by_name(folder, call, meanwhile):
    pytest.importorskip("aiohttp")

    def more():
        Growing.body += b'{"text": "three"}\n'

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Growing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.jsonl?download=true"
        meanwhile(more)
        code, _, err = call(inputs=[url])
        assert code == 1 and f"{url} changed while it was read" in err
        meanwhile(lambda: None)
        assert call(inputs=[url])[0] == 0
        server.shutdown()


def test_a_network_that_fails_at_the_last_look_costs_no_work(folder, call, meanwhile):
    memory = fsspec.filesystem("memory")
    memory.pipe("/last/a.txt", b"a")
    plan = folder / "out/s/.work/plan.json"
    meanwhile(lambda: memory.rm("/last/a.txt"))
    code, _, err = call(inputs=[folder / "in", "memory://last/a.txt"])
    assert code == 1 and "memory://last/a.txt" in err
    assert plan.exists()


class DriverError(Exception):
    """As drivers of URLs raise: of no kind that Python knows."""


def test_a_driver_that_fails_at_the_cut_or_the_first_look_is_one_line(folder, call, monkeypatch):
    def fail(*_, **__):
        raise DriverError("connection reset")

    for module, name in ((chunks, "cut"), (held_out, "look")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            code, _, err = call()
        assert code == 1 and err.count("\n") == 1
        assert "reading the input failed, DriverError: connection reset" in err
    assert call()[0] == 0


def test_bytes_behind_a_damage_count_as_not_read(folder, call):
    lines = [json.dumps({"text": random.Random(n).randbytes(99).hex()}) for n in range(2000)]
    whole = gzip.compress("\n".join(lines).encode())
    data = whole + b"\x1f\x8b\xff" + random.Random(0).randbytes(len(whole))  # no second part
    (folder / "in/a.jsonl.gz").write_bytes(data)
    code, _, err = call()
    assert code == 1
    unread = int(err.split()[1].replace(",", ""))
    assert 0.3 * len(data) < unread < 0.6 * len(data)
    assert "a.jsonl.gz (gzip stream damaged, the rest of the file is lost" in err
