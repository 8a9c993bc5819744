"""Learning: texts in, checkpoint out; by training, pretraining, distillation or pruning."""
