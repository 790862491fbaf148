"""What pip makes of the entry point `pte-trl`, for this checkout, wherever the installed one leads."""

from pte_trl_cli import main

if __name__ == "__main__":
    main()
