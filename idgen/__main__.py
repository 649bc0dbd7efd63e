"""``python -m idgen`` is ``idgen``."""

from idgen.cli import main

if __name__ == "__main__":
    main()
