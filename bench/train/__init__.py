"""A training from end to end, its classes sharded over ranks."""
