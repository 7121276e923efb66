"""`python -m npp_ds`, the same as `npp`: the form that torchrun and the deepspeed launcher start."""

from npp_ds.cli import main

main()
