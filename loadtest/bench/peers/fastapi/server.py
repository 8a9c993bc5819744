"""server.py CHECKPOINT PORT SETTINGS: FastAPI and transformers."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # this folder would shadow the package of the same name

from service import serve
from transformer import Classifier

checkpoint, port, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
serve(Classifier(checkpoint, settings), port, settings)
