"""launch/demo_corpus.sh, with apt-get, dpkg and Python replaced by ones that take notes."""

import shutil

import pytest

from stablelm_jax.preparation.recipes import load_recipe

APT = """#!/bin/sh
printf '["apt-get", "%s"]\\n' "$*" >>"$FAKE_LOG"
for last; do :; done
case "$*" in *' download '*) touch "${last}_7.4_all.deb" ;; esac
"""
DPKG = '#!/bin/sh\nmkdir -p "$3/usr/share"\n'


@pytest.fixture
def debian(checkout):
    checkout.add_program("apt-get", APT)
    checkout.add_program("dpkg", DPKG)
    return checkout


def value(call, flag):
    return call[call.index(flag) + 1]


def test_it_leaves_the_files_that_its_recipe_names_and_prepares_all_of_them(debian):
    done = debian.run("launch/demo_corpus.sh", "the data")
    assert done.returncode == 0, done.stderr
    data = str(debian.elsewhere / "the data")
    (call,) = debian.calls("stablelm_jax.prepare")
    assert (value(call, "--recipe"), value(call, "--source")) == ("demo", "all")
    assert value(call, "--output") == data
    places = [source.origins[0].inputs[0] for source in load_recipe("demo").sources]
    named = {place.replace("{output}", data) for place in places}
    written = {value(call, "--output") for call in debian.calls("launch/corpora/html_text.py")}
    assert named == written | {f"{data}/downloads/stdlib_code.jsonl"}
    assert str(debian.elsewhere / "the data").replace(" ", "\\ ") in done.stdout.splitlines()[-1]


def test_it_downloads_each_package_once(debian):
    for _ in range(2):
        assert debian.run("launch/demo_corpus.sh").returncode == 0
    commands = [call[0].split()[-2:] for call in debian.calls("apt-get")]
    packages = [package for command, package in commands if command == "download"]
    assert len(packages) == len(set(packages)) == 7
    assert sum(words[-1] == "update" for words in commands) == 1


def test_a_package_that_cannot_be_had_is_an_error_that_names_it(debian):
    debian.add_program("apt-get", '#!/bin/sh\ncase "$*" in *" download "*) exit 100 ;; esac\n')
    done = debian.run("launch/demo_corpus.sh")
    assert done.returncode == 1
    assert "libreoffice-help-en-us" in done.stderr.splitlines()[-1]


def test_a_system_without_debians_tools_is_told_so_at_once(checkout):
    for program in ("bash", "dirname", "cat"):
        (checkout.programs / program).symlink_to(shutil.which(program))
    done = checkout.run("launch/demo_corpus.sh", PATH=str(checkout.programs))
    assert done.returncode == 1
    assert "Debian or Ubuntu" in done.stderr.splitlines()[-1]
    assert not checkout.log.exists()
