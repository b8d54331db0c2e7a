"""Devices: classes of hardware as profiles, this machine as a profile, memory as a budget."""
