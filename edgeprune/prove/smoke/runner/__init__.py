"""What is sent to a device and run there: it loads a GGUF, makes it work, and says how that went.

It needs Python 3.9 and llama-cpp-python, a ``llama-server`` or a ``llama-bench``, and nothing else: no edgeprune. Its
modules travel together in one file, under another name (``packing``): they import each other relatively, and ``work``
is the start.
"""
