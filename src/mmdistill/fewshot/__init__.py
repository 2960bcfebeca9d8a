"""Few-shot evaluation: encode clips once, draw episodes from their features, classify the queries.

`encode` computes features, `episodes` draws episodes, `classifiers` predicts, `scores` computes the numbers, and
`protocol` combines them. Import the modules themselves: the worker processes of the logistic regression import this
package and must not load torch.
"""
