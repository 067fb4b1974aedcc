#!/bin/sh
# Build the Debian package: sh contrib/debian/build.sh DIRECTORY
# DIRECTORY gets it.  The build dependencies must be there, as in
#   sh contrib/roots.sh debian13 sh contrib/debian/build.sh --install-dependencies /tmp/out
set -eu
cd "$(dirname "$0")/../.."
if [ "$1" = --install-dependencies ]; then
    shift
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends build-essential \
        devscripts equivs lintian fakeroot
    mk-build-deps -i -r -t 'apt-get -y -qq --no-install-recommends' contrib/debian/control
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/imgfs"
tar -c --exclude=./.git --exclude=./.venv --exclude='*.so' --exclude=__pycache__ --exclude=./build \
    --exclude='*.egg-info' . | tar -x -C "$work/imgfs"
cp -r contrib/debian "$work/imgfs/debian"
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' imgfs/__init__.py)
sed -i "1s/(.*)/($version)/" "$work/imgfs/debian/changelog"
(cd "$work/imgfs" && dpkg-buildpackage -us -uc -b)
cp "$work"/*.deb "$work"/*.changes "$work"/*.buildinfo "$out"
