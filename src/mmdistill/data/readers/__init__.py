"""Readers: one per modality, from frame numbers to raw arrays."""
