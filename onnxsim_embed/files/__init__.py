"""Everything on disk that is not a model."""
