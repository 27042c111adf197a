"""``python -m zeolith.server`` is the ``zeolith`` command."""

from zeolith.server.cli import main

if __name__ == "__main__":
    main()
