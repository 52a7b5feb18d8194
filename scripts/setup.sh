#!/usr/bin/env bash
# Creates .venv, or brings it up to date, for `make setup`.
#
# Does nothing when .venv already matches requirements/dev.txt and
# pyproject.toml. Safe to stop and run again: a .venv that was left half done,
# was moved, or whose Python no longer starts, is built anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
PY=$VENV/bin/python
REQUIREMENTS=requirements/dev.txt
STAMP=$VENV/.setup-done      # what the finished .venv was made from
UNFINISHED=$VENV/.setup-unfinished
FOLDER=$VENV/.setup-folder   # where .venv was created: its programs name that path
LOG=.setup.log
DISK_FULL='no space left on device|disk quota'
NO_NETWORK='dns error|name resolution|name or service not known|failed to establish|unreachable'
NO_NETWORK+='|connect error|connection (refused|reset)|timed out|timeout|error sending request|max retries'

# Settings of a surrounding shell that would send packages elsewhere.
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX

say() { printf 'setup: %s\n' "$*"; }

die() {
    printf '\nsetup failed: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

log_has() { grep -qiE "$1" "$LOG"; }

# Runs a command with its output kept in the log, and shown but for the list of packages.
logged() {
    printf '$ %s\n' "$*" >>"$LOG"
    "$@" 2>&1 | tee -a "$LOG" | awk '!/^ [+~-] / { print; fflush() }'
}

# Says why the downloads failed, from what uv and pip wrote.
die_of_install() {
    local more="The whole output is in $LOG."
    if log_has "$DISK_FULL"; then
        die 'the disk is full.' \
            'About 7 GB are needed here, and as much for the download cache in your home folder.' "$more"
    elif log_has 'certificate|unknownissuer'; then
        die 'the package index could not be trusted: its certificate was not accepted.' \
            'Install the system certificates (Debian: sudo apt install ca-certificates),' \
            'or set SSL_CERT_FILE to the certificate file of your network, and run it again.' "$more"
    elif log_has "$NO_NETWORK"; then
        die 'the packages could not be downloaded: no network, or the package index is out of reach.' \
            'Check the connection (and HTTPS_PROXY if you use a proxy) and run it again.' "$more"
    elif log_has 'no solution found|no matching distribution|no wheels|not supported'; then
        die "a pinned package is not available for $("$PY" --version 2>&1) on this platform." \
            'Try another Python: make setup PYTHON=python3.12 (or python3.11, python3.13).' "$more"
    fi
    die 'installing the packages failed; the reason is in the output above.' "$more"
}

what_it_is_made_from() {
    pwd -P
    cat scripts/setup.sh "$REQUIREMENTS" pyproject.toml | cksum
}

VERSION='import sys; print(sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'

# Its Python starts, it lies where it was created, and it is of the version that was asked for.
venv_works() {
    local version
    version=$("$PY" -c "$VERSION" 2>/dev/null) || return 1
    [ ! -e "$FOLDER" ] || [ "$(cat "$FOLDER")" = "$(pwd -P)" ] || return 1
    [ "$PYTHON" = python3 ] || [ "$("$PYTHON" -c "$VERSION" 2>/dev/null)" = "$version" ]
}

check_python() {
    command -v "$PYTHON" >/dev/null ||
        die "there is no '$PYTHON' on this machine." \
            'Install Python 3.11 or newer (Debian: sudo apt install python3 python3-venv),' \
            'or name one: make setup PYTHON=/path/to/python3'
    "$PYTHON" -c "$VERSION" >/dev/null ||
        die "Python 3.11 or newer is needed, and '$PYTHON' is $("$PYTHON" --version 2>&1)." \
            'Name a newer one: make setup PYTHON=python3.12'
}

create_venv() {
    say "creating $VENV with $("$PYTHON" --version)"
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV" >>"$LOG" 2>&1 && return
    # Debian splits pip's installer off into python3-venv; the system's pip can stand in.
    rm -rf "$VENV"
    if "$PYTHON" -m pip --version >>"$LOG" 2>&1 &&
        "$PYTHON" -m venv --without-pip "$VENV" >>"$LOG" 2>&1; then
        return
    fi
    rm -rf "$VENV"
    if log_has "$DISK_FULL"; then
        die 'the disk is full.' 'About 7 GB are needed here.'
    elif log_has 'permission denied|read-only file system'; then
        die "this folder cannot be written to: $PWD"
    fi
    die "'$PYTHON' cannot create a virtual environment: its venv module is missing or broken." \
        'On Debian or Ubuntu: sudo apt install python3-venv' "The whole output is in $LOG."
}

pip_install() {
    if "$PY" -m pip --version >/dev/null 2>&1; then
        logged "$PY" -m pip install --disable-pip-version-check --retries 2 "$@"
    else
        logged "$PYTHON" -m pip --python "$PY" install --disable-pip-version-check --retries 2 "$@"
    fi
}

install_uv() {
    local pin
    pin=$(grep -oE '^uv==[^ ;]+' "$REQUIREMENTS")
    [ "$("$VENV/bin/uv" --version 2>/dev/null | cut -d' ' -f2)" = "${pin#uv==}" ] ||
        pip_install --quiet "$pin"
}

# uv with the system's certificates, then with its own, then pip.
install_requirements() {
    if install_uv; then
        logged env UV_SYSTEM_CERTS=1 "$VENV/bin/uv" pip install --python "$PY" -r "$REQUIREMENTS" && return
        if log_has 'certificate|unknownissuer'; then
            say 'trying again with the certificates that uv carries'
            logged env -u SSL_CERT_FILE -u SSL_CERT_DIR UV_SYSTEM_CERTS=0 \
                "$VENV/bin/uv" pip install --python "$PY" -r "$REQUIREMENTS" && return
        fi
    elif log_has "$NO_NETWORK"; then
        return 1
    fi
    ! log_has "$DISK_FULL" || return 1
    say 'uv could not do it; trying with pip, which is slower'
    grep -vE '^uv==' "$REQUIREMENTS" >"$VENV/requirements-without-uv.txt"
    pip_install -r "$VENV/requirements-without-uv.txt"
}

install_package() {
    if [ -x "$VENV/bin/uv" ]; then
        logged "$VENV/bin/uv" pip install --quiet --offline --python "$PY" \
            --no-deps --no-build-isolation --editable . && return
    fi
    pip_install --quiet --no-deps --no-build-isolation --editable .
}

# Two runs at once would write the same .venv: the second one waits.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
fi

if [ "$(cat "$STAMP" 2>/dev/null)" = "$(what_it_is_made_from)" ] && venv_works; then
    exit 0
fi

: >"$LOG" || die "this folder cannot be written to: $PWD"
check_python
if [ -e "$UNFINISHED" ] || ! venv_works; then
    [ ! -e "$VENV" ] || say "$VENV is unfinished, broken or of another Python: building it anew"
    create_venv
    pwd -P >"$FOLDER"
fi
rm -f "$STAMP"
: >"$UNFINISHED"
say "installing $REQUIREMENTS (the first time: several GB to download, a few minutes)"
install_requirements || die_of_install
install_package ||
    die 'the package itself could not be installed from this folder.' "The whole output is in $LOG."
what_it_is_made_from >"$STAMP"
rm -f "$UNFINISHED"
say "done: $VENV is ready ($VENV/bin/skipnet --help)"
