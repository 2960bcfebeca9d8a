"""Ranks of a run: launch, process group, device and collectives."""
