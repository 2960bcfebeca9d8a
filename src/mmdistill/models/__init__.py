"""Networks, preprocessing and reconstruction targets. No module here uses configs or files."""

POOLINGS = ("mean", "motion", "last_k", "segments", "halves", "person")  # see `pooling.Pooling`
TARGETS = ("norm_pix", "motion_energy", "pixel")  # targets of masked autoencoding, see `targets.patch_targets`
