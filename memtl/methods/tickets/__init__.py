"""Lottery tickets: subnetworks of a pre-trained network, found by its weights' magnitudes, that
transfer as the whole network does.

Chen, Frankle, Chang, Liu, Zhang, Wang and Carbin: The Lottery Ticket Hypothesis for Pre-trained
BERT Networks, NeurIPS 2020.
"""

from ...nn.masked import parameter_masks
from .channels import channel_vectors
from .config import TicketConfig
from .controls import permute_layers
from .drawing import draw_ticket
from .materialise import Materialised, MaterialisedLayer
from .optimizer import CompactOptimizer, state_bytes
from .ticket import AppliedTicket, Source, Ticket, TicketLayer

__all__ = [
    "AppliedTicket",
    "CompactOptimizer",
    "Materialised",
    "MaterialisedLayer",
    "Source",
    "Ticket",
    "TicketConfig",
    "TicketLayer",
    "channel_vectors",
    "draw_ticket",
    "parameter_masks",
    "permute_layers",
    "state_bytes",
]
