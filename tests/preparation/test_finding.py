"""What is found under an input: every file once, and a clear line where there is nothing."""

import http.server
import os
import threading
import zipfile

import fsspec
import pytest

from stablelm_jax.preparation.inputs import InputError, find_files
from stablelm_jax.storage import remote


class Answers(http.server.BaseHTTPRequestHandler):
    """/CODE/... is answered with that code, a redirect with itself, and 200 with two lines."""

    def do_GET(self):
        code = int(self.path.split("/")[1])
        body = b'{"text": "one"}\n{"text": "two"}\n' if code == 200 else b""
        self.send_response(code)
        if "login" in self.path:
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if code == 302:
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    """The address of a web server of this machine."""
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("url", "kind", "compression"),
    [
        ("a.jsonl?download=true", "jsonl", None),
        ("a.jsonl.gz?X-Amz-Signature=01%2F23&name=b.txt", "jsonl", "gzip"),
        ("with%20space%2Ejsonl#part.txt", "jsonl", None),
        ("a%5B1%5D.parquet?x=[*]", "parquet", None),
        ("notes?file=a.jsonl", "text", None),
    ],
)
def test_the_kind_of_a_url_is_told_by_its_path_and_not_by_its_query(server, url, kind, compression):
    (file,) = find_files([f"{server}/200/{url}"])
    assert (file.kind, file.compression) == (kind, compression)
    assert file.path == f"{server}/200/{url}"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "the server refuses with 401; log in, give a signed URL"),
        (403, "the server refuses with 403"),
        (404, "nothing there; check the path"),
        (302, "from one address to the next without end"),
        (500, "the server fails with 500; try again later"),
        (503, "the server fails with 503; try again later"),
    ],
)
def test_what_a_server_answers_is_said_in_one_line(server, code, said):
    with pytest.raises(InputError, match=said) as raised:
        find_files([f"{server}/{code}/a.jsonl?x=1"])
    assert "\n" not in str(raised.value)


def test_a_page_in_the_place_of_data_is_told_for_what_it_is(server):
    with pytest.raises(InputError, match="^--input http.*sends a web page, perhaps to log in"):
        find_files([f"{server}/200/login/a.jsonl?x=1"])
    (file,) = find_files([f"{server}/200/login/Node.js"])
    assert file.size


