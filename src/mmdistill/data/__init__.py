"""Annotations, clips, readers, masks and the demo dataset. Knows no model and no configuration."""
