"""Series of training runs: ablation and hyperparameter search."""
