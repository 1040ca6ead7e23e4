#!/usr/bin/env bash
# Installs what cryptfs needs to be built, run and tested. Run by the Makefile; safe to run again.
#
#   scripts/install.sh packages     Debian packages: only those missing, and only as root or with sudo
#   scripts/install.sh torture      those that only `make torture` needs, too
#   scripts/install.sh venv DIR     a virtual environment with pinned, hashed requirements
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(fuse3 libfuse3-dev pkg-config gcc libc6-dev python3 python3-dev python3-venv gocryptfs sqlite3 git attr
    acl libcap2-bin make rsync softhsm2 vim-tiny)
torture_packages=(stress-ng fio postgresql)

say() { printf 'install: %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$1" >&2
    printf 'hint: %s\n' "$2" >&2
    exit 1
}

missing_packages() {
    local package
    for package in "${packages[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || printf '%s ' "$package"
    done
}

install_packages() {
    local missing as_root=()
    command -v dpkg-query >/dev/null || die "this is not a Debian system" "install the equivalents of: ${packages[*]}"
    missing=$(missing_packages)
    [[ -n $missing ]] || return 0
    if [[ $(id -u) -ne 0 ]]; then
        sudo -n true 2>/dev/null || { [[ -t 0 ]] && command -v sudo >/dev/null; } ||
            die "Debian packages are missing: $missing" "as root: apt-get install $missing"
        as_root=(sudo)
    fi
    say "Debian packages: $missing"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
    # The lists on the machine may be missing or older than the archive: only then are they fetched.
    # shellcheck disable=SC2086  # one word per package
    "${apt[@]}" install --yes --no-install-recommends $missing </dev/null >/dev/null 2>&1 || {
        "${apt[@]}" update </dev/null
        "${apt[@]}" install --yes --no-install-recommends $missing </dev/null
    }
}

# Prints the first interpreter that is new enough and can both make an environment and compile an extension.
find_python() {
    local name
    for name in python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do
        if "$name" - <<'PY' 2>/dev/null; then
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PY
            command -v "$name"
            return 0
        fi
    done
    die "no Python 3.11 or newer with its headers was found" "apt-get install python3 python3-dev python3-venv"
}

make_venv() {
    local venv=$1 python
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        say "$venv, with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
    say "requirements-dev.txt into $venv"
    "${pip[@]}" install -qq --require-hashes --requirement requirements-dev.txt
    # The pinned setuptools builds cryptfs itself: nothing more is fetched. "compat": a line in a .pth file; the usual
    # import hook costs every start of Python as much again as the interpreter itself.
    "${pip[@]}" install -qq --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
}

case ${1:-} in
    packages) install_packages ;;
    torture)
        packages+=("${torture_packages[@]}")
        install_packages
        ;;
    venv) make_venv "${2:?usage: scripts/install.sh venv DIR}" ;;
    *) die "no such step: ${1:-}" "scripts/install.sh packages, torture, or venv DIR" ;;
esac
