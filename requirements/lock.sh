#!/bin/sh
# Pin what each image installs, with hashes: run it after a change of pyproject.toml. Needs uv.
# torch is left out, with what it brings: each machine needs another build of it. Images install it first, then:
#   pip install --require-hashes --no-deps -r requirements/NAME.lock && pip install --no-deps .
# Known vulnerabilities, asked of the network: pip-audit --require-hashes --disable-pip -r requirements/NAME.lock
set -eu
cd "$(dirname "$0")"
for name in serve stream build dev; do
    more=fast
    [ $name = stream ] && more=avro
    [ $name = build ] && more=parquet # that image classifies tables too, in the chart's batch
    echo 'torch; sys_platform == "never"' | uv pip compile ../pyproject.toml --extra "$name" --extra fast --extra $more --override /dev/stdin \
        --python-version 3.11 --python-platform x86_64-manylinux_2_35 --generate-hashes --no-annotate --no-header \
        --quiet "$@" --output-file "$name.lock" >/dev/null
done
