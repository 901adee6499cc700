"""``python -m kvmpriv``."""

if __name__ == "__main__":
    import gc

    gc.disable()  # until the command's modules are imported: see cli.run
    from .cli import run

    run()
