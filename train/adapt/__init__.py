"""Keep a served model up to date: drift, review and retraining."""
