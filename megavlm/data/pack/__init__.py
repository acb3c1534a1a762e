"""The training path: samples become tokens, tokens become packs of equal cost, lanes give them in order."""
