"""launch/demo_corpus.sh, with apt-get, dpkg and Python replaced by ones that take notes."""

import shutil
from pathlib import Path

import pytest

from stablelm_jax import config as config_lib

ROOT = Path(__file__).parents[2]
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


def test_it_prepares_the_sources_of_its_config_each_help_with_its_language(debian):
    done = debian.run("launch/demo_corpus.sh", "the data")
    assert done.returncode == 0, done.stderr
    calls = {value(call, "--source"): call for call in debian.calls("stablelm_jax.prepare")}
    config = config_lib.load(ROOT / "configs" / "demo_multilingual.py")
    assert set(calls) == set(config.data.weights)
    for source, call in calls.items():
        assert value(call, "--output") == str(debian.elsewhere / "the data")
        assert value(call, "--licence") == "PSF-2.0" if source == "stdlib_code" else "MPL-2.0"
        if source != "stdlib_code":
            assert value(call, "--language") == source[-2:]
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
