#!/bin/sh
# Install what the tests need and run them all: sh tests/run.sh [--long] [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
. contrib/install.sh
if [ "${1:-}" = --long ]; then
    IMGFS_TEST_LONG=1
    export IMGFS_TEST_LONG
    shift
fi
need_packages qemu-utils procps util-linux mount openssh-server openssh-client openssl
need_venv '[test]'
exec .venv/bin/python -m pytest "$@"
