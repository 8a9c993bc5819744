"""Fine-tune and evaluate: labelled texts in, checkpoint out."""
