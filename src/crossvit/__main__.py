"""`python -m crossvit` is the command `crossvit`."""

from crossvit.cli import main

if __name__ == "__main__":
    main()
