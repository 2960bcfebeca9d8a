"""The evaluation of checkpoints: networks, encoding, scoring and the report."""
