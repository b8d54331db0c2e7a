"""Smoke tests: does the file do on the device what was promised?"""
