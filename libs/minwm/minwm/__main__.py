"""`python -m minwm`, and so `torchrun -m minwm train …` and `deepspeed --module minwm train …`."""

from minwm.cli import main

main()
