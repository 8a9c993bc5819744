"""Fine-tune and evaluate: labelled texts in, checkpoint out."""

import logging
import os

# The libraries' own progress bars and notices are switched off; Aisle shows its own.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
