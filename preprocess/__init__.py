"""The one definition of "text in": training and serving both go through here."""
