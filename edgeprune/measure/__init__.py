"""Measuring: llama.cpp in a child process, observed, masked and disturbed through its eval callback."""
