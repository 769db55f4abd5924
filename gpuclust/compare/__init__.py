"""Clusters against classes: scores, geometry of the rows, and the result of one layer."""
