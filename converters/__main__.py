"""`python -m converters` is `timmport`."""

from converters.cli import main

if __name__ == "__main__":
    main()
