"""Byte formats of checkpoints: torch zip archives, safetensors files, DeepSpeed ZeRO directories, manifests."""
