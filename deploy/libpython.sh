#!/bin/sh
# Triton's Python backend links libpython, which not every Python brings: install Debian's where it is missing.
set -eu
"$1" -c 'from aisle.deploy.triton import python_library; python_library()' 2>/dev/null && exit 0
version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends "libpython$version"
