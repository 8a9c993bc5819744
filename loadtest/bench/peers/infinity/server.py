"""server.py CHECKPOINT PORT SETTINGS: infinity-emb, started by its own command line."""

import json
import os
import sys
from pathlib import Path

checkpoint, port, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
command = [str(Path(sys.executable).with_name("infinity_emb")), "v2", "--model-id", checkpoint]
command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", port, "--log-level", "warning"]
command += ["--engine", "torch", "--device", "cpu", "--dtype", settings["dtype"]]
command += ["--batch-size", str(settings["batch"])]
command += ["--no-compile"]  # it would compile each shape, which takes minutes
command += ["--no-bettertransformer"]  # it needs old releases of transformers
os.environ |= {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
os.execv(command[0], command)
