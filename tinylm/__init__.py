"""Tiny Transformer's library: tokenizers, documents, rows, the decoder, losses,
checkpoints and sampling.

It knows torch and never Lightning; it returns values and never prints.
Read `tinylm/model/decoder.py` first.
"""
