"""In which basis a layer's key heads are seen before some of their rotary pairs stop turning.

For every frequency f an orthogonal U_f [G, G] mixes the key heads: k'_{f,j} = Σ_g U_f[j, g] k_{g,f}, and a query head
h of group g sees it as q'_{h,f,j} = U_f[j, g] q_{h,f}. Both numbers of a pair are mixed alike, so U_f commutes with
the rotation and changes no score (RoRoPE: TransMLA, arXiv 2502.07864, section 4.2).
A basis is a [F, G, G] tensor. Selected with `ConversionOptions.rope_basis`.
"""

from collections.abc import Callable

import torch

# From E[k_g · k_g'] of every frequency, [F, G, G].
Basis = Callable[[torch.Tensor], torch.Tensor]


def heads(key_moment: torch.Tensor) -> torch.Tensor:
    """Each component is a key head (MHA2MLA)."""
    return torch.eye(key_moment.shape[-1], dtype=key_moment.dtype).to(key_moment.device).expand_as(key_moment)


def principal(key_moment: torch.Tensor) -> torch.Tensor:
    """Principal components of the key heads, strongest first: the first carries most of what the heads share."""
    _, vectors = torch.linalg.eigh(key_moment)
    return vectors.flip(-1).transpose(1, 2)


STRATEGIES: dict[str, Basis] = {"heads": heads, "principal": principal}
NEEDS_CALIBRATION = {"principal"}
