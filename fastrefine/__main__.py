"""``python -m fastrefine`` is the command ``fastrefine``."""

from fastrefine.cli import main

if __name__ == "__main__":
    main()
