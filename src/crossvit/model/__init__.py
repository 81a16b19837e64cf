"""The paper as modules: configuration, attention, tokens, fusion, the network, and its cost.

Depends on torch only (`config` on the standard library only) and knows nothing of data, training, files or the web.
"""
