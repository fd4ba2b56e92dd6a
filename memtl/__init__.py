"""memtl: memory-efficient transfer learning.

Training memory is mostly what autograd keeps between forward and backward. memtl leaves the
forward pass exact and makes what is kept a choice::

    import memtl

    report = memtl.apply(model, memtl.BackRazorConfig(keep=0.1))
    print(report)

See README.md for the commands, DESIGN.md for how it is built.
"""

from . import backends

backends.load()

from . import functional, memory, nn, storage  # noqa: E402
from .backends import BackendUnavailable  # noqa: E402
from .methods import (  # noqa: E402
    AdaptFormerConfig,
    BackRazorConfig,
    BitFitConfig,
    CheckpointConfig,
    FrozenConfig,
    Head2ToeConfig,
    LinearProbeConfig,
    LiteResidualConfig,
    LowBitConfig,
    NormTuningConfig,
    RepNetConfig,
    Ticket,
    TicketConfig,
    VPTConfig,
    VQTConfig,
    apply,
    draw_ticket,
    load,
    print_trainable_parameters,
    save,
    select_features,
    trainable_parameters,
    unconvert,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptFormerConfig",
    "BackRazorConfig",
    "BackendUnavailable",
    "BitFitConfig",
    "CheckpointConfig",
    "FrozenConfig",
    "Head2ToeConfig",
    "LinearProbeConfig",
    "LiteResidualConfig",
    "LowBitConfig",
    "NormTuningConfig",
    "RepNetConfig",
    "Ticket",
    "TicketConfig",
    "VPTConfig",
    "VQTConfig",
    "apply",
    "draw_ticket",
    "functional",
    "load",
    "memory",
    "nn",
    "print_trainable_parameters",
    "save",
    "select_features",
    "storage",
    "trainable_parameters",
    "unconvert",
]
