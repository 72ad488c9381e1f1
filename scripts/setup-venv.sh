# Sourced by scripts/test and scripts/demo: a virtual environment in the checkout, and what apt has.
# shellcheck shell=bash

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$CHECKOUT/.venv
PATH=$PATH:/usr/sbin:/sbin # where sshd lives; not on every user's PATH
unset PYTHONDONTWRITEBYTECODE # else each process would compile what it imports

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# usable PYTHON: whether it runs and is new enough
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local name
    for name in python3 python3.{14,13,12,11,10} python; do
        if command -v "$name" >/dev/null && usable "$name"; then
            command -v "$name"
            return
        fi
    done
    die "no Python >= 3.10: install python3"
}

# apt_install PACKAGE ...: as root on Debian or Ubuntu; else status 1
apt_install() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        return 1
    fi
    say "installing by apt: $*"
    export DEBIAN_FRONTEND=noninteractive
    local policy=/usr/sbin/policy-rc.d status=0
    if [ -e "$policy" ]; then policy=; else
        printf '#!/bin/sh\nexit 101\n' >"$policy" # no package starts its daemons
        chmod +x "$policy"
    fi
    apt-get update -qq </dev/null >/dev/null &&
        apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null || status=$?
    if [ -n "$policy" ]; then rm -f "$policy"; fi
    return "$status"
}

# need COMMAND:PACKAGE ...: install the packages whose command is missing, or say what to install
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    if [ ${#missing[@]} -gt 0 ] && ! apt_install "${missing[@]}"; then
        say "please install (as root): ${missing[*]}; what needs them is left out"
    fi
}

make_venv() {
    local python
    if usable "$VENV/bin/python" && "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        return
    fi
    python=$(find_python)
    say "making $VENV with $python"
    if "$python" -m venv --clear "$VENV" >/dev/null 2>&1; then
        return
    fi
    # Debian keeps ensurepip, which venv needs, in a package of its own.
    apt_install python3-venv || die "$python cannot make a virtual environment: install python3-venv"
    "$python" -m venv --clear "$VENV"
}

# fingerprint: changes when the installation must be done again (also when the checkout moved)
fingerprint() {
    printf '%s\n' "$CHECKOUT"
    "$VENV/bin/python" -V
    cksum <"$CHECKOUT/pyproject.toml"
}

# install_packages ...: by pip. No cache: nothing is written outside the checkout. Of the modules few
# are ever imported, which keep themselves compiled: to compile all takes half of the time.
install_packages() {
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir --no-compile \
        --root-user-action=ignore "$@" </dev/null
}

# install_checkout [EXTRA]: pip install -e, unless that was done with this pyproject.toml
install_checkout() {
    local extra=${1:-} stamp now
    now=$(fingerprint)
    for stamp in "$VENV/installed-$extra"*; do # one with more extras has all that this one needs
        if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
            return
        fi
    done
    say "installing ostap_parallel and what it needs into $VENV"
    install_packages --editable "$CHECKOUT${extra:+[$extra]}"
    printf '%s\n' "$now" >"$VENV/installed-$extra"
}

# install_root: the wheel of ROOT, where there is one; tests that need it are left out otherwise
install_root() {
    if "$VENV/bin/python" -c 'import ROOT' 2>/dev/null; then
        return
    fi
    say "installing ROOT into $VENV"
    install_packages --pre --only-binary :all: root ||
        say "there is no wheel of ROOT for this Python: the tests that need it are left out"
}

# oldest_releases: the dependencies of pyproject.toml, each in the oldest release that it allows
oldest_releases() {
    sed -n '/^dependencies = \[/,/^]/s/^ *"\([^">]*\)>=\([^",]*\).*/\1==\2/p' "$CHECKOUT/pyproject.toml"
}

# install_releases newest|oldest: the checkout with its tests' needs and these releases
install_releases() {
    local packages
    say "installing ostap_parallel with the $1 releases of what it needs into $VENV"
    mapfile -t packages < <(oldest_releases)
    if [ "$1" = newest ]; then
        packages=("${packages[@]%%==*}")
    fi
    install_packages --upgrade --editable "$CHECKOUT[test]" "${packages[@]}"
    "$VENV/bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
        grep -iE "^($(IFS='|' && printf '%s' "${packages[*]%%==*}")) " >&2
}
