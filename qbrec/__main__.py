"""`python -m qbrec`: the same as the `qbrec` command."""

from qbrec.cli.main import main

if __name__ == "__main__":
    main()
