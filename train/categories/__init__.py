"""Adding, merging, renaming and moving categories without training."""
