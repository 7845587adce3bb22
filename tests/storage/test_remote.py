"""A call that fails is tried again where that may help; a driver that is not there is named."""

from __future__ import annotations

import pytest

from stablelm_jax.storage import remote


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, as they were asked for; none takes time."""
    asked = []
    monkeypatch.setattr(remote.time, "sleep", asked.append)
    return asked


def failing(*errors):
    """A call that raises these errors in turn, then returns "done"."""
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_what_may_pass_is_tried_five_times_with_growing_waits_and_one_warning(waits):
    warnings = []
    errors = [ConnectionResetError(str(number)) for number in range(4)]
    assert remote.retry(failing(*errors), warnings.append) == "done"
    assert warnings == errors[:1]
    assert len(waits) == 4 and 7 < sum(waits) < 15
    with pytest.raises(TimeoutError):
        remote.retry(failing(*[TimeoutError()] * 5))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), PermissionError(), ValueError(), TypeError()]
)
def test_what_lasts_is_raised_at_once_as_it_came(waits, error):
    with pytest.raises(type(error)) as caught:
        remote.retry(failing(error))
    assert caught.value is error and not waits


def test_an_error_of_a_driver_says_what_failed_how_often_and_why(waits):
    with pytest.raises(OSError, match="reading failed 5 times, TimeoutError: no answer"):
        remote.retried("reading", failing(*[TimeoutError("no answer\nat all")] * 5))
    with pytest.raises(OSError, match="reading failed, PermissionError"):
        remote.retried("reading", failing(PermissionError("no")))
    with pytest.raises(FileNotFoundError):
        remote.retried("reading", failing(FileNotFoundError()))


def test_an_error_is_described_in_one_line():
    assert remote.described(KeyError()) == "KeyError"
    assert remote.described(ValueError("\n one\ntwo")) == "ValueError: one"
    page = remote.described(ValueError("x" * 5000 + " at the end"))
    assert len(page) < 330 and page.endswith("at the end")


def test_a_driver_that_is_not_installed_names_the_extra(monkeypatch):
    def url_to_fs(url, **options):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(ValueError, match=r"pip install -e '.\[gcs\]'"):
        remote.filesystem("gs://bucket/data")


def test_a_folder_lends_its_listing_to_what_is_made_from_it():
    folder = remote.RemotePath("memory://storage-test")
    folder.fs.pipe_file("/storage-test/a", b"abc")
    assert (folder / "a").parent is folder and folder.sizes == {"a": 3}
    assert (folder / "a").read_range(1, 2) == b"b"
    assert remote.as_path("memory://storage-test/a").parent.url == folder.url
