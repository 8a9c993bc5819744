"""Fine-tune and evaluate: labelled texts in, checkpoint out."""

import logging
import os

# Their own bars and notices stay off the screen: ours say what happens.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
