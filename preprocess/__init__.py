"""The one definition of "text in": training and serving both go through here."""

MAX_TOKENS = 128  # of one text, [CLS] and [SEP] included, unless tokenizer.json sets its own truncation
