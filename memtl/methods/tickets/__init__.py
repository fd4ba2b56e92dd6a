"""Lottery tickets: subnetworks of a pre-trained network, found by its weights' magnitudes, that
transfer as the whole network does.

Chen, Frankle, Chang, Liu, Zhang, Wang and Carbin: The Lottery Ticket Hypothesis for Pre-trained
BERT Networks, NeurIPS 2020.
"""

from .config import TicketConfig
from .controls import permute_layers
from .drawing import draw_ticket
from .ticket import AppliedTicket, Source, Ticket, TicketLayer

__all__ = [
    "AppliedTicket",
    "Source",
    "Ticket",
    "TicketConfig",
    "TicketLayer",
    "draw_ticket",
    "permute_layers",
]
