"""``python -m gradkeel``: the command line."""

from gradkeel.cli import main

if __name__ == "__main__":
    main()
