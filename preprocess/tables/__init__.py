"""Tables of texts in all supported file formats: one reader and one writer."""
