"""Fewer tokens, same weights: which image tokens are active in which layers.

A *policy* says for every layer what share of each image span stays (``policies``), a *selector* says which of its tokens
(``selectors``), a *route* is the outcome for one pack: stages of consecutive layers with their active rows and rebuilt
sequence boundaries (``route``). All of it is computed on the host, by the worker that made the pack.
"""
