"""Networks, preprocessing and reconstruction targets. No module here knows configs or files."""

TARGETS = ("norm_pix", "motion_energy", "pixel")  # what masked autoencoding predicts, see `targets`
