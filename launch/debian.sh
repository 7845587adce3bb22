# shellcheck shell=bash
# Sourced after environment.sh by the scripts that take texts out of Debian's packages: these are
# unpacked to the folder $downloads, not installed.

: "${downloads:=}" # the script that sources this sets it

need_debian() {
    local tool
    for tool in apt-get dpkg; do
        command -v "$tool" >/dev/null ||
            die "no $tool here: this needs Debian or Ubuntu. Elsewhere, prepare text of your own (README)."
    done
}

# Package lists and archives of our own: the system's need root.
apt_get() {
    mkdir -p "$downloads/apt/lists/partial" "$downloads/apt/archives/partial"
    (cd "$downloads" && apt-get -qq -o APT::Sandbox::User=root -o Dir::State::lists="$downloads/apt/lists" \
        -o Dir::Cache="$downloads/apt" "$@")
}

updated=
fetch_package() { # PACKAGE becomes $downloads/PACKAGE, once
    local package=$1
    [[ ! -d $downloads/$package ]] || return 0
    [[ -n $updated ]] || apt_get update || die 'apt-get update failed (see above); try again later'
    updated=yes
    rm -rf "$downloads/unpacked" "$downloads/$package"_*.deb
    apt_get download "$package" ||
        die "apt-get could not download $package (see above); try again later"
    dpkg -x "$downloads/$package"_*.deb "$downloads/unpacked"
    mv "$downloads/unpacked" "$downloads/$package"
    rm "$downloads/$package"_*.deb
}
