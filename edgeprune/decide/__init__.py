"""Deciding: which experts each layer keeps, which GGML type each tensor gets, where it all goes."""
