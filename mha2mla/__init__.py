"""Turn a pretrained transformer into one with Multi-head Latent Attention.

    model, report = convert(model, ConversionOptions(kv_lora_rank=96))
    model.save_pretrained("converted")

Importing this package registers the converted families with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` loads a converted checkpoint without a trust flag.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mha2mla.cache import cache_bytes
from mha2mla.convert import ConversionReport, convert, needs_calibration, resolve_options
from mha2mla.families import FAMILIES, register
from mha2mla.kivi_cache import KiviCache
from mha2mla.native import to_deepseek
from mha2mla.options import ConversionOptions
from mha2mla.quantized_cache import QuantizedLatentCache, calibrate_ranges, rotate_latents
from mha2mla.reconstruct import reconstruct
from mha2mla.served import to_served
from mha2mla.statistics import Statistics, collect_statistics
from mha2mla.streaming import convert_streamed
from mha2mla.version import __version__

register(AutoConfig.register, AutoModel.register, AutoModelForCausalLM.register)

__all__ = [
    "FAMILIES",
    "ConversionOptions",
    "ConversionReport",
    "KiviCache",
    "QuantizedLatentCache",
    "Statistics",
    "__version__",
    "cache_bytes",
    "calibrate_ranges",
    "collect_statistics",
    "convert",
    "convert_streamed",
    "needs_calibration",
    "reconstruct",
    "resolve_options",
    "rotate_latents",
    "to_deepseek",
    "to_served",
]
