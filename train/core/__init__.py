"""What all training commands share: the checkpoint, settings, the split, metrics and calibration."""
