"""Annotations, clips, readers, masks, samplers and the dataset. Imports no model and no config."""
