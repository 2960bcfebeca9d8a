"""Few-shot evaluation: encode clips once, draw episodes from their features, report.

`embed` makes features of networks, `episodes` draws, `evaluate` scores, `protocol` puts them together, `report` writes.
Import the modules themselves: the worker processes of the logistic head import this package and must not load torch.
"""
