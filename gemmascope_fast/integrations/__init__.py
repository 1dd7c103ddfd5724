"""Other SAE libraries on this backend: one module per host, imported when it is wanted.

    from gemmascope_fast.integrations import saelens
    saelens.install()                  # every SAE of the process; undone by saelens.uninstall()
    with saelens.accelerate(sae): ...  # one instance, for the length of the block

No host is a dependency: a module imports its own when it is installed, and refuses versions that
it was not written for.
"""
