"""The demo dataset: rendered tennis rallies that replace real data in demos and tests."""
