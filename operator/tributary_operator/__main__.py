"""`python -m tributary_operator`.

Almost empty on purpose: the accountant's processes import this module again, and need nothing of it.
"""

if __name__ == "__main__":
    from tributary_operator.app import main

    main()