def test_a_file_within_a_zip_keeps_the_address_that_it_is_opened_by(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("b.jsonl", '{"text": "one"}\n')
    (file,) = find_files([f"zip://*.jsonl::{tmp_path}/a.zip"])
    with fsspec.open(file.path) as opened:
        assert opened.read() == b'{"text": "one"}\n'


def test_a_server_that_is_down_or_unknown_is_told_from_a_file_that_is_missing():
    for url in ("http://127.0.0.1:1/a.jsonl", "http://nowhere.invalid/a.jsonl?download=true"):
        with pytest.raises(InputError, match="the server cannot be reached, .*check the address"):
            find_files([url])


def test_a_driver_that_is_missing_names_the_extra_that_brings_it(monkeypatch):
    def missing(url, **options):
        raise ImportError("it is missing")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", missing)
    for url, extra in [("http://h/a", "http"), ("https://h/a", "http"), ("s3://b/a", "s3")]:
        with pytest.raises(InputError, match=rf"pip install -e '.\[{extra}\]'"):
            find_files([url])


def test_a_large_file_may_take_longer_than_the_five_minutes_of_the_driver():
    pytest.importorskip("aiohttp")
    timeout = remote.driver_options("https://h/a.jsonl")["client_kwargs"]["timeout"]
    assert timeout.total is None and timeout.sock_read
    assert remote.driver_options("s3://bucket/a.jsonl") == {}


# links, and what is left out by name


@pytest.fixture
def tree(tmp_path):
    for name in ["in/a.jsonl", "in/sub/b.txt", "store/c.txt", "store/deep/d.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def link(tree, name, target):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, tree / name)


def looked_up(tree, *inputs):
    """(files, {what is left out: reason}), named from `tree` on."""
    left_out = []
    files = find_files([str(tree / name) for name in inputs], left_out=left_out)
    return [os.path.relpath(file.path, tree) for file in files], {
        os.path.relpath(item.name, tree): item.reason.partition(":")[0] for item in left_out
    }


READ_ALREADY = "a link to a folder that is read already"
ANOTHER_NAME = "another name of a file that is read"


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_linked_folders_are_followed_once_each_and_no_loop_is_walked(tree, prefix):
    link(tree, "in/linked", "../store")
    link(tree, "in/again", tree / "store")
    link(tree, "in/sub/up", "..")
    link(tree, "in/self", "self")
    link(tree, "in/gone", "nowhere")
    left_out = []
    files = find_files([f"{prefix}{tree}/in"], left_out=left_out)
    names = [os.path.relpath(file.path, tree) for file in files]
    assert names == ["in/a.jsonl", "in/sub/b.txt", "in/again/c.txt", "in/again/deep/d.txt"]
    assert {
        os.path.relpath(item.name, tree / "in"): item.reason.partition(":")[0] for item in left_out
    } == {
        "linked": READ_ALREADY,
        "sub/up": READ_ALREADY,
        "self": "a link that leads nowhere",
        "gone": "a link that leads nowhere",
    }


def test_an_input_that_is_a_link_and_links_to_links_are_followed(tree):
    link(tree, "first", "second")
    link(tree, "second", "store")
    assert looked_up(tree, "first") == (["first/c.txt", "first/deep/d.txt"], {})
    link(tree, "file.txt", "first/c.txt")
    assert looked_up(tree, "file.txt") == (["file.txt"], {})
    # What lies beside the target of a link is not what lies beside the link.
    (tree / "e.txt").write_text("beside the folder store")
    link(tree, "in/deep", "../store/deep")
    (file,) = find_files([f"{tree}/in/deep/../c.txt"])
    assert os.path.samefile(file.path, tree / "store" / "c.txt")


def test_a_real_folder_is_read_under_its_own_name_wherever_the_link_sorts(tree):
    link(tree, "in/0", "sub")
    assert looked_up(tree, "in") == (["in/a.jsonl", "in/sub/b.txt"], {"in/0": READ_ALREADY})


def test_a_file_of_several_names_is_read_once_under_the_one_that_tells_its_kind(tree):
    link(tree, "in/alias.jsonl", "a.jsonl")
    os.link(tree / "in/sub/b.txt", tree / "in/sub/hard.txt")
    (tree / "in/blobs").mkdir()
    (tree / "in/blobs/0123abcd").write_text("{}")  # as the Hub's cache keeps files
    link(tree, "in/snapshot/data.jsonl", "../blobs/0123abcd")
    assert looked_up(tree, "in") == (
        ["in/a.jsonl", "in/snapshot/data.jsonl", "in/sub/b.txt"],
        {
            "in/alias.jsonl": ANOTHER_NAME,
            "in/blobs/0123abcd": ANOTHER_NAME,
            "in/sub/hard.txt": ANOTHER_NAME,
        },
    )


def test_no_document_comes_twice_through_two_inputs(tree):
    link(tree, "other/linked.txt", "../in/sub/b.txt")
    (tree / "other/e.txt").write_text("e")
    files, left_out = looked_up(tree, "in", "other")
    assert files == ["in/a.jsonl", "in/sub/b.txt", "other/e.txt"]
    assert left_out == {"other/linked.txt": ANOTHER_NAME}
    with pytest.raises(InputError, match="reached twice; name it once"):
        looked_up(tree, "in", "in/a.jsonl")
    link(tree, "linked", "in")
    with pytest.raises(InputError, match=f"linked: nothing to read there, .* {ANOTHER_NAME}"):
        looked_up(tree, "in", "linked")


def test_a_pattern_for_all_depths_is_not_caught_in_loops_of_links(tree):
    for number in range(3):
        link(tree, f"in/sub/up{number}", "..")
    link(tree, "in/linked", "../store")
    files, left_out = looked_up(tree, "in/**/*.txt")
    assert files == ["in/sub/b.txt", "in/linked/c.txt", "in/linked/deep/d.txt"]
    assert looked_up(tree, "in/**/deep") == (["in/linked/deep/d.txt"], {})
    assert set(looked_up(tree, "in/**")[1].values()) == {READ_ALREADY}


def test_what_is_no_file_or_hidden_is_left_out_by_name_with_its_size(tree):
    os.mkfifo(tree / "in/pipe")
    link(tree, "in/device", "/dev/null")
    (tree / "in/.git/deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (tree / "in/.git" / name).write_text("12345")
    (tree / "in/.hidden").write_text("123")
    left_out = []
    find_files([str(tree / "in")], left_out=left_out)
    found = {os.path.basename(item.name): (item.reason, item.files, item.size) for item in left_out}
    assert found == {
        "pipe": ("a pipe, socket or device", 1, 0),
        "device": ("a pipe, socket or device", 1, 0),
        ".git": ("hidden", 2, 10),
        ".hidden": ("hidden", 1, 3),
    }


def test_what_prepare_wrote_is_left_out_locally_and_remotely(tree):
    for name in ("made/manifest.json", "made/train-00000.bin", "begun/.work/outputs/x"):
        (tree / "in/data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "in/data" / name).write_text("{}")
    (tree / "in/data/manifest.json").write_text("{}")  # anybody's
    (tree / "in/data/stopped").mkdir()  # its manifest was removed, to make it anew
    for name in ("train-00000.bin", "rejected.jsonl"):
        (tree / "in/data/stopped" / name).write_text("{}")
    files, left_out = looked_up(tree, "in")
    assert files == ["in/a.jsonl", "in/data/manifest.json", "in/sub/b.txt"]
    assert set(left_out.values()) == {"written by prepare"}
    with pytest.raises(InputError, match="left out: written by prepare"):
        looked_up(tree, "in/data/made/*")
    memory, remote_left_out = fsspec.filesystem("memory"), []
    memory.put(str(tree / "in"), "/finding", recursive=True)
    files = find_files(["memory://finding"], left_out=remote_left_out)
    names = ["a.jsonl", "data/manifest.json"]
    assert [file.name for file in files][:2] == [f"memory:///finding/{name}" for name in names]
    assert {item.reason for item in remote_left_out} == {"written by prepare", "hidden"}


def test_folders_and_files_without_permission_are_named_as_a_loss(tree, monkeypatch):
    scandir, access = os.scandir, os.access

    def forbidden(folder):
        if os.path.basename(folder) == "sub":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    looked = os.stat

    def unseen(path, **options):
        if os.path.basename(path) == "unseen":
            raise PermissionError(13, "Permission denied")
        return looked(path, **options)

    link(tree, "in/unseen", "a.jsonl")
    monkeypatch.setattr(os, "stat", unseen)
    monkeypatch.setattr(os, "scandir", forbidden)
    monkeypatch.setattr(os, "access", lambda path, *rest: path[-1] != "l" and access(path, *rest))
    (tree / "in/c.txt").write_text("c")
    left_out = []
    (file,) = find_files([str(tree / "in")], left_out=left_out)
    assert file.name.endswith("c.txt")
    assert {(os.path.basename(item.name), item.reason, item.is_loss) for item in left_out} == {
        ("a.jsonl", "no permission to read it", True),
        ("sub", "cannot be listed: Permission denied", True),
        ("unseen", "cannot be looked at: Permission denied", True),
    }


def test_names_that_are_no_text_are_shown_in_one_line_of_text(tree):
    for name in (b"caf\xe9.jsonl", b"two\nlines\x1b[31m.txt", "Größe 漢字.txt".encode()):
        (tree / "store" / os.fsdecode(name)).write_text("a")
    names = {os.path.basename(file.name): file for file in find_files([str(tree / "store")])}
    assert names.keys() >= {"caf\\xe9.jsonl", "two\\nlines\\x1b[31m.txt", "Größe 漢字.txt"}
    assert names["caf\\xe9.jsonl"].kind == "jsonl"
    assert os.path.exists(names["caf\\xe9.jsonl"].path)


def test_an_empty_folder_and_a_pattern_that_fits_nothing_are_told_apart(tree):
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match="an empty folder"):
        looked_up(tree, "empty")
    with pytest.raises(InputError, match="nothing there; check the path"):
        looked_up(tree, "in/*.csv")


def test_a_remote_pattern_gives_every_file_once_and_leaves_hidden_ones_out():
    memory, left_out = fsspec.filesystem("memory"), []
    for name in ("a.txt", "sub/b.txt", ".git/c.txt", "x[1].txt"):
        memory.pipe(f"/patterns/{name}", b"text")
    names = [file.name for file in find_files(["memory://patterns/**"], left_out=left_out)]
    assert sorted(names) == [f"memory:///patterns/{n}" for n in ("a.txt", "sub/b.txt", "x[1].txt")]
    assert {item.name for item in left_out} == {"memory:///patterns/.git/c.txt"}
    assert len(find_files(["memory://patterns/x[1].txt"])) == 1
