"""Developers' tools for kernels: build them, boot them in VMs, run the suite and mutants there.

scripts/README.md lists the commands, scripts/kernel holds the data: configs, patches, breaks.
The package uses the standard library only, except where a command runs tests.
"""
