"""`python -m trbert_jax` is `trbert`, also where the folder of installed scripts is not on the path."""

from trbert_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
