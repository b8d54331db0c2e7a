"""Proving: what was promised, measured; and the flat baseline beside it."""
