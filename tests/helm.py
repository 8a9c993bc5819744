"""Helm's own code as a command: reads the chart and its values from stdin, writes lint errors and manifests to stdout.

It runs in its own process: Go's runtime takes over signal handlers, which would disturb gRPC and OpenVINO.
"""

from __future__ import annotations

import json
import sys

from helm_python import HelmError
from helm_python.chart import Chart, lint

if __name__ == "__main__":
    chart, values = json.load(sys.stdin)
    try:
        manifests = Chart.load(chart).render(values, name="shop", namespace="search")
        print(json.dumps({"errors": lint(chart, values, strict=True)["errors"], "manifests": manifests}))
    except HelmError as error:
        sys.exit(str(error))
