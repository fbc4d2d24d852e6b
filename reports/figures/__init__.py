"""The report's figures, each drawn on a `Sheet`, with a text that says the same to those who cannot see it.

A figure shows one workload, with one panel or one group of panels per `train_rest` regime; `by_size` alone shows many.
Each comes in two layouts, since text that fits a wide page is too small to read once the page is as wide as a phone.
"""
