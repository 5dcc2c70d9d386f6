"""`python -m seresvit` is the command `seresvit`."""

from seresvit.cli import main

main()
